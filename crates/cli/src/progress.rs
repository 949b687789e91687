//! A short line on a terminal while a dump runs: how long it has taken, and how many pages are in the images.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, SigmaskHow};

/// How often the line is written anew, and how long nothing is written at first.
const INTERVAL: Duration = Duration::from_millis(250);

/// The line; it disappears with this value.
pub struct Progress {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Progress {
    /// Begins a line for the dump of `pid` into `images`. Its thread takes no signals: they are for the main thread,
    /// whose system calls they must interrupt.
    pub fn start(pid: i32, images: PathBuf) -> Progress {
        let (stop, stopped) = channel::<()>();
        let start = Instant::now();
        let show = move || {
            while stopped.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
                let (seconds, bytes) = (start.elapsed().as_secs_f32(), bytes_of_pages(&images));
                let mut terminal = std::io::stderr().lock();
                // A terminal that went away is no reason to fail.
                let _ = write!(terminal, "\r\x1b[Kdumping pid {pid}: {seconds:.1} s, {} of pages", size(bytes));
            }
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        };
        let mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK);
        let thread = std::thread::Builder::new().name("progress".into()).spawn(show).ok();
        if let Ok(mask) = mask {
            // Cannot fail: it was the mask a moment ago.
            let _ = mask.thread_set_mask();
        }
        Progress { stop: Some(stop), thread }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It cannot panic; and if it did, the line is all that is lost.
            let _ = thread.join();
        }
    }
}

fn bytes_of_pages(images: &Path) -> u64 {
    let entries = std::fs::read_dir(images).into_iter().flatten().flatten();
    let pages = entries.filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"pages-"));
    pages.filter_map(|entry| entry.metadata().ok()).map(|meta| meta.len()).sum()
}

/// Bytes for people: `512 B`, `1.5 KiB`, `3.2 GiB`.
pub fn size(bytes: u64) -> String {
    let (mut value, mut units) = (bytes as f64, ["KiB", "MiB", "GiB", "TiB"].iter());
    let mut unit = "B";
    while value >= 1000.0 {
        let Some(next) = units.next() else { break };
        (value, unit) = (value / 1024.0, next);
    }
    if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") }
}

/// Microseconds for people: `0.08 ms`, `12.3 ms`, `2.50 s`.
pub fn time(us: u64) -> String {
    match us {
        0..1_000 => format!("{:.2} ms", us as f64 / 1e3),
        1_000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        _ => format!("{:.2} s", us as f64 / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_for_people() {
        assert_eq!(
            [0, 999, 1024, 1536, 5 << 20, 3 << 30].map(size),
            ["0 B", "999 B", "1.0 KiB", "1.5 KiB", "5.0 MiB", "3.0 GiB"]
        );
        assert_eq!([80, 12_340, 2_500_000].map(time), ["0.08 ms", "12.3 ms", "2.50 s"]);
    }
}
