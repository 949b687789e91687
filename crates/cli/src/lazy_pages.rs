//! The command `lazy-pages`, and what a restore needs to find it, or to start one of its own.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, Result, bail};
use dormouse_infect::host::fd::copy_number;
use dormouse_infect::supervise;
use dormouse_pages::PageClient;
use dormouse_resources::mem::lazy;
use dormouse_resources::mem::lazy::Source;
use dormouse_tls::Tls;
use nix::sys::socket::{getsockopt, sockopt};

use crate::args::{LazyPagesArgs, LazyWorkerArgs};
use crate::run::{Place, told, write_pid};

/// `dormouse lazy-pages`
///
/// # Errors
/// The directories or the log are not accessible; what fails later is told here.
pub fn serve(args: &LazyPagesArgs, notes: &[String]) -> Result<ExitCode> {
    let place = Place::enter(&args.common, notes)?;
    Ok(told(&place, run(args, &place)))
}

fn run(args: &LazyPagesArgs, place: &Place) -> Result<()> {
    let tls = Tls::wanted(args.tls.options().as_ref())?;
    let _ = std::fs::remove_file(lazy::SOCKET);
    let listener = UnixListener::bind(lazy::SOCKET)
        .with_context(|| format!("cannot listen at {} in the work directory", lazy::SOCKET))?;
    if args.daemon {
        nix::unistd::daemon(true, false).context("cannot go into the background")?;
    }
    if let Some(file) = &args.pidfile {
        write_pid(file, std::process::id().cast_signed())?;
    }
    if let Some(fd) = args.status_fd {
        // A NUL byte says that connections are taken, as CRIU's does.
        let mut status =
            File::from(copy_number(fd).with_context(|| format!("cannot use descriptor {fd} (--status-fd)"))?);
        status.write_all(&[0]).with_context(|| format!("cannot write to descriptor {fd} (--status-fd)"))?;
        let _ = nix::unistd::close(fd);
    }
    let (peer, _) = listener.accept().context("cannot accept a connection")?;
    let _ = std::fs::remove_file(lazy::SOCKET);
    let asker = getsockopt(&peer, sockopt::PeerCredentials).context("cannot learn who restores")?.uid();
    if asker != 0 && asker != nix::unistd::geteuid().as_raw() {
        bail!(
            "user {asker} connected to {}, who is neither root nor we; restore as the user of lazy-pages",
            lazy::SOCKET
        );
    }
    let source = match args.ps_socket {
        Some(fd) => {
            let socket = copy_number(fd).with_context(|| format!("cannot use descriptor {fd} (--ps-socket)"))?;
            let client = PageClient::from_socket(socket, tls.as_ref().map(|tls| (tls, args.address.as_str())));
            Source::Server(client.context("cannot begin to talk to the page server of --ps-socket")?)
        }
        None if args.page_server => Source::Server(
            PageClient::connect(&args.address, args.port, tls.as_ref())
                .with_context(|| format!("cannot connect to the page server at {}:{}", args.address, args.port))?,
        ),
        None => Source::Images,
    };
    guarded(place, source, !args.no_working_set, peer)
}

/// Serves in a child: if that is killed, this process still holds the userfaultfds, and ends the tree.
fn guarded(place: &Place, source: Source, learns: bool, mut peer: UnixStream) -> Result<()> {
    let work = move || match lazy::serve(&place.path, source, learns, &mut peer) {
        Ok(lazy::Served { pages, asked, first }) => {
            tracing::info!(
                "All pages are where they belong; {pages} came from here, {first} of them first; the tree waited {asked} times"
            );
            0
        }
        Err(error) => {
            place.log.failure(&error.into(), None);
            1
        }
    };
    match supervise::guarded(work, lazy::end_orphans).context("cannot start a process that brings pages")? {
        0 => Ok(()),
        _ => bail!("the tree was killed, since not all of its pages came"),
    }
}

/// `dormouse lazy-worker`, the process of a `restore --lazy`, whose socket is its standard input.
///
/// # Errors
/// As for [`serve`].
pub fn work(args: &LazyWorkerArgs) -> Result<ExitCode> {
    let place = Place::enter(&args.common, &[])?;
    let socket = copy_number(0).context("the standard input is no socket; lazy-worker is for restore --lazy alone")?;
    Ok(told(&place, guarded(&place, Source::Images, !args.no_working_set, socket.into())))
}

/// Starts a `lazy-worker`, under a number that no task of the images has. If it `learns`, then by the working set.
///
/// # Errors
/// It cannot be started.
pub fn start(place: &Place, learns: bool) -> Result<UnixStream> {
    let mut unfit = Vec::new();
    let started = loop {
        let (ours, theirs) = UnixStream::pair().context("cannot make a socket pair")?;
        let mut command = Command::new("/proc/self/exe");
        command.args(["lazy-worker", "-W", ".", "-o", "lazy-pages.log", "-v3", "-D"]).arg(&place.path);
        command.args((!learns).then_some("--no-working-set"));
        command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        let child = command.spawn().context("cannot start the process that brings pages")?;
        if !place.path.join(format!("core-{}.img", child.id())).exists() {
            break ours;
        }
        // Kept until the next one is there, or that would get the same number.
        unfit.push((ours, child));
    };
    for (socket, mut child) in unfit {
        drop(socket);
        let _ = child.wait();
    }
    Ok(started)
}

/// Connects a restore to the `lazy-pages` of the work directory.
///
/// # Errors
/// Nobody listens.
pub fn connect() -> Result<UnixStream> {
    UnixStream::connect(lazy::SOCKET).with_context(|| {
        format!(
            "cannot connect to {} in the work directory; start `dormouse lazy-pages` with the same -D and -W",
            lazy::SOCKET
        )
    })
}
