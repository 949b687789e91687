//! Which groups the threads of a tree are in, and what these groups and those below them are set to.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use dormouse_images::{ImageDir, ImageKind, pb};
use dormouse_infect::freezer::Freezer;
use dormouse_kernel::HostPid;
use dormouse_kernel::proc::misc;

use super::alike::Alike;
use super::hierarchy::{Hierarchy, display};
use super::props::{PROCS, Specs, TASKS};
use super::{CgroupOptions, Manage, below_root, names_match, set};
use crate::{Result, call, invalid};

/// Number of the set of control groups of the program that dumps (`inventory_entry.root_cg_set`).
pub const OWN_CG_SET: u32 = 1;

/// The sets of groups that threads of a tree are in.
#[derive(Debug)]
pub struct CgroupDump<'a> {
    options: &'a CgroupOptions,
    /// Set [`OWN_CG_SET`] is the first. Empty if groups are left alone.
    sets: Vec<Vec<pb::CgMemberEntry>>,
    own_is_used: bool,
    /// The process that was looked at last, its leader's set, and who else is in that.
    last: Option<(HostPid, u32, Alike)>,
    frozen: Option<Frozen>,
}

/// A group that was frozen for the dump: which one, and what property it had before.
#[derive(Debug)]
struct Frozen {
    identity: (u64, u64),
    property: (&'static str, &'static str),
}

impl<'a> CgroupDump<'a> {
    /// Knows the set of this program.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn new(options: &'a CgroupOptions) -> Result<Self> {
        let own = match options.manage() {
            Manage::Ignore => None,
            _ => options.unless_asked(read(HostPid::current(), HostPid::current(), options))?,
        };
        Ok(Self { options, sets: own.into_iter().collect(), own_is_used: false, last: None, frozen: None })
    }

    /// Knows the group that was frozen for the dump: it is dumped as it was before.
    ///
    /// # Errors
    /// It is gone.
    pub fn with_freezer(mut self, freezer: Option<&Freezer>) -> Result<Self> {
        if let Some(freezer) = freezer {
            let identity = freezer.identity().map_err(call("cannot look at the frozen control group"))?;
            self.frozen = Some(Frozen { identity, property: freezer.property() });
        }
        Ok(self)
    }

    /// Looks at the groups of a stopped process with these threads.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn look(&mut self, pid: HostPid, tids: &[HostPid]) -> Result<()> {
        self.last = None;
        if tids.len() > 1 && !self.sets.is_empty() {
            self.last = Some((pid, self.set_of(pid, pid)?, Alike::of(pid, tids)));
        }
        Ok(())
    }

    /// The number of the set that a thread is in.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn set_of(&mut self, pid: HostPid, tid: HostPid) -> Result<u32> {
        if self.sets.is_empty() {
            return Ok(OWN_CG_SET);
        }
        if let Some((_, set, _)) = self.last.as_ref().filter(|(last, _, alike)| *last == pid && alike.has(tid)) {
            return Ok(*set);
        }
        let Some(set) = self.options.unless_asked(read(pid, tid, self.options))? else { return Ok(OWN_CG_SET) };
        let at = self.sets.iter().position(|s| *s == set).unwrap_or_else(|| {
            self.sets.push(set);
            self.sets.len() - 1
        });
        self.own_is_used |= at == 0;
        Ok(OWN_CG_SET + at as u32)
    }

    /// Writes the image, if any thread is in other groups than this program.
    ///
    /// # Errors
    /// The groups cannot be read, or the image not be written.
    pub fn finish(self, images: &ImageDir) -> Result<()> {
        if self.sets.len() < 2 {
            return Ok(());
        }
        if let Some(entry) = self.options.unless_asked(self.entry())? {
            images.write_one(ImageKind::Cgroup, 0, &entry)?;
        }
        Ok(())
    }

    fn entry(&self) -> Result<pb::CgroupEntry> {
        let specs = Specs::of(self.options)?;
        let mut controllers = Vec::new();
        for group in misc::cgroups(HostPid::current())? {
            let joined = String::from_utf8_lossy(&group.controllers).into_owned();
            let wanted = self.options.controllers.is_empty() || self.options.controllers.contains(&joined);
            // Hierarchies that control nothing come after the others, as they are met.
            if wanted && !joined.split(',').all(|n| n.starts_with("name=")) {
                controllers.push(controller(&joined));
            }
        }
        let mut walks: Vec<Option<Walk<'_>>> = Vec::new();
        for member in self.sets[1..].iter().flatten() {
            let known = controllers.iter().position(|c| names_match(&c.cnames, &member.name));
            let at = known.unwrap_or_else(|| {
                controllers.push(controller(&member.name));
                controllers.len() - 1
            });
            walks.resize_with(controllers.len(), || None);
            if walks[at].is_none() {
                walks[at] = Some(Walk::new(&controllers[at].cnames, &specs, self)?);
            }
            let walk = walks[at].as_mut().expect("made above");
            let names = controllers[at].cnames.clone();
            walk.add(self.options.root_of(&names).unwrap_or(&member.path), &mut controllers[at])?;
        }
        let first = if self.own_is_used { 0 } else { 1 };
        let sets = (OWN_CG_SET..).zip(&self.sets).skip(first);
        let sets = sets.map(|(id, ctls)| pb::CgSetEntry { id, ctls: ctls.clone() }).collect();
        Ok(pb::CgroupEntry { sets, controllers })
    }
}

fn read(pid: HostPid, tid: HostPid, options: &CgroupOptions) -> Result<Vec<pb::CgMemberEntry>> {
    set(misc::thread_cgroups(pid, tid)?, &options.controllers)
}

fn controller(joined: &str) -> pb::CgControllerEntry {
    let cnames = joined.split(',').map(str::to_owned).collect();
    pb::CgControllerEntry { cnames, dirs: Vec::new(), is_threaded: Some(false) }
}

/// A walk through the groups of one hierarchy.
struct Walk<'s> {
    root: Hierarchy,
    name: String,
    properties: Vec<&'s str>,
    seen: HashSet<String>,
    frozen: Option<&'s Frozen>,
}

impl<'s> Walk<'s> {
    fn new(names: &[String], specs: &'s Specs, dump: &'s CgroupDump<'_>) -> Result<Self> {
        Ok(Self {
            frozen: dump.frozen.as_ref(),
            root: Hierarchy::open(names, dump.options.yard.as_deref())?,
            name: display(names),
            properties: specs.properties(names),
            seen: HashSet::new(),
        })
    }

    /// Adds a group and all below it. What is below the root of all belongs to the machine, and is not looked at.
    fn add(&mut self, path: &str, into: &mut pb::CgControllerEntry) -> Result<()> {
        let group = below_root(path)?;
        if let Some(dir) = self.dir(&group, group.clone(), !group.is_empty())? {
            let threaded =
                |p: &pb::CgroupPropEntry| p.name == TASKS || p.name == "cgroup.type" && p.value == "threaded";
            into.is_threaded = Some(into.is_threaded == Some(true) || dir.properties.iter().any(threaded));
            into.dirs.push(dir);
        }
        Ok(())
    }

    fn dir(&mut self, group: &str, dir_name: String, deep: bool) -> Result<Option<pb::CgroupDirEntry>> {
        if !self.seen.insert(group.to_owned()) {
            return Ok(None);
        }
        let path = self.root.dir(group);
        let what = || format!("cannot read control group /{group} of {}", self.name);
        let metadata = fs::metadata(&path).map_err(call(what()))?;
        let dir_perms = Some(perms(&metadata));
        let mut properties = Vec::new();
        for name in &self.properties {
            properties.extend(property(&path, name).map_err(call(format!("{}: {name}", what())))?);
        }
        if let Some(frozen) = self.frozen.filter(|f| f.identity == (metadata.dev(), metadata.ino())) {
            let (name, value) = frozen.property;
            properties.retain(|p| p.name != name);
            let found = property(&path, name).map_err(call(format!("{}: {name}", what())))?;
            properties.extend(found.map(|p| pb::CgroupPropEntry { value: value.into(), ..p }));
        }
        let mut below = Vec::new();
        for entry in fs::read_dir(&path).map_err(call(what()))? {
            let entry = entry.map_err(call(what()))?;
            if deep && entry.file_type().map_err(call(what()))?.is_dir() {
                let name = entry.file_name();
                below.push(name.into_string().map_err(|n| invalid!("{}: {n:?} is no UTF-8 text", what()))?);
            }
        }
        below.sort();
        let mut children = Vec::new();
        for name in below {
            children.extend(self.dir(&format!("{group}/{name}"), name, true)?);
        }
        Ok(Some(pb::CgroupDirEntry { dir_name, children, properties, dir_perms }))
    }
}

fn perms(m: &fs::Metadata) -> pb::CgroupPerms {
    pb::CgroupPerms { mode: m.mode(), uid: m.uid(), gid: m.gid() }
}

/// A property as it is written again; `None` if groups of this kernel have none of that name.
fn property(dir: &Path, name: &str) -> io::Result<Option<pb::CgroupPropEntry>> {
    let path = dir.join(name);
    let m = match fs::metadata(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let value = match name {
        // Who is in the group is told by the sets.
        PROCS | TASKS => String::new(),
        _ => settable(name, &fs::read_to_string(&path)?),
    };
    Ok(Some(pb::CgroupPropEntry { name: name.to_owned(), value, perms: Some(perms(&m)) }))
}

/// What is read, in the form in which it is written.
fn settable(name: &str, read: &str) -> String {
    let value = read.strip_suffix('\n').unwrap_or(read);
    if name == "memory.oom_control" {
        let disabled = value.lines().find_map(|l| l.strip_prefix("oom_kill_disable "));
        return disabled.unwrap_or("0").to_owned();
    }
    // The largest number stands for no limit.
    if value.parse() == Ok(i64::MAX) { "-1".into() } else { value.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_as_they_are_written() {
        assert_eq!(settable("memory.oom_control", "oom_kill_disable 1\nunder_oom 0\noom_kill 0\n"), "1");
        assert_eq!(settable("memory.limit_in_bytes", "9223372036854775807\n"), "-1");
        assert_eq!(settable("devices.list", "c 1:3 rwm\nb *:* m\n"), "c 1:3 rwm\nb *:* m");
        assert_eq!(settable("cpu.shares", "1024\n"), "1024");
    }

    #[test]
    fn threads_of_this_program_are_in_its_set() {
        let options = CgroupOptions::default();
        let mut dump = CgroupDump::new(&options).unwrap();
        let me = HostPid::current();
        assert_eq!(dump.set_of(me, me).unwrap(), OWN_CG_SET);
        let ignore = CgroupOptions { manage: Some(Manage::Ignore), ..Default::default() };
        assert!(CgroupDump::new(&ignore).unwrap().sets.is_empty());
    }
}
