//! A whole checkpoint as one stream of bytes, for a pipe: images one after the other in frames, and an end that tells that
//! nothing is missing. FORMAT.md describes it.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};

use crate::{ImageDir, ImageError, ImageKind};

/// What a stream begins with; the last byte is the version.
const HEAD: [u8; 16] = *b"dormouse-stream\x01";
/// Most bytes of an image in one frame.
const FRAME: usize = 1 << 20;
/// Longest name.
const NAME: u32 = 255;
/// Bytes of a frame's head: length of the name, checksum of the content (both 32 bits), length of the content (64 bits).
const FRAME_HEAD: usize = 16;

/// Why a stream cannot be taken in.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// It begins with something else.
    #[error("this is no stream of dump --stream: it begins with {0:?}; give one, decompressed if it was compressed")]
    Foreign(String),
    /// It is in another version of the format.
    #[error(
        "the stream is of version {0}, and this program knows version 1; restore with the version of dormouse that made it"
    )]
    Version(u8),
    /// It ends too soon.
    #[error(
        "the stream ends after {bytes} bytes, in the middle{}; it was cut off, so get all of it and retry",
        after(last)
    )]
    Cut {
        /// Bytes that there were.
        bytes: u64,
        /// The last image that was seen.
        last: String,
    },
    /// Something in it cannot be.
    #[error("the stream is damaged behind byte {bytes}: {what}; get it again and retry")]
    Damaged {
        /// Bytes up to there.
        bytes: u64,
        /// What was found.
        what: String,
    },
    /// It cannot be read.
    #[error("cannot read the stream: {0}; try again")]
    Read(io::Error),
    /// An image of it cannot be kept.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The same, of its content.
    #[error("cannot keep {name} of the stream in memory: {cause}; free some, or restore on a machine with more")]
    Keep {
        /// The image.
        name: String,
        /// The kernel's answer.
        cause: io::Error,
    },
}

fn after(last: &str) -> String {
    if last.is_empty() { String::new() } else { format!(" of or behind {last}") }
}

/// Where the images of a checkpoint go, one after the other.
pub trait ImageSink {
    /// Appends bytes to the image `name`, which is made if it was not the last one.
    ///
    /// # Errors
    /// They cannot be written.
    fn append(&mut self, name: &str, bytes: &[u8]) -> io::Result<()>;

    /// Tells that there are no more images; everything is written then.
    ///
    /// # Errors
    /// It cannot be written.
    fn finish(&mut self) -> io::Result<()>;

    /// Appends a whole image.
    ///
    /// # Errors
    /// It cannot be written, or the image not be read.
    fn file(&mut self, name: &str, mut from: File) -> io::Result<()> {
        let mut part = Vec::with_capacity(FRAME);
        loop {
            part.clear();
            let n = Read::by_ref(&mut from).take(FRAME as u64).read_to_end(&mut part)?;
            // What ends with a full frame gets no empty one.
            if n > 0 || from.metadata()?.len() == 0 {
                self.append(name, &part)?;
            }
            if n < FRAME {
                return Ok(());
            }
        }
    }
}

/// Writes a stream. One that is dropped before [`ImageSink::finish`] has no end, and is refused by whoever reads it.
#[derive(Debug)]
pub struct StreamWriter<W> {
    out: W,
    sum: crc32fast::Hasher,
    frames: u64,
}

impl<W: Write> StreamWriter<W> {
    /// Begins a stream.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn new(mut out: W) -> io::Result<Self> {
        out.write_all(&HEAD)?;
        Ok(Self { out, sum: crc32fast::Hasher::new(), frames: 0 })
    }

    fn frame(&mut self, name: &[u8], sum: u32, len: u64) -> io::Result<()> {
        let mut head = Vec::with_capacity(FRAME_HEAD + name.len());
        head.extend((name.len() as u32).to_le_bytes());
        head.extend(sum.to_le_bytes());
        head.extend(len.to_le_bytes());
        head.extend(name);
        self.sum.update(&head);
        self.out.write_all(&head)
    }
}

impl<W: Write> ImageSink for StreamWriter<W> {
    fn append(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        // An empty image has a frame, too.
        for part in bytes.chunks(FRAME).chain(bytes.is_empty().then_some(&[][..])) {
            self.frames += 1;
            self.frame(name.as_bytes(), crc32fast::hash(part), part.len() as u64)?;
            self.out.write_all(part)?;
        }
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        let sum = self.sum.clone().finalize();
        self.frame(&[], sum, self.frames)?;
        self.out.flush()
    }
}

/// Reads a stream into a directory, which should be empty; how many bytes there were. Whatever goes wrong, the images there are
/// no checkpoint then, since the inventory is the last one.
///
/// # Errors
/// The stream is none, is cut off or damaged, or its images cannot be kept.
pub fn unpack(from: &mut impl Read, into: &ImageDir) -> Result<u64, StreamError> {
    let mut reader = Reader { from, bytes: 0, last: String::new() };
    let mut head = [0; HEAD.len()];
    reader.fill(&mut head)?;
    if head[..15] != HEAD[..15] {
        return Err(StreamError::Foreign(String::from_utf8_lossy(&head).into_owned()));
    }
    if head[15] != HEAD[15] {
        return Err(StreamError::Version(head[15]));
    }
    let (mut sum, mut frames) = (crc32fast::Hasher::new(), 0);
    let mut seen = HashSet::new();
    let mut file = None;
    let mut part = Vec::new();
    loop {
        let mut head = [0; FRAME_HEAD];
        reader.fill(&mut head)?;
        let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("four bytes"));
        let (name_len, want) = (word(0), word(4));
        let len = u64::from_le_bytes(head[8..].try_into().expect("eight bytes"));
        if name_len == 0 {
            return match (sum.finalize() == want && len == frames, reader.last.as_str()) {
                (true, "inventory.img") => Ok(reader.bytes),
                (true, last) => Err(reader.damaged(format!("its last image is {last:?} and not inventory.img"))),
                (false, _) => Err(reader.damaged("its end does not fit what came before".into())),
            };
        }
        if name_len > NAME || len > FRAME as u64 {
            return Err(reader.damaged(format!("a frame with {len} bytes and a name of {name_len}")));
        }
        let mut name = vec![0; name_len as usize];
        reader.fill(&mut name)?;
        sum.update(&head);
        sum.update(&name);
        frames += 1;
        let name = String::from_utf8_lossy(&name).into_owned();
        let Some((kind, id)) = ImageKind::from_file_name(&name) else {
            return Err(reader.damaged(format!("{name:?} is no name of an image")));
        };
        if reader.last != name {
            if !seen.insert(name.clone()) {
                return Err(reader.damaged(format!("{name} comes twice")));
            }
            file = Some(into.create_file(kind, id)?);
            reader.last.clone_from(&name);
        }
        part.resize(len as usize, 0);
        reader.fill(&mut part)?;
        if crc32fast::hash(&part) != want {
            return Err(reader.damaged(format!("the checksum of {name} is wrong")));
        }
        let written = file.as_mut().map_or(Ok(()), |file: &mut File| file.write_all(&part));
        written.map_err(|cause| StreamError::Keep { name, cause })?;
    }
}

struct Reader<'a, R> {
    from: &'a mut R,
    bytes: u64,
    last: String,
}

impl<R: Read> Reader<'_, R> {
    fn fill(&mut self, to: &mut [u8]) -> Result<(), StreamError> {
        let mut have = 0;
        while have < to.len() {
            match self.from.read(&mut to[have..]) {
                Ok(0) => return Err(StreamError::Cut { bytes: self.bytes, last: self.last.clone() }),
                Ok(n) => (have, self.bytes) = (have + n, self.bytes + n as u64),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(StreamError::Read(e)),
            }
        }
        Ok(())
    }

    fn damaged(&self, what: String) -> StreamError {
        StreamError::Damaged { bytes: self.bytes, what }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory of a test, which goes with it.
    struct Dir(std::path::PathBuf);

    impl Dir {
        fn new(name: &str) -> (Self, ImageDir) {
            let path = std::env::temp_dir().join(format!("dormouse-stream-{}-{name}", std::process::id()));
            let _ = std::fs::remove_dir_all(&path);
            let dir = ImageDir::create(&path).expect("directory");
            (Self(path), dir)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn stream(images: &[(&str, &[u8])]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut writer = StreamWriter::new(&mut bytes).expect("begin");
        images.iter().for_each(|(name, content)| writer.append(name, content).expect("append"));
        writer.finish().expect("finish");
        bytes
    }

    const SMALL: &[(&str, &[u8])] = &[("fs-7.img", b"mouse"), ("pages-1.img", &[]), ("inventory.img", b"all")];

    #[test]
    fn what_was_written_is_read() {
        let (path, dir) = Dir::new("good");
        let large: Vec<u8> = (0..2 * FRAME + 5).map(|i| (i / 11) as u8).collect();
        let bytes = stream(&[
            ("pages-2.img", &large),
            ("pages-2.img", b"more"),
            ("core-9.img", b""),
            ("inventory.img", b"all"),
        ]);
        assert_eq!(unpack(&mut &bytes[..], &dir).expect("unpack"), bytes.len() as u64);
        let read = |name: &str| std::fs::read(path.0.join(name)).expect(name);
        assert_eq!(read("pages-2.img"), [&large[..], b"more"].concat());
        assert_eq!((read("core-9.img"), read("inventory.img")), (Vec::new(), b"all".to_vec()));
    }

    #[test]
    fn a_file_is_written_whole() {
        let (path, _dir) = Dir::new("file");
        for size in [0, 5, FRAME, FRAME + 1] {
            std::fs::write(path.0.join("source"), vec![7; size]).expect("write");
            let mut bytes = Vec::new();
            let mut writer = StreamWriter::new(&mut bytes).expect("begin");
            writer.file("pages-1.img", File::open(path.0.join("source")).expect("open")).expect("file");
            writer.append("inventory.img", b"all").expect("append");
            writer.finish().expect("finish");
            let (copy, dir) = Dir::new("file-copy");
            unpack(&mut &bytes[..], &dir).expect("unpack");
            assert_eq!(std::fs::read(copy.0.join("pages-1.img")).expect("read"), vec![7; size]);
        }
    }

    #[test]
    fn every_cut_and_every_changed_byte_is_found() {
        let (_path, dir) = Dir::new("bad");
        let good = stream(SMALL);
        for cut in 0..good.len() {
            let error = unpack(&mut &good[..cut], &dir).expect_err("cut off");
            assert!(matches!(error, StreamError::Cut { bytes, .. } if bytes == cut as u64), "{cut}: {error}");
        }
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x20;
            unpack(&mut &bad[..], &dir).expect_err("a changed byte");
        }
    }

    #[test]
    fn what_is_no_stream_is_refused_by_name() {
        let (_path, dir) = Dir::new("foreign");
        let says = |bytes: &[u8]| unpack(&mut &bytes[..], &dir).expect_err("refused").to_string();
        assert!(says(b"\x1f\x8b\x08 something compressed").contains("decompressed"));
        assert!(says(b"dormouse-stream\x02 and more").contains("of version 2"));
        let named = |name| says(&stream(&[(name, b"x"), ("inventory.img", b"all")]));
        assert!(named("../core-1.img").contains("no name of an image"));
        assert!(named("passwd").contains("no name of an image"));
        assert!(says(&stream(&[("fs-1.img", b""), ("fs-2.img", b""), ("fs-1.img", b"")])).contains("comes twice"));
        assert!(says(&stream(&SMALL[..2])).contains("not inventory.img"));
    }
}
