//! What /proc says of processes from outside: trees, states, threads, maps, descriptors.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

/// A process as the harness sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Process {
    /// Name.
    pub comm: String,
    /// `T` stopped, `Z` zombie, `-` all else.
    pub state: char,
    /// Parent.
    pub parent: i32,
    /// Process group.
    pub group: i32,
    /// Session.
    pub session: i32,
    /// Thread ids, sorted.
    pub threads: Vec<i32>,
}

/// A process tree by pid.
pub type Tree = BTreeMap<i32, Process>;

/// The numbers that name entries of a directory.
pub fn numbers(dir: &str) -> Vec<i32> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut found: Vec<i32> = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    found.sort_unstable();
    found
}

/// Reads one process; none when it is gone.
pub fn read(pid: i32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (open, close) = (stat.find('(')?, stat.rfind(')')?);
    let fields: Vec<&str> = stat[close + 1..].split_whitespace().collect();
    let state = match *fields.first()? {
        "T" => 'T',
        "Z" | "X" => 'Z',
        "t" => 't',
        _ => '-',
    };
    Some(Process {
        comm: stat[open + 1..close].to_owned(),
        state,
        parent: fields.get(1)?.parse().ok()?,
        group: fields.get(2)?.parse().ok()?,
        session: fields.get(3)?.parse().ok()?,
        threads: numbers(&format!("/proc/{pid}/task")),
    })
}

/// The process `root` and all its descendants. The parent of `root` is noted as 0: it is not part of the tree.
pub fn tree(root: i32) -> Tree {
    let all: Tree = numbers("/proc").into_iter().filter_map(|pid| Some((pid, read(pid)?))).collect();
    let mut found = Tree::new();
    let mut todo = vec![root];
    while let Some(pid) = todo.pop() {
        let Some(process) = all.get(&pid) else { continue };
        let mut process = process.clone();
        if pid == root {
            process.parent = 0;
        }
        found.insert(pid, process);
        todo.extend(all.iter().filter(|(_, child)| child.parent == pid).map(|(pid, _)| *pid));
    }
    found
}

/// A tree as text, a line each.
pub fn print(tree: &Tree) -> String {
    let line = |(pid, p): (&i32, &Process)| {
        let threads: Vec<String> = p.threads.iter().map(i32::to_string).collect();
        format!("{pid} {} {} {} {} {} {}\n", p.parent, p.group, p.session, p.state, threads.join(","), p.comm)
    };
    tree.iter().map(line).collect()
}

/// The tree that [`print`] has made a text of.
pub fn parse(text: &str) -> Option<Tree> {
    let process = |line: &str| {
        let mut words = line.splitn(7, ' ');
        let mut number = || words.next()?.parse().ok();
        let (pid, parent, group, session) = (number()?, number()?, number()?, number()?);
        let state = words.next()?.parse().ok()?;
        let threads = words.next()?.split(',').map(str::parse).collect::<Result<_, _>>().ok()?;
        Some((pid, Process { comm: words.next()?.to_owned(), state, parent, group, session, threads }))
    };
    text.lines().map(process).collect()
}

/// The children of a process.
pub fn children(pid: i32) -> Vec<i32> {
    numbers("/proc").into_iter().filter(|child| read(*child).is_some_and(|process| process.parent == pid)).collect()
}

/// The first difference between two trees, in words.
pub fn difference(before: &Tree, after: &Tree) -> Option<String> {
    for (pid, was) in before {
        match after.get(pid) {
            None => return Some(format!("pid {pid} ({}) is missing", was.comm)),
            Some(is) if is != was => return Some(format!("pid {pid} was {was:?}, is {is:?}")),
            Some(_) => {}
        }
    }
    let extra = after.iter().find(|(pid, _)| !before.contains_key(pid))?;
    Some(format!("pid {} ({}) is new", extra.0, extra.1.comm))
}

/// True when no process (alive, dead or dying) and no thread has this id. Reaps it when it is our own child.
pub fn is_free(pid: i32) -> bool {
    waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG)).ok();
    kill(Pid::from_raw(pid), None).is_err() && fs::metadata(format!("/proc/{pid}")).is_err()
}

/// Waits until all of `pids` are free; the first that is not after `limit`.
pub fn wait_free(pids: impl IntoIterator<Item = i32>, limit: Duration) -> Result<(), i32> {
    let end = Instant::now() + limit;
    for pid in pids {
        while !is_free(pid) {
            if Instant::now() > end {
                return Err(pid);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    Ok(())
}

/// A field of /proc/PID/status.
pub fn status(pid: i32, field: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    text.lines().find_map(|line| Some(line.strip_prefix(field)?.strip_prefix(':')?.trim().to_owned()))
}

/// State and tracer of each thread of a process, for messages.
pub fn threads_in_words(pid: i32) -> Vec<String> {
    let of_thread = |tid: i32| {
        let text = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")).unwrap_or_default();
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("gone").trim();
        let call = fs::read_to_string(format!("/proc/{pid}/task/{tid}/wchan")).unwrap_or_default();
        format!("thread {tid}: {}, traced by {}, in {call}", field("State:"), field("TracerPid:"))
    };
    numbers(&format!("/proc/{pid}/task")).into_iter().map(of_thread).collect()
}

/// Maps and descriptors of a process, one line each; the growing end of the stack is left out.
pub fn possessions(pid: i32) -> Vec<String> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let mut lines: Vec<String> = maps
        .lines()
        .map(|line| match line.split_once('-') {
            Some((_, rest)) if line.ends_with("[stack]") => format!("map -{rest}"),
            _ => format!("map {line}"),
        })
        .collect();
    for fd in numbers(&format!("/proc/{pid}/fd")) {
        let to = fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap_or_default();
        lines.push(format!("fd {fd} -> {}", to.display()));
    }
    lines
}

/// Processes that carry `marker` in their environment.
pub fn marked(marker: &str) -> Vec<i32> {
    let own = std::process::id().cast_signed();
    numbers("/proc")
        .into_iter()
        .filter(|pid| *pid != own)
        .filter(|pid| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|entry| entry == marker.as_bytes())
        })
        .collect()
}

/// Kills the processes and waits until they are gone.
pub fn end(pids: &[i32]) {
    for pid in pids {
        kill(Pid::from_raw(*pid), Signal::SIGKILL).ok();
    }
    wait_free(pids.iter().copied(), Duration::from_secs(5)).ok();
}

/// Closes what this process inherited beyond its three standard descriptors, so that no test program has it.
pub fn close_stray_descriptors() {
    for fd in numbers("/proc/self/fd").into_iter().filter(|fd| *fd > 2) {
        nix::unistd::close(fd).ok();
    }
}
