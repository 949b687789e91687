//! Groups are made before the tree, entered by every task as soon as it exists, and given their properties when all tasks
//! have come so far. What was made or changed is taken back unless the restore succeeds.

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

use dormouse_images::pb;
use dormouse_infect::arena::{Arena, Batch};
use dormouse_kernel::HostPid;
use dormouse_kernel::proc::misc;
use dormouse_sys::nr;

use super::hierarchy::{Hierarchy, display};
use super::settings::Settings;
use super::{CgroupOptions, Manage, OWN_CG_SET, below_root, names_match, set};
use crate::fd::raise;
use crate::{Result, TreeImage, call, invalid};

/// The hierarchies of a checkpoint.
#[derive(Debug)]
struct Controller {
    names: Vec<String>,
    root: Option<Hierarchy>,
    /// The group that this program is in.
    own: String,
}

/// The control groups of a tree.
#[derive(Debug)]
pub struct Groups {
    /// Dropped first: what it takes back is below the hierarchies' descriptors.
    settings: Settings,
    controllers: Vec<Controller>,
    /// The groups of each set, by controller.
    sets: HashMap<u32, Vec<(usize, String)>>,
    /// The set that stands for the groups of whoever restores.
    own_set: u32,
    /// Files to be written by those who enter: by controller, group, and whether a thread enters alone.
    doors: HashMap<(usize, String, bool), OwnedFd>,
    base: RawFd,
    yard: Option<PathBuf>,
    manage: Manage,
    /// Nobody has asked for groups, and they are entered only as far as that is allowed.
    optional: bool,
}

/// The set of groups that a thread was in.
pub fn set_of(core: &pb::CoreEntry) -> Option<u32> {
    let thread = core.thread_core.as_ref().and_then(|t| t.cg_set);
    thread.or_else(|| core.tc.as_ref().and_then(|t| t.cg_set)).filter(|id| *id != 0)
}

impl Groups {
    /// Makes the groups of a checkpoint that are not there yet, or finds those that are. `base` is above every descriptor
    /// number of the tree.
    ///
    /// # Errors
    /// A group cannot be made, is there and must not be, or is not there and must be; what was made is gone again.
    pub fn make(options: &CgroupOptions, image: &TreeImage, base: RawFd) -> Result<Self> {
        let none = |optional| Self {
            controllers: Vec::new(),
            sets: HashMap::new(),
            own_set: image.root_cg_set.unwrap_or(OWN_CG_SET),
            doors: HashMap::new(),
            base,
            yard: options.yard.clone(),
            manage: options.manage(),
            optional,
            settings: Settings::default(),
        };
        let wanted = image.cgroups.as_ref().filter(|c| !c.sets.is_empty() && options.manage() != Manage::Ignore);
        let Some(entry) = wanted else { return Ok(none(false)) };
        let mut groups = none(options.manage.is_none() && !nix::unistd::geteuid().is_root());
        let made = groups.load(options, entry);
        Ok(options.unless_asked(made)?.map_or_else(|| none(true), |()| groups))
    }

    /// Descriptors that the groups of a checkpoint need.
    pub fn descriptors(image: &TreeImage) -> usize {
        image
            .cgroups
            .as_ref()
            .map_or(0, |c| c.controllers.len() + 2 * c.sets.iter().map(|s| s.ctls.len()).sum::<usize>())
    }

    fn load(&mut self, options: &CgroupOptions, entry: &pb::CgroupEntry) -> Result<()> {
        let mut entry = entry.clone();
        rewrite(&mut entry, options)?;
        let own = set(misc::cgroups(HostPid::current())?, &[])?;
        for c in &entry.controllers {
            if c.cnames.is_empty() {
                return Err(invalid!("cgroup.img: a controller has no name"));
            }
            // A hierarchy that this program is not in is a new one, where everybody is in the root.
            let own = own.iter().find(|m| names_match(&c.cnames, &m.name));
            let own = own.map_or(Ok(String::new()), |m| below_root(&m.path))?;
            self.controllers.push(Controller { names: c.cnames.clone(), root: None, own });
        }
        for s in &entry.sets {
            let mut places = Vec::new();
            for m in &s.ctls {
                if m.cgns_prefix.is_some_and(|n| n > 0) {
                    return Err(invalid!(
                        "cgroup.img: group {} is in a control group namespace, which cannot be restored yet; use \
                         --manage-cgroups=ignore",
                        m.path
                    ));
                }
                let at = self.controllers.iter().position(|c| names_match(&c.names, &m.name));
                let at =
                    at.ok_or_else(|| invalid!("cgroup.img: there is no controller {:?} of set {}", m.name, s.id))?;
                places.push((at, below_root(&m.path)?));
            }
            self.sets.insert(s.id, places);
        }
        for (at, c) in entry.controllers.iter().enumerate() {
            c.dirs.iter().try_for_each(|dir| self.dir(at, "", dir))?;
        }
        Ok(())
    }

    fn root(&mut self, at: usize) -> Result<&Hierarchy> {
        let c = &mut self.controllers[at];
        if c.root.is_none() {
            c.root = Some(Hierarchy::open(&c.names, self.yard.as_deref())?);
        }
        Ok(c.root.as_ref().expect("opened above"))
    }

    fn name(&self, at: usize, group: &str) -> String {
        format!("control group /{group} of {}", display(&self.controllers[at].names))
    }

    /// Makes or finds a group and those below it.
    fn dir(&mut self, at: usize, above: &str, dir: &pb::CgroupDirEntry) -> Result<()> {
        let group = below_root(&format!("{above}/{}", dir.dir_name))?;
        if group != above {
            self.group(at, &group, dir)?;
        }
        dir.children.iter().try_for_each(|child| self.dir(at, &group, child))
    }

    fn group(&mut self, at: usize, group: &str, dir: &pb::CgroupDirEntry) -> Result<()> {
        let path = self.root(at)?.dir(group);
        let what = self.name(at, group);
        let is_there = path.try_exists().map_err(call(format!("cannot look for {what}")))?;
        match (self.manage, is_there) {
            (Manage::Existing | Manage::Props, false) => {
                return Err(invalid!("{what} is not there; make it, or use --manage-cgroups=soft"));
            }
            (Manage::Strict, true) => {
                return Err(invalid!("{what} is there already; remove it, or use --manage-cgroups=full"));
            }
            _ => {}
        }
        if !is_there {
            let mut part = String::new();
            for name in group.split('/') {
                part = if part.is_empty() { name.to_owned() } else { format!("{part}/{name}") };
                let path = self.root(at)?.dir(&part);
                if !path.try_exists().map_err(call(format!("cannot look for {what}")))? {
                    self.settings.make(path).map_err(call(format!("cannot make {what}")))?;
                }
            }
        }
        if let Some(perms) = dir.dir_perms.as_ref().filter(|_| self.manage != Manage::Existing) {
            self.settings.permit(&path, perms, is_there).map_err(call(format!("cannot set who may use {what}")))?;
        }
        if !is_there {
            self.settings.first(&path, &what, &dir.properties)?;
        }
        if !is_there || matches!(self.manage, Manage::Props | Manage::Full) {
            self.settings.later(path, what, &dir.properties, is_there);
        }
        Ok(())
    }

    /// Where the members of a set are, by controller; `None` is this program's own.
    fn places(&self, id: Option<u32>) -> Result<Vec<String>> {
        let mut places: Vec<String> = self.controllers.iter().map(|c| c.own.clone()).collect();
        if let Some(id) = id.filter(|id| *id != self.own_set) {
            let set =
                self.sets.get(&id).ok_or_else(|| invalid!("cgroup.img: there is no set {id} of control groups"))?;
            for (at, group) in set {
                places[*at].clone_from(group);
            }
        }
        Ok(places)
    }

    /// Adds what moves a task that was forked by a member of `from`, or a thread (`alone`) of such a task, into the groups of
    /// `to`. `None` is the set of this program.
    ///
    /// # Errors
    /// There is no such set or group.
    pub fn enter_ops(
        &mut self,
        b: &mut Batch,
        arena: &mut Arena,
        (from, to): (Option<u32>, Option<u32>),
        alone: bool,
    ) -> Result<()> {
        if self.controllers.is_empty() || from == to {
            return Ok(());
        }
        let (from, to) = (self.places(from)?, self.places(to)?);
        for (at, (from, to)) in from.into_iter().zip(to).enumerate() {
            if from == to {
                continue;
            }
            let fd = match self.door(at, &to, alone) {
                Err(e) if self.optional => {
                    tracing::warn!("a control group is not entered: {e}");
                    continue;
                }
                other => other?,
            };
            let me = arena.put(b"0");
            let what = format!("entering {}", self.name(at, &to));
            let args = [fd as u64, me, 1];
            if self.optional {
                b.attempt(what, nr::WRITE, &args);
            } else {
                b.must(what, nr::WRITE, &args);
            }
        }
        Ok(())
    }

    fn door(&mut self, at: usize, group: &str, alone: bool) -> Result<RawFd> {
        let key = (at, group.to_owned(), alone);
        if let Some(fd) = self.doors.get(&key) {
            return Ok(fd.as_raw_fd());
        }
        let v2 = self.controllers[at].names.iter().any(String::is_empty);
        let file = match (alone, v2) {
            (false, _) => super::props::PROCS,
            (true, true) => "cgroup.threads",
            (true, false) => super::props::TASKS,
        };
        let path = self.root(at)?.dir(group).join(file);
        let open = OpenOptions::new().write(true).open(path);
        let fd = open.map_err(call(format!("cannot open {file} of {}", self.name(at, group))))?;
        let fd = raise(fd.into(), self.base)?;
        let number = fd.as_raw_fd();
        self.doors.insert(key, fd);
        Ok(number)
    }

    /// Gives the groups their properties. To be called when all tasks are in them and have all that they need.
    ///
    /// # Errors
    /// One cannot be set.
    pub fn set_properties(&mut self) -> Result<()> {
        self.settings.set()
    }

    /// The restore has succeeded: what was made stays, and groups that were frozen are.
    pub fn keep(&mut self) {
        self.settings.keep();
    }
}

/// Puts the user's roots in place of the dumped ones.
fn rewrite(entry: &mut pb::CgroupEntry, options: &CgroupOptions) -> Result<()> {
    for c in &mut entry.controllers {
        let Some(root) = options.root_of(&c.cnames) else { continue };
        let root = below_root(root)?;
        let mut members: Vec<&mut pb::CgMemberEntry> =
            entry.sets.iter_mut().flat_map(|s| &mut s.ctls).filter(|m| names_match(&c.cnames, &m.name)).collect();
        for dir in &mut c.dirs {
            let old = below_root(&dir.dir_name)?;
            let mut moved = false;
            members.retain_mut(|m| {
                let below = m.path.trim_start_matches('/').strip_prefix(&*old);
                let Some(rest) = below.filter(|r| old.is_empty() || r.is_empty() || r.starts_with('/')) else {
                    return true;
                };
                m.path = format!("/{root}/{}", rest.trim_start_matches('/'));
                moved = true;
                false
            });
            if moved {
                dir.dir_name.clone_from(&root);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str, path: &str) -> pb::CgMemberEntry {
        pb::CgMemberEntry { name: name.into(), path: path.into(), cgns_prefix: None }
    }

    fn controller(name: &str, dir: &str) -> pb::CgControllerEntry {
        let dirs = vec![pb::CgroupDirEntry { dir_name: dir.into(), ..Default::default() }];
        pb::CgControllerEntry { cnames: vec![name.into()], dirs, is_threaded: None }
    }

    #[test]
    fn roots_of_the_user_take_the_place_of_the_dumped_ones() {
        let mut entry = pb::CgroupEntry {
            sets: vec![pb::CgSetEntry {
                id: 2,
                ctls: vec![member("a", "/old/x"), member("b", "/older"), member("cpu", "/")],
            }],
            controllers: vec![controller("a", "old"), controller("b", "old"), controller("cpu", "")],
        };
        let roots = vec![(None, "/new/".to_owned())];
        rewrite(&mut entry, &CgroupOptions { roots, ..Default::default() }).unwrap();
        let paths: Vec<_> = entry.sets[0].ctls.iter().map(|m| below_root(&m.path).unwrap()).collect();
        assert_eq!(paths, ["new/x", "older", "new"], "names are compared, not texts");
        let dirs: Vec<_> = entry.controllers.iter().map(|c| &*c.dirs[0].dir_name).collect();
        assert_eq!(dirs, ["new", "old", "new"]);
    }

    #[test]
    fn the_set_of_a_thread_may_be_told_by_its_process() {
        let mut core = pb::CoreEntry::default();
        assert_eq!(set_of(&core), None);
        core.tc = Some(pb::TaskCoreEntry { cg_set: Some(3), ..Default::default() });
        core.thread_core = Some(pb::ThreadCoreEntry::default());
        assert_eq!(set_of(&core), Some(3));
        core.thread_core = Some(pb::ThreadCoreEntry { cg_set: Some(4), ..Default::default() });
        assert_eq!(set_of(&core), Some(4));
    }
}
