//! What the restoring process has itself: its settings, which tasks inherit, and the descriptor numbers that it takes.

use std::ops::Range;
use std::os::fd::RawFd;

use dormouse_kernel::HostPid;
use dormouse_resources::cgroup::Groups;
use dormouse_resources::{Own, TreeImage};

use crate::{RestoreError, call};

/// What this process has itself, and the signals that it ignores.
pub fn own_settings() -> Result<(Own, u64), RestoreError> {
    let me = HostPid::current();
    let status = dormouse_kernel::proc::status::read(me).map_err(dormouse_resources::ResourceError::from)?;
    let stat = dormouse_kernel::proc::stat::read(me).map_err(dormouse_resources::ResourceError::from)?;
    let limits = dormouse_kernel::proc::limits::read(me).map_err(dormouse_resources::ResourceError::from)?;
    let own = Own { limits: limits.to_vec(), groups: status.groups, bounding: status.cap_bnd, nice: stat.nice as i32 };
    Ok((own, status.sig_ign))
}

/// Descriptor numbers that no task of the tree uses: the restore's own lie there.
///
/// Above the tree's highest number if there is room, else in the largest hole between its numbers.
pub fn descriptor_range(image: &TreeImage, own: &mut Own) -> Result<Range<RawFd>, RestoreError> {
    let mut numbers: Vec<u64> = image.tasks.iter().flat_map(|t| &t.fds).map(|f| f.fd.into()).collect();
    numbers.extend([LOWEST_OWN_FD - 1]);
    numbers.sort_unstable();
    numbers.dedup();
    let hard = own.limits.get(libc::RLIMIT_NOFILE as usize).map_or(1024, |l| l.1).min(i32::MAX as u64);
    let pages: usize = image.tasks.iter().filter_map(|t| t.pages.as_ref()).map(|p| p.images.len()).sum();
    let need = 64 + FREE + (2 * (image.files.len() + image.tasks.len() + pages) + Groups::descriptors(image)) as u64;
    let last = numbers.last().map_or(0, |n| n + 1);
    let holes = numbers.windows(2).map(|w| w[0] + 1..w[1]).filter(|h| h.start >= LOWEST_OWN_FD);
    let above = last..hard.max(last);
    let range = if above.end - above.start >= need {
        above
    } else {
        holes.chain([above.clone()]).max_by_key(|h| h.end - h.start).unwrap_or(above)
    };
    if range.end - range.start < need {
        let what = format!(
            "the restore needs {need} descriptor numbers that the tree does not use, but only {} are free in a row below {hard} \
             (hard RLIMIT_NOFILE); raise the limit and retry",
            range.end - range.start
        );
        return Err(RestoreError::Call { what, cause: std::io::Error::from_raw_os_error(libc::EMFILE) });
    }
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, hard, hard)
        .map_err(|e| call("cannot raise our own RLIMIT_NOFILE")(e.into()))?;
    // The tasks inherit it, so it is what they must not take for theirs.
    if let Some(limit) = own.limits.get_mut(libc::RLIMIT_NOFILE as usize) {
        *limit = (hard, hard);
    }
    Ok(range.start as RawFd..range.end as RawFd)
}

/// What the restore opened must lie in its range, or a task would lose it, or get it in place of its own.
pub fn check_descriptors(range: &Range<RawFd>) -> Result<(), RestoreError> {
    let own = dormouse_kernel::proc::fds(HostPid::current()).map_err(dormouse_resources::ResourceError::from)?;
    let highest = own.into_iter().max().unwrap_or(0);
    if highest < range.end {
        return Ok(());
    }
    let what = format!(
        "the restore's descriptors do not fit into the hole below {} that the tree leaves; raise RLIMIT_NOFILE",
        range.end
    );
    Err(RestoreError::Call { what, cause: std::io::Error::from_raw_os_error(libc::EMFILE) })
}

/// Numbers that are left free in front of the restore's own: a task whose numbers are all taken needs some to work with.
pub const FREE: u64 = 64;

/// Below it lie what this program was started with.
const LOWEST_OWN_FD: u64 = 64;
