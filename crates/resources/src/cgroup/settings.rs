//! What groups are set to: written when they are made or when the tree is there, and taken back if the restore fails.

use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dormouse_images::pb;

use super::props::{PROCS, TASKS};
use crate::{Result, call, invalid};

/// Properties that cannot be set any more when a group has tasks or other groups in it.
const FIRST: [&str; 8] = [
    "cpuset.cpus",
    "cpuset.mems",
    "devices.list",
    "memory.kmem.limit_in_bytes",
    "memory.swappiness",
    "memory.oom_control",
    "memory.use_hierarchy",
    "cgroup.type",
];

/// How long the last tasks of a failed restore may need to leave a group.
const LEAVING: Duration = Duration::from_secs(2);

/// What takes a change back.
#[derive(Debug)]
enum Undo {
    Made(PathBuf),
    Permitted(PathBuf, pb::CgroupPerms),
    Set(PathBuf, String),
}

/// Properties to be set, and changes to be taken back.
#[derive(Debug, Default)]
pub struct Settings {
    later: Vec<Later>,
    /// Files and values that freeze a group.
    freeze: Vec<(PathBuf, String)>,
    undo: Vec<Undo>,
}

/// The properties of one group.
#[derive(Debug)]
struct Later {
    dir: PathBuf,
    what: String,
    properties: Vec<pb::CgroupPropEntry>,
    /// It was there before.
    is_old: bool,
}

impl Settings {
    /// Makes a group.
    pub fn make(&mut self, dir: PathBuf) -> io::Result<()> {
        fs::create_dir(&dir)?;
        self.undo.push(Undo::Made(dir));
        Ok(())
    }

    /// Sets owner and mode. `is_old`: of what was there before.
    pub fn permit(&mut self, path: &Path, perms: &pb::CgroupPerms, is_old: bool) -> io::Result<()> {
        let m = fs::metadata(path)?;
        let before = pb::CgroupPerms { mode: m.mode(), uid: m.uid(), gid: m.gid() };
        if is_old && !same(&before, perms) {
            self.undo.push(Undo::Permitted(path.to_owned(), before));
        }
        permit(path, &before, perms)
    }

    /// Sets what must be set first in a group that was just made.
    pub fn first(&mut self, dir: &Path, what: &str, properties: &[pb::CgroupPropEntry]) -> Result<()> {
        for p in properties.iter().filter(|p| FIRST.contains(&&*p.name)) {
            check(p)?;
            let set = match &*p.name {
                "devices.list" => devices(dir, &p.value),
                "cgroup.type" if p.value != "threaded" => Ok(()),
                // This kernel has no such limit any more (Linux 5.4).
                "memory.kmem.limit_in_bytes" => match write(&dir.join(&p.name), &p.value) {
                    Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
                    other => other,
                },
                _ => write(&dir.join(&p.name), &p.value),
            };
            set.map_err(call(cannot_set(p, what)))?;
            if let Some(perms) = p.perms.as_ref().filter(|_| p.name != "devices.list") {
                self.permit(&dir.join(&p.name), perms, false).map_err(call(cannot_set(p, what)))?;
            }
        }
        Ok(())
    }

    /// Remembers what is set when the tree is there. `is_old`: of a group that was there before.
    pub fn later(&mut self, dir: PathBuf, what: String, properties: &[pb::CgroupPropEntry], is_old: bool) {
        let properties = properties.iter().filter(|p| !FIRST.contains(&&*p.name)).cloned().collect();
        self.later.push(Later { dir, what, properties, is_old });
    }

    /// Sets what was remembered.
    pub fn set(&mut self) -> Result<()> {
        for group in std::mem::take(&mut self.later) {
            for p in &group.properties {
                check(p)?;
                self.property(&group.dir.join(&p.name), p, group.is_old).map_err(call(cannot_set(p, &group.what)))?;
            }
        }
        Ok(())
    }

    fn property(&mut self, path: &Path, p: &pb::CgroupPropEntry, is_old: bool) -> io::Result<()> {
        match (&*p.name, &*p.value) {
            ("freezer.state", "FROZEN" | "FREEZING") => {
                self.freeze.push((path.to_owned(), "FROZEN".into()));
                return Ok(());
            }
            ("freezer.state", _) => return Ok(()),
            ("cgroup.freeze", "1") => self.freeze.push((path.to_owned(), "1".into())),
            _ => {}
        }
        if let Some(perms) = &p.perms {
            self.permit(path, perms, is_old)?;
        }
        if matches!(&*p.name, PROCS | TASKS | "cgroup.freeze") {
            return Ok(());
        }
        let before = read(path);
        if let Some(before) = before.as_ref().filter(|b| is_old && **b != p.value) {
            self.undo.push(Undo::Set(path.to_owned(), before.clone()));
        }
        set(path, &p.name, before.as_deref().unwrap_or(""), &p.value)
    }

    /// Nothing is taken back any more; groups that were frozen are.
    pub fn keep(&mut self) {
        self.undo.clear();
        for (path, value) in self.freeze.drain(..) {
            write(&path, &value).unwrap_or_else(|e| tracing::warn!("cannot freeze a control group: {e}"));
        }
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        let end = Instant::now() + LEAVING;
        while let Some(undo) = self.undo.pop() {
            let undone = match &undo {
                Undo::Made(dir) => loop {
                    match fs::remove_dir(dir) {
                        Err(e) if e.raw_os_error() == Some(libc::EBUSY) && Instant::now() < end => {
                            std::thread::sleep(Duration::from_millis(2));
                        }
                        other => break other,
                    }
                },
                Undo::Permitted(path, perms) => fs::metadata(path)
                    .and_then(|m| permit(path, &pb::CgroupPerms { mode: m.mode(), uid: m.uid(), gid: m.gid() }, perms)),
                Undo::Set(path, value) => {
                    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("");
                    set(path, name, read(path).as_deref().unwrap_or(""), value)
                }
            };
            undone.unwrap_or_else(|e| tracing::warn!("{undo:?} cannot be taken back: {e}"));
        }
    }
}

fn cannot_set(p: &pb::CgroupPropEntry, what: &str) -> String {
    format!("cannot set {} of {what} to {:?} (--manage-cgroups=none leaves properties alone)", p.name, p.value)
}

fn check(p: &pb::CgroupPropEntry) -> Result<()> {
    if p.name.is_empty() || p.name.contains('/') || p.name == ".." {
        return Err(invalid!("cgroup.img: {:?} is no name of a property", p.name));
    }
    Ok(())
}

fn same(a: &pb::CgroupPerms, b: &pb::CgroupPerms) -> bool {
    (a.uid, a.gid, a.mode & 0o7777) == (b.uid, b.gid, b.mode & 0o7777)
}

fn permit(path: &Path, before: &pb::CgroupPerms, perms: &pb::CgroupPerms) -> io::Result<()> {
    if (before.uid, before.gid) != (perms.uid, perms.gid) {
        std::os::unix::fs::chown(path, Some(perms.uid), Some(perms.gid))?;
    }
    if before.mode & 0o7777 != perms.mode & 0o7777 {
        fs::set_permissions(path, Permissions::from_mode(perms.mode & 0o7777))?;
    }
    Ok(())
}

fn read(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.strip_suffix('\n').unwrap_or(&text).to_owned())
}

/// Writes a value at once, unless it is there already. An empty one cannot be written.
fn write(path: &Path, value: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).open(path)?;
    if value.is_empty() || read(path).is_some_and(|before| before == value) {
        return Ok(());
    }
    file.write_all(value.as_bytes())
}

/// Sets a property whose value was `before`.
fn set(path: &Path, name: &str, before: &str, value: &str) -> io::Result<()> {
    match name {
        "net_prio.ifpriomap" => {
            // One interface a call; there may be others here than there were.
            for line in value.lines().filter(|line| !before.lines().any(|b| b == *line)) {
                write(path, line).unwrap_or_else(|e| tracing::warn!("cannot set the priority {line:?}: {e}"));
            }
            Ok(())
        }
        "cgroup.subtree_control" => {
            let words = |text: &'_ str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
            let (before, wanted) = (words(before), words(value));
            let gone = before.iter().filter(|c| !wanted.contains(c)).map(|c| format!("-{c}"));
            let new = wanted.iter().filter(|c| !before.contains(c)).map(|c| format!("+{c}"));
            write(path, &gone.chain(new).collect::<Vec<_>>().join(" "))
        }
        _ => write(path, value),
    }
}

/// Nothing is allowed but what is listed, one entry a call.
fn devices(dir: &Path, list: &str) -> io::Result<()> {
    let (deny, allow) = (dir.join("devices.deny"), dir.join("devices.allow"));
    OpenOptions::new().write(true).open(deny)?.write_all(b"a")?;
    list.lines().try_for_each(|line| OpenOptions::new().write(true).open(&allow)?.write_all(line.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prop(name: &str, value: &str) -> pb::CgroupPropEntry {
        pb::CgroupPropEntry { name: name.into(), value: value.into(), perms: None }
    }

    /// An ordinary directory does for a group, as long as nothing but files is written.
    fn directory(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("dormouse-{name}-{}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        dir
    }

    #[test]
    fn what_was_changed_and_made_is_taken_back() {
        let dir = directory("cgroup-undo");
        fs::write(dir.join("pids.max"), "max").unwrap();
        let mut settings = Settings::default();
        settings.make(dir.join("made")).unwrap();
        let properties = [prop("pids.max", "7"), prop("cpuset.cpus", "0")];
        settings.later(dir.clone(), "group".into(), &properties, true);
        settings.set().unwrap();
        assert_eq!(fs::read_to_string(dir.join("pids.max")).unwrap(), "7ax", "written as to a group: at once");
        drop(settings);
        assert_eq!(fs::read_to_string(dir.join("pids.max")).unwrap(), "max");
        assert!(!dir.join("made").exists() && !dir.join("cpuset.cpus").exists());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_property_is_a_file_of_its_group() {
        let mut settings = Settings::default();
        settings.later("/nowhere".into(), "group".into(), &[prop("../x", "1")], false);
        assert!(settings.set().unwrap_err().to_string().contains("no name of a property"));
        settings.later("/nowhere".into(), "group".into(), &[prop("pids.max", "1")], false);
        let message = settings.set().unwrap_err().to_string();
        assert!(message.contains("pids.max of group") && message.contains("--manage-cgroups"), "{message}");
    }
}
