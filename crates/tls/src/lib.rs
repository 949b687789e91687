//! Pages on their way to another machine, encrypted: TLS with certificates on both sides, which CRIU's options name.
//!
//! See docs/decisions/0014-tls.md for the choice of libraries, and for what is stricter than in CRIU.
#![forbid(unsafe_code)]

mod key;
mod line;
mod name;

use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use line::{Encrypted, Line};
use rustls::client::WebPkiServerVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, ClientConnection, InconsistentKeys, RootCertStore, ServerConfig, ServerConnection};

/// Where CRIU looks for its files.
const CACERT: &str = "/etc/pki/CA/cacert.pem";
const CACRL: &str = "/etc/pki/CA/cacrl.pem";
const CERT: &str = "/etc/pki/criu/cert.pem";
const KEY: &str = "/etc/pki/criu/private/key.pem";

/// What is to be used, as CRIU's options name it; files are PEM, and those that are not named lie where CRIU looks for them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// `--tls-cacert`: whose certificates are trusted. Nobody else's are.
    pub cacert: Option<PathBuf>,
    /// `--tls-cacrl`: which of them are revoked.
    pub cacrl: Option<PathBuf>,
    /// `--tls-cert`: our own certificate, and those between it and one that the other side trusts.
    pub cert: Option<PathBuf>,
    /// `--tls-key`: its private key.
    pub key: Option<PathBuf>,
    /// `--tls-no-cn-verify`: a server's certificate may be for another host.
    pub any_name: bool,
}

/// Why there can be no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be used.
    #[error("cannot use {} ({option}): {why}; name a PEM file with {what}", path.display())]
    File {
        /// Which one.
        path: PathBuf,
        /// The option that names it.
        option: &'static str,
        /// What it ought to hold.
        what: &'static str,
        /// What is wrong.
        why: String,
    },
    /// Certificate and key do not fit, or are of a kind that is not known.
    #[error("cannot use the certificate of {} with the key of {}: {why}; name both with --tls-cert and --tls-key",
            cert.display(), key.display())]
    Pair {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// What is wrong.
        why: rustls::Error,
    },
    /// The processor lacks instructions.
    #[error("TLS needs a processor with {0}, which this one lacks; use a tunnel, e.g. of ssh(1), in place of --tls")]
    Processor(&'static str),
    /// The library refuses for another reason.
    #[error("TLS cannot be set up: {0}")]
    Setup(String),
}

/// Both ends of encrypted connections.
#[derive(Clone, Debug)]
pub struct Tls {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl Tls {
    /// Reads all files, so that one that is missing is told before anything else is done.
    ///
    /// # Errors
    /// As of [`TlsError`].
    pub fn new(options: &Options) -> Result<Self, TlsError> {
        processor()?;
        let provider = Arc::new(rustls_graviola::default_provider());
        let (roots, revoked, own) = (trusted(options)?, revoked(options)?, own(options, &provider)?);
        let names = if options.any_name { name::Names::Any } else { name::Names::Own };
        let client = client_config(Arc::clone(&provider), Arc::clone(&roots), revoked.clone(), names);
        let server = server_config(provider, roots, revoked);
        let setup = |e: Box<dyn std::error::Error>| TlsError::Setup(e.to_string());
        let client = client.map_err(setup)?.with_client_cert_resolver(Arc::<SingleCertAndKey>::clone(&own));
        let mut server = server.map_err(setup)?.with_cert_resolver(own);
        // Nobody comes twice. CRIU 4.2 takes a ticket, which its library tells by asking for another try, for the loss of the line.
        server.send_tls13_tickets = 0;
        Ok(Self { client: Arc::new(client), server: Arc::new(server) })
    }

    /// As [`Tls::new`], if anything is to be encrypted at all.
    ///
    /// # Errors
    /// As of [`TlsError`].
    pub fn wanted(options: Option<&Options>) -> Result<Option<Self>, TlsError> {
        options.map(Self::new).transpose()
    }

    /// The end of the one who connects to `host`, whose certificate must be for that name.
    ///
    /// # Errors
    /// `host` is no name of a host; the other side has hung up, or one of the two is not trusted by the other. The latter may
    /// show only when something is read.
    pub fn connect(&self, socket: TcpStream, host: &str) -> std::io::Result<Line> {
        let name = ServerName::try_from(host.to_owned()).map_err(std::io::Error::other)?;
        let connection = ClientConnection::new(Arc::clone(&self.client), name).map_err(std::io::Error::other)?;
        let mut line = Line::over(connection, socket);
        if let Line::Encrypted(line) = &mut line {
            line.agree()?;
        }
        Ok(line)
    }

    /// The end of the one who was connected to. Nothing is said before the first use, since the other side may be silent.
    ///
    /// # Errors
    /// None that is known: the library's.
    pub fn accept(&self, socket: TcpStream) -> std::io::Result<Line> {
        let connection = ServerConnection::new(Arc::clone(&self.server)).map_err(std::io::Error::other)?;
        Ok(Line::over(connection, socket))
    }
}

type Revoked = Vec<CertificateRevocationListDer<'static>>;
type ClientBuilder = rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>;
type ServerBuilder = rustls::ConfigBuilder<ServerConfig, rustls::server::WantsServerCert>;

/// A client that looks at the server's certificate.
fn client_config(
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    revoked: Revoked,
    names: name::Names,
) -> Result<ClientBuilder, Box<dyn std::error::Error>> {
    let verifier = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider));
    let verifier = verifier.with_crls(revoked).allow_unknown_revocation_status().build()?;
    let client = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(client.dangerous().with_custom_certificate_verifier(Arc::new(name::Verifier::new(verifier, names))))
}

/// A server that talks to those only who have a certificate.
fn server_config(
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    revoked: Revoked,
) -> Result<ServerBuilder, Box<dyn std::error::Error>> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider));
    // Like CRIU, it does not tell strangers whom it trusts.
    let verifier = verifier.clear_root_hint_subjects().with_crls(revoked).allow_unknown_revocation_status().build()?;
    let server = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(server.with_client_cert_verifier(verifier))
}

/// What a file is for: the option that names it, and what it ought to hold.
type Use = (&'static str, &'static str);

fn unusable(path: &Path, (option, what): Use, why: &dyn std::fmt::Display) -> TlsError {
    TlsError::File { path: path.to_owned(), option, what, why: why.to_string() }
}

/// Whose certificates are trusted.
fn trusted(options: &Options) -> Result<Arc<RootCertStore>, TlsError> {
    let told: Use = ("--tls-cacert", "certificates to trust");
    let path = options.cacert.clone().unwrap_or_else(|| CACERT.into());
    let mut roots = RootCertStore::empty();
    for certificate in all::<CertificateDer<'static>>(&path, told)? {
        roots.add(certificate).map_err(|e| unusable(&path, told, &e))?;
    }
    Ok(Arc::new(roots))
}

/// Lists of revoked certificates. As with CRIU, there need not be one where it is looked for unasked.
fn revoked(options: &Options) -> Result<Revoked, TlsError> {
    let path = match &options.cacrl {
        Some(path) => path,
        None if Path::new(CACRL).exists() => Path::new(CACRL),
        None => return Ok(Vec::new()),
    };
    all(path, ("--tls-cacrl", "lists of revoked certificates"))
}

/// Our certificate and its key, which must fit.
fn own(options: &Options, provider: &CryptoProvider) -> Result<Arc<SingleCertAndKey>, TlsError> {
    let cert = options.cert.clone().unwrap_or_else(|| CERT.into());
    let key = options.key.clone().unwrap_or_else(|| KEY.into());
    let chain = all(&cert, ("--tls-cert", "your certificate"))?;
    let secret = PrivateKeyDer::from_pem_file(&key);
    let secret = secret.map_err(|e| unusable(&key, ("--tls-key", "the certificate's private key"), &e))?;
    let pair = |why| TlsError::Pair { cert, key, why };
    let secret = match provider.key_provider.load_private_key(secret) {
        Ok(secret) => Arc::new(key::Persistent(secret)),
        Err(e) => return Err(pair(e)),
    };
    let certified = CertifiedKey::new(chain, secret);
    match certified.keys_match() {
        // Some keys do not tell what belongs to them.
        Ok(()) | Err(rustls::Error::InconsistentKeys(InconsistentKeys::Unknown)) => Ok(Arc::new(certified.into())),
        Err(e) => Err(pair(e)),
    }
}

/// All that a file holds of a kind: at least one.
fn all<T: PemObject>(path: &Path, told: Use) -> Result<Vec<T>, TlsError> {
    let read = T::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<T>, _>>);
    match read {
        Ok(all) if all.is_empty() => Err(unusable(path, told, &pem::Error::NoItemsFound)),
        Ok(all) => Ok(all),
        Err(e) => Err(unusable(path, told, &e)),
    }
}

/// The cryptography panics without these.
fn processor() -> Result<(), TlsError> {
    #[cfg(target_arch = "x86_64")]
    let has = is_x86_feature_detected!("aes")
        && is_x86_feature_detected!("pclmulqdq")
        && is_x86_feature_detected!("ssse3")
        && is_x86_feature_detected!("avx")
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("adx");
    #[cfg(target_arch = "x86_64")]
    let needs = "AES, PCLMULQDQ, SSSE3, AVX, AVX2, BMI1, BMI2 and ADX";
    #[cfg(target_arch = "aarch64")]
    let has = std::arch::is_aarch64_feature_detected!("neon")
        && std::arch::is_aarch64_feature_detected!("aes")
        && std::arch::is_aarch64_feature_detected!("pmull")
        && std::arch::is_aarch64_feature_detected!("sha2");
    #[cfg(target_arch = "aarch64")]
    let needs = "NEON, AES, PMULL and SHA2";
    if has { Ok(()) } else { Err(TlsError::Processor(needs)) }
}
