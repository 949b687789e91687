//! Pages that stay with their processes: nothing of them is in the images, and whoever restores fetches them from here while
//! the processes stand still.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use dormouse_blob_abi::PAGE;
use dormouse_kernel::HostPid;
use dormouse_pages::runs::PE_PRESENT;
use dormouse_pages::server::{Header, command};

use crate::{Result, call, invalid};

/// Most bytes of one answer.
const BUFFER: u64 = 1 << 20;

/// What stays, by process.
#[derive(Debug, Default)]
pub struct Behind(BTreeMap<u64, Vec<Range<u64>>>);

impl Behind {
    /// Pages of a process that stay, ascending.
    pub fn add(&mut self, pid: HostPid, pages: Vec<Range<u64>>) {
        self.0.insert(pid.0 as u64, pages);
    }

    /// How many pages there are.
    pub fn pages(&self) -> u64 {
        self.0.values().flatten().map(|r| (r.end - r.start) / PAGE).sum()
    }

    /// Gives pages to the one who asks for them until that says it needs no more; how many it has got. The processes stand
    /// still all the while.
    ///
    /// # Errors
    /// The one who asks went away before, or asked for what is not here; or a process was killed.
    pub fn serve(&self, peer: &mut (impl Read + Write)) -> Result<u64> {
        let memory = |pid: u64| File::open(HostPid(pid as i32).proc_path("mem")).map(|file| (pid, file));
        let memories: BTreeMap<u64, File> = self
            .0
            .keys()
            .map(|pid| memory(*pid))
            .collect::<std::io::Result<_>>()
            .map_err(call("cannot open the memory of the processes that pages stay with"))?;
        let mut buffer = Vec::new();
        let mut given = 0;
        let lost = |given: u64| {
            call(format!(
                "the one who fetches pages is gone, with {given} of {} pages; see that nothing of the tree runs there, since it \
                 goes on here",
                self.pages()
            ))
        };
        loop {
            let header = Header::read(peer).map_err(lost(given))?;
            let header = header.ok_or_else(|| lost(given)(std::io::ErrorKind::UnexpectedEof.into()))?;
            match header.command & 0xffff {
                command::GET => {
                    let len = self.held(&header)?;
                    buffer.resize(len as usize, 0);
                    let what =
                        || format!("cannot read the memory of pid {} at {:#x}; was it killed?", header.of, header.addr);
                    memories[&header.of].read_exact_at(&mut buffer, header.addr).map_err(call(what()))?;
                    let answer = Header { command: command::ADD_FLAGS | PE_PRESENT << 16, pages: len / PAGE, ..header };
                    peer.write_all(&answer.bytes()).and_then(|()| peer.write_all(&buffer)).map_err(lost(given))?;
                    given += len / PAGE;
                }
                command::CLOSE | command::FORCE_CLOSE => {
                    // It has all that it wants, whether it hears that or not.
                    let _ = peer.write_all(&[0; 4]);
                    return Ok(given);
                }
                other => {
                    return Err(invalid!(
                        "the one who fetches pages sent the unknown command {other:#x}; is it lazy-pages?"
                    ));
                }
            }
        }
    }

    /// How many bytes of what is asked for follow each other here.
    fn held(&self, header: &Header) -> Result<u64> {
        let held = self.0.get(&header.of).and_then(|ranges| {
            let mut at = ranges.partition_point(|r| r.end <= header.addr);
            let first = ranges.get(at).filter(|r| r.start <= header.addr && header.addr.is_multiple_of(PAGE))?;
            let mut end = first.end;
            while ranges.get(at + 1).is_some_and(|r| r.start == end) {
                at += 1;
                end = ranges[at].end;
            }
            Some((end - header.addr).min(header.pages.saturating_mul(PAGE)).min(BUFFER))
        });
        held.filter(|len| *len > 0).ok_or_else(|| {
            invalid!(
                "{} pages at {:#x} of pid {} were asked for, which did not stay here; are those the images of this dump?",
                header.pages,
                header.addr,
                header.of
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn behind() -> Behind {
        let mut behind = Behind::default();
        behind.add(HostPid(7), vec![0x1000..0x3000, 0x3000..0x4000, 0x8000..0x9000]);
        behind
    }

    fn held(of: u64, addr: u64, pages: u64) -> Option<u64> {
        behind().held(&Header { command: command::GET, pages, addr, of }).ok()
    }

    #[test]
    fn only_what_stayed_is_given_as_far_as_it_goes_on() {
        assert_eq!(behind().pages(), 4);
        assert_eq!(held(7, 0x1000, 1), Some(0x1000));
        assert_eq!(held(7, 0x2000, 9), Some(0x2000));
        assert_eq!(held(7, 0x8000, u64::MAX), Some(0x1000));
        for (of, addr, pages) in
            [(7, 0x4000, 1), (7, 0, 1), (7, 0x1001, 1), (8, 0x1000, 1), (7, 0x1000, 0), (7, u64::MAX, 1)]
        {
            assert_eq!(held(of, addr, pages), None, "{of} {addr:#x} {pages}");
        }
    }

    /// A peer that has said everything already.
    struct Script(Vec<u8>, usize);

    impl Read for Script {
        fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
            let n = (&self.0[self.1..]).read(to)?;
            self.1 += n;
            Ok(n)
        }
    }

    impl Write for Script {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn one_who_does_not_say_that_it_is_done_has_vanished() {
        let close = Header { command: command::CLOSE, ..Header::default() }.bytes();
        let serve = |bytes: &[u8]| Behind::default().serve(&mut Script(bytes.to_vec(), 0));
        assert_eq!(serve(&close).expect("the end"), 0);
        for (bytes, want) in
            [(&close[..0], "is gone, with 0 of 0"), (&close[..9], "is gone"), (&[9; 32], "unknown command")]
        {
            let error = serve(bytes).expect_err(want).to_string();
            assert!(error.contains(want), "{error}");
        }
    }
}
