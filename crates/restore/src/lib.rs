//! Waking a tree up: read and check the images, plan every task's operations, fork, hand over.
//!
//! The host opens every file description once, makes every shared object, and writes for each process and thread a
//! list of operations into one shared mapping. It forks the root, which runs its list in the restorer blob and forks
//! its children from there; at the end all of them park, the host gives them the registers of the image through
//! ptrace, and lets them go together. Until then every task dies with the host.

#![forbid(unsafe_code)]

mod control;
mod ending;
mod fill;
mod handover;
mod lazy;
mod own;
mod plan;
mod process;

use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::PathBuf;

use dormouse_images::ImageDir;
use dormouse_kernel::Session;
pub use dormouse_resources::{ResourceError, RestoreOptions};
use dormouse_resources::{checkpoint, ns, task};

/// Called at the stages of a restore: the action's name and, once it exists, the root task's pid.
pub type Hook<'a> = &'a dyn Fn(&str, Option<i32>) -> anyhow::Result<()>;

/// Takes the master of a new terminal of the tree's.
pub type TakeMaster<'a> = &'a dyn Fn(BorrowedFd<'_>) -> anyhow::Result<()>;

/// What to restore and how.
pub struct Request<'a> {
    /// Identity of this run.
    pub session: Session,
    /// Directory of the images.
    pub images_dir: PathBuf,
    /// What kinds of resource look at.
    pub options: RestoreOptions,
    /// Leave every task stopped (SIGSTOP) instead of running.
    pub leave_stopped: bool,
    /// Make the root task our sibling instead of our child.
    pub restore_sibling: bool,
    /// Refuse images whose tasks have other rights than an ordinary process of this user: what is restored for a caller
    /// with fewer rights than ours must not be a way to more.
    pub only_user: Option<u32>,
    /// Take pages out of the images once the tree has them.
    pub dedup: bool,
    /// Who serves the pages that come later; with [`RestoreOptions::lazy`].
    pub lazy: Option<&'a std::os::unix::net::UnixStream>,
    /// Takes masters of terminals that were outside of the tree, before the tree is made; an error ends the restore. With
    /// [`RestoreOptions::orphan_pts_master`].
    pub take_master: Option<TakeMaster<'a>>,
    /// Called at "pre-restore", "post-restore", "pre-resume", "post-resume" and others; an error ends the restore,
    /// except after "post-resume".
    pub hooks: Hook<'a>,
}

/// What was restored.
#[derive(Debug, Clone, Copy)]
pub struct Report {
    /// The root task.
    pub root_pid: i32,
    /// Processes, zombies included.
    pub tasks: usize,
    /// Threads, leaders included.
    pub threads: usize,
    /// Pages read from the images.
    pub pages: u64,
    /// Microseconds spent forking and running the plan.
    pub forking_us: u64,
    /// Microseconds in all.
    pub total_us: u64,
}

/// Why a restore failed. Nothing of the tree is left when it is returned.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// An image cannot be read, the images contradict each other, or a resource cannot be made.
    #[error(transparent)]
    Resource(#[from] ResourceError),
    /// A kernel call of the host failed.
    #[error("{what}: {cause}")]
    Call {
        /// Operation and subject.
        what: String,
        /// The kernel's answer.
        cause: std::io::Error,
    },
    /// An operation inside a task failed.
    #[error("pid {pid}: {what}: {cause}{hint}")]
    Task {
        /// The task, as numbered in the image.
        pid: i32,
        /// Operation and subject.
        what: String,
        /// The kernel's answer.
        cause: std::io::Error,
        /// The next step, if one is known.
        hint: &'static str,
    },
    /// A task ended before it was handed over.
    #[error("pid {pid} ended while it was being restored: {how}")]
    Died {
        /// The task.
        pid: i32,
        /// What is known of its end.
        how: String,
    },
    /// A thread could not be handed over.
    #[error(transparent)]
    Infect(#[from] dormouse_infect::InfectError),
    /// A hook failed.
    #[error("{0:#}")]
    Hook(anyhow::Error),
}

impl RestoreError {
    /// An errno for programs, where one fits: `EEXIST` if a pid is taken.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Call { cause, .. } | Self::Task { cause, .. } => cause.raw_os_error(),
            Self::Resource(_) | Self::Died { .. } | Self::Infect(_) | Self::Hook(_) => None,
        }
    }
}

pub(crate) fn call(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> RestoreError {
    let what = what.into();
    move |cause| RestoreError::Call { what, cause }
}

/// Why a terminal cannot be made anew.
const NO_TAKER: &str = "nobody takes the master of the tree's new terminal; ask a service with notify_scripts";

/// Restores the tree of `request.images_dir`.
///
/// # Errors
/// Any step failed; then no process of the tree is left.
pub fn run(request: &Request<'_>) -> Result<Report, RestoreError> {
    let start = std::time::Instant::now();
    checkpoint::verify(&request.images_dir)?;
    if request.options.cpu.image {
        let images = ImageDir::open(&request.images_dir).map_err(ResourceError::from)?;
        dormouse_resources::cpu::check(&images, request.options.cpu)?;
    }
    let image = checkpoint::load(&request.images_dir)?;
    if let Some(uid) = request.only_user {
        task::creds::ordinary(&image, uid)?;
    }
    (request.hooks)("pre-restore", None).map_err(RestoreError::Hook)?;
    ending::wait(&image);
    let away = ns::net::arrive(&image, &request.options)?;
    let hook = |action: &str, root| match &away {
        Some(away) => away.at_home(|| (request.hooks)(action, root))?,
        None => (request.hooks)(action, root),
    };
    let request = &Request {
        hooks: &hook,
        images_dir: request.images_dir.clone(),
        options: request.options.clone(),
        lazy: request.lazy,
        ..*request
    };
    let (plan, mut files, groups) = plan::plan(request, &image)?;
    tracing::info!("planned {} tasks in {} us", image.tasks.len(), start.elapsed().as_micros());
    for master in files.take_orphan_masters() {
        // Ours is closed right away: from here on the terminal lives as long as the caller holds it.
        let take = request.take_master.ok_or_else(|| RestoreError::Hook(anyhow::anyhow!(NO_TAKER)))?;
        take(master.as_fd()).map_err(RestoreError::Hook)?;
    }
    let mut report = handover::execute(request, &image, &plan, (files, groups))?;
    if request.dedup {
        // The tree runs; what fails now costs nothing but space.
        for pages in image.tasks.iter().filter_map(|t| t.pages.as_ref()) {
            dormouse_resources::mem::punch(pages)
                .map(|bytes| tracing::info!("{bytes} bytes of pages taken out of the images"))
                .unwrap_or_else(|e| tracing::warn!("pages stay in the images: {e}"));
        }
    }
    report.total_us = start.elapsed().as_micros() as u64;
    Ok(report)
}
