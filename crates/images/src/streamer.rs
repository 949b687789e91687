//! What CRIU and `criu-image-streamer` say to each other over a socket in the images directory: messages of one field, each behind
//! its length in 32 bits (CRIU's `images/img-streamer.proto`).

use std::io::{self, Read};

/// Name of the socket at which a streamer takes the images of a dump.
pub const CAPTURE: &str = "streamer-capture.sock";
/// Name of the socket at which a streamer gives images to a restore.
pub const SERVE: &str = "streamer-serve.sock";

/// Longest reply that can be one.
const REPLY: u32 = 64;

/// A request for the image `name`, whose name has at most 127 bytes.
pub fn request(name: &str) -> Vec<u8> {
    let mut bytes = (name.len() as u32 + 2).to_le_bytes().to_vec();
    // Field 1, a string.
    bytes.extend([0x0a, name.len() as u8]);
    bytes.extend(name.bytes());
    bytes
}

/// Reads the reply to a request in a restore: whether there is such an image.
///
/// # Errors
/// The streamer is gone, or sent something else.
pub fn reply(from: &mut impl Read) -> io::Result<bool> {
    let mut len = [0; 4];
    from.read_exact(&mut len)?;
    let len = u32::from_le_bytes(len);
    if len > REPLY {
        return Err(io::Error::other(format!("a reply of {len} bytes is none of a streamer")));
    }
    let mut bytes = vec![0; len as usize];
    from.read_exact(&mut bytes)?;
    // Field 1, a boolean.
    match bytes[..] {
        [0x08, exists] => Ok(exists != 0),
        _ => Err(io::Error::other(format!("{bytes:x?} is no reply of a streamer"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_those_of_the_schema() {
        assert_eq!(request("fs-7.img"), *b"\x0a\0\0\0\x0a\x08fs-7.img");
        assert!(reply(&mut &b"\x02\0\0\0\x08\x01"[..]).expect("yes"));
        assert!(!reply(&mut &b"\x02\0\0\0\x08\x00"[..]).expect("no"));
        for bad in [&b"\x02\0\0\0\x08"[..], b"\x02\0\0\0\x10\x01", b"\xff\0\0\0", b""] {
            reply(&mut &bad[..]).expect_err("no reply");
        }
    }
}
