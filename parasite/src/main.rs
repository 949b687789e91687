//! The parasite blob: runs operation lists for the host inside the target, and cures its thread when the host is gone.
#![no_std]
#![no_main]

use core::panic::PanicInfo;

use dormouse_blob_abi::parasite::{Entry, Reply, Request};
use dormouse_blob_abi::run::{Special, UNKNOWN, run};
use dormouse_blob_abi::{DONE, Op};
use dormouse_sys::{nr, syscall};

struct Nothing;

impl Special for Nothing {
    unsafe fn special(&mut self, _: &Op) -> i64 {
        UNKNOWN
    }
}

const EINTR: i64 = -4;
const MSG_NOSIGNAL: u64 = 0x4000;

/// Entered by the host through ptrace, with every signal blocked and `entry` in the first argument register.
///
/// # Safety
/// `entry` points to an [`Entry`] that stays mapped while the thread is here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dormouse_entry(entry: *mut Entry) -> ! {
    // SAFETY: the host wrote the entry record before it set the registers.
    let e = unsafe { &mut *entry };
    let sock = e.sock as u64;
    if e.ops != 0 {
        // SAFETY: the host composed the list for this address space.
        e.status = unsafe { run(e.ops as *mut Op, e.n_ops, &mut Nothing) };
        if reply(sock, e.status) {
            wait_for_end(sock);
        }
    } else {
        serve(sock);
    }
    // The host is gone: give the thread back as it was.
    // SAFETY: closes the parasite's own descriptor; the frame was prepared by the host.
    unsafe {
        if e.ops == 0 {
            syscall(nr::CLOSE, [sock, 0, 0, 0, 0, 0]);
        }
        syscall(nr::SIGALTSTACK, [0, e.frame_altstack, 0, 0, 0, 0]);
        sigreturn(e.frame)
    }
}

fn serve(sock: u64) {
    loop {
        let mut req = Request { ops: 0, n_ops: 0 };
        // SAFETY: reads at most one request into a local.
        let r = unsafe { syscall(nr::RECVFROM, [sock, &raw mut req as u64, 16, 0, 0, 0]) }.0;
        if r == EINTR {
            continue;
        }
        if r != 16 {
            return;
        }
        // SAFETY: the host composed the list for this address space.
        let status = unsafe { run(req.ops as *mut Op, req.n_ops, &mut Nothing) };
        if !reply(sock, status) {
            return;
        }
    }
}

fn reply(sock: u64, status: u64) -> bool {
    let rep = Reply { status };
    // SAFETY: sends a local.
    unsafe { syscall(nr::SENDTO, [sock, &raw const rep as u64, 8, MSG_NOSIGNAL, 0, 0]) }.0 == 8
}

/// Sleeps until the host closes its end. ppoll(2) without a timeout leaves the thread's restart block alone.
fn wait_for_end(sock: u64) {
    loop {
        let mut pollfd = sock & 0xffff_ffff;
        // SAFETY: one pollfd with no events asked for: only a hang-up ends the wait.
        let r = unsafe { syscall(nr::PPOLL, [&raw mut pollfd as u64, 1, 0, 0, 0, 0]) }.0;
        if r > 0 || (r < 0 && r != EINTR) {
            return;
        }
    }
}

/// rt_sigreturn(2) with the stack pointer at the prepared frame.
#[cfg(target_arch = "x86_64")]
unsafe fn sigreturn(frame: u64) -> ! {
    // SAFETY: the frame restores every register; nothing after it runs.
    unsafe { core::arch::asm!("mov rsp, {f}", "mov eax, 15", "syscall", "ud2", f = in(reg) frame, options(noreturn)) }
}

#[cfg(target_arch = "aarch64")]
unsafe fn sigreturn(frame: u64) -> ! {
    // SAFETY: the frame restores every register; nothing after it runs.
    unsafe { core::arch::asm!("mov sp, {f}", "mov x8, #139", "svc #0", "brk #1", f = in(reg) frame, options(noreturn)) }
}

const _: u64 = DONE;

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    loop {
        // SAFETY: ends only this thread's process; unreachable as long as the blobs hold no panicking code.
        unsafe { syscall(nr::EXIT_GROUP, [127, 0, 0, 0, 0, 0]) };
    }
}
