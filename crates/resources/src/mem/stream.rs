//! Pages on their way into a stream: the dump sends them as to a page server, which is a thread of its own.

use std::io::{self, Read, Write};

use dormouse_blob_abi::PAGE;
use dormouse_images::stream::ImageSink;
use dormouse_images::{ImageDir, ImageKind};
use dormouse_pages::runs::PE_PRESENT;
use dormouse_pages::server::{Header, MapId, command};

use super::pages::PageIds;
use super::records::Records;
use crate::{Result, call, invalid};

/// Bytes that are received at once.
const BUFFER: u64 = 1 << 20;

/// Writes pages that `peer` sends into the stream, and their page maps into `images`, until it says that it is done. Inside, an
/// error of the stream.
///
/// # Errors
/// The peer went away before, or an image cannot be written.
pub fn collect(
    images: &ImageDir,
    peer: &mut (impl Read + Write),
    stream: &mut dyn ImageSink,
) -> Result<io::Result<()>> {
    let ids = PageIds::new();
    let mut map: Option<(Records, String)> = None;
    let mut buffer = vec![0; BUFFER as usize];
    loop {
        let header = Header::read(peer).map_err(call("cannot read from the dump"))?;
        let header = header.ok_or_else(|| invalid!("the dump went away before it was done"))?;
        match header.command & 0xffff {
            command::OPEN2 => {
                map.take().map_or(Ok(()), |(records, _)| records.finish())?;
                let (kind, id) = match MapId::decode(header.of) {
                    Some(MapId::Task(id)) => (ImageKind::Pagemap, id),
                    Some(MapId::Shared(id)) => (ImageKind::ShmemPagemap, id),
                    None => return Err(invalid!("the dump sent pages of unknown kind ({:#x})", header.of)),
                };
                let number = ids.next();
                let name = ImageKind::Pages.file_name(number.into());
                if let Err(e) = stream.append(&name, &[]) {
                    return Ok(Err(e));
                }
                map = Some((Records::new(images.writer(kind, id)?, number)?, name));
                // There is no checkpoint before.
                peer.write_all(&[0]).map_err(call("cannot answer the dump"))?;
            }
            command::ADD_FLAGS => {
                let Some((records, name)) = &mut map else { return Err(invalid!("the dump sent pages of nothing")) };
                let (flags, mut left) = (header.command >> 16, header.pages * PAGE);
                records.add(header.addr, left, flags)?;
                while flags & PE_PRESENT != 0 && left > 0 {
                    let part = &mut buffer[..left.min(BUFFER) as usize];
                    peer.read_exact(part).map_err(call("cannot read from the dump"))?;
                    if let Err(e) = stream.append(name, part) {
                        return Ok(Err(e));
                    }
                    left -= part.len() as u64;
                }
            }
            command::FORCE_CLOSE => {
                map.take().map_or(Ok(()), |(records, _)| records.finish())?;
                peer.write_all(&[0; 4]).map_err(call("cannot answer the dump"))?;
                return Ok(Ok(()));
            }
            other => return Err(invalid!("the dump sent the unknown command {other:#x}")),
        }
    }
}
