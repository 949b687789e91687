//! Writing down what every process and thread of the tree has to do, in order, before the first of them exists.
//!
//! The stages at which all wait for each other (`STAGE_*`) are the only synchronisation between tasks: everything
//! that depends on another task's doing lies on the other side of one.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::fd::RawFd;

use dormouse_blob_abi::restorer::{CloneArgs, Control, TaskArgs};
use dormouse_blob_abi::{OpKind, Policy};
use dormouse_blobs::RESTORER;
use dormouse_infect::arena::{Arena, Batch, OpId};
use dormouse_infect::host::process;
use dormouse_kernel::{HostPid, Session};
use dormouse_resources::cgroup::{Groups, set_of};
use dormouse_resources::fd::{Files, When};
use dormouse_resources::mem::{HostFill, HostLazy, Proxy, Shared, Vdso, layout, map};
use dormouse_resources::task::seccomp::Filters;
use dormouse_resources::task::{self, regs};
use dormouse_resources::tree::Forest;
use dormouse_resources::{Own, RestoreCtx, RestoreOptions, TaskImage, TreeImage, tree};
use dormouse_sys::nr;

use crate::own::{FREE, check_descriptors, descriptor_range, own_settings};
use crate::{Request, RestoreError, call};

/// Every process exists, has its memory, and leads its own session or group if it has one.
pub const STAGE_FORKED: usize = 0;
/// Every process is in its group: helpers may go.
pub const STAGE_GROUPED: usize = 1;
/// Every thread exists: the host ties their lives to its own by ptrace, since credentials end the parent-death signal.
pub const STAGE_GUARDED: usize = 2;

/// Stack of a task while it runs its list. The restorer's frames are small and it calls no library.
const STACK: u64 = 8 << 10;

const CLONE_VM: u64 = 0x100;
const CLONE_FS: u64 = 0x200;
const CLONE_FILES: u64 = 0x400;
const CLONE_SIGHAND: u64 = 0x800;
const CLONE_PARENT: u64 = 0x8000;
const CLONE_THREAD: u64 = 0x10000;
const CLONE_SYSVSEM: u64 = 0x40000;
const CLONE_CLEAR_SIGHAND: u64 = 1 << 32;
const THREAD_FLAGS: u64 = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM;
const SIGCHLD: u64 = 17;

/// One operation list: a process's leader (or helper, or zombie) or another thread.
pub struct List {
    /// Its process.
    pub node: usize,
    /// Its thread id.
    pub tid: i32,
    /// Which of its task's threads it is; none for the leader.
    pub thread: Option<usize>,
    /// What it does.
    pub batch: Batch,
    /// Where the list lies.
    pub ops: u64,
    /// Where its [`TaskArgs`] lie.
    pub args: u64,
    /// Parks at its end, to be handed over; otherwise it exits.
    pub parks: bool,
}

/// Everything that the run needs besides the descriptors that the tasks inherit ([`Files`]).
pub struct Plan {
    /// The shared mapping.
    pub arena: Arena,
    /// Address of the [`Control`] block.
    pub control: u64,
    /// Address of a system-call instruction in the shared mapping.
    pub insn: u64,
    /// The address range that no task uses: the shared mapping, and the vDSO's parking place behind it.
    pub hole: Range<u64>,
    /// All lists; those of processes first, in the order of `forest.nodes`.
    pub lists: Vec<List>,
    /// Who forks whom.
    pub forest: Forest,
    /// Operations that make a process or thread: (list, operation, list that is made).
    pub births: Vec<(usize, OpId, usize)>,
    /// Shared memory objects.
    pub shared: Shared,
    /// Memory that the host fills while tasks wait.
    pub fills: Vec<HostFill>,
    /// Where tasks open the userfaultfds (list, operation) of memory whose pages come later.
    pub lazies: Vec<((usize, OpId), HostLazy)>,
    /// What the host puts in the place of the vDSO of another kernel (address, bytes), by pid.
    pub vdsos: HashMap<i32, (u64, Vec<u8>)>,
}

/// Plans the restore of `image`. Opens its files and makes its shared memory; forks nothing.
pub fn plan<'a>(request: &'a Request<'_>, image: &'a TreeImage) -> Result<(Plan, Files<'a>, Groups), RestoreError> {
    let options: &'a RestoreOptions = &request.options;
    let (mut own, ignored) = own_settings()?;
    let vdso = Vdso::find()?;
    let mut proxies = HashMap::new();
    for t in &image.tasks {
        proxies.extend(vdso.fit(t)?.map(|proxy| (t.pid(), proxy)));
    }
    let filters = Filters::load(image)?;
    let forest = tree::forest::build(&image.tasks, options.shell_job, options.lazy)?;
    let descriptors = descriptor_range(image, &mut own)?;
    let base = descriptors.start + FREE as RawFd;
    let shared = Shared::make(image, base)?;
    let mut files = Files::new(options, image, base)?;
    let mut groups = Groups::make(&options.cgroups, image, base)?;
    let size = arena_size(image, &forest);
    let park_len = (vdso.len() + 4095) & !4095;
    let hole = layout::find_hole(image, size as u64 + park_len)?;
    let hole = hole..hole + size as u64 + park_len;
    for t in &image.tasks {
        if let (Some(proxy), Some(mm)) = (proxies.get_mut(&t.pid()), &t.mm) {
            proxy.place(&vdso, mm, &hole)?;
        }
    }
    let mut arena = map_arena(&request.session, size, hole.start)?;
    arena.put(&RESTORER.relocated(hole.start));
    let insn = find_insn(&arena)?;
    let control = arena.alloc(size_of::<Control>(), 64);
    let mut writer = Writer {
        image,
        own: &own,
        ignored,
        sibling: request.restore_sibling,
        vdso: &vdso,
        proxies: &proxies,
        filters: &filters,
        shared: &shared,
        files: &mut files,
        groups: &mut groups,
        arena: &mut arena,
        forest: &forest,
        hole: hole.clone(),
        descriptors: descriptors.clone(),
        control,
        park: hole.end - park_len,
        lists: Vec::new(),
        births: Vec::new(),
        fills: Vec::new(),
        lazies: options.lazy.then(Vec::new),
        uffds: Vec::new(),
    };
    writer.write()?;
    writer.files.settle_sockets(&shared)?;
    writer.files.set_leases()?;
    check_descriptors(&descriptors)?;
    let (lists, births, fills) = (writer.lists, writer.births, writer.fills);
    let lazies = writer.uffds.into_iter().zip(writer.lazies.unwrap_or_default()).collect();
    let vdsos = proxies.iter().map(|(pid, proxy)| (*pid, proxy.memory(&vdso))).collect();
    Ok((Plan { arena, control, insn, hole, lists, forest, births, shared, fills, lazies, vdsos }, files, groups))
}

/// Bytes of address space for all lists and what they point to. Only what is touched costs memory.
fn arena_size(image: &TreeImage, forest: &Forest) -> usize {
    let mut size = 16 << 20;
    for t in &image.tasks {
        let vmas = t.mm.as_ref().map_or(0, |m| m.vmas.len());
        let runs = t.pages.as_ref().map_or(0, |p| p.runs.len());
        let core = prost_size(t);
        size += (256 << 10) + vmas * 512 + runs * 256 + t.fds.len() * 256 + t.threads.len() * (24 << 10) + core;
    }
    size += forest.nodes.len() * (16 << 10);
    size.next_multiple_of(2 << 20)
}

/// Bytes that pending signals, groups and the like of a task may take.
fn prost_size(t: &TaskImage) -> usize {
    let core = |c: &dormouse_images::pb::CoreEntry| {
        let signals = c.thread_core.as_ref().and_then(|t| t.signals_p.as_ref()).map_or(0, |s| s.signals.len());
        let shared = c.tc.as_ref().and_then(|t| t.signals_s.as_ref()).map_or(0, |s| s.signals.len());
        let groups = c.thread_core.as_ref().and_then(|t| t.creds.as_ref()).map_or(0, |k| k.groups.len());
        let timers = c.tc.as_ref().and_then(|t| t.timers.as_ref()).map_or(0, |t| t.posix.len());
        (signals + shared) * 512 + groups * 8 + timers * 512
    };
    core(&t.core) + t.threads.iter().map(|(_, c)| core(c)).sum::<usize>()
}

fn map_arena(session: &Session, size: usize, at: u64) -> Result<Arena, RestoreError> {
    let name = std::ffi::CString::new(session.memfd_name("restore")).expect("a session name holds no NUL");
    let file = nix::sys::memfd::memfd_create(name.as_c_str(), nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
        .map_err(|e| call("memfd_create")(e.into()))?;
    let file = File::from(file);
    file.set_len(size as u64).map_err(call(format!("cannot size the shared mapping to {size} bytes")))?;
    Arena::map_at(&file, size, at).map_err(call(format!("cannot map {size} bytes at {at:#x}")))
}

fn find_insn(arena: &Arena) -> Result<u64, RestoreError> {
    let code = arena.bytes(arena.base(), RESTORER.relocated(0).len());
    let insn = dormouse_infect::arch::SYSCALL_INSN;
    let step = if cfg!(target_arch = "aarch64") { 4 } else { 1 };
    (0..code.len()).step_by(step).find(|&i| code[i..].starts_with(insn)).map(|i| arena.base() + i as u64).ok_or_else(
        || RestoreError::Call {
            what: "the restorer holds no system-call instruction".into(),
            cause: std::io::Error::from_raw_os_error(libc::ENOEXEC),
        },
    )
}

struct Writer<'w, 'f> {
    image: &'f TreeImage,
    own: &'w Own,
    ignored: u64,
    sibling: bool,
    vdso: &'w Vdso,
    proxies: &'w HashMap<i32, Proxy>,
    filters: &'w Filters,
    shared: &'w Shared,
    files: &'w mut Files<'f>,
    groups: &'w mut Groups,
    arena: &'w mut Arena,
    forest: &'w Forest,
    hole: Range<u64>,
    descriptors: Range<RawFd>,
    control: u64,
    park: u64,
    lists: Vec<List>,
    births: Vec<(usize, OpId, usize)>,
    fills: Vec<HostFill>,
    lazies: Option<Vec<HostLazy>>,
    /// Where tasks open the userfaultfds of `lazies`: (list, operation).
    uffds: Vec<(usize, OpId)>,
}

impl<'f> Writer<'_, 'f> {
    fn write(&mut self) -> Result<(), RestoreError> {
        for (i, n) in self.forest.nodes.iter().enumerate() {
            self.add_list(i, (n.pid, None), n.task.is_some_and(|t| !self.image.tasks[t].is_zombie()));
        }
        // Threads come after all processes, so that a process's list has its node's index.
        let mut threads = vec![Vec::new(); self.forest.nodes.len()];
        for (i, n) in self.forest.nodes.iter().enumerate() {
            for (k, (tid, _)) in n.task.map_or(&[][..], |t| &self.image.tasks[t].threads).iter().enumerate() {
                threads[i].push(self.add_list(i, (*tid, Some(k)), true));
            }
        }
        for (i, own_threads) in threads.iter().enumerate() {
            let batch = match self.forest.nodes[i].task {
                Some(t) if !self.image.tasks[t].is_zombie() => self.task_list(i, t, own_threads)?,
                task => self.short_list(i, task)?,
            };
            self.place(i, batch);
            let Some(t) = self.forest.nodes[i].task else { continue };
            for (k, list) in own_threads.iter().enumerate() {
                let batch = self.thread_list(t, k)?;
                self.place(*list, batch);
            }
        }
        Ok(())
    }

    fn add_list(&mut self, node: usize, (tid, thread): (i32, Option<usize>), parks: bool) -> usize {
        let args = self.arena.alloc(size_of::<TaskArgs>(), 64);
        self.lists.push(List { node, tid, thread, batch: Batch::new(), ops: 0, args, parks });
        self.lists.len() - 1
    }

    fn place(&mut self, list: usize, batch: Batch) {
        let ops = batch.place(self.arena);
        let node = &self.forest.nodes[self.lists[list].node];
        let is_thread = list >= self.forest.nodes.len();
        let set_tid = self.arena.put(&self.lists[list].tid.to_ne_bytes());
        let stack = self.arena.alloc(STACK as usize, 4096);
        let (flags, exit_signal) = match (is_thread, node.forker.is_none(), node.as_sibling) {
            (true, ..) => (THREAD_FLAGS, 0),
            (_, true, _) if self.sibling => (CLONE_CLEAR_SIGHAND | CLONE_PARENT, 0),
            (_, true, _) => (CLONE_CLEAR_SIGHAND, SIGCHLD),
            (_, _, true) => (CLONE_PARENT, 0),
            _ => {
                let (files, fs) = self.shares(self.lists[list].node);
                (if files { CLONE_FILES } else { 0 } | if fs { CLONE_FS } else { 0 }, SIGCHLD)
            }
        };
        let clone =
            CloneArgs { flags, exit_signal, stack, stack_size: STACK, set_tid, set_tid_size: 1, ..Default::default() };
        let args = TaskArgs {
            control: self.control,
            ops,
            n_ops: batch.len() as u64,
            entry: self.arena.base() + RESTORER.entry,
            index: list as u64,
            clone,
        };
        let at = self.lists[list].args;
        self.arena.write_record(at, &args);
        self.lists[list].ops = ops;
        self.lists[list].batch = batch;
    }

    /// Does this process have the descriptor table, and the directories, of the one that forks it?
    fn shares(&self, node: usize) -> (bool, bool) {
        let n = &self.forest.nodes[node];
        let ids = |t: Option<usize>| t.and_then(|t| self.image.tasks[t].ids.as_ref());
        match (ids(n.task), ids(n.forker.and_then(|f| self.forest.nodes[f].task))) {
            (Some(own), Some(its)) if !n.as_sibling => (own.files_id == its.files_id, own.fs_id == its.fs_id),
            _ => (false, false),
        }
    }

    /// The set of control groups of a process; helpers and zombies stay where they are forked.
    fn group_set(&self, node: usize) -> Option<u32> {
        let n = &self.forest.nodes[node];
        n.task.and_then(|t| set_of(&self.image.tasks[t].core)).or_else(|| n.forker.and_then(|f| self.group_set(f)))
    }

    fn birth(&mut self, b: &mut Batch, by: usize, of: usize, kind: OpKind) {
        let what =
            format!("clone3 of {} {}", if kind == OpKind::Thread { "thread" } else { "pid" }, self.lists[of].tid);
        let op = b.push(what, kind, Policy::Must, 0, [self.lists[of].args, 0, 0, 0, 0, 0]);
        self.births.push((by, op, of));
    }

    /// Forks those children of node `i` that `which` picks.
    fn forks(&mut self, b: &mut Batch, i: usize, which: impl Fn(&dormouse_resources::tree::Node) -> bool) {
        let kids: Vec<usize> = self.forest.forked_by(i).filter(|k| which(&self.forest.nodes[*k])).collect();
        for k in kids {
            self.birth(b, i, k, OpKind::Fork);
        }
    }

    /// The session and group part at the beginning of every process.
    fn begin(&mut self, b: &mut Batch, i: usize) -> Result<(), RestoreError> {
        let node = &self.forest.nodes[i];
        if node.forker.is_none() {
            if let Some((at, lengths)) = process::own_rseq() {
                for len in lengths {
                    let args = [at, len, RSEQ_FLAG_UNREGISTER, dormouse_sys::arch::RSEQ_SIGNATURE];
                    b.attempt("ending the inherited restartable sequence", nr::RSEQ, &args);
                }
            }
            // CLONE_CLEAR_SIGHAND ends handlers, but what we ignore stays ignored.
            let default = self.arena.put_words(&[0; 4]);
            for signal in (1..=64).filter(|n| self.ignored & 1 << (n - 1) != 0) {
                b.must(format!("default action of signal {signal}"), nr::RT_SIGACTION, &[signal, default, 0, 8]);
            }
            self.vdso.park_ops(b, self.park);
            b.must("munmap of the restoring program's memory", nr::MUNMAP, &[0, self.hole.start]);
            let rest = layout::TASK_SIZE - self.hole.end;
            b.must("munmap of the restoring program's memory", nr::MUNMAP, &[self.hole.end, rest]);
            let own = &self.descriptors;
            b.must("closing inherited descriptors", nr::CLOSE_RANGE, &[0, own.start as u64 - 1, 0]);
            b.must("closing inherited descriptors", nr::CLOSE_RANGE, &[own.end as u64, u32::MAX.into(), 0]);
        }
        let parent = match node.forker.map(|f| &self.forest.nodes[f]) {
            None if self.sibling => nix::unistd::getppid().as_raw(),
            None => HostPid::current().0,
            Some(f) if node.as_sibling => f.forker.map_or(0, |p| self.forest.nodes[p].pid),
            Some(f) => f.pid,
        };
        b.push("dying with the parent", OpKind::Guard, Policy::Must, 0, [parent as u64, 0, 0, 0, 0, 0]);
        let sets = (node.forker.and_then(|f| self.group_set(f)), self.group_set(i));
        self.groups.enter_ops(b, self.arena, sets, false)?;
        self.forks(b, i, |n| n.before_setsid);
        let node = &self.forest.nodes[i];
        if node.setsid {
            b.must(format!("setsid of pid {}", node.pid), nr::SETSID, &[]);
            if let Some(t) = node.task {
                self.files.session_ops(b, &self.image.tasks[t])?;
            }
        }
        if node.pgid == Some(node.pid) && !node.setsid {
            b.must(format!("setpgid of pid {} to itself", node.pid), nr::SETPGID, &[0, 0]);
        }
        self.forks(b, i, |n| !n.before_setsid && !n.after_memory);
        Ok(())
    }

    /// Joins the group once all exist, and waits for the end of helpers and zombies.
    fn join(&mut self, b: &mut Batch, i: usize) {
        let node = &self.forest.nodes[i];
        barrier(b, STAGE_FORKED);
        if self.lazies.is_some() {
            b.must("closing the userfaultfd", nr::CLOSE_RANGE, &[0, self.descriptors.start as u64 - 1, 0]);
        }
        if let Some(g) = node.pgid.filter(|g| *g != node.pid) {
            b.must(format!("setpgid of pid {} to {g}", node.pid), nr::SETPGID, &[0, g as u64]);
        }
        barrier(b, STAGE_GROUPED);
        let mut any = false;
        for n in self.forest.nodes.iter().filter(|n| n.reaper == Some(i)) {
            any = true;
            if n.task.is_none() {
                b.must(format!("wait for helper {}", n.pid), nr::WAIT4, &[n.pid as u64, 0, 0, 0]);
            } else {
                let info = self.arena.alloc(128, 16);
                // P_PID; WEXITED | WNOWAIT: it stays a zombie.
                let args = [1, n.pid as u64, info, 4 | 0x0100_0000, 0];
                b.must(format!("the end of zombie {}", n.pid), nr::WAITID, &args);
            }
        }
        if any {
            task::drain_ops(b, self.arena);
        }
    }

    /// A helper, which only lends its pid to a session or group, or a zombie.
    fn short_list(&mut self, i: usize, task: Option<usize>) -> Result<Batch, RestoreError> {
        let mut b = Batch::new();
        self.begin(&mut b, i)?;
        self.join(&mut b, i);
        let code = task.map_or(0, |t| self.image.tasks[t].tc().exit_code);
        if let Some(t) = task {
            task::name_op(&mut b, self.arena, &self.image.tasks[t].tc().comm);
        }
        let signal = code & 0x7f;
        if signal == 0 {
            b.must("exit", nr::EXIT_GROUP, &[u64::from(code >> 8 & 0xff)]);
            return Ok(b);
        }
        let no_core = self.arena.put_words(&[0, 0]);
        let open = self.arena.put_words(&[0]);
        b.attempt("no core file", nr::SETRLIMIT, &[libc::RLIMIT_CORE as u64, no_core]);
        b.must(format!("signal {signal}"), nr::KILL, &[self.forest.nodes[i].pid as u64, signal.into()]);
        b.must("unblocking signals", nr::RT_SIGPROCMASK, &[libc::SIG_SETMASK as u64, open, 0, 8]);
        Ok(b)
    }

    fn task_list(&mut self, i: usize, t: usize, threads: &[usize]) -> Result<Batch, RestoreError> {
        let task = &self.image.tasks[t];
        let mut b = Batch::new();
        self.begin(&mut b, i)?;
        let node = &self.forest.nodes[i];
        let parent = node.after_memory.then_some(node.forker).flatten().and_then(|f| self.forest.nodes[f].task);
        let parent = parent.map(|p| &self.image.tasks[p]);
        map::map_ops(&mut b, &mut self.ctx(parent.is_some()), task, parent)?;
        self.forks(&mut b, i, |n| n.after_memory);
        if self.lazies.is_some() {
            // The host takes it before the first stage opens.
            let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
            let op = b.must("userfaultfd (needs CAP_SYS_PTRACE)", nr::USERFAULTFD, &[flags]);
            self.uffds.push((i, op));
        }
        self.join(&mut b, i);
        self.files.foreground_ops(&mut b, self.arena, task)?;
        map::final_ops(&mut b, &mut self.ctx(parent.is_some()), task)?;
        let (shares_files, shares_fs) = self.shares(i);
        if !shares_fs {
            self.fs_ops(&mut b, task)?;
        }
        let fds = if shares_files { &[][..] } else { &task.fds };
        for f in fds {
            let fd = self.files.fd(f.id, self.shared)?;
            let flags = if f.flags & 1 != 0 { libc::O_CLOEXEC as u64 } else { 0 };
            b.must(format!("descriptor {}", f.fd), nr::DUP3, &[fd as u64, f.fd.into(), flags]);
        }
        for list in threads {
            self.birth(&mut b, i, *list, OpKind::Thread);
        }
        barrier(&mut b, STAGE_GUARDED);
        self.files.late_ops(&mut b, self.arena, task, !shares_files, !shares_fs)?;
        if !shares_files {
            self.files.task_ops(&mut b, self.arena, task)?;
        }
        if !shares_files {
            // Whoever shares a table finds it as it is to be: its owner has filled it before the last stage.
            let own = &self.descriptors;
            b.must("closing the restore's descriptors", nr::CLOSE_RANGE, &[own.start as u64, own.end as u64 - 1, 0]);
            self.files.lock_ops(&mut b, self.arena, task);
        }
        let pid = task.pid();
        let tc = task.tc();
        self.files.owner_ops(&mut b, self.arena, task, When::BeforeCredentials)?;
        task::process_ops(&mut b, &mut self.ctx(false), task)?;
        let ext = self.image.ext.get(&(pid as u32));
        task::thread_ops(&mut b, &mut self.ctx(false), task, &task.core, ext, pid)?;
        if !shares_files {
            self.files.owner_ops(&mut b, self.arena, task, When::AfterCredentials)?;
        }
        task::after_creds_ops(&mut b, &task.core, task.mm.as_ref().and_then(|m| m.dumpable));
        let own = task.core.thread_core.as_ref().and_then(|c| c.signals_p.as_ref());
        task::signal_ops(&mut b, self.arena, pid, pid, tc.signals_s.as_ref(), own)?;
        task::timer_ops(&mut b, self.arena, task)?;
        park(&mut b);
        Ok(b)
    }

    fn thread_list(&mut self, t: usize, k: usize) -> Result<Batch, RestoreError> {
        let task = &self.image.tasks[t];
        let (tid, core) = &task.threads[k];
        let mut b = Batch::new();
        // After the stage the process closes what the restore had open.
        self.groups.enter_ops(&mut b, self.arena, (set_of(&task.core), set_of(core)), true)?;
        barrier(&mut b, STAGE_GUARDED);
        let ext = self.image.ext.get(&(*tid as u32));
        task::thread_ops(&mut b, &mut self.ctx(false), task, core, ext, *tid)?;
        task::after_creds_ops(&mut b, core, None);
        let own = core.thread_core.as_ref().and_then(|c| c.signals_p.as_ref());
        task::signal_ops(&mut b, self.arena, task.pid(), *tid, None, own)?;
        park(&mut b);
        Ok(b)
    }

    fn ctx(&mut self, forked_with_memory: bool) -> RestoreCtx<'_, 'f> {
        RestoreCtx {
            arena: self.arena,
            files: self.files,
            shared: self.shared,
            vdso: self.vdso,
            proxies: self.proxies,
            filters: self.filters,
            park: self.park,
            own: self.own,
            forked_with_memory,
            fills: &mut self.fills,
            lazies: self.lazies.as_mut(),
        }
    }

    /// Root, working directory, umask.
    fn fs_ops(&mut self, b: &mut Batch, task: &TaskImage) -> Result<(), RestoreError> {
        let Some(fs) = &task.fs else { return Ok(()) };
        let (cwd, root) = self.files.fs_fds(fs)?;
        if let Some(root) = root {
            let dot = self.arena.put(b".\0");
            b.must("fchdir to the root directory", nr::FCHDIR, &[root as u64]);
            b.must("chroot (needs CAP_SYS_CHROOT)", nr::CHROOT, &[dot]);
        }
        if let Some(cwd) = cwd {
            b.must("fchdir to the working directory", nr::FCHDIR, &[cwd as u64]);
        }
        b.must("umask", nr::UMASK, &[fs.umask.unwrap_or(0o22).into()]);
        Ok(())
    }
}

/// rseq(2).
const RSEQ_FLAG_UNREGISTER: u64 = 1;

fn barrier(b: &mut Batch, stage: usize) {
    b.push("barrier", OpKind::Barrier, Policy::Must, 0, [stage as u64, 0, 0, 0, 0, 0]);
}

fn park(b: &mut Batch) {
    b.push("park", OpKind::Park, Policy::Must, 0, [0; 6]);
}

/// The state that a thread is handed over with.
pub fn state_of(
    image: &TreeImage,
    list: &List,
    forest: &Forest,
) -> Result<dormouse_infect::ptrace::State, RestoreError> {
    let task = &image.tasks[forest.nodes[list.node].task.expect("only tasks park")];
    let core = list.thread.map_or(&task.core, |k| &task.threads[k].1);
    Ok(regs::from_core(list.tid, core, image.ext.get(&(list.tid as u32)))?)
}
