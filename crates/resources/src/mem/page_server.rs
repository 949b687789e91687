//! The page server: writes page maps and pages that a dump elsewhere sends. One dump, and it is done.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use dormouse_images::{ImageDir, ImageKind};
use dormouse_pages::PagesFile;
use dormouse_pages::runs::{PE_LAZY, PE_PARENT, PE_PRESENT};
use dormouse_pages::server::{Header, MapId, command};

use super::pages::PageIds;
use super::records::Records;
use super::vma::clip;
use crate::checkpoint::{PageMap, read_page_map};
use crate::pages_image::{self, PagesImage};
use crate::{Result, call, invalid, unwritten};

/// Bytes that are received at once.
const BUFFER: usize = 1 << 20;
/// The first number of a pages image, above all that a dump into the same directory takes. CRIU's.
const FIRST_ID: u32 = 0x10000;

/// What a server has written.
#[derive(Clone, Copy, Debug, Default)]
pub struct Served {
    /// Page maps.
    pub maps: usize,
    /// Pages.
    pub pages: u64,
}

/// Writes what `peer` sends into `images` until it says that it is done. With `lazy` it may also ask for pages of the images.
///
/// # Errors
/// The peer went away before, sent nonsense, or an image cannot be written.
pub fn serve(images: &ImageDir, lazy: bool, peer: &mut (impl Read + Write)) -> Result<Served> {
    let mut server = Server {
        images,
        ids: PageIds::from(FIRST_ID),
        map: None,
        served: Served::default(),
        buffer: vec![0; BUFFER],
        asked: HashMap::new(),
    };
    loop {
        let Some(header) = Header::read(peer).map_err(call("cannot read from the dump"))? else {
            return Err(invalid!("the dump went away before it was done; the pages here are incomplete"));
        };
        let answer: &[u8] = match header.command & 0xffff {
            command::OPEN => {
                server.open(&header)?;
                &[]
            }
            command::OPEN2 => {
                if server.open(&header)? {
                    &[1]
                } else {
                    &[0]
                }
            }
            command::PARENT => {
                let (_, kind, id) = map_of(&header)?;
                if server.before(kind, id)?.is_some() { &[1, 0, 0, 0] } else { &[0; 4] }
            }
            command::ADD => {
                server.add(&header, PE_PRESENT, peer)?;
                &[]
            }
            command::HOLE => {
                server.add(&header, PE_PARENT, peer)?;
                &[]
            }
            command::ADD_FLAGS => {
                server.add(&header, header.command >> 16, peer)?;
                &[]
            }
            command::GET if lazy => {
                server.get(&header, peer)?;
                &[]
            }
            command::CLOSE | command::FORCE_CLOSE => {
                server.close()?;
                peer.write_all(&[0; 4]).map_err(call("cannot answer the dump"))?;
                return Ok(server.served);
            }
            other => return Err(invalid!("the dump sent the unknown command {other:#x}")),
        };
        peer.write_all(answer).map_err(call("cannot answer the dump"))?;
    }
}

struct Server<'a> {
    images: &'a ImageDir,
    ids: PageIds,
    map: Option<Map>,
    served: Served,
    buffer: Vec<u8>,
    /// Page maps of processes whose pages were asked for, with their open images.
    asked: HashMap<u64, (PageMap, Vec<PagesFile>)>,
}

/// A page map being written.
struct Map {
    of: u64,
    name: MapId,
    records: Records,
    pages: File,
    end: u64,
    /// The address behind the last entry.
    next: u64,
    before: Option<PageMap>,
}

fn map_of(header: &Header) -> Result<(MapId, ImageKind, u64)> {
    match MapId::decode(header.of) {
        Some(map @ MapId::Task(id)) => Ok((map, ImageKind::Pagemap, id)),
        Some(map @ MapId::Shared(id)) => Ok((map, ImageKind::ShmemPagemap, id)),
        None => Err(invalid!("the dump sent pages of unknown kind ({:#x})", header.of)),
    }
}

impl Server<'_> {
    /// Sends pages of the images, as many of those that are asked for as follow each other.
    fn get(&mut self, header: &Header, peer: &mut impl Write) -> Result<()> {
        let pid = header.of;
        if let Entry::Vacant(place) = self.asked.entry(pid) {
            let map = read_page_map(self.images, Path::new(self.images.path()), ImageKind::Pagemap, pid)?;
            let files = map.images.iter().map(PagesImage::open).collect::<Result<_>>()?;
            place.insert((map, files));
        }
        let (map, files) = &self.asked[&pid];
        let len = header.pages.saturating_mul(4096).min(BUFFER as u64);
        let mut have = 0;
        for run in clip(&map.runs, header.addr, header.addr.saturating_add(len)) {
            if run.start != header.addr + have {
                break;
            }
            let part = &mut self.buffer[have as usize..(have + run.len) as usize];
            let read = files[run.file].read_exact_at(part, run.offset);
            read.map_err(call(format!("cannot read pages of pid {pid} from {}", map.images[run.file].path.display())))?;
            have += run.len;
        }
        if have == 0 {
            return Err(invalid!("the page at {:#x} of pid {pid} was asked for and is not in the images", header.addr));
        }
        let answer = Header { command: command::ADD_FLAGS | PE_PRESENT << 16, pages: have / 4096, ..*header };
        let sent = peer.write_all(&answer.bytes()).and_then(|()| peer.write_all(&self.buffer[..have as usize]));
        sent.map_err(call("cannot send pages to the one who asked for them"))?;
        self.served.pages += have / 4096;
        Ok(())
    }

    /// The page map of the checkpoint before.
    fn before(&self, kind: ImageKind, id: u64) -> Result<Option<PageMap>> {
        let Some(parent) = self.images.parent()? else { return Ok(None) };
        if !parent.exists(kind, id)? {
            return Ok(None);
        }
        Ok(Some(read_page_map(&parent, &Path::new(self.images.path()).join("parent"), kind, id)?))
    }

    /// Begins a page map; whether the checkpoint before has it.
    fn open(&mut self, header: &Header) -> Result<bool> {
        self.close()?;
        let (name, kind, id) = map_of(header)?;
        let before = self.before(kind, id)?;
        let has_before = before.is_some();
        let number = self.ids.next();
        let records = Records::new(self.images.writer(kind, id)?, number)?;
        let pages = pages_image::create(self.images, number, false)?;
        self.map = Some(Map { of: header.of, name, records, pages, end: 0, next: 0, before });
        self.served.maps += 1;
        Ok(has_before)
    }

    fn add(&mut self, header: &Header, flags: u32, peer: &mut impl Read) -> Result<()> {
        if self.map.as_ref().is_none_or(|map| map.of != header.of) {
            self.open(header)?;
        }
        let map = self.map.as_mut().expect("just opened");
        let len = header.pages.checked_mul(4096);
        let end = len.and_then(|len| header.addr.checked_add(len));
        let (Some(len), Some(end)) = (len, end) else {
            return Err(invalid!(
                "the dump sent {} pages of {} at {:#x}: too many",
                header.pages,
                map.name,
                header.addr
            ));
        };
        if header.addr < map.next || header.addr & 4095 != 0 || flags & !(PE_PARENT | PE_LAZY | PE_PRESENT) != 0 {
            return Err(invalid!(
                "the dump sent pages of {} at {:#x} out of order (flags {flags:#x})",
                map.name,
                header.addr
            ));
        }
        map.next = end;
        if flags & PE_PARENT != 0 {
            let held: u64 = map.before.iter().flat_map(|b| clip(&b.runs, header.addr, end)).map(|r| r.len).sum();
            if held != len {
                return Err(invalid!(
                    "pages of {} at {:#x} ought to be in the checkpoint before and are not; dump without --prev-images-dir",
                    map.name,
                    header.addr
                ));
            }
        }
        map.records.add(header.addr, len, flags)?;
        if flags & PE_PRESENT == 0 {
            return Ok(());
        }
        let mut done = 0;
        while done < len {
            let part = &mut self.buffer[..(len - done).min(BUFFER as u64) as usize];
            peer.read_exact(part).map_err(call(format!("the dump went away in the middle of {}", map.name)))?;
            map.pages.write_all_at(part, map.end).map_err(unwritten)?;
            map.end += part.len() as u64;
            done += part.len() as u64;
        }
        self.served.pages += len / 4096;
        Ok(())
    }

    fn close(&mut self) -> Result<()> {
        self.map.take().map_or(Ok(()), |map| map.records.finish())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A peer that has said everything already.
    struct Script<'a>(&'a [u8], Vec<u8>);

    impl Read for Script<'_> {
        fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
            self.0.read(to)
        }
    }

    impl Write for Script<'_> {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.1.write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// A header: command, pages, address, of what.
    type Words = (u32, u64, u64, u64);

    fn run(name: &str, words: &[Words], pages: &[u8]) -> (Result<Served>, Vec<u8>) {
        let path = std::env::temp_dir().join(format!("dormouse-ps-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        let images = ImageDir::create(&path).expect("directory");
        let mut bytes = Vec::new();
        for (command, pages_of, addr, of) in words {
            bytes.extend(Header { command: *command, pages: *pages_of, addr: *addr, of: *of }.bytes());
            if command & 0xffff == command::ADD_FLAGS && command >> 16 & PE_PRESENT != 0 {
                bytes.extend(pages);
            }
        }
        let mut peer = Script(&bytes, Vec::new());
        let served = serve(&images, false, &mut peer);
        if served.is_ok() {
            let map = read_page_map(&images, &path, ImageKind::Pagemap, 7).expect("a page map");
            assert_eq!(map.runs.len(), 1);
        }
        std::fs::remove_dir_all(&path).expect("clean up");
        (served, peer.1)
    }

    #[test]
    fn pages_are_written_and_the_end_is_answered() {
        let words =
            [(command::OPEN2, 0, 0, 7 << 8 | 1), (6 | 4 << 16, 2, 0x1000, 7 << 8 | 1), (command::CLOSE, 0, 0, 0)];
        let (served, said) = run("good", &words, &[5; 8192]);
        assert_eq!(served.expect("served").pages, 2);
        assert_eq!(said, [0, 0, 0, 0, 0]);
    }

    #[test]
    fn nonsense_is_refused() {
        let of = 7 << 8 | 1;
        let cases: [(&str, &[Words], &str); 7] = [
            ("nothing", &[], "went away"),
            ("unknown", &[(99, 0, 0, 0)], "unknown command"),
            ("kind", &[(command::OPEN2, 0, 0, 3)], "unknown kind"),
            ("many", &[(6 | 4 << 16, u64::MAX, 0x1000, of)], "too many"),
            ("order", &[(6, 1, 0x2000, of), (6, 1, 0x1000, of)], "out of order"),
            ("cut", &[(6 | 4 << 16, 3, 0x1000, of)], "in the middle"),
            ("parent", &[(6 | 1 << 16, 1, 0x1000, of)], "checkpoint before"),
        ];
        for (name, words, want) in cases {
            let error = run(name, words, &[5; 8192]).0.expect_err(name).to_string();
            assert!(error.contains(want), "{name}: {error}");
        }
    }
}
