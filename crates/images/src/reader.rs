//! Reading an image record by record: every length is checked against the file before anything is allocated.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use prost::{Message, Name};

use crate::kind::{Body, IMG_COMMON_MAGIC, IMG_SERVICE_MAGIC, ImageKind};
use crate::required::{self, Fault};
use crate::schema::{Shape, shape};
use crate::{ImageError, pb, wire};

/// The longest record that is read or written, in bytes: room for an address space of two million mappings.
pub const MAX_RECORD: u64 = 1 << 28;

/// Bytes of an `ipc_msg` record, and its text.
pub(crate) type RawMessage = (Vec<u8>, Vec<u8>);

/// An image file being read.
pub type ImageReader = Records<BufReader<File>>;

/// The payload of the last record, as long as nobody has taken it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pending {
    Nothing,
    /// So many bytes, then padding.
    Bytes(u64),
    /// So many `ipc_msg` records with their text.
    Messages(u32),
    /// The rest of the file.
    Rest,
}

/// The records of an image, in order, each with its payload. A payload that is not taken is skipped.
#[derive(Debug)]
pub struct Records<R> {
    kind: ImageKind,
    path: PathBuf,
    input: R,
    pos: u64,
    left: u64,
    record: u64,
    pending: Pending,
    buf: Vec<u8>,
}

impl<R: BufRead> Records<R> {
    /// Reads the header. `len` is how many bytes `input` holds; `path` is for messages.
    ///
    /// # Errors
    /// The header is not that of `kind`; raw images have none.
    pub fn new(kind: ImageKind, input: R, len: u64, path: &Path) -> Result<Self, ImageError> {
        let mut records = Self::start(kind, input, len, path);
        let Some(own) = kind.magic() else {
            return Err(ImageError::WrongMessage { kind, message: "records: it is raw" });
        };
        let magic = |expected, found| ImageError::Magic { path: path.to_owned(), kind, expected, found };
        let mut found = records.word()?;
        // Version 1 of the format had no first word; CRIU still reads it.
        if let Some(first) = kind.first_magic()
            && found != own
        {
            if found != first {
                return Err(magic(first, found));
            }
            found = records.word()?;
        }
        if found != own {
            return Err(magic(own, found));
        }
        Ok(records)
    }

    /// Reads the header and tells the kind from it: the first of those that share a magic.
    ///
    /// # Errors
    /// The header is that of no kind.
    pub fn detect(input: R, len: u64, path: &Path) -> Result<Self, ImageError> {
        let mut records = Self::start(ImageKind::Inventory, input, len, path);
        let mut magic = records.word()?;
        if magic == IMG_COMMON_MAGIC || magic == IMG_SERVICE_MAGIC {
            magic = records.word()?;
        }
        let kind = ImageKind::from_magic(magic);
        records.kind = kind.ok_or_else(|| ImageError::UnknownMagic { path: path.to_owned(), magic })?;
        Ok(records)
    }

    fn start(kind: ImageKind, input: R, len: u64, path: &Path) -> Self {
        let pending = Pending::Nothing;
        Self { kind, path: path.to_owned(), input, pos: 0, left: len, record: 0, pending, buf: Vec::new() }
    }

    /// The kind of this image.
    pub fn kind(&self) -> ImageKind {
        self.kind
    }

    /// Where the next byte comes from, in bytes from the start of the file.
    pub fn position(&self) -> u64 {
        self.pos
    }

    /// How many records have been read.
    pub fn count(&self) -> u64 {
        self.record
    }

    /// The path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next record as the message `M`; `None` at the end of the file.
    ///
    /// # Errors
    /// The record is cut off, broken, lacks a required field, or this kind of image holds another message.
    #[expect(clippy::should_implement_trait, reason = "the type of a record is the caller's to name, per record")]
    pub fn next<M: Message + Name + Default>(&mut self) -> Result<Option<M>, ImageError> {
        let (kind, message) = (self.kind, M::NAME);
        let Some((record, bytes)) = self.raw()? else { return Ok(None) };
        if kind.message(record) != Some(message) {
            return Err(ImageError::WrongMessage { kind, message });
        }
        M::decode(bytes).map(Some).map_err(|e| {
            let path = self.path.clone();
            ImageError::Decode { path, record, message: message.to_owned(), reason: e.to_string() }
        })
    }

    /// The next record: its number and its bytes, which are a complete message of [`ImageKind::message`].
    ///
    /// # Errors
    /// As of [`Self::next`].
    pub fn raw(&mut self) -> Result<Option<(u64, &[u8])>, ImageError> {
        self.skip_payload()?;
        if self.left == 0 {
            return Ok(None);
        }
        let message = self.kind.message(self.record);
        let Some(shape) = message.and_then(shape) else {
            return Err(ImageError::WrongMessage { kind: self.kind, message: "records" });
        };
        self.record_bytes(shape)?;
        self.pending = pending(self.kind, self.record, &self.buf);
        self.record += 1;
        Ok(Some((self.record - 1, &self.buf)))
    }

    /// The payload of the last record, without padding. Of [`Body::IpcMsg`]: its messages as they are in the file;
    /// [`Self::messages`] takes them apart.
    ///
    /// # Errors
    /// The payload is cut off.
    pub fn payload(&mut self) -> Result<Vec<u8>, ImageError> {
        let mut out = Vec::new();
        self.payload_to(&mut out)?;
        Ok(out)
    }

    /// Length of the payload in bytes, without padding; `None` for message queues, which tell it only as they are read.
    pub fn payload_len(&self) -> Option<u64> {
        match self.pending {
            Pending::Nothing => Some(0),
            Pending::Bytes(len) => Some(len),
            Pending::Messages(_) => None,
            Pending::Rest => Some(self.left),
        }
    }

    /// Skips the payload of the last record, if it has not been taken.
    ///
    /// # Errors
    /// The payload is cut off.
    pub fn skip_payload(&mut self) -> Result<(), ImageError> {
        self.payload_to(&mut io::sink())
    }

    fn payload_to(&mut self, out: &mut impl io::Write) -> Result<(), ImageError> {
        match std::mem::replace(&mut self.pending, Pending::Nothing) {
            Pending::Nothing => Ok(()),
            Pending::Rest => self.copy(self.left, out),
            Pending::Bytes(len) => {
                self.copy(len, out)?;
                self.skip_padding(len)
            }
            Pending::Messages(count) => {
                let failed = |e| ImageError::io(Path::new("memory"), "write", e);
                for _ in 0..count {
                    let (message, text) = self.message()?;
                    let padding = vec![0; (text.len() as u64).wrapping_neg() as usize % 8];
                    for part in [&(message.len() as u32).to_le_bytes(), &*message, &text, &padding] {
                        out.write_all(part).map_err(failed)?;
                    }
                }
                Ok(())
            }
        }
    }

    /// The messages of the last record of an [`ImageKind::IpcnsMsg`] image: each its record and its text.
    ///
    /// # Errors
    /// A message is cut off or broken.
    pub fn messages(&mut self) -> Result<Vec<(pb::IpcMsg, Vec<u8>)>, ImageError> {
        let field = |message: &[u8], n| wire::number(message, n);
        let messages = self.raw_messages()?.into_iter();
        Ok(messages.map(|(m, text)| (pb::IpcMsg { mtype: field(&m, 1), msize: field(&m, 2) as u32 }, text)).collect())
    }

    /// The same with the bytes of the records.
    pub(crate) fn raw_messages(&mut self) -> Result<Vec<RawMessage>, ImageError> {
        match std::mem::replace(&mut self.pending, Pending::Nothing) {
            Pending::Messages(count) => (0..count).map(|_| self.message()).collect(),
            Pending::Nothing | Pending::Bytes(_) | Pending::Rest => Ok(Vec::new()),
        }
    }

    /// Does nothing follow the last record but another one?
    pub(crate) fn awaits_nothing(&self) -> bool {
        self.pending == Pending::Nothing
    }

    /// One `ipc_msg` record and its text.
    fn message(&mut self) -> Result<RawMessage, ImageError> {
        let Some(shape) = shape(pb::IpcMsg::NAME) else { return Ok(Default::default()) };
        self.record -= 1;
        let read = self.record_bytes(shape);
        self.record += 1;
        read?;
        let message = std::mem::take(&mut self.buf);
        let len = u64::from(wire::number(&message, 2) as u32);
        let mut text = Vec::new();
        self.copy(len, &mut text)?;
        self.skip_padding(len)?;
        Ok((message, text))
    }

    /// Reads a length and so many bytes into `buf`, and checks them.
    fn record_bytes(&mut self, shape: &Shape) -> Result<(), ImageError> {
        let len = u64::from(self.word()?);
        if len > MAX_RECORD {
            let path = self.path.clone();
            return Err(ImageError::TooLong { path, record: self.record, len, limit: MAX_RECORD });
        }
        let mut buf = std::mem::take(&mut self.buf);
        buf.clear();
        let read = self.copy(len, &mut buf);
        self.buf = buf;
        read?;
        required::check(shape, &self.buf, self.kind.is_sidecar())
            .map_err(|fault| fault_error(fault, &self.path, self.record, shape.name))
    }

    fn word(&mut self) -> Result<u32, ImageError> {
        self.need(4)?;
        let mut word = [0; 4];
        self.input.read_exact(&mut word).map_err(|e| ImageError::io(&self.path, "read", e))?;
        self.pos += 4;
        self.left -= 4;
        Ok(u32::from_le_bytes(word))
    }

    fn copy(&mut self, len: u64, out: &mut impl io::Write) -> Result<(), ImageError> {
        self.need(len)?;
        let done =
            io::copy(&mut self.input.by_ref().take(len), out).map_err(|e| ImageError::io(&self.path, "read", e))?;
        self.pos += done;
        self.left -= done;
        // The file has become shorter since it was opened.
        if done < len {
            self.left = 0;
        }
        self.need(len - done)
    }

    fn skip_padding(&mut self, len: u64) -> Result<(), ImageError> {
        let padding = len.wrapping_neg() % self.kind.padding();
        self.copy(padding, &mut io::sink())
    }

    fn need(&self, needed: u64) -> Result<(), ImageError> {
        if needed <= self.left {
            return Ok(());
        }
        let (path, record, offset, left) = (self.path.clone(), self.record, self.pos, self.left);
        Err(ImageError::Truncated { path, record, offset, needed, left })
    }

    /// The input, from where it has been read to.
    pub(crate) fn into_input(self) -> R {
        self.input
    }
}

/// What follows a record of an image.
pub(crate) fn pending(kind: ImageKind, number: u64, record: &[u8]) -> Pending {
    let field = |n| wire::number(record, n);
    let field32 = |n| u64::from(field(n) as u32);
    match kind.body() {
        Body::Plain | Body::Pagemap | Body::Raw => Pending::Nothing,
        Body::PipeData | Body::SkPacket => Pending::Bytes(field32(2)),
        Body::TcpStream => Pending::Bytes(field32(1) + field32(3)),
        Body::BpfMap => Pending::Bytes(field32(2) + field32(3)),
        Body::IpcShm if field(3) != 0 => Pending::Nothing,
        Body::IpcShm => Pending::Bytes(field(2)),
        Body::IpcMsg => Pending::Messages(field(3) as u32),
        Body::IpcSem => Pending::Bytes(2 * field32(2)),
        Body::Ghost if number > 0 => Pending::Bytes(field(1)),
        Body::Ghost if field(9) != 0 => Pending::Nothing,
        Body::Ghost => Pending::Rest,
    }
}

/// The error for a record that failed its check.
pub(crate) fn fault_error(fault: Fault, path: &Path, record: u64, message: &str) -> ImageError {
    let path = path.to_owned();
    match fault {
        Fault::Missing(mut names) => {
            names.reverse();
            ImageError::MissingField { path, record, field: names.join(".") }
        }
        Fault::Malformed(reason) => ImageError::Decode { path, record, message: message.to_owned(), reason },
        Fault::Unknown { message, tag } => ImageError::UnknownTag { path, record, message: message.to_owned(), tag },
    }
}
