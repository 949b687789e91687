//! Control groups: which ones the threads of a tree are in, what those are set to, and how all that comes back.

mod alike;
mod dump;
mod hierarchy;
mod props;
mod restore;
mod settings;

use std::path::PathBuf;

use dormouse_images::pb;
use dormouse_kernel::proc::misc::Cgroup;

pub use dump::{CgroupDump, OWN_CG_SET};
pub use props::Specs;
pub use restore::{Groups, set_of};

use crate::{ResourceError, Result, invalid};

/// What is done about control groups (`--manage-cgroups`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manage {
    /// Nothing.
    Ignore,
    /// Tasks are moved into their groups, which must be there.
    Existing,
    /// The same, and the groups get their properties again.
    Props,
    /// Groups that are not there are made, with their properties.
    Soft,
    /// The same, and those that are there get their properties again.
    Full,
    /// All groups are made; none may be there.
    Strict,
}

/// What the user wants done about control groups.
#[derive(Clone, Debug, Default)]
pub struct CgroupOptions {
    /// `None`: [`Manage::Soft`], but only as far as it is allowed.
    pub manage: Option<Manage>,
    /// Where groups are dumped from, or go to: (controller, or all the others; path) (`--cgroup-root`).
    pub roots: Vec<(Option<String>, String)>,
    /// Which properties are dumped, besides or instead of those that are known (`--cgroup-props`).
    pub props: Option<String>,
    /// The same in a file (`--cgroup-props-file`).
    pub props_file: Option<PathBuf>,
    /// Only these controllers are dumped, if there are any (`--cgroup-dump-controller`).
    pub controllers: Vec<String>,
    /// A directory where all hierarchies are mounted already (`--cgroup-yard`).
    pub yard: Option<PathBuf>,
}

impl CgroupOptions {
    fn manage(&self) -> Manage {
        self.manage.unwrap_or(Manage::Soft)
    }

    /// The root that the user gave for a hierarchy.
    fn root_of(&self, names: &[String]) -> Option<&str> {
        let own = self.roots.iter().find(|(c, _)| c.as_ref().is_some_and(|c| names_match(names, c)));
        let root = own.or_else(|| self.roots.iter().find(|(c, _)| c.is_none()));
        root.map(|(_, path)| path.as_str())
    }

    /// What to do about a failure: nobody has asked for groups, and who may not manage them does without.
    fn unless_asked<T>(&self, failed: Result<T>) -> Result<Option<T>> {
        match failed {
            Err(e) if self.manage.is_none() && (!nix::unistd::geteuid().is_root() || is_forbidden(&e)) => {
                tracing::warn!("control groups are left out: {e}");
                Ok(None)
            }
            other => other.map(Some),
        }
    }
}

fn is_forbidden(e: &ResourceError) -> bool {
    let ResourceError::Call { cause, .. } = e else { return false };
    matches!(cause.raw_os_error(), Some(libc::EPERM | libc::EACCES | libc::EROFS))
}

/// Do the names of a hierarchy ("cpu", "cpuacct"; "name=systemd"; "" for version 2) occur among those of `joined`
/// ("cpu,cpuacct")?
fn names_match(names: &[String], joined: &str) -> bool {
    !names.is_empty() && names.iter().all(|n| joined.split(',').any(|j| j == n))
}

/// A path below a hierarchy's root: without slashes at its ends, and never leading out of it.
fn below_root(path: &str) -> Result<String> {
    let parts: Vec<&str> = path.split('/').filter(|p| !p.is_empty() && *p != ".").collect();
    if parts.contains(&"..") {
        return Err(invalid!(
            "control group {path:?} is outside of this program's control group namespace; run it in that of the tree, or use \
             --manage-cgroups=ignore"
        ));
    }
    Ok(parts.join("/"))
}

/// Membership in all hierarchies, in the order of their names.
fn set(groups: Vec<Cgroup>, only: &[String]) -> Result<Vec<pb::CgMemberEntry>> {
    let mut set = Vec::with_capacity(groups.len());
    for group in groups {
        let text = |bytes: Vec<u8>| {
            String::from_utf8(bytes).map_err(|e| {
                let name = String::from_utf8_lossy(e.as_bytes()).into_owned();
                invalid!("the name of control group {name:?} is no UTF-8 text, as images need it; rename it and retry")
            })
        };
        let name = text(group.controllers)?;
        if only.is_empty() || only.contains(&name) {
            set.push(pb::CgMemberEntry { name, path: text(group.path)?, cgns_prefix: None });
        }
    }
    set.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(set)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Vec<String> {
        text.split(',').map(str::to_owned).collect()
    }

    #[test]
    fn hierarchies_are_known_by_all_of_their_names() {
        assert!(names_match(&names("cpu,cpuacct"), "cpu,cpuacct") && names_match(&names(""), ""));
        assert!(!names_match(&names("cpu,cpuacct"), "cpu") && !names_match(&names(""), "cpu"));
        assert!(!names_match(&names("cpu"), "cpuset") && names_match(&names("name=a"), "name=a"));
    }

    #[test]
    fn a_root_of_its_own_comes_before_that_of_all() {
        let roots = vec![(None, "/all".to_owned()), (Some("name=a".to_owned()), "/own".to_owned())];
        let options = CgroupOptions { roots, ..Default::default() };
        assert_eq!(options.root_of(&names("name=a")), Some("/own"));
        assert_eq!(options.root_of(&names("cpu")), Some("/all"));
    }

    #[test]
    fn what_nobody_asked_for_may_be_forbidden() {
        let failed = |errno| Err(crate::call("cannot")(std::io::Error::from_raw_os_error(errno)));
        let asked = CgroupOptions { manage: Some(Manage::Soft), ..Default::default() };
        assert!(asked.unless_asked::<()>(failed(libc::EPERM)).is_err());
        assert!(CgroupOptions::default().unless_asked::<()>(failed(libc::EROFS)).unwrap().is_none());
        if nix::unistd::geteuid().is_root() {
            assert!(CgroupOptions::default().unless_asked::<()>(failed(libc::EBUSY)).is_err());
        }
    }

    #[test]
    fn paths_stay_below_the_root() {
        assert_eq!(below_root("/a//b/").unwrap(), "a/b");
        assert_eq!(below_root("/").unwrap(), "");
        assert!(below_root("/../x").unwrap_err().to_string().contains("namespace"));
    }
}
