//! Whether a certificate is for the host that was connected to.
//!
//! Certificates of old name a host as their subject's common name (CN) only, which browsers and TLS libraries no longer look at.
//! CRIU's library does if there is no other name, and so do we: its users' certificates are made by hand.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, Error, SignatureScheme};
use webpki::EndEntityCert;

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
/// The object identifier 2.5.4.3 with its tag and length.
const COMMON_NAME: &[u8] = &[0x06, 0x03, 0x55, 0x04, 0x03];
/// Tags of strings whose bytes are those of ASCII: UTF8String, PrintableString, IA5String.
const STRINGS: [u8; 3] = [0x0c, 0x13, 0x16];

/// For whom a certificate may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Names {
    /// For the host that was connected to.
    Own,
    /// For whomever.
    Any,
}

/// Looks at a server's certificate.
#[derive(Debug)]
pub struct Verifier {
    inner: Arc<WebPkiServerVerifier>,
    names: Names,
}

impl Verifier {
    /// One that looks at names besides.
    pub fn new(inner: Arc<WebPkiServerVerifier>, names: Names) -> Self {
        Self { inner, names }
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        // The name comes last: who fails by it alone is trusted.
        match self.inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if self.names == Names::Any || is_called(end_entity, server_name) => Ok(ServerCertVerified::assertion()),
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// Whether a certificate has no other name of a host, and this one is its common name.
fn is_called(certificate: &CertificateDer<'_>, name: &ServerName<'_>) -> bool {
    let Ok(certificate) = EndEntityCert::try_from(certificate) else { return false };
    if certificate.valid_dns_names().next().is_some() {
        return false;
    }
    let names = common_names(certificate.subject());
    // Of several, nobody knows which one is meant.
    let [only] = &names[..] else { return false };
    only.eq_ignore_ascii_case(name.to_str().as_bytes())
}

/// The common names among the parts of a subject (RFC 5280, 4.1.2.4): sets of sequences of an identifier and a value.
fn common_names(subject: &[u8]) -> Vec<&[u8]> {
    let sets = Parts(subject).filter(|(tag, _)| *tag == SET);
    let attributes = sets.flat_map(|(_, set)| Parts(set)).filter(|(tag, _)| *tag == SEQUENCE);
    let values = attributes.filter_map(|(_, attribute)| Parts(attribute.strip_prefix(COMMON_NAME)?).next());
    values.filter(|(tag, _)| STRINGS.contains(tag)).map(|(_, value)| value).collect()
}

/// What DER strings together: tags and contents. It ends where something is not understood.
struct Parts<'a>(&'a [u8]);

impl<'a> Iterator for Parts<'a> {
    type Item = (u8, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (&[tag, first], rest) = self.0.split_first_chunk()?;
        let (len, rest) = match first {
            0..=0x7f => (usize::from(first), rest),
            0x81 => rest.split_first().map(|(len, rest)| (usize::from(*len), rest))?,
            0x82 => rest.split_first_chunk().map(|(len, rest)| (usize::from(u16::from_be_bytes(*len)), rest))?,
            _ => return None,
        };
        let (content, rest) = rest.split_at_checked(len)?;
        self.0 = rest;
        Some((tag, content))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_names_are_found_among_others() {
        let attribute = |id: &[u8], tag: u8, value: &[u8]| {
            let inner = [id, &[tag, value.len() as u8], value].concat();
            let sequence = [&[SEQUENCE, inner.len() as u8][..], &inner].concat();
            [&[SET, sequence.len() as u8][..], &sequence].concat()
        };
        let other = attribute(&[0x06, 0x03, 0x55, 0x04, 0x0a], 0x0c, b"somebody");
        let subject = [other.clone(), attribute(COMMON_NAME, 0x0c, b"here"), other].concat();
        assert_eq!(common_names(&subject), [b"here"]);
        assert_eq!(common_names(&attribute(COMMON_NAME, 0x1e, b"\0h")), [b""; 0], "of another kind");
        for cut in 0..subject.len() {
            common_names(&subject[..cut]);
        }
    }

    #[test]
    fn lengths_may_take_more_bytes() {
        let long = [&[SET, 0x81, 200][..], &[7; 200]].concat();
        assert_eq!(Parts(&long).next(), Some((SET, &[7; 200][..])));
        let longer = [&[SET, 0x82, 1, 44][..], &[7; 300]].concat();
        assert_eq!(Parts(&longer).next(), Some((SET, &[7; 300][..])));
        assert_eq!(Parts(&longer[..100]).next(), None);
    }
}
