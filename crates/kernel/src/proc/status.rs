//! `/proc/PID/status`: credentials, pids in every namespace, signal and capability masks of a task or thread.

use std::path::Path;

use super::text::{self, At};
use super::{Result, read_record};
use crate::ids::{HostPid, NsPid};

/// The fields of a status file, under the kernel's names; see proc_pid_status(5).
///
/// `Option` marks what some supported kernel, or a kernel thread or zombie, does not have.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Status {
    /// The name, unescaped.
    pub name: Vec<u8>,
    /// File mode creation mask; absent for zombies.
    pub umask: Option<u32>,
    /// State letter, as in stat.
    pub state: u8,
    /// Thread group id, the process's id.
    pub tgid: Option<HostPid>,
    /// Thread id.
    pub pid: Option<HostPid>,
    /// Parent's process id.
    pub ppid: Option<HostPid>,
    /// The tracer's id; `None` if not traced.
    pub tracer_pid: Option<HostPid>,
    /// Real, effective, saved, file system uid.
    pub uid: [u32; 4],
    /// Real, effective, saved, file system gid.
    pub gid: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Process id from the reader's pid namespace to the innermost.
    pub ns_tgid: Vec<NsPid>,
    /// Thread id from the reader's pid namespace to the innermost.
    pub ns_pid: Vec<NsPid>,
    /// Process group from the reader's pid namespace to the innermost.
    pub ns_pgid: Vec<NsPid>,
    /// Session from the reader's pid namespace to the innermost.
    pub ns_sid: Vec<NsPid>,
    /// Queued signals of the real uid, and the limit.
    pub sig_q: Option<(u64, u64)>,
    /// Signals pending for the thread; bit n-1 is signal n.
    pub sig_pnd: u64,
    /// Signals pending for the process.
    pub shd_pnd: u64,
    /// Blocked signals.
    pub sig_blk: u64,
    /// Ignored signals.
    pub sig_ign: u64,
    /// Caught signals.
    pub sig_cgt: u64,
    /// Inheritable capabilities.
    pub cap_inh: u64,
    /// Permitted capabilities.
    pub cap_prm: u64,
    /// Effective capabilities.
    pub cap_eff: u64,
    /// Bounding set.
    pub cap_bnd: u64,
    /// Ambient capabilities.
    pub cap_amb: u64,
    /// `PR_SET_NO_NEW_PRIVS`.
    pub no_new_privs: bool,
    /// Seccomp mode: 0 off, 1 strict, 2 filter; `None` if the kernel is built without.
    pub seccomp: Option<u32>,
    /// Seccomp filters attached; since Linux 5.9.
    pub seccomp_filters: Option<u32>,
    /// Threads in the process; 0 for a zombie's missing line.
    pub threads: u32,
    /// Whether the kernel is writing a core; since Linux 4.15, absent without an address space.
    pub core_dumping: Option<bool>,
    /// Locked memory, kB; absent without an address space.
    pub vm_lck_kb: Option<u64>,
    /// Resident memory, shared memory too, kB; absent without an address space.
    pub vm_rss_kb: Option<u64>,
    /// Whether it is a kernel thread; since Linux 6.8.
    pub kthread: Option<bool>,
    /// Shadow-stack features of the thread ("shstk wrss"), as the kernel words them; x86_64 since Linux 6.6.
    pub x86_thread_features: Vec<u8>,
}

/// The status file of a process, which is that of its leading thread.
pub fn read(pid: HostPid) -> Result<Status> {
    let path = pid.proc_path("status");
    parse(&path, &read_record(&path)?)
}

/// The status file of thread `tid` of process `pid`.
pub fn read_thread(pid: HostPid, tid: HostPid) -> Result<Status> {
    let path = pid.task_path(tid, "status");
    parse(&path, &read_record(&path)?)
}

/// Parses a status file; unknown lines are skipped, a file without `Name` and `State` is an error.
pub fn parse(path: &Path, bytes: &[u8]) -> Result<Status> {
    let mut status = Status::default();
    let mut named = false;
    for (at, line) in text::lines(path, bytes) {
        let (key, value) = text::split_once(line, b':').ok_or_else(|| at.bad("no colon", line))?;
        if key == b"Name" {
            named = true;
            status.name = unescape_name(value.strip_prefix(b"\t").unwrap_or(value));
        } else {
            field(&mut status, at, key, value.trim_ascii())?;
        }
    }
    if !named || status.state == 0 {
        return Err(At::new(path, 1).bad("no Name or no State line", bytes));
    }
    Ok(status)
}

fn field(status: &mut Status, at: At<'_>, key: &[u8], value: &[u8]) -> Result<()> {
    match key {
        b"Umask" => {
            status.umask = Some(u32::try_from(at.oct(value, "bad umask")?).map_err(|_| at.bad("bad umask", value))?)
        }
        b"State" => status.state = *value.first().ok_or_else(|| at.bad("empty state", value))?,
        b"Tgid" => status.tgid = Some(HostPid(at.dec(value, "bad Tgid")?)),
        b"Pid" => status.pid = Some(HostPid(at.dec(value, "bad Pid")?)),
        b"PPid" => status.ppid = Some(HostPid(at.dec(value, "bad PPid")?)),
        b"TracerPid" => status.tracer_pid = Some(HostPid(at.dec(value, "bad TracerPid")?)).filter(|pid| pid.0 != 0),
        b"Uid" => status.uid = four(at, value)?,
        b"Gid" => status.gid = four(at, value)?,
        b"Groups" => status.groups = text::words(value).map(|word| at.dec(word, "bad group")).collect::<Result<_>>()?,
        b"NStgid" => status.ns_tgid = pids(at, value)?,
        b"NSpid" => status.ns_pid = pids(at, value)?,
        b"NSpgid" => status.ns_pgid = pids(at, value)?,
        b"NSsid" => status.ns_sid = pids(at, value)?,
        b"SigQ" => {
            let (queued, limit) = text::split_once(value, b'/').ok_or_else(|| at.bad("bad SigQ", value))?;
            status.sig_q = Some((at.dec(queued, "bad SigQ")?, at.dec(limit, "bad SigQ limit")?));
        }
        b"SigPnd" => status.sig_pnd = at.hex(value, "bad SigPnd")?,
        b"ShdPnd" => status.shd_pnd = at.hex(value, "bad ShdPnd")?,
        b"SigBlk" => status.sig_blk = at.hex(value, "bad SigBlk")?,
        b"SigIgn" => status.sig_ign = at.hex(value, "bad SigIgn")?,
        b"SigCgt" => status.sig_cgt = at.hex(value, "bad SigCgt")?,
        b"CapInh" => status.cap_inh = at.hex(value, "bad CapInh")?,
        b"CapPrm" => status.cap_prm = at.hex(value, "bad CapPrm")?,
        b"CapEff" => status.cap_eff = at.hex(value, "bad CapEff")?,
        b"CapBnd" => status.cap_bnd = at.hex(value, "bad CapBnd")?,
        b"CapAmb" => status.cap_amb = at.hex(value, "bad CapAmb")?,
        b"NoNewPrivs" => status.no_new_privs = bit(at, value)?,
        b"Seccomp" => status.seccomp = Some(at.dec(value, "bad Seccomp")?),
        b"Seccomp_filters" => status.seccomp_filters = Some(at.dec(value, "bad Seccomp_filters")?),
        b"Threads" => status.threads = at.dec(value, "bad Threads")?,
        b"CoreDumping" => status.core_dumping = Some(bit(at, value)?),
        b"VmLck" => status.vm_lck_kb = Some(kilobytes(at, value)?),
        b"VmRSS" => status.vm_rss_kb = Some(kilobytes(at, value)?),
        b"Kthread" => status.kthread = Some(bit(at, value)?),
        b"x86_Thread_features" => status.x86_thread_features = value.to_vec(),
        // Fields that nothing here needs; new kernels add more.
        _ => {}
    }
    Ok(())
}

fn kilobytes(at: At<'_>, value: &[u8]) -> Result<u64> {
    at.dec(value.strip_suffix(b" kB").ok_or_else(|| at.bad("not in kB", value))?, "bad size")
}

fn bit(at: At<'_>, value: &[u8]) -> Result<bool> {
    match value {
        b"0" => Ok(false),
        b"1" => Ok(true),
        _ => Err(at.bad("neither 0 nor 1", value)),
    }
}

fn four(at: At<'_>, value: &[u8]) -> Result<[u32; 4]> {
    let mut words = text::words(value);
    let mut next = || at.dec_field(words.next(), "bad id");
    Ok([next()?, next()?, next()?, next()?])
}

fn pids(at: At<'_>, value: &[u8]) -> Result<Vec<NsPid>> {
    text::words(value).map(|word| at.dec(word, "bad pid").map(NsPid)).collect()
}

/// The kernel writes a newline as `\n` and a backslash as `\\` here.
fn unescape_name(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, tail)) = rest.split_first() {
        (out, rest) = match (byte, tail.first()) {
            (b'\\', Some(b'n')) => (push(out, b'\n'), &tail[1..]),
            (b'\\', Some(b'\\')) => (push(out, b'\\'), &tail[1..]),
            _ => (push(out, byte), tail),
        };
    }
    out
}

fn push(mut out: Vec<u8>, byte: u8) -> Vec<u8> {
    out.push(byte);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shadow_stack_features_are_kept_as_words() {
        let file = b"Name:\tx\nState:\tR (running)\nx86_Thread_features:\tshstk wrss \nx86_Thread_features_locked:\t\n";
        let status = parse(Path::new("status"), file).unwrap();
        assert_eq!(status.x86_thread_features, b"shstk wrss");
    }
}
