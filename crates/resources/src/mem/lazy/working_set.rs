//! Which pages lazy restores were asked for, in order, so that the next one brings them first. It is only an order: whatever
//! is in a record, all pages come, each once and where it belongs. See docs/decisions/0011-working-set.md.

use std::collections::BTreeMap;

use dormouse_images::{ImageDir, ImageError, ImageKind, pb};
use dormouse_kernel::Session;

use super::{PAGE, Todo};

/// Most stretches in a record: half a mebibyte in memory, less in the file.
const MOST: usize = 1 << 15;
/// Stretches in one message of the image.
const IN_MESSAGE: usize = 4096;
/// A larger file holds something else.
const LARGEST: u64 = 4 << 20;
/// How many stretches back a page may still join one: threads take turns, and the order of so few does not matter.
const BACK: usize = 8;
/// Most pages of a stretch that grows towards lower addresses, since it is brought from its beginning.
const BACKWARDS: u64 = 16;

/// Pages of a task that follow each other, by their addresses at the dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// The task's pid in the images.
    pub pid: i32,
    pages: u32,
    /// First address.
    pub start: u64,
}

impl Stretch {
    fn new(pid: i32, start: u64, end: u64) -> Self {
        Self { pid, pages: ((end - start) / PAGE).try_into().unwrap_or(u32::MAX), start }
    }

    /// The address behind it.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(u64::from(self.pages) * PAGE)
    }
}

fn pages(list: &[Stretch]) -> u64 {
    list.iter().map(|s| u64::from(s.pages)).sum()
}

/// What becomes of a record after a restore.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// It is as good as before.
    Keep,
    /// It is this from now on, and had so many pages when it was learned.
    Write(Vec<Stretch>, u64),
    /// It says little any more, and the next restore learns a new one.
    Forget,
}

/// The record of restores before this one, and what this one adds.
#[derive(Debug)]
pub struct WorkingSet {
    checkpoint: Option<String>,
    /// How many pages there were when the record was learned.
    learned: u64,
    known: Vec<Stretch>,
    /// Which of these comes next.
    at: usize,
    asked: Vec<Stretch>,
}

impl WorkingSet {
    /// Reads the record of a directory, if it has one of this checkpoint. `todo` gives the pages of a task that are to come. A
    /// record that cannot be read is told of and is none.
    pub fn read<'a>(images: &ImageDir, todo: impl Fn(i32) -> Option<&'a Todo>) -> Self {
        let mut set = Self { checkpoint: None, learned: 0, known: Vec::new(), at: 0, asked: Vec::new() };
        set.checkpoint = checkpoint(images);
        match read(images) {
            Ok(Some(messages)) => set.take(&messages, todo),
            Ok(None) => {}
            Err(why) => tracing::warn!("{why}; pages come in the order of their addresses, and a new record is made"),
        }
        set
    }

    /// Takes what a record says of pages that there are.
    fn take<'a>(&mut self, messages: &[pb::WorkingSet], todo: impl Fn(i32) -> Option<&'a Todo>) {
        let Some(first) = messages.first() else { return };
        if first.checkpoint != self.checkpoint {
            tracing::info!("The working set is that of another checkpoint, and is passed over");
            return;
        }
        for message in messages {
            for ((pid, start), pages) in message.pids.iter().zip(&message.starts).zip(&message.pages) {
                let pid = i32::try_from(*pid).unwrap_or(-1);
                let Some(todo) = todo(pid) else { continue };
                let end = start.saturating_add(u64::from(*pages) * PAGE);
                let room = MOST - self.known.len();
                let there = todo.within(*start, end).take(room);
                self.known.extend(there.map(|(from, len, _)| Stretch::new(pid, from, from + len)));
            }
        }
        let all = pages(&self.known);
        self.learned = first.learned().min(all);
        if all > 0 {
            tracing::info!("The working set of the last run comes first: {all} pages in {} pieces", self.known.len());
        }
    }

    /// What is to be brought next, if anything is.
    pub fn next(&self) -> Option<Stretch> {
        self.known.get(self.at).copied()
    }

    /// All of that is there, or has gone.
    pub fn advance(&mut self) {
        self.at += 1;
        if self.at == self.known.len() {
            tracing::info!("The working set is there");
        }
    }

    /// Somebody waited for a page, and so many bytes came.
    pub fn asked(&mut self, pid: i32, start: u64, len: u64) {
        let end = start + len;
        for last in self.asked.iter_mut().rev().take(BACK).filter(|last| last.pid == pid) {
            if last.end() == start && u32::try_from((end - last.start) / PAGE).is_ok() {
                *last = Stretch::new(pid, last.start, end);
                return;
            }
            if end == last.start && last.end() - start <= BACKWARDS * PAGE {
                *last = Stretch::new(pid, start, last.end());
                return;
            }
        }
        if self.asked.len() < MOST {
            self.asked.push(Stretch::new(pid, start, end));
        }
    }

    /// Writes what the next restore is to know. It is no failure if that cannot be written.
    pub fn write(&self, images: &ImageDir) {
        let (list, learned) = match self.outcome() {
            Next::Keep => return,
            Next::Forget => {
                match images.remove(ImageKind::DormouseWorkingSet, 0) {
                    Ok(()) => tracing::info!("The working set has become another one; the next restore learns it anew"),
                    Err(error) => tracing::info!("An old working set stays: {error}"),
                }
                return;
            }
            Next::Write(list, learned) => (list, learned),
        };
        if checkpoint(images) != self.checkpoint {
            tracing::info!("There is another checkpoint in the directory by now, so no working set is written");
            return;
        }
        let Ok(session) = Session::new() else { return };
        let messages = messages(&list, self.checkpoint.clone(), learned);
        match images.replace(ImageKind::DormouseWorkingSet, 0, &session.hex(), &messages) {
            Ok(()) => tracing::info!("Wrote the working set: {} pages in {} pieces", pages(&list), list.len()),
            Err(error) => tracing::info!("The working set is not kept: {error}"),
        }
    }

    /// Pages that were brought first are never asked for, so they stay, and what was asked for besides comes behind them. If
    /// that was more, the record is a new one. One that has doubled little by little is forgotten: much of it may be old.
    fn outcome(&self) -> Next {
        let mut list = without(&self.asked, &self.known);
        let (old, new) = (pages(&self.known), pages(&list));
        if new == 0 {
            return Next::Keep;
        }
        if self.known.len() + list.len() > MOST {
            // No room for both.
            return if new < old { Next::Keep } else { Next::Write(list, new) };
        }
        if new < old && old + new > 2 * self.learned {
            return Next::Forget;
        }
        list.splice(0..0, self.known.iter().copied());
        Next::Write(list, if new < old { self.learned } else { old + new })
    }
}

/// The parts of `asked` that are not in `known`, in order, each once.
fn without(asked: &[Stretch], known: &[Stretch]) -> Vec<Stretch> {
    let mut seen: BTreeMap<(i32, u64), u64> = BTreeMap::new();
    let mut left = Vec::new();
    for (s, is_new) in known.iter().map(|s| (s, false)).chain(asked.iter().map(|s| (s, true))) {
        let mut at = s.start;
        let (mut first, mut last) = (s.start, s.end());
        let before = seen.range(..=(s.pid, s.start)).next_back();
        let before = before.filter(|((pid, _), end)| *pid == s.pid && **end >= s.start).map(|(key, _)| *key);
        let inside = seen.range((s.pid, s.start)..=(s.pid, s.end())).map(|(key, _)| *key);
        let mut keys: Vec<(i32, u64)> = before.into_iter().chain(inside).collect();
        keys.dedup();
        for key in keys {
            let Some(end) = seen.remove(&key) else { continue };
            if at < key.1 && is_new {
                left.push(Stretch::new(s.pid, at, key.1.min(s.end())));
            }
            at = at.max(end);
            (first, last) = (first.min(key.1), last.max(end));
        }
        if at < s.end() && is_new {
            left.push(Stretch::new(s.pid, at, s.end()));
        }
        seen.insert((s.pid, first), last);
    }
    left
}

/// What tells a checkpoint from others that were in its directory.
fn checkpoint(images: &ImageDir) -> Option<String> {
    images.read_one::<pb::InventoryEntry>(ImageKind::Inventory, 0).ok()?.dump_criu_run_id
}

fn read(images: &ImageDir) -> Result<Option<Vec<pb::WorkingSet>>, String> {
    let told = |error: ImageError| format!("the working set of the last run cannot be used: {error}");
    let size = match images.open_file(ImageKind::DormouseWorkingSet, 0) {
        Err(ImageError::Missing { .. }) => return Ok(None),
        file => file.map_err(told)?.metadata().map_or(0, |m| m.len()),
    };
    let name = ImageKind::DormouseWorkingSet.file_name(0);
    if size > LARGEST {
        return Err(format!("{name} has {size} bytes, which is too much for a working set"));
    }
    let messages: Vec<pb::WorkingSet> = images.read_all(ImageKind::DormouseWorkingSet, 0).map_err(told)?;
    let fits = |m: &pb::WorkingSet| {
        m.pids.len() == m.starts.len() && m.pids.len() == m.pages.len() && m.starts.iter().all(|s| s % PAGE == 0)
    };
    if messages.iter().all(fits) { Ok(Some(messages)) } else { Err(format!("{name} is damaged")) }
}

fn messages(list: &[Stretch], checkpoint: Option<String>, learned: u64) -> Vec<pb::WorkingSet> {
    let mut messages: Vec<pb::WorkingSet> = list
        .chunks(IN_MESSAGE)
        .map(|part| pb::WorkingSet {
            checkpoint: None,
            learned: None,
            pids: part.iter().map(|s| s.pid.cast_unsigned()).collect(),
            starts: part.iter().map(|s| s.start).collect(),
            pages: part.iter().map(|s| s.pages).collect(),
        })
        .collect();
    if let Some(first) = messages.first_mut() {
        first.checkpoint = checkpoint;
        first.learned = Some(learned);
    }
    messages
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(known: &[(i32, u64, u64)], learned: u64) -> WorkingSet {
        let known: Vec<Stretch> = known.iter().map(|(pid, start, end)| Stretch::new(*pid, *start, *end)).collect();
        WorkingSet { checkpoint: Some("this".into()), learned, known, at: 0, asked: Vec::new() }
    }

    fn list(stretches: &[Stretch]) -> Vec<(i32, u64, u64)> {
        stretches.iter().map(|s| (s.pid, s.start, s.end())).collect()
    }

    fn written(set: &WorkingSet) -> (Vec<(i32, u64, u64)>, u64) {
        match set.outcome() {
            Next::Write(all, learned) => (list(&all), learned),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_asked_for_is_kept_in_order_and_joined_where_the_order_allows() {
        let mut s = set(&[], 0);
        for (pid, page, pages) in [(1, 32, 16), (2, 1, 1), (1, 48, 16), (2, 2, 1), (1, 31, 1), (1, 8, 1), (1, 7, 1)] {
            s.asked(pid, page * PAGE, pages * PAGE);
        }
        // The page before a long stretch does not wait for all of it.
        let want = [(1, 32, 64), (2, 1, 3), (1, 31, 32), (1, 7, 9)];
        assert_eq!(list(&s.asked), want.map(|(pid, from, to)| (pid, from * PAGE, to * PAGE)));
        for page in (0..40).rev() {
            s.asked(3, page * PAGE, PAGE);
        }
        let backwards = [(3, 24, 40), (3, 8, 24), (3, 0, 8)].map(|(pid, from, to)| (pid, from * PAGE, to * PAGE));
        assert_eq!(list(&s.asked[4..]), backwards);
    }

    #[test]
    fn a_record_has_an_end() {
        let mut s = set(&[], 0);
        for i in 0..2 * MOST as u64 {
            s.asked(1, i * 2 * PAGE, PAGE);
        }
        assert_eq!(s.asked.len(), MOST);
        let (all, learned) = written(&s);
        assert_eq!((all.len(), learned), (MOST, MOST as u64));
        // What has no room for a few more stays as it is, and what says little is replaced.
        let mut full = set(&all, learned);
        full.asked(9, 0, 5 * PAGE);
        assert_eq!(full.outcome(), Next::Keep);
        full.asked(9, 5 * PAGE, learned * PAGE);
        assert_eq!(written(&full), (vec![(9, 0, (learned + 5) * PAGE)], learned + 5));
        // Its file is one that is read again.
        let (path, images) = dir("full");
        let mut todo = Todo::default();
        todo.add(0, 4 * MOST as u64 * PAGE, 0);
        s.write(&images);
        let size = images.open_file(ImageKind::DormouseWorkingSet, 0).expect("open").metadata().expect("stat").len();
        assert!(size < LARGEST / 4, "{size}");
        let again = WorkingSet::read(&images, |_| Some(&todo));
        assert_eq!((list(&again.known) == all, again.learned), (true, learned));
        std::fs::remove_dir_all(&path).expect("clean up");
    }

    #[test]
    fn new_pages_come_behind_the_known_ones_and_each_only_once() {
        let mut s = set(&[(1, 0x10000, 0x20000), (1, 0x4000, 0x6000)], 18);
        // Asked for before it was brought: known. The next one is half known, and asked for twice, by a child too.
        s.asked(1, 0x12000, 0x1000);
        assert_eq!(s.outcome(), Next::Keep);
        s.asked(1, 0x3000, 0x4000);
        s.asked(2, 0x3000, 0x1000);
        s.asked(1, 0x3000, 0x4000);
        let more = [(1, 0x3000, 0x4000), (1, 0x6000, 0x7000), (2, 0x3000, 0x4000)];
        let all: Vec<_> = list(&s.known).into_iter().chain(more).collect();
        assert_eq!(written(&s), (all, 18));
    }

    #[test]
    fn pages_known_by_pieces_are_found_to_be_known() {
        let mut s = set(&[(1, 0x1000, 0x2000), (1, 0x3000, 0x4000), (1, 0x2000, 0x3000), (1, 0x2000, 0x6000)], 7);
        s.asked(1, 0x1000, 0x5000);
        assert_eq!(s.outcome(), Next::Keep);
        s.asked(1, 0, 0x8000);
        let (all, _) = written(&s);
        assert_eq!(all[4..], [(1, 0, 0x1000), (1, 0x6000, 0x8000)]);
    }

    #[test]
    fn a_record_that_grew_to_twice_its_size_is_learned_anew() {
        let mut s = set(&[(1, 0, 100 * PAGE)], 60);
        s.asked(1, 200 * PAGE, 20 * PAGE);
        assert_eq!(written(&s).1, 60);
        s.asked(1, 220 * PAGE, PAGE);
        assert_eq!(s.outcome(), Next::Forget);
        // More than there was: this is what is learned.
        s.asked(1, 221 * PAGE, 79 * PAGE);
        assert_eq!(written(&s), (vec![(1, 0, 100 * PAGE), (1, 200 * PAGE, 300 * PAGE)], 200));
    }

    /// A directory with an inventory of this name.
    fn dir(name: &str) -> (std::path::PathBuf, ImageDir) {
        let path = std::env::temp_dir().join(format!("dormouse-working-set-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        let images = ImageDir::create(&path).expect("directory");
        inventory(&images, "this");
        (path, images)
    }

    fn inventory(images: &ImageDir, id: &str) {
        let inventory = pb::InventoryEntry { img_version: 2, dump_criu_run_id: Some(id.into()), ..Default::default() };
        images.write_inventory(&inventory).expect("write");
    }

    #[test]
    fn only_pages_that_there_are_come_out_of_a_file() {
        let (path, images) = dir("file");
        let mut todo = Todo::default();
        todo.add(0x1000, 0x4000, 0x1000);
        todo.add(0x8000, 0x2000, 0x8000);
        let read = || WorkingSet::read(&images, |pid| (pid == 7).then_some(&todo));
        assert!(read().next().is_none());
        let mut first = set(&[], 0);
        for (pid, start, len) in [(7, 0x4000, 0x5000), (8, 0x1000, 0x1000), (7, 0x10_0000, 0x1000), (7, 0x1000, 0x1000)]
        {
            first.asked(pid, start, len);
        }
        first.write(&images);
        let mut again = read();
        assert_eq!(list(&again.known), [(7, 0x4000, 0x5000), (7, 0x8000, 0x9000), (7, 0x1000, 0x2000)]);
        assert_eq!((again.learned, again.next().map(|s| s.start)), (3, Some(0x4000)));
        (0..3).for_each(|_| again.advance());
        assert!(again.next().is_none());
        let names = std::fs::read_dir(&path).expect("list").count();
        assert_eq!(names, 2, "nothing temporary is left");

        // One of a checkpoint that was here before, and one that outlives its checkpoint.
        inventory(&images, "other");
        assert!(read().next().is_none());
        images.remove(ImageKind::DormouseWorkingSet, 0).expect("remove");
        first.write(&images);
        assert!(!images.exists(ImageKind::DormouseWorkingSet, 0).expect("look"));
        std::fs::remove_dir_all(&path).expect("clean up");
    }

    #[test]
    fn damaged_records_are_no_records() {
        let (path, images) = dir("bad");
        let mut todo = Todo::default();
        todo.add(0x1000, 0x4000, 0x1000);
        let good = pb::WorkingSet {
            checkpoint: Some("this".into()),
            learned: Some(u64::MAX),
            pids: vec![7],
            starts: vec![0x1000],
            pages: vec![u32::MAX],
        };
        let load = |messages: &[pb::WorkingSet]| {
            images.write_all(ImageKind::DormouseWorkingSet, 0, messages).expect("write");
            list(&WorkingSet::read(&images, |_| Some(&todo)).known)
        };
        assert_eq!(load(std::slice::from_ref(&good)), [(7, 0x1000, 0x5000)]);
        assert_eq!(load(&[pb::WorkingSet { starts: vec![0x1001], ..good.clone() }]), []);
        assert_eq!(load(&[pb::WorkingSet { pids: vec![], ..good.clone() }]), []);
        assert_eq!(load(&[pb::WorkingSet { starts: vec![u64::MAX - 0xfff], ..good.clone() }]), []);
        assert_eq!(load(&[]), []);
        let many = pb::WorkingSet {
            pids: vec![7; 2 * MOST],
            starts: vec![0x1000; 2 * MOST],
            pages: vec![1; 2 * MOST],
            ..good.clone()
        };
        assert_eq!(load(&[many]).len(), MOST);
        load(&[good]);
        let file = path.join("dormouse-working-set.img");
        let bytes = std::fs::read(&file).expect("read");
        for bad in [&bytes[..bytes.len() - 1], b"", b"other", &vec![0; LARGEST as usize + 1]] {
            std::fs::write(&file, bad).expect("write");
            assert!(read(&images).is_err(), "{} bytes", bad.len());
        }
        std::fs::remove_dir_all(&path).expect("clean up");
    }
}
