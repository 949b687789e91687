//! The restorer blob: every process and thread of a restored tree runs its operation list here, forks its children
//! from here, and parks here until the host gives it the registers of the image.
#![no_std]
#![no_main]

use core::panic::PanicInfo;
use core::sync::atomic::{AtomicU32, Ordering};

use dormouse_blob_abi::restorer::{Control, STAGES, TaskArgs};
use dormouse_blob_abi::run::{Special, UNKNOWN, run};
use dormouse_blob_abi::{DONE, Op, OpKind};
use dormouse_sys::{arch, futex, nr, syscall};

const EINVAL: i64 = -22;
const PR_SET_PDEATHSIG: u64 = 1;
const SIGKILL: u64 = 9;

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
            k if k == OpKind::Park as u32 => {
                bump(&self.control.parked);
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
        bump(arrived);
        bump(&self.control.progress);
        while open.load(Ordering::Acquire) == 0 {
            futex::wait(open, 0);
        }
        0
    }
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
