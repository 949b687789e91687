//! The emulator: starts it, follows its console, and gives it up when it takes too long.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use dormouse_blob_check::Arch;

use super::initramfs::END;
use crate::cmd;

/// Boots and waits for the tests' end; true when they passed.
pub(super) fn run(
    arch: Arch,
    kernel: &Path,
    (initramfs, disk): (&Path, Option<&Path>),
    log: &Path,
    limit: Duration,
) -> Result<bool> {
    let mut command = emulator(arch);
    if let Some(disk) = disk {
        command.arg("-drive").arg(format!("file={},format=raw,if=virtio", disk.display()));
    }
    command.arg("-kernel").arg(kernel).arg("-initrd").arg(initramfs);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    let log_file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    eprintln!("$ {}", cmd::line(&command));
    let mut child = command.spawn().with_context(|| format!("cannot run {}", command.get_program().display()))?;
    let lines = console(&mut child);
    let result = follow(&lines, log_file, limit);
    // By its own handle: it has ended by itself in the good case.
    let _ = child.kill();
    let _ = child.wait();
    match result? {
        Some(0) => Ok(true),
        Some(1) => Ok(false),
        Some(code) => {
            bail!("the harness in the machine ended with code {code}; the console's log is {}", log.display())
        }
        None => bail!("the machine stopped before the tests ended; the console's log is {}", log.display()),
    }
}

fn emulator(arch: Arch) -> Command {
    let (program, machine, cpu, console) = match arch {
        Arch::X86_64 => ("qemu-system-x86_64", "q35", "max", "ttyS0"),
        // Pointer authentication by its real algorithm takes an emulator most of its time.
        Arch::Aarch64 => ("qemu-system-aarch64", "virt", "max,sve=on,pauth-impdef=on", "ttyAMA0"),
    };
    let mut command = cmd::program(program);
    command.args([
        "-M",
        machine,
        "-accel",
        "tcg",
        "-cpu",
        cpu,
        "-m",
        "2G",
        "-smp",
        "2",
        "-display",
        "none",
        "-no-reboot",
    ]);
    command.args(["-nodefaults", "-serial", "stdio", "-append"]);
    command.arg(format!("console={console} panic=-1 quiet loglevel=4 random.trust_cpu=on"));
    command
}

/// The lines of the machine's console, as they come.
fn console(child: &mut Child) -> Receiver<String> {
    let (send, receive) = channel();
    if let Some(out) = child.stdout.take() {
        thread::spawn(move || {
            for line in BufReader::new(out).split(b'\n') {
                let Ok(line) = line else { break };
                let text = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
                if send.send(text).is_err() {
                    break;
                }
            }
        });
    }
    receive
}

/// Shows and keeps the console until the end marker, whose number is returned; nothing when there was none.
fn follow(lines: &Receiver<String>, mut log: File, limit: Duration) -> Result<Option<i32>> {
    let start = Instant::now();
    loop {
        let left = limit.saturating_sub(start.elapsed());
        let line = match lines.recv_timeout(left) {
            Ok(line) => line,
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
            Err(RecvTimeoutError::Timeout) => {
                bail!("the machine did not end within {} minutes; --minutes allows more", limit.as_secs() / 60)
            }
        };
        writeln!(log, "{line}")?;
        if let Some((_, code)) = line.split_once(END) {
            println!("machine ended after {:.0} s", start.elapsed().as_secs_f64());
            return Ok(Some(code.trim().parse().with_context(|| format!("the machine says `{line}`"))?));
        }
        println!("{line}");
    }
}
