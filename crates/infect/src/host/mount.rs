//! Mounts without a name: only a descriptor leads to one, and it goes with that.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;

use super::fd::{owned, result};

/// `FSOPEN_CLOEXEC`, and `FSMOUNT_CLOEXEC`.
const CLOEXEC: u64 = 1;
const FSCONFIG_SET_FLAG: u64 = 0;
const FSCONFIG_SET_STRING: u64 = 1;
const FSCONFIG_CMD_CREATE: u64 = 6;

/// Mounts a file system nowhere: its root directory (fsopen(2), fsconfig(2), fsmount(2); Linux 5.2). Options are names with
/// or without a value.
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN; the file system's own.
pub fn nameless(fstype: &str, options: &[(&str, Option<&str>)]) -> io::Result<OwnedFd> {
    let text = |s: &str| CString::new(s).map_err(io::Error::from);
    let name = text(fstype)?;
    // SAFETY: the kernel reads a string; the new descriptor is ours.
    let context = owned(unsafe { libc::syscall(libc::SYS_fsopen, name.as_ptr(), CLOEXEC) })?;
    for (key, value) in options {
        let (key, value) = (text(key)?, value.map(text).transpose()?);
        let command = if value.is_some() { FSCONFIG_SET_STRING } else { FSCONFIG_SET_FLAG };
        configure(&context, command, Some(&key), value.as_ref())?;
    }
    configure(&context, FSCONFIG_CMD_CREATE, None, None)?;
    // SAFETY: takes numbers only; the new descriptor is ours.
    owned(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), CLOEXEC, 0u64) })
}

fn configure(context: &OwnedFd, command: u64, key: Option<&CString>, value: Option<&CString>) -> io::Result<()> {
    let at = |s: Option<&CString>| s.map_or(ptr::null(), |s| s.as_ptr());
    // SAFETY: the kernel reads two strings, or none where the command takes none.
    result(unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, at(key), at(value), 0u64) })
        .map(drop)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;

    use super::*;

    #[test]
    fn a_mount_has_its_options_and_no_name() {
        match nameless("tmpfs", &[("mode", Some("0701")), ("size", Some("64k"))]) {
            Err(e) => assert_eq!(e.raw_os_error(), Some(libc::EPERM)),
            Ok(fd) => {
                let root = format!("/proc/self/fd/{}", fd.as_raw_fd());
                std::fs::create_dir(format!("{root}/here")).unwrap();
                assert!(std::fs::metadata(format!("{root}/here")).unwrap().is_dir());
                use std::os::unix::fs::PermissionsExt as _;
                assert_eq!(std::fs::metadata(root).unwrap().permissions().mode() & 0o7777, 0o701);
            }
        }
    }
}
