//! Pages that come later: which of a task's they are, and where they have moved to while they were still to come.

mod server;
mod working_set;

use std::collections::BTreeMap;

use dormouse_images::pb;

pub use server::{SOCKET, Served, Source, end_orphans, finish, give, give_none, serve};

use super::vma::{VMA_ANON_PRIVATE, clip, flag, is_mapped};
use crate::checkpoint::{PageMap, Run};

const PAGE: u64 = 4096;

/// May pages of this mapping come later? Only those of private anonymous memory in ordinary pages that is not locked.
pub fn can_be_lazy(v: &pb::VmaEntry) -> bool {
    is_mapped(v) && v.status & VMA_ANON_PRIVATE != 0 && v.flags & (flag::HUGETLB | flag::LOCKED) == 0
}

/// The parts of a mapping whose pages come later (address, bytes). Its command line and environment are among them only if the
/// images do not have them: others read those (proc(5)), and nobody waits for a page in the memory of another process.
pub fn lazy_in(mm: &pb::MmEntry, v: &pb::VmaEntry, pages: &PageMap) -> Vec<(u64, u64)> {
    if !can_be_lazy(v) {
        return Vec::new();
    }
    let mut todo = Todo::default();
    for (start, len) in &pages.lazy {
        let (from, to) = (v.start.max(*start), v.end.min(start + len));
        todo.add(from, to.saturating_sub(from), from);
    }
    for (start, end) in [(mm.mm_arg_start, mm.mm_arg_end), (mm.mm_env_start, mm.mm_env_end)] {
        let (start, end) = (start & !(PAGE - 1), end.saturating_add(PAGE - 1) & !(PAGE - 1));
        for run in clip(&pages.runs, start, end) {
            todo.take(run.start, run.start + run.len);
        }
    }
    todo.0.into_iter().map(|(start, (len, _))| (start, len)).collect()
}

/// The parts of `runs` that do not come later.
pub fn at_once(runs: impl Iterator<Item = Run>, lazy: &[(u64, u64)]) -> Vec<Run> {
    let mut left = Vec::new();
    for run in runs {
        let mut at = run.start;
        let end = run.start + run.len;
        for (start, len) in lazy.iter().filter(|(start, len)| *start < end && start + len > run.start) {
            if at < *start {
                left.push(run.part(at, start - at));
            }
            at = at.max(start + len);
        }
        if at < end {
            left.push(run.part(at, end - at));
        }
    }
    left
}

/// Memory whose pages are still to come, and where each stretch was when it was dumped.
#[derive(Clone, Debug, Default)]
struct Todo(BTreeMap<u64, (u64, u64)>);

impl Todo {
    fn add(&mut self, start: u64, len: u64, image: u64) {
        if len > 0 {
            self.0.insert(start, (len, image));
        }
    }

    /// The stretch that an address is in: from there on, (bytes, address at the dump).
    fn at(&self, addr: u64) -> Option<(u64, u64)> {
        let (start, (len, image)) = self.0.range(..=addr).next_back()?;
        let off = addr - start;
        (off < *len).then(|| (len - off, image + off))
    }

    /// What lies in a range: (address, bytes, address at the dump).
    fn within(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, u64, u64)> + '_ {
        let before = self.0.range(..start).next_back();
        before.into_iter().chain(self.0.range(start..end.max(start))).filter_map(move |(at, (len, image))| {
            let (from, to) = (start.max(*at), end.min(at + len));
            (from < to).then(|| (from, to - from, image + (from - at)))
        })
    }

    /// Where some of what was in a range at the dump is still to come: (address, bytes). It is looked for elsewhere only if it
    /// `may_have_moved`, since that takes longer.
    fn find(&self, start: u64, end: u64, may_have_moved: bool) -> Option<(u64, u64)> {
        let in_place = self.within(start, end).find(|(at, _, image)| at == image).map(|(at, len, _)| (at, len));
        let moved = || {
            self.0.iter().find_map(|(at, (len, image))| {
                let (from, to) = (start.max(*image), end.min(image + len));
                (from < to).then(|| (at + (from - image), to - from))
            })
        };
        in_place.or_else(|| may_have_moved.then(moved)?)
    }

    fn first(&self) -> Option<(u64, u64, u64)> {
        self.0.first_key_value().map(|(start, (len, image))| (*start, *len, *image))
    }

    /// Takes out all that lies in a range: (address, bytes, address at the dump).
    fn take(&mut self, start: u64, end: u64) -> Vec<(u64, u64, u64)> {
        let first = self.0.range(..start).next_back().filter(|(s, (len, _))| *s + len > start).map(|(s, _)| *s);
        let keys: Vec<u64> = first.into_iter().chain(self.0.range(start..end.max(start)).map(|(s, _)| *s)).collect();
        let mut taken = Vec::new();
        for key in keys {
            let Some((len, image)) = self.0.remove(&key) else { continue };
            let (from, to) = (key.max(start), (key + len).min(end));
            self.add(key, from - key, image);
            self.add(to, key + len - to, image + (to - key));
            taken.push((from, to - from, image + (from - key)));
        }
        taken
    }

    fn moved(&mut self, from: u64, to: u64, len: u64) {
        for (start, len, image) in self.take(from, from + len) {
            self.add(start - from + to, len, image);
        }
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn todo(list: &[(u64, u64, u64)]) -> Todo {
        let mut t = Todo::default();
        list.iter().for_each(|(s, l, i)| t.add(*s, *l, *i));
        t
    }

    fn list(t: &Todo) -> Vec<(u64, u64, u64)> {
        t.0.iter().map(|(s, (l, i))| (*s, *l, *i)).collect()
    }

    #[test]
    fn what_is_taken_out_of_the_middle_leaves_both_ends() {
        let mut t = todo(&[(0x1000, 0x4000, 0x1000), (0x8000, 0x2000, 0x18000)]);
        assert_eq!(t.take(0x2000, 0x9000), [(0x2000, 0x3000, 0x2000), (0x8000, 0x1000, 0x18000)]);
        assert_eq!(list(&t), [(0x1000, 0x1000, 0x1000), (0x9000, 0x1000, 0x19000)]);
        assert_eq!(t.take(0x2000, 0x9000), []);
        assert_eq!(t.at(0x1fff), Some((1, 0x1fff)));
        assert_eq!((t.at(0x2000), t.at(0xfff), t.at(0x9800)), (None, None, Some((0x800, 0x19800))));
    }

    #[test]
    fn moved_memory_remembers_where_it_was() {
        let mut t = todo(&[(0x1000, 0x4000, 0x1000)]);
        t.moved(0x3000, 0x10000, 0x8000);
        assert_eq!(list(&t), [(0x1000, 0x2000, 0x1000), (0x10000, 0x2000, 0x3000)]);
        t.moved(0x10000, 0x3000, 0x1000);
        assert_eq!(t.at(0x3000), Some((0x1000, 0x3000)));
        assert_eq!(t.at(0x11000), Some((0x1000, 0x4000)));
    }

    #[test]
    fn pages_are_found_by_where_they_were_at_the_dump() {
        let mut t = todo(&[(0x1000, 0x4000, 0x1000), (0x8000, 0x2000, 0x8000)]);
        assert_eq!(t.within(0x2000, 0x9000).collect::<Vec<_>>(), [(0x2000, 0x3000, 0x2000), (0x8000, 0x1000, 0x8000)]);
        assert_eq!(t.within(0x5000, 0x8000).count() + t.within(0x9000, 0x1000).count(), 0);
        assert_eq!(t.find(0x4000, 0x9000, false), Some((0x4000, 0x1000)));
        assert_eq!((t.find(0x5000, 0x8000, true), t.find(u64::MAX - 1, u64::MAX, true)), (None, None));
        t.moved(0x3000, 0x10000, 0x2000);
        t.moved(0x8000, 0x3000, 0x2000);
        assert_eq!((t.find(0x3000, 0x5000, false), t.find(0x8000, 0x9000, false)), (None, None));
        assert_eq!(
            (t.find(0x4000, 0x5000, true), t.find(0x9000, 0x20000, true)),
            (Some((0x11000, 0x1000)), Some((0x4000, 0x1000)))
        );
    }

    #[test]
    fn the_command_line_does_not_come_later_if_it_is_in_the_images() {
        let status = super::super::vma::VMA_REGULAR | VMA_ANON_PRIVATE;
        let v =
            pb::VmaEntry { start: 0x1000, end: 0x9000, prot: 3, status, flags: flag::PRIVATE, ..Default::default() };
        let mm = pb::MmEntry {
            mm_arg_start: 0x3010,
            mm_arg_end: 0x3fff,
            mm_env_start: 0x3fff,
            mm_env_end: 0x4001,
            ..Default::default()
        };
        let map = |runs| PageMap { images: Vec::new(), runs, lazy: vec![(0, 0x6000), (0x8000, 0x4000)] };
        let run = Run { start: 0x2000, len: 0x4000, offset: 0, file: 0 };
        let all = [(0x1000, 0x5000), (0x8000, 0x1000)];
        assert_eq!(lazy_in(&mm, &v, &map(vec![run])), [(0x1000, 0x2000), (0x5000, 0x1000), (0x8000, 0x1000)]);
        assert_eq!(lazy_in(&mm, &v, &map(Vec::new())), all);
        let locked = pb::VmaEntry { flags: v.flags | flag::LOCKED, ..v };
        assert_eq!(lazy_in(&mm, &locked, &map(vec![run])), []);
    }

    #[test]
    fn runs_are_cut_at_what_comes_later() {
        let run = |start: u64, len: u64| Run { start, len, offset: start + 0x100_0000, file: 0 };
        let runs = [run(0x1000, 0x5000), run(0x9000, 0x1000)];
        let lazy = [(0x2000, 0x1000), (0x4000, 0x1000), (0x9000, 0x1000)];
        assert_eq!(at_once(runs.into_iter(), &lazy), [run(0x1000, PAGE), run(0x3000, PAGE), run(0x5000, PAGE)]);
        assert_eq!(at_once(runs.into_iter(), &[]), runs);
    }
}
