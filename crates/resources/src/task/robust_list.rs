//! The robust futex list of a thread, which the kernel walks when it ends (get_robust_list(2)).

use dormouse_infect::arena::Batch;
use dormouse_infect::host::task;
use dormouse_kernel::HostPid;
use dormouse_sys::nr;

use crate::{Result, call};

/// Address and bytes of the list's head; zeros on a kernel without robust futexes.
///
/// # Errors
/// The thread is gone.
pub fn read(tid: HostPid) -> Result<(u64, u32)> {
    match task::robust_list(tid) {
        Ok((head, len)) => Ok((head, len as u32)),
        Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => Ok((0, 0)),
        Err(e) => Err(call(format!("get_robust_list of thread {tid}"))(e)),
    }
}

/// Sets it.
pub fn restore_op(b: &mut Batch, head: u64, len: u32) {
    if len != 0 {
        b.must("set_robust_list", nr::SET_ROBUST_LIST, &[head, len.into()]);
    }
}
