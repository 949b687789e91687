//! `/proc/PID/stat`: one line of numbers per task or thread, its name in parentheses.

use std::path::Path;

use super::text::{self, At};
use super::{Result, read_record};
use crate::ids::HostPid;

/// The fields of a stat file, under the kernel's names; see proc_pid_stat(5). Addresses are 0 without ptrace access.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stat {
    /// Thread or process id (1).
    pub pid: HostPid,
    /// The name, without the parentheses (2); any bytes, up to 15 for user tasks.
    pub comm: Vec<u8>,
    /// `R`, `S`, `D`, `Z`, `T`, `t`, `X`, `I` (3).
    pub state: u8,
    /// Parent's process id (4).
    pub ppid: HostPid,
    /// Process group (5); 0 if it is outside the reader's namespace.
    pub pgrp: i32,
    /// Session (6); 0 if it is outside the reader's namespace.
    pub session: i32,
    /// Controlling terminal's device number, 0 for none (7).
    pub tty_nr: i32,
    /// The terminal's foreground process group, -1 for none (8).
    pub tpgid: i32,
    /// `PF_*` flags (9).
    pub flags: u64,
    /// User time in clock ticks (14).
    pub utime: u64,
    /// System time in clock ticks (15).
    pub stime: u64,
    /// User time of waited-for children, clock ticks (16).
    pub cutime: i64,
    /// System time of waited-for children, clock ticks (17).
    pub cstime: i64,
    /// Kernel priority (18).
    pub priority: i64,
    /// Nice value, -20 to 19 (19).
    pub nice: i64,
    /// Threads in the process (20).
    pub num_threads: i64,
    /// Start after boot in clock ticks (22).
    pub starttime: u64,
    /// Virtual memory in bytes (23).
    pub vsize: u64,
    /// Pages in memory (24), not exact.
    pub rss: u64,
    /// Code's first address (26).
    pub startcode: u64,
    /// Code's end address (27).
    pub endcode: u64,
    /// Address of the stack's bottom (28).
    pub startstack: u64,
    /// Blocked signals, standard ones only (32); use the status file for all 64.
    pub blocked: u64,
    /// Signal sent to the parent at exit (38).
    pub exit_signal: i32,
    /// Real-time priority, 0 for others (40).
    pub rt_priority: u32,
    /// `SCHED_*` policy (41).
    pub policy: u32,
    /// Address of the initialised data (45).
    pub start_data: u64,
    /// End address of the data (46).
    pub end_data: u64,
    /// Address from where brk(2) grows (47).
    pub start_brk: u64,
    /// First address of the arguments (48).
    pub arg_start: u64,
    /// End address of the arguments (49).
    pub arg_end: u64,
    /// First address of the environment (50).
    pub env_start: u64,
    /// End address of the environment (51).
    pub env_end: u64,
    /// Status in the form of waitpid(2) (52).
    pub exit_code: i32,
}

/// The stat file of a process: its leader's state and name, the process's times.
pub fn read(pid: HostPid) -> Result<Stat> {
    let path = pid.proc_path("stat");
    parse(&path, &read_record(&path)?)
}

/// The stat file of thread `tid` of process `pid`.
pub fn read_thread(pid: HostPid, tid: HostPid) -> Result<Stat> {
    let path = pid.task_path(tid, "stat");
    parse(&path, &read_record(&path)?)
}

/// Parses a stat file. The name ends at the last parenthesis, so it may hold parentheses, blanks and newlines.
pub fn parse(path: &Path, bytes: &[u8]) -> Result<Stat> {
    let at = At::new(path, 1);
    let (pid, rest) = text::split_once(bytes, b'(').ok_or_else(|| at.bad("no name", bytes))?;
    let close = rest.iter().rposition(|&byte| byte == b')').ok_or_else(|| at.bad("name has no end", bytes))?;
    let (comm, tail) = (&rest[..close], rest[close + 1..].trim_ascii());
    let fields: Vec<&[u8]> = text::words(tail).collect();
    let field = |number: usize| fields.get(number - 3).copied().unwrap_or_default();
    let &[state] = field(3) else { return Err(at.bad("state is not one letter", field(3))) };
    let unsigned = |number, what| at.dec::<u64>(field(number), what);
    let signed = |number, what| at.dec::<i64>(field(number), what);
    let int = |number, what| at.dec::<i32>(field(number), what);
    Ok(Stat {
        pid: HostPid(at.dec(pid, "bad pid")?),
        comm: comm.to_vec(),
        state,
        ppid: HostPid(int(4, "bad ppid")?),
        pgrp: int(5, "bad pgrp")?,
        session: int(6, "bad session")?,
        tty_nr: int(7, "bad tty_nr")?,
        tpgid: int(8, "bad tpgid")?,
        flags: unsigned(9, "bad flags")?,
        utime: unsigned(14, "bad utime")?,
        stime: unsigned(15, "bad stime")?,
        cutime: signed(16, "bad cutime")?,
        cstime: signed(17, "bad cstime")?,
        priority: signed(18, "bad priority")?,
        nice: signed(19, "bad nice")?,
        num_threads: signed(20, "bad num_threads")?,
        starttime: unsigned(22, "bad starttime")?,
        vsize: unsigned(23, "bad vsize")?,
        rss: unsigned(24, "bad rss")?,
        startcode: unsigned(26, "bad startcode")?,
        endcode: unsigned(27, "bad endcode")?,
        startstack: unsigned(28, "bad startstack")?,
        blocked: unsigned(32, "bad blocked")?,
        exit_signal: int(38, "bad exit_signal")?,
        rt_priority: at.dec(field(40), "bad rt_priority")?,
        policy: at.dec(field(41), "bad policy")?,
        start_data: unsigned(45, "bad start_data")?,
        end_data: unsigned(46, "bad end_data")?,
        start_brk: unsigned(47, "bad start_brk")?,
        arg_start: unsigned(48, "bad arg_start")?,
        arg_end: unsigned(49, "bad arg_end")?,
        env_start: unsigned(50, "bad env_start")?,
        env_end: unsigned(51, "bad env_end")?,
        exit_code: int(52, "bad exit_code")?,
    })
}
