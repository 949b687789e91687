//! An ordinary user whose dormouse has CAP_CHECKPOINT_RESTORE as a file capability (setcap(8)): own trees only.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Result, ensure};
use nix::libc;

use crate::case::{Case, Ran, TOOL_LIMIT, pid_of};
use crate::proc;
use crate::programs;
use crate::report::{Outcome, Test};
use crate::target::{Target, ready};

/// A user without any rights.
pub const USER: u32 = 12345;
/// What is dumped where its kind does not matter.
const PROGRAM: &str = "tree";
/// CAP_CHECKPOINT_RESTORE (capabilities(7)).
const CHECKPOINT_RESTORE: u32 = 40;

/// The tests, which belong to the programs.
pub fn tests() -> Vec<Test> {
    vec![Test::new("rootless/users_dump_and_restore_their_own_trees", own_trees)]
}

/// Starts the program as an ordinary user.
pub fn start_as_user(case: &Case<'_>, program: &str) -> Result<Child> {
    let program = programs::find(case, program)?;
    let mut command = case.command(&program);
    command.arg(&case.dir).uid(USER).gid(USER);
    fs::write(case.path("out"), "")?;
    fs::set_permissions(case.path("out"), fs::Permissions::from_mode(0o666))?;
    let child = case.start(command)?;
    ensure!(programs::await_ready(case)?.is_none(), "the program cannot be set up");
    Ok(child)
}

/// A directory of the user's.
pub fn users_dir(case: &Case<'_>, name: &str) -> Result<PathBuf> {
    let dir = case.path(name);
    fs::create_dir_all(&dir)?;
    chown(&dir, Some(USER), Some(USER))?;
    Ok(dir)
}

fn own_trees(case: &Case<'_>) -> Result<Outcome> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(Outcome::needs("root, to become another user"));
    }
    let bin = case.path("capable");
    fs::copy(&case.args.bin, &bin)?;
    if let Err(error) = give_capability(&bin, CHECKPOINT_RESTORE) {
        return Ok(Outcome::needs(format!("file capabilities ({error})")));
    }
    let child = start_as_user(case, PROGRAM)?;
    let (pid, images) = (pid_of(&child), users_dir(case, "img")?);
    let tree = proc::tree(pid);
    let run = |mut command: Command, name: &str| -> Result<Ran> {
        command.arg("--unprivileged").uid(USER).gid(USER);
        let log = images.join(format!("{name}.log"));
        case.wait_tool(case.start_tool(command, name)?, name, &log, TOOL_LIMIT)
    };
    let ran = run(case.dump_command(&bin, pid, &images, &[])?, "dump")?;
    ensure!(ran.ok(), "dump: {}", ran.errors());
    ensure!(fs::metadata(images.join("inventory.img"))?.uid() == USER, "the images belong to another user");
    case.await_end(tree.keys().copied())?;
    let ran = run(case.restore_command(&bin, &images, &[]), "restore")?;
    ensure!(ran.ok(), "restore: {}", ran.errors());
    case.same_tree(&tree)?;
    programs::ask(case, 1)?;
    let capabilities = proc::status(pid, "CapPrm").unwrap_or_default();
    ensure!(capabilities.trim_start_matches('0').is_empty(), "the tree has capabilities: {capabilities}");
    proc::end(&tree.keys().copied().collect::<Vec<_>>());
    proc::wait_free(tree.keys().copied(), Duration::from_secs(5)).ok();

    // What belongs to others stays theirs.
    let theirs = ready!(Target::restart(case, PROGRAM));
    let ran = run(case.dump_command(&bin, theirs.pid, &images, &[])?, "dump")?;
    ensure!(!ran.ok(), "a tree of root's was dumped");
    theirs.unharmed()?;
    theirs.end();
    Ok(Outcome::PASSED)
}

/// Gives a program a capability that its file carries (`struct vfs_cap_data` of version 2, linux/capability.h).
fn give_capability(program: &Path, capability: u32) -> Result<()> {
    const REVISION_2: u32 = 0x0200_0000;
    const EFFECTIVE: u32 = 1;
    let permitted = 1u64 << capability;
    let words = [REVISION_2 | EFFECTIVE, permitted as u32, 0, (permitted >> 32) as u32, 0];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let path = CString::new(program.as_os_str().as_bytes())?;
    // SAFETY: two strings that end with NUL, and a buffer with its length; the kernel copies them.
    let done = unsafe {
        libc::setxattr(path.as_ptr(), c"security.capability".as_ptr(), bytes.as_ptr().cast(), bytes.len(), 0)
    };
    ensure!(done == 0, "{}", io::Error::last_os_error());
    Ok(())
}
