//! The command `cpuinfo`: what the CPU can do, written down, or compared with what was written on another machine.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use dormouse_images::ImageDir;
use dormouse_resources::cpu::{self, CpuCaps};

use crate::args::CpuinfoArgs;
use crate::run::{Place, told};

/// `dormouse cpuinfo`
///
/// # Errors
/// The directories or the log are not accessible; what fails later is told here.
pub fn cpuinfo(args: &CpuinfoArgs, notes: &[String]) -> Result<ExitCode> {
    let place = Place::enter(&args.common, notes)?;
    Ok(told(&place, run(args, &place.path)))
}

/// Does it.
///
/// # Errors
/// The image cannot be written or read, or this CPU lacks something; see [`cpu::check`].
pub fn run(args: &CpuinfoArgs, directory: &Path) -> Result<()> {
    let images = ImageDir::open(directory)?;
    if args.action == "dump" {
        return Ok(cpu::dump(&images)?);
    }
    let mut caps = args.cpu_cap.unwrap_or_default();
    if !(caps.fpu || caps.ins || caps.cpu) {
        // As in CRIU: who asks for a check gets one.
        caps = CpuCaps { fpu: true, ins: true, cpu: true, ..caps };
    }
    Ok(cpu::check(&images, caps)?)
}
