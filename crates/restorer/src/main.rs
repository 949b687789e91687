//! The restorer blob: every process and thread of a restored tree runs its operation list here, forks its children
//! from here, and parks here until the host gives it the registers of the image.
#![no_std]
#![no_main]

mod aio;

use core::panic::PanicInfo;
use core::sync::atomic::{AtomicU32, Ordering};

use dormouse_blob_abi::restorer::{Control, FILL_ASKED, FILL_DONE, FILL_FAILED, FILL_NO_UFFD, Fill, STAGES, TaskArgs};
use dormouse_blob_abi::run::{Special, UNKNOWN, read_all, run};
use dormouse_blob_abi::{DONE, Op, OpKind};
use dormouse_sys::{arch, futex, nr, syscall};

const EINVAL: i64 = -22;
const PR_SET_PDEATHSIG: u64 = 1;
const SIGKILL: u64 = 9;
/// `O_CLOEXEC | UFFD_USER_MODE_ONLY`: nobody but us is to touch the memory.
const UFFD_FLAGS: u64 = 0x80000 | 1;
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;

struct Task<'a> {
    control: &'a Control,
}

impl Special for Task<'_> {
    unsafe fn special(&mut self, op: &Op) -> i64 {
        match op.kind {
            k if k == OpKind::Fork as u32 || k == OpKind::Thread as u32 => {
                // SAFETY: the host wrote the task's arguments into the shared mapping.
                let child = unsafe { &*(op.args[0] as *const TaskArgs) };
                // SAFETY: the child runs on a stack of its own and never returns.
                unsafe { arch::clone3_call((&raw const child.clone).cast(), 88, start, op.args[0]) }
            }
            k if k == OpKind::Barrier as u32 => self.barrier(op.args[0] as usize),
            k if k == OpKind::Guard as u32 => guard(op.args[0]),
            // SAFETY: the host composed the operation for this address space.
            k if k == OpKind::FillByHost as u32 => unsafe { self.fill(op.args) },
            // SAFETY: the host composed the operation for this address space.
            k if k == OpKind::AioRing as u32 => unsafe { aio::restore(op.args) },
            k if k == OpKind::Park as u32 => {
                // The host sleeps on `progress` alone.
                self.control.parked.fetch_add(1, Ordering::AcqRel);
                bump(&self.control.progress);
                loop {
                    futex::wait(&self.control.failed, 0);
                    if self.control.failed.load(Ordering::Acquire) != 0 {
                        exit(1);
                    }
                }
            }
            _ => UNKNOWN,
        }
    }
}

impl Task<'_> {
    fn barrier(&self, stage: usize) -> i64 {
        if stage >= STAGES {
            return EINVAL;
        }
        // SAFETY: `stage < STAGES`; unchecked so that the blob needs no panic path.
        let (arrived, open) =
            unsafe { (self.control.arrived.get_unchecked(stage), self.control.open.get_unchecked(stage)) };
        // The host sleeps on `progress` alone.
        arrived.fetch_add(1, Ordering::AcqRel);
        bump(&self.control.progress);
        while open.load(Ordering::Acquire) == 0 {
            futex::wait(open, 0);
        }
        0
    }

    /// Waits until the host has filled memory; reads it itself where there is no userfaultfd(2) or the host refuses, unless it
    /// cannot.
    ///
    /// # Safety
    /// The iovecs name fresh memory of this task, and the record the mappings that it lies in.
    unsafe fn fill(&self, args: [u64; 6]) -> i64 {
        // SAFETY: the host wrote the record into the shared mapping.
        let fill = unsafe { &*(args[4] as *const Fill) };
        let mut fd = if fill.n_ranges > 0 { watched(fill) } else { EINVAL };
        while fd >= 0 || fill.by_host_alone != 0 {
            fill.uffd.store(if fd >= 0 { fd as u32 } else { FILL_NO_UFFD }, Ordering::Relaxed);
            fill.state.store(FILL_ASKED, Ordering::Release);
            bump(&self.control.progress);
            while fill.state.load(Ordering::Acquire) == FILL_ASKED {
                futex::wait(&fill.state, FILL_ASKED);
            }
            let had = fd;
            if fd >= 0 {
                close(fd);
                fd = EINVAL;
            }
            match fill.state.load(Ordering::Acquire) {
                FILL_DONE => return 0,
                FILL_FAILED => return -i64::from(fill.errno.load(Ordering::Acquire)),
                _ if fill.by_host_alone == 0 => break,
                // Once more without a userfaultfd, if it was because of that.
                _ if had < 0 => return EINVAL,
                _ => {}
            }
        }
        // SAFETY: as for the caller.
        unsafe { read_all(args) }
    }
}

/// A userfaultfd (Linux 4.11; user mode alone since 5.11) that covers all ranges of the record, or a negative errno.
fn watched(fill: &Fill) -> i64 {
    // SAFETY: takes flags only.
    let fd = unsafe { syscall(nr::USERFAULTFD, [UFFD_FLAGS, 0, 0, 0, 0, 0]) }.0;
    if fd < 0 {
        return fd;
    }
    let mut api = [0xAAu64, 0, 0];
    // SAFETY: `struct uffdio_api` is three words; a local.
    let mut r = unsafe { syscall(nr::IOCTL, [fd as u64, UFFDIO_API, &raw mut api as u64, 0, 0, 0]) }.0;
    let mut i = 0;
    while r >= 0 && i < fill.n_ranges {
        // SAFETY: the host wrote `n_ranges` pairs into the shared mapping.
        let [start, len] = unsafe { *(fill.ranges as *const [u64; 2]).add(i as usize) };
        let mut range = [start, len, UFFDIO_REGISTER_MODE_MISSING, 0];
        // SAFETY: `struct uffdio_register` is four words; a local.
        r = unsafe { syscall(nr::IOCTL, [fd as u64, UFFDIO_REGISTER, &raw mut range as u64, 0, 0, 0]) }.0;
        i += 1;
    }
    if r < 0 {
        close(fd);
        return r;
    }
    fd
}

fn close(fd: i64) {
    // SAFETY: closes a descriptor of our own.
    unsafe { syscall(nr::CLOSE, [fd as u64, 0, 0, 0, 0, 0]) };
}

/// The parent-death signal (prctl(2)) comes only for a death after it was set, so the parent is looked at afterwards.
fn guard(parent: u64) -> i64 {
    // SAFETY: sets an attribute of this task, and asks a number.
    unsafe {
        let r = syscall(nr::PRCTL, [PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0, 0]).0;
        if r >= 0 && syscall(nr::GETPPID, [0; 6]).0 as u64 != parent {
            exit(1);
        }
        r
    }
}

fn bump(word: &AtomicU32) {
    word.fetch_add(1, Ordering::AcqRel);
    futex::wake_all(word);
}

/// Entry point of every task: the host jumps here in the root task, clone3 in all others.
///
/// # Safety
/// `args` points to a [`TaskArgs`] in the shared mapping.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dormouse_entry(args: *const TaskArgs) -> ! {
    start(args as u64)
}

extern "C" fn start(args: u64) -> ! {
    // SAFETY: the address comes from the host, by way of the root task or an operation.
    let args = unsafe { &*(args as *const TaskArgs) };
    // SAFETY: as above.
    let control = unsafe { &*(args.control as *const Control) };
    let mut task = Task { control };
    let ops = args.ops as *mut Op;
    // SAFETY: the host composed the list for this task.
    let end = unsafe { run(ops, args.n_ops, &mut task) };
    if end == DONE {
        exit(0);
    }
    if control.failed.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Acquire).is_ok() {
        // SAFETY: `end` is an index into the list.
        let errno = -unsafe { (*ops.add(end as usize)).ret };
        control.failed_task.store(args.index as u32, Ordering::Relaxed);
        control.failed_op.store(end as u32, Ordering::Relaxed);
        control.failed_errno.store(errno as u32, Ordering::Release);
        bump(&control.progress);
    }
    exit(1)
}

fn exit(code: u64) -> ! {
    loop {
        // SAFETY: ends the process.
        unsafe { syscall(nr::EXIT_GROUP, [code, 0, 0, 0, 0, 0]) };
    }
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    exit(127)
}
