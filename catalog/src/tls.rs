//! TLS towards a peer: what each `sslmode` verifies.
//!
//! Source: PostgreSQL docs, libpq-ssl, "SSL Mode Descriptions".

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::server::ParsedCertificate;
use rustls::version::{TLS12, TLS13};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    SupportedProtocolVersion,
};
use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime};
use sha2::{Digest, Sha256, Sha384, Sha512};
use tokio::net::TcpStream;
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres_rustls::MakeRustlsConnect;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::peer::{PeerOptions, is_pem};

/// Makes TLS connections as a peer's options say.
#[derive(Clone)]
pub struct PeerTls {
    config: Arc<ClientConfig>,
    inner: MakeRustlsConnect,
    name: Option<String>,
}

impl<S> MakeTlsConnect<S> for PeerTls
where
    MakeRustlsConnect: MakeTlsConnect<S>,
{
    type Stream = <MakeRustlsConnect as MakeTlsConnect<S>>::Stream;
    type TlsConnect = <MakeRustlsConnect as MakeTlsConnect<S>>::TlsConnect;
    type Error = <MakeRustlsConnect as MakeTlsConnect<S>>::Error;

    fn make_tls_connect(&mut self, host: &str) -> Result<Self::TlsConnect, Self::Error> {
        self.inner.make_tls_connect(self.name.as_deref().unwrap_or(host))
    }
}

/// How much of the server's certificate is verified.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verify {
    Nothing,
    Authority,
    AuthorityAndName,
}

/// Tells how well a connection with these options is protected: 0 never by TLS, 1 if the server insists, 2 if it can, 3 always,
/// 4 authority verified, 5 name verified too. As `peergate.tls_strength` in the catalog.
pub fn strength(options: &PeerOptions) -> u8 {
    if options.flag("disable_tls") {
        return 0;
    }
    let base = match options.get("sslmode") {
        Some("disable") => return 0,
        Some("allow") => return 1,
        Some("prefer") => return 2,
        None if !options.flag("require_tls") => return 2,
        _ => 3,
    };
    match verification(options) {
        Verify::Nothing => base,
        Verify::Authority => 4,
        Verify::AuthorityAndName => 5,
    }
}

/// What is verified of the certificate, as libpq says it and, for PeerDB's options, as PeerDB does.
fn verification(options: &PeerOptions) -> Verify {
    let has_authority = options.get("sslrootcert").is_some() || options.get("root_ca").is_some();
    match options.get("sslmode") {
        _ if options.flag("skip_cert_verification") => Verify::Nothing,
        Some("verify-full") => Verify::AuthorityAndName,
        Some("verify-ca") => Verify::Authority,
        // As libpq: an authority that is given is not ignored.
        Some("require") if has_authority => Verify::Authority,
        _ if options.flag("require_tls") && has_authority => Verify::AuthorityAndName,
        _ => Verify::Nothing,
    }
}

/// The versions of TLS that the options allow; rustls has none below 1.2.
fn versions(options: &PeerOptions) -> io::Result<Vec<&'static SupportedProtocolVersion>> {
    let level = |name: &str| match options.get(name) {
        Some("TLSv1.3") => 3,
        Some(_) => 2,
        None => 0,
    };
    let (lowest, highest) = (level("ssl_min_protocol_version"), level("ssl_max_protocol_version"));
    let fits = |version: i32| version >= lowest && (highest == 0 || version <= highest);
    let all: [(i32, &'static SupportedProtocolVersion); 2] = [(2, &TLS12), (3, &TLS13)];
    let allowed: Vec<_> = all.into_iter().filter(|(n, _)| fits(*n)).map(|(_, version)| version).collect();
    if allowed.is_empty() {
        return Err(io::Error::other(
            "options \"ssl_min_protocol_version\" and \"ssl_max_protocol_version\" leave no version of TLS",
        ));
    }
    Ok(allowed)
}

impl PeerTls {
    /// Reads certificates and keys and makes the configuration.
    ///
    /// # Errors
    /// [`io::Error`] naming the option whose file cannot be read or does not hold what it should.
    pub fn new(options: &PeerOptions) -> io::Result<PeerTls> {
        let verify = verification(options);
        let provider = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&versions(options)?)
            .map_err(io::Error::other)?;
        let chain = if verify == Verify::Nothing {
            None
        } else {
            let trusted = authorities(options)?;
            let mut roots = RootCertStore::empty();
            for certificate in &trusted {
                roots.add(certificate.clone()).map_err(|e| unusable("sslrootcert", e))?;
            }
            let inner = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone());
            let inner = inner.with_crls(revocation_lists(options)?);
            let inner = inner.build().map_err(io::Error::other)?;
            Some(Chain { inner, trusted, any_name: verify == Verify::Authority })
        };
        let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(Verifier { provider, chain }));
        let sends_certificate = options.get("sslcertmode") != Some("disable");
        let mut config = match (options.get("sslcert"), options.get("sslkey")) {
            (Some(certificate), Some(key)) if sends_certificate => {
                let chain = certificates(certificate).map_err(|e| unusable("sslcert", e))?;
                let key = if is_pem(key) {
                    PrivateKeyDer::from_pem_slice(key.as_bytes())
                } else {
                    PrivateKeyDer::from_pem_file(key)
                };
                let key = key.map_err(|e| unusable("sslkey", e))?;
                builder.with_client_auth_cert(chain, key).map_err(io::Error::other)?
            }
            (Some(_), None) | (None, Some(_)) => {
                return Err(io::Error::other("options \"sslcert\" and \"sslkey\" belong together"));
            }
            _ => builder.with_no_client_auth(),
        };
        config.enable_sni = options.get("sslsni").is_none_or(|_| options.flag("sslsni"));
        if options.get("sslnegotiation") == Some("direct") {
            // A server takes TLS that begins unasked only with this.
            config.alpn_protocols = vec![b"postgresql".to_vec()];
        }
        Ok(PeerTls {
            config: Arc::new(config.clone()),
            inner: MakeRustlsConnect::new(config),
            name: options.get("tls_host").map(str::to_owned),
        })
    }

    /// Makes TLS on a socket on which the server has agreed to it. Also returns the `tls-server-end-point` data for SCRAM's channel
    /// binding, which the SQL client keeps to itself; `None` when the certificate's signature has no hash that could be used.
    ///
    /// # Errors
    /// [`io::Error`] if the handshake fails, the certificate's verification included.
    pub async fn handshake(
        &self,
        host: &str,
        socket: TcpStream,
    ) -> io::Result<(TlsStream<TcpStream>, Option<Vec<u8>>)> {
        let name = self.name.as_deref().unwrap_or(host).to_owned();
        let name = ServerName::try_from(name).map_err(io::Error::other)?;
        let stream = TlsConnector::from(self.config.clone()).connect(name, socket).await?;
        let certificate = stream.get_ref().1.peer_certificates().and_then(|c| c.first());
        let binding = certificate.and_then(|c| end_point(c));
        Ok((stream, binding))
    }
}

/// Hashes a certificate as RFC 5929 section 4.1 says: by its signature's hash, SHA-256 in place of weaker ones. Two servers that show
/// the same certificate have the same hash.
pub fn end_point(certificate: &[u8]) -> Option<Vec<u8>> {
    use x509_cert::der::oid::db::rfc5912::{
        ECDSA_WITH_SHA_256, ECDSA_WITH_SHA_384, ECDSA_WITH_SHA_512, SHA_1_WITH_RSA_ENCRYPTION,
        SHA_256_WITH_RSA_ENCRYPTION, SHA_384_WITH_RSA_ENCRYPTION, SHA_512_WITH_RSA_ENCRYPTION,
    };
    match x509(certificate)?.signature_algorithm.oid {
        SHA_1_WITH_RSA_ENCRYPTION | SHA_256_WITH_RSA_ENCRYPTION | ECDSA_WITH_SHA_256 => {
            Some(Sha256::digest(certificate).to_vec())
        }
        SHA_384_WITH_RSA_ENCRYPTION | ECDSA_WITH_SHA_384 => Some(Sha384::digest(certificate).to_vec()),
        SHA_512_WITH_RSA_ENCRYPTION | ECDSA_WITH_SHA_512 => Some(Sha512::digest(certificate).to_vec()),
        _ => None,
    }
}

fn unusable(option: &str, error: impl std::fmt::Display) -> io::Error {
    io::Error::other(format!("option \"{option}\" cannot be used: {error}"))
}

/// What to do about a handshake that failed, when there is something to say.
pub fn hint(error: &io::Error) -> Option<&'static str> {
    match error.get_ref()?.downcast_ref::<Error>()? {
        Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            Some("The server's certificate is not signed by an authority in sslrootcert.")
        }
        Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => Some("Set host to a name in the server's certificate; with hostaddr it need not be the address."),
        _ => None,
    }
}

/// Certificates from PEM text, or from the file that it names.
fn certificates(given: &str) -> Result<Vec<CertificateDer<'static>>, pem::Error> {
    if is_pem(given) {
        CertificateDer::pem_slice_iter(given.as_bytes()).collect()
    } else {
        CertificateDer::pem_file_iter(given).and_then(Iterator::collect)
    }
}

fn authorities(options: &PeerOptions) -> io::Result<Vec<CertificateDer<'static>>> {
    let found = match (options.get("root_ca"), options.get("sslrootcert")) {
        (Some(pem), _) => certificates(pem).map_err(|e| unusable("root_ca", e))?,
        (None, Some("system")) | (None, None) => rustls_native_certs::load_native_certs().certs,
        (None, Some(file)) => certificates(file).map_err(|e| unusable("sslrootcert", e))?,
    };
    if found.is_empty() { Err(unusable("sslrootcert", "it holds no certificate")) } else { Ok(found) }
}

/// The lists of `sslcrl` and of all files in `sslcrldir`.
fn revocation_lists(options: &PeerOptions) -> io::Result<Vec<CertificateRevocationListDer<'static>>> {
    let mut files: Vec<(&str, PathBuf)> = Vec::new();
    if let Some(file) = options.get("sslcrl") {
        files.push(("sslcrl", file.into()));
    }
    if let Some(directory) = options.get("sslcrldir") {
        for entry in std::fs::read_dir(directory).map_err(|e| unusable("sslcrldir", e))? {
            files.push(("sslcrldir", entry.map_err(|e| unusable("sslcrldir", e))?.path()));
        }
    }
    let mut lists = Vec::new();
    for (option, file) in files {
        let read = CertificateRevocationListDer::pem_file_iter(&file).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        lists.extend(read.map_err(|e| unusable(option, format!("{}: {e}", file.display())))?);
    }
    Ok(lists)
}

/// Verifies what the mode asks for. Whatever that is, the server must prove that it has the certificate's key.
#[derive(Debug)]
struct Verifier {
    provider: Arc<CryptoProvider>,
    /// `None` for the modes that only encrypt: every certificate will do.
    chain: Option<Chain>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match &self.chain {
            Some(chain) => chain.verify(certificate, intermediates, name, ocsp, now),
            None => Ok(ServerCertVerified::assertion()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Verifies the chain to a trusted authority and, unless `any_name`, the name; as libpq does, also where webpki is stricter.
#[derive(Debug)]
struct Chain {
    inner: Arc<WebPkiServerVerifier>,
    trusted: Vec<CertificateDer<'static>>,
    any_name: bool,
}

impl Chain {
    /// Verifies a certificate as TLS hands it over.
    fn verify(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match self.inner.verify_server_cert(certificate, intermediates, name, ocsp, now) {
            // The chain is verified before the name, so a wrong name means that the chain is right.
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if self.any_name || is_common_name(certificate, name) => Ok(ServerCertVerified::assertion()),
            // OpenSSL takes a certificate that is trusted itself; webpki wants an authority above it.
            Err(Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::Other(_)))
                if self.trusted.iter().any(|trusted| trusted == certificate) =>
            {
                self.verify_trusted(certificate, name, now).map(|()| ServerCertVerified::assertion())
            }
            other => other,
        }
    }

    /// Verifies a certificate that is itself trusted: there is no chain, only dates and name.
    fn verify_trusted(
        &self,
        certificate: &CertificateDer<'_>,
        name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), Error> {
        let parsed = x509(certificate).ok_or(CertificateError::BadEncoding)?;
        let validity = parsed.tbs_certificate.validity;
        if now.as_secs() < validity.not_before.to_unix_duration().as_secs() {
            return Err(CertificateError::NotValidYet.into());
        }
        if now.as_secs() > validity.not_after.to_unix_duration().as_secs() {
            return Err(CertificateError::Expired.into());
        }
        match verify_server_name(&ParsedCertificate::try_from(certificate)?, name) {
            Err(error) if !(self.any_name || is_common_name(certificate, name)) => Err(error),
            _ => Ok(()),
        }
    }
}

fn x509(certificate: &[u8]) -> Option<x509_cert::Certificate> {
    x509_cert::der::Decode::from_der(certificate).ok()
}

/// Whether `name` is the common name of a certificate that has no alternative names: those that PostgreSQL's documentation makes.
///
/// Source: PostgreSQL docs, libpq-ssl, "Client Verification of Server Certificates".
fn is_common_name(certificate: &[u8], name: &ServerName<'_>) -> bool {
    use x509_cert::der::oid::db::rfc4519::COMMON_NAME;
    use x509_cert::der::oid::db::rfc5280::ID_CE_SUBJECT_ALT_NAME;
    let Some(parsed) = x509(certificate) else { return false };
    let extensions = parsed.tbs_certificate.extensions.unwrap_or_default();
    if extensions.iter().any(|extension| extension.extn_id == ID_CE_SUBJECT_ALT_NAME) {
        return false;
    }
    let attributes = parsed.tbs_certificate.subject.0.iter().flat_map(|rdn| rdn.0.iter());
    let mut names =
        attributes.filter(|a| a.oid == COMMON_NAME).filter_map(|a| std::str::from_utf8(a.value.value()).ok());
    let host = name.to_str();
    names.any(|common| match common.strip_prefix("*.") {
        Some(domain) => host.split_once('.').is_some_and(|(_, rest)| rest.eq_ignore_ascii_case(domain)),
        None => common.eq_ignore_ascii_case(&host),
    })
}
