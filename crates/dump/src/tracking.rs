//! Who was written to since the checkpoint before, and how the next dump will know: see docs/decisions/0005-write-tracking.md.
//!
//! Between two runs the userfaultfds that watch are held by a keeper process, which the sidecar `dormouse-tracker.img`
//! names. A watch that was lost, or is about another checkpoint than the one that is built on, only means that all is saved.

use std::collections::HashMap;
use std::os::fd::AsFd as _;
use std::path::Path;

use dormouse_images::{ImageDir, ImageKind, checksums, pb};
use dormouse_infect::freeze::Tree;
use dormouse_infect::keeper::{self, Item, Keeper};
use dormouse_infect::parasite::Parasite;
use dormouse_kernel::proc::stat;
use dormouse_kernel::{Features, HostPid, Session, Support};
use dormouse_pages::{PageScanner, ProbeFeatures as _, Uffd};
use dormouse_resources::checkpoint::optional;
use dormouse_resources::mem::{self, Increment, PageIds, Watch};
use dormouse_resources::pages_image;

use crate::{Chain, DumpError};

/// Clock ticks a second, in which the kernel tells start times (`USER_HZ`, the same on all architectures).
const TICKS: u64 = 100;

/// By what this kernel tells writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    Protection,
    SoftDirty,
    None,
}

/// The state of a chain of dumps.
pub struct Tracking {
    method: Method,
    /// Watch from now on.
    go_on: bool,
    before: Option<Before>,
    /// The keepers that there were before the tree was stopped.
    keepers: Vec<HostPid>,
    /// Userfaultfds that go to the next keeper, with the signature of the address space.
    next: Vec<(HostPid, u64, Uffd)>,
    /// Processes that soft-dirty bits are watched of.
    soft_dirty: bool,
}

/// The checkpoint before.
struct Before {
    dir: ImageDir,
    tracked: bool,
    /// Boot time in microseconds at which it was made.
    uptime: u64,
    keeper: Option<Keeper>,
    kept: HashMap<HostPid, (u64, Uffd)>,
    /// Its writes are told by soft-dirty bits.
    soft_dirty: bool,
    /// The version of its format.
    version: u32,
}

/// The images directory of a run. A checkpoint that was there before is none from now on, whatever happens.
///
/// # Errors
/// It is not there, or may not be written to.
pub fn empty_directory(path: &Path) -> Result<ImageDir, DumpError> {
    let images = ImageDir::open(path)?;
    images.remove(ImageKind::Inventory, 0)?;
    images.remove(ImageKind::DormouseChecksums, 0)?;
    images.remove(ImageKind::DormouseWorkingSet, 0)?;
    Ok(images)
}

impl Tracking {
    /// Links `images` to the checkpoint before and looks for its watch. `goes_on` if the tree will.
    ///
    /// # Errors
    /// There is no such checkpoint, or it cannot be read.
    pub fn begin(images: &ImageDir, chain: &Chain, goes_on: bool) -> Result<Self, DumpError> {
        if chain.checksums && chain.server.is_some() {
            return Err(DumpError::Impossible(
                "--checksums with --page-server is not there yet, since the pages are elsewhere; leave out one of them"
                    .into(),
            ));
        }
        images.unlink_parent()?;
        images.remove(ImageKind::DormouseTracker, 0)?;
        let method = if chain.track { method() } else { Method::None };
        if chain.track && method == Method::None {
            tracing::warn!(
                "this kernel does not tell which pages are written to (Linux 6.7, or CONFIG_MEM_SOFT_DIRTY): all are saved"
            );
        }
        if method == Method::Protection {
            raise_limit();
            PageScanner::try_out();
        }
        let mut before = None;
        if let Some(path) = &chain.before {
            images.link_parent(path)?;
            let dir = images.parent()?.ok_or_else(|| DumpError::Impossible("the link \"parent\" vanished".into()))?;
            before = Some(Before::open(dir, chain.track)?);
        }
        let go_on = chain.track && goes_on && method != Method::None;
        // Looked for now, while nothing waits. One that begins later is that of a dump beside this one, and all is saved then.
        let keepers = if go_on && method == Method::Protection { Keeper::all() } else { Vec::new() };
        Ok(Self { method, go_on, before, keepers, next: Vec::new(), soft_dirty: false })
    }

    /// The version of the format of this dump: checkpoints before it may have compressed pages, too.
    pub fn version(&self, packed: bool) -> u32 {
        pages_image::version(packed, self.before.as_ref().map(|b| b.version))
    }

    /// Whether writes can be told at all.
    pub fn is_possible(&self) -> bool {
        self.method != Method::None
    }

    /// Ends the watches of earlier runs over the processes of the tree, if this run begins new ones. Called once all of it
    /// is stopped: from here on a run that fails leaves no watch, and the next one saves everything.
    ///
    /// # Errors
    /// A keeper may not be ended.
    pub fn take_over(&mut self, tree: &Tree) -> Result<(), DumpError> {
        if !self.go_on || self.method != Method::Protection {
            return Ok(());
        }
        let pids: Vec<HostPid> = tree.tasks.iter().filter(|t| !t.zombie).map(|t| t.pid).collect();
        let known = self.before.as_mut().and_then(|b| b.keeper.take());
        let is_known = |keeper: &Keeper| known.as_ref().is_some_and(|k| k.pid() == keeper.pid());
        let strays: Vec<Keeper> =
            Keeper::all_of(&self.keepers, &pids).into_iter().filter(|keeper| !is_known(keeper)).collect();
        // Where we hold all that one does, to use it further, nobody has to wait until it is gone.
        let holds_all = |keeper: &Keeper| self.before.as_ref().is_some_and(|b| b.kept.len() == keeper.count());
        let known = known.into_iter().map(|keeper| (!holds_all(&keeper), keeper));
        for (wait, keeper) in known.chain(strays.into_iter().map(|keeper| (true, keeper))) {
            let what = format!("cannot end pid {}, which watches writes for the dump before", keeper.pid());
            let ended = if wait { keeper.end() } else { keeper.kill() };
            ended.map_err(|cause| DumpError::Call { what, cause })?;
        }
        Ok(())
    }

    /// Needs the task a new userfaultfd, which only a parasite can make?
    pub fn needs_parasite(&self, pid: HostPid) -> bool {
        self.go_on
            && self.method == Method::Protection
            && self.before.as_ref().is_none_or(|b| b.watch_of(pid).is_none())
    }

    /// What is known of a stopped task.
    ///
    /// # Errors
    /// An image of the checkpoint before is damaged, or the process is gone.
    pub fn task(
        &mut self,
        pid: HostPid,
        parasite: Option<&mut Parasite<'_>>,
        ids: &PageIds,
    ) -> Result<Increment, DumpError> {
        let mut increment = Increment { go_on: self.go_on, ..Increment::default() };
        if let Some(before) = self.before.as_mut().filter(|b| b.tracked) {
            increment.before = mem::held_by(&before.dir, pid, ids)?;
            match self.method {
                Method::Protection => {
                    if before.watch_of(pid).is_some() {
                        increment.watch = before.kept.remove(&pid).map(|(_, uffd)| Watch::Protection(uffd));
                        increment.since_before = true;
                    }
                }
                Method::SoftDirty => increment.since_before = before.soft_dirty && before.knew(pid)?,
                Method::None => {}
            }
        }
        match (self.method, parasite) {
            (Method::SoftDirty, _) => increment.watch = Some(Watch::SoftDirty),
            (Method::Protection, Some(parasite)) if self.go_on && increment.watch.is_none() => {
                increment.watch = mem::protection(parasite)?.map(Watch::Protection);
            }
            _ => {}
        }
        if increment.watch.is_none() {
            increment.go_on = false;
        }
        Ok(increment)
    }

    /// The task's pages were looked at.
    pub fn done(&mut self, pid: HostPid, increment: Increment) {
        match increment.watch {
            Some(Watch::Protection(uffd)) if increment.go_on => {
                if let Some(signature) = signature(pid) {
                    self.next.push((pid, signature, uffd));
                }
            }
            Some(Watch::SoftDirty) if increment.go_on => self.soft_dirty = true,
            _ => {}
        }
    }

    /// Leaves the watches to a keeper and names it in `images`.
    ///
    /// # Errors
    /// The keeper cannot be started, or the image not be written.
    pub fn finish(&mut self, images: &ImageDir, session: &Session) -> Result<(), DumpError> {
        if !self.next.is_empty() {
            let copy = |(pid, note, uffd): (HostPid, u64, Uffd)| {
                Ok(Item { pid, fd: uffd.as_fd().try_clone_to_owned()?, note })
            };
            let items: std::io::Result<Vec<Item>> = self.next.drain(..).map(copy).collect();
            let start = || {
                let pid = keeper::start(&keeper_name(&session.hex()), items?)?;
                Ok(pid.and_then(|pid| Some((pid, stat::read(pid).ok()?.starttime))))
            };
            let started = start().map_err(|cause| DumpError::Call {
                what: "cannot start the process that watches writes until the next dump".into(),
                cause,
            })?;
            // If every process has ended meanwhile, there is nothing to watch.
            let Some((pid, start)) = started else { return Ok(()) };
            tracing::info!("pid {pid} watches writes until the next dump");
            let entry =
                pb::TrackerEntry { session: session.hex(), keeper_pid: Some(pid.0 as u32), keeper_start: Some(start) };
            images.write_one(ImageKind::DormouseTracker, 0, &entry)?;
        } else if self.soft_dirty {
            let entry = pb::TrackerEntry { session: session.hex(), ..Default::default() };
            images.write_one(ImageKind::DormouseTracker, 0, &entry)?;
        }
        Ok(())
    }
}

impl Before {
    fn open(dir: ImageDir, track: bool) -> Result<Self, DumpError> {
        let inventory = optional(dir.read_all::<pb::InventoryEntry>(ImageKind::Inventory, 0))?;
        let Some(inventory) = inventory.first() else {
            return Err(DumpError::Impossible(format!(
                "{} holds no complete dump or pre-dump (inventory.img is missing); name another directory with \
                 --prev-images-dir, or leave it out",
                dir.path().display()
            )));
        };
        let uptime = inventory.dump_uptime.unwrap_or(0);
        let entry = optional(dir.read_all::<pb::TrackerEntry>(ImageKind::DormouseTracker, 0))?.into_iter().next();
        let mut this = Self {
            dir,
            tracked: track,
            uptime,
            keeper: None,
            kept: HashMap::new(),
            soft_dirty: false,
            version: inventory.img_version,
        };
        match entry {
            // CRIU has no such image and knows soft-dirty bits only.
            None => this.soft_dirty = true,
            Some(pb::TrackerEntry { session, keeper_pid: Some(pid), keeper_start }) if track => {
                this.keeper = Keeper::find(&keeper_name(&session), HostPid(pid as i32), keeper_start.unwrap_or(0));
                let items = this.keeper.as_ref().map(Keeper::items).unwrap_or_default();
                this.kept = items.into_iter().map(|i| (i.pid, (i.note, Uffd::kept(i.fd)))).collect();
                if this.kept.is_empty() {
                    tracing::warn!(
                        "the watch over writes since {} was lost (a later dump took it over, or its keeper, pid {pid}, \
                         ended): all pages are saved",
                        this.dir.path().display()
                    );
                }
            }
            Some(entry) => this.soft_dirty = entry.keeper_pid.is_none(),
        }
        Ok(this)
    }

    /// The watch over a task, unless it is of a program that the process ran before.
    fn watch_of(&self, pid: HostPid) -> Option<&Uffd> {
        let (note, uffd) = self.kept.get(&pid).filter(|_| self.tracked)?;
        (signature(pid) == Some(*note)).then_some(uffd)
    }

    /// Was the process there when the checkpoint before was made? Its number may be another's by now.
    fn knew(&self, pid: HostPid) -> Result<bool, DumpError> {
        // A tick of doubt on either side counts as no.
        Ok((stat::read(pid)?.starttime + 2) * (1_000_000 / TICKS) < self.uptime)
    }
}

/// Gives back the space of pages that are in `images` anew, and says so.
pub fn dedup(images: &ImageDir) {
    match mem::dedup(images) {
        Ok(bytes) => tracing::info!("{bytes} bytes of pages taken out of the checkpoints before"),
        Err(e) => tracing::warn!("pages that are saved anew stay in the checkpoints before: {e}"),
    }
}

/// One descriptor for each process of the tree, and as many again in the keeper: as many as we may have.
fn raise_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        // Where this is not possible, a descriptor that is missing is an error that says so.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Writes the checksums. The images are complete without them, so that they are missing is no failure.
pub fn sum_up(images: &ImageDir, chain: &Chain) {
    match checksums::write(images, !chain.direct_io) {
        Ok(bytes) => tracing::info!("checksums of {bytes} bytes of images written"),
        Err(e) => tracing::warn!("the images are complete, but there are no checksums of them: {e}"),
    }
}

fn keeper_name(session: &str) -> String {
    format!("dormouse-{session}-keeper")
}

/// What changes when a process runs another program: the places of its code and stack, which are random.
fn signature(pid: HostPid) -> Option<u64> {
    let s = stat::read(pid).ok()?;
    (s.startstack != 0).then(|| s.startstack.rotate_left(20) ^ s.startcode)
}

/// Write protection first: it is this chain's own, and its loss is noticed. Anybody may clear soft-dirty bits.
fn method() -> Method {
    let features = Features::probe();
    let guards_look_like_pages = features.guard_pages == Support::Yes && features.pagemap_scan_guard != Support::Yes;
    if features.userfaultfd_wp_async == Support::Yes && features.pagemap_scan == Support::Yes && !guards_look_like_pages
    {
        Method::Protection
    } else if features.mem_dirty_track == Support::Yes {
        Method::SoftDirty
    } else {
        Method::None
    }
}
