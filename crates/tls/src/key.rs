//! A private key that signs again what it has failed to sign.
//!
//! graviola (0.3.4 and 0.4.4) checks each RSA signature that it has made, and with some keys one of a thousand fails that check: it
//! is not given away, but the handshake would end. Its blinding is another one each time, so the next try succeeds.

use std::sync::Arc;

use rustls::pki_types::SubjectPublicKeyInfoDer;
use rustls::sign::{Signer, SigningKey};
use rustls::{Error, SignatureAlgorithm, SignatureScheme};

/// Tries in all: with one failure of a thousand, four of them are one handshake in 10^12.
const TRIES: usize = 4;

/// A key that does not give up at once.
#[derive(Debug)]
pub struct Persistent(pub Arc<dyn SigningKey>);

impl SigningKey for Persistent {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        let signer = self.0.choose_scheme(offered)?;
        Some(Box::new(PersistentSigner(signer)))
    }

    fn public_key(&self) -> Option<SubjectPublicKeyInfoDer<'_>> {
        self.0.public_key()
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        self.0.algorithm()
    }
}

#[derive(Debug)]
struct PersistentSigner(Box<dyn Signer>);

impl Signer for PersistentSigner {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        let early = (1..TRIES).find_map(|_| self.0.sign(message).ok());
        early.map_or_else(|| self.0.sign(message), Ok)
    }

    fn scheme(&self) -> SignatureScheme {
        self.0.scheme()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Fails so often, then signs by the number of the try.
    #[derive(Debug)]
    struct Fails(usize, Arc<AtomicUsize>);

    impl Signer for Fails {
        fn sign(&self, _: &[u8]) -> Result<Vec<u8>, Error> {
            let before = self.1.fetch_add(1, Ordering::Relaxed);
            if before < self.0 { Err(Error::General("bad".into())) } else { Ok(vec![before as u8]) }
        }

        fn scheme(&self) -> SignatureScheme {
            SignatureScheme::RSA_PSS_SHA256
        }
    }

    #[test]
    fn a_failure_is_not_the_end_but_many_are() {
        for (failures, tried) in [(0, 1), (1, 2), (3, 4), (4, 4), (9, 4)] {
            let count = Arc::new(AtomicUsize::new(0));
            let signed = PersistentSigner(Box::new(Fails(failures, Arc::clone(&count)))).sign(b"x");
            assert_eq!(signed.is_ok(), failures < TRIES, "{failures}");
            assert_eq!(count.load(Ordering::Relaxed), tried, "{failures}");
        }
    }
}
