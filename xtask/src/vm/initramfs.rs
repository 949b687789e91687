//! What the machine's first and only file system holds, and the scripts that bring the machine up.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::Part;
use super::cpio::Archive;
use super::kernel::{Kernel, WANTED};

/// Where the list of expected skips is in the machine.
pub(super) const SKIPS: &str = "/etc/skips.txt";

/// Precedes the harness's exit code on the console.
pub(super) const END: &str = "dormouse-vm-exit:";

/// What goes in.
pub(super) struct Parts<'a> {
    pub kernel: &'a Kernel,
    pub busybox: &'a Path,
    /// The binary under test.
    pub bin: &'a Path,
    /// `dormouse-e2e`.
    pub harness: &'a Path,
    /// Directory with the test programs.
    pub programs: &'a Path,
    pub skips: &'a Path,
}

/// The kernel's own root cannot be moved or pivoted, unlike any root that users have: so everything goes to a tmpfs.
const FIRST: &str = "#!/bin/busybox sh
/bin/busybox mkdir /new
/bin/busybox mount -t tmpfs -o size=90%,mode=755 tmpfs /new
/bin/busybox cp -a /bin /dev /etc /lib /programs /proc /root /run /sbin /sys /tmp /new
exec /bin/busybox switch_root /new /sbin/init
";

const SECOND: &str = "#!/bin/busybox sh
export PATH=/bin:/sbin HOME=/root
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=1777,size=90% tmpfs /tmp
mount -t tmpfs -o mode=755 tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
hostname dormouse-vm
ip link set lo up
for module in @MODULES@; do
	modprobe -q $module
done
ulimit -c 0
@BEFORE@
read up idle < /proc/uptime
echo \"kernel $(uname -r), $(nproc) processors, up after $up s\"
dmesg -c > /dev/null
/bin/dormouse-e2e @HARNESS@ < /dev/null
code=$?
[ $code = 0 ] || dmesg | tail -n 40
@AFTER@
echo '@END@' $code
poweroff -f
";

/// Images go to another machine with the directories of their tests, as an archive that begins where the disk does. Numbers
/// of processes differ, so that those of the first machine are free in the second.
fn around(part: Option<Part>) -> (&'static str, &'static str) {
    match part {
        None => ("", ""),
        Some(Part::Sleep) => {
            ("echo 1000 > /proc/sys/kernel/ns_last_pid", "tar -C / -cf /dev/vda tmp/e2e && sync || code=3")
        }
        Some(Part::Wake) => ("tar -C / -xf /dev/vda\necho 20000 > /proc/sys/kernel/ns_last_pid", ""),
    }
}

/// Writes the archive to `file`.
///
/// # Errors
/// A part cannot be read.
pub(super) fn write(file: &Path, parts: &Parts<'_>, harness: &[String], part: Option<Part>) -> Result<()> {
    let mut archive = Archive::default();
    for dir in ["bin", "dev", "etc", "lib", "programs", "proc", "root", "run", "sbin", "sys", "tmp"] {
        archive.directory(dir);
    }
    archive.device("dev/console", 5, 1);
    archive.device("dev/null", 1, 3);
    archive.program("bin/busybox", &read(parts.busybox)?);
    archive.link("bin/sh", "busybox");
    archive.program("init", FIRST.as_bytes());
    let words: Vec<_> = harness.iter().map(|word| quoted(word)).collect();
    let (before, after) = around(part);
    let second = SECOND.replace("@MODULES@", &WANTED.join(" ")).replace("@HARNESS@", &words.join(" "));
    let second = second.replace("@END@", END).replace("@BEFORE@", before).replace("@AFTER@", after);
    archive.program("sbin/init", second.as_bytes());
    archive.program("bin/dormouse", &read(parts.bin)?);
    archive.program("bin/dormouse-e2e", &read(parts.harness)?);
    for entry in fs::read_dir(parts.programs)? {
        let entry = entry?;
        archive.program(&format!("programs/{}", entry.file_name().display()), &read(&entry.path())?);
    }
    archive.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n");
    archive.file("etc/group", b"root:x:0:\ntty:x:5:\nnogroup:x:65534:\n");
    archive.file("etc/hosts", b"127.0.0.1 localhost\n::1 localhost\n");
    archive.file(SKIPS, &fs::read(parts.skips).unwrap_or_default());
    modules(&mut archive, parts.kernel)?;
    fs::write(file, archive.finish()).with_context(|| format!("cannot write {}", file.display()))
}

fn modules(archive: &mut Archive, kernel: &Kernel) -> Result<()> {
    let inside = format!("lib/modules/{}", kernel.release);
    let outside = kernel.base.join(&inside);
    let mut made = vec!["lib".to_owned()];
    let index = ["modules.dep", "modules.builtin"].map(str::to_owned);
    for path in index.iter().chain(&kernel.modules) {
        let path = format!("{inside}/{path}");
        for (slash, _) in path.match_indices('/') {
            if !made.iter().any(|m| *m == path[..slash]) {
                made.push(path[..slash].to_owned());
                archive.directory(&path[..slash]);
            }
        }
        archive.file(&path, &read(&outside.join(&path[inside.len() + 1..]))?);
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// A word for the shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::quoted;

    #[test]
    fn words_survive_the_shell() {
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("it's"), "'it'\\''s'");
    }
}
