//! One run's random identity: every name that another run could also choose comes from here.

use std::fmt::Write;
use std::io;

/// 128 random bits that tell this run from every other on the machine; two runs in one namespace never collide.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Session {
    /// The random bits.
    pub id: [u8; 16],
}

impl Session {
    /// Draws a fresh identity; see getrandom(2). Fails only where the kernel refuses randomness.
    pub fn new() -> io::Result<Session> {
        let mut id = [0; 16];
        getrandom::fill(&mut id).map_err(io::Error::from)?;
        Ok(Session { id })
    }

    /// The identity as 32 lower-case hexadecimal digits.
    pub fn hex(&self) -> String {
        let mut text = String::with_capacity(32);
        for byte in self.id {
            // Writing to a String cannot fail.
            let _ = write!(text, "{byte:02x}");
        }
        text
    }

    /// The identity that [`Session::hex`] wrote; `None` if the text is not 32 hexadecimal digits.
    pub fn from_hex(text: &str) -> Option<Session> {
        let digits: Vec<u8> = text.chars().map(|c| c.to_digit(16).map(|d| d as u8)).collect::<Option<_>>()?;
        let mut id = [0; 16];
        if digits.len() != 2 * id.len() {
            return None;
        }
        for (byte, pair) in id.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = pair[0] << 4 | pair[1];
        }
        Some(Session { id })
    }

    /// The first 8 digits of [`Session::hex`], for logs and for names that people read.
    pub fn short(&self) -> String {
        let mut text = self.hex();
        text.truncate(8);
        text
    }

    /// An abstract unix socket's name, its leading NUL included: `"\0dormouse-<32 hex>-<role>"`.
    ///
    /// A name longer than the 108 bytes of `sun_path` is the caller's error at bind(2): keep `role` under 66 bytes.
    pub fn socket_name(&self, role: &str) -> Vec<u8> {
        let mut name = vec![0];
        name.extend_from_slice(self.temp_dir_name(role).as_bytes());
        name
    }

    /// A memfd's name, `dormouse-<32 hex>-<role>`; the kernel takes up to 249 bytes, see memfd_create(2).
    pub fn memfd_name(&self, role: &str) -> String {
        self.temp_dir_name(role)
    }

    /// The last component of a temporary directory, `dormouse-<32 hex>-<role>`; `role` must hold no slash.
    pub fn temp_dir_name(&self, role: &str) -> String {
        format!("dormouse-{}-{role}", self.hex())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_carry_the_identity() {
        let session = Session { id: *b"\x00\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\xff" };
        assert_eq!(session.hex(), "000102030405060708090a0b0c0d0eff");
        assert_eq!(session.short(), "00010203");
        assert_eq!(session.socket_name("x"), b"\0dormouse-000102030405060708090a0b0c0d0eff-x");
        assert_eq!(session.memfd_name("img"), "dormouse-000102030405060708090a0b0c0d0eff-img");
        assert_eq!(session.temp_dir_name("mnt"), "dormouse-000102030405060708090a0b0c0d0eff-mnt");
    }

    #[test]
    fn an_identity_is_passed_on_as_text() {
        let session = Session::new().expect("randomness");
        assert_eq!(Session::from_hex(&session.hex()), Some(session));
        for wrong in ["", "00", &session.hex()[1..], &format!("{}0", session.hex()), &"x".repeat(32), &"é".repeat(32)]
        {
            assert_eq!(Session::from_hex(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn two_sessions_differ() {
        assert_ne!(Session::new().expect("randomness").id, Session::new().expect("randomness").id);
    }
}
