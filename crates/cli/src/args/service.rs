//! Options of `service`, and of the workers that it starts.

use std::path::PathBuf;

use dormouse_kernel::Session;

/// `dormouse service`
#[derive(Clone, Debug, clap::Args)]
pub struct ServiceArgs {
    /// Socket to make and listen on; none is made if systemd hands one over [default: ./criu_service.socket]
    #[arg(long, value_name = "PATH")]
    pub address: Option<PathBuf>,
    /// Go on in the background once connections are accepted
    #[arg(short = 'd', long, visible_alias = "daemon")]
    pub restore_detached: bool,
    /// Write the service's pid to this file, which must not exist; relative to --work-dir
    #[arg(long, value_name = "FILE")]
    pub pidfile: Option<PathBuf>,
    /// Write a zero byte to this descriptor once connections are accepted
    #[arg(long, value_name = "FD")]
    pub status_fd: Option<i32>,
    /// Directory to change to first
    #[arg(short = 'W', long, value_name = "DIR")]
    pub work_dir: Option<PathBuf>,
    /// Write the service's log to this file, relative to --work-dir; `-` is the standard output [default: the standard
    /// error]
    #[arg(short = 'o', long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,
    /// How much is logged: 0 nothing, 1 errors, 2 warnings, 3 each connection; each -v adds one
    #[arg(short = 'v', long, value_name = "LEVEL", default_value_t = 2)]
    pub verbosity: u8,
    /// Read options from this file, too, and not from the default ones
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Do not read /etc/criu/default.conf and ~/.criu/default.conf
    #[arg(long)]
    pub no_default_config: bool,
}

/// `dormouse service-worker`
#[derive(Clone, Debug, clap::Args)]
pub struct WorkerArgs {
    /// Identity of the request
    #[arg(long, value_name = "ID", value_parser = parse_session)]
    pub session: Session,
}

fn parse_session(text: &str) -> Result<Session, String> {
    Session::from_hex(text).ok_or_else(|| "not 32 hexadecimal digits".into())
}
