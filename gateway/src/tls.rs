//! TLS towards clients: negotiation, with guards that pgwire lacks, reading of certificates, and what a client's must be.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::BytesMut;
use catalog::tls::end_point;
use pgwire::tokio::server::{MaybeTls, negotiate_tls};
use rustls::crypto::{CryptoProvider, ring};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::TcpStream;
pub(crate) use tokio_rustls::TlsAcceptor;
use x509_cert::Certificate;
use x509_cert::der::Decode;
use x509_cert::der::oid::db::rfc4519::COMMON_NAME;

use crate::config::{ClientCheck, TlsClients, TlsFiles};
use crate::error::{Error, Fatal};

/// The name of the protocol in TLS' own negotiation, which direct TLS demands.
const ALPN: &[u8] = b"postgresql";

/// What new sessions are shown, and what they must show.
#[derive(Clone)]
pub(crate) struct Tls {
    /// Makes TLS on sockets.
    pub(crate) acceptor: TlsAcceptor,
    /// What a client's certificate must be; `None`: it needs none.
    pub(crate) check: Option<ClientCheck>,
    /// When the server's own certificate ends, in seconds since 1970.
    pub(crate) expires: u64,
    /// Stands for that certificate, as [`crate::backend::Connected::certificate`] for the catalog's server's.
    pub(crate) certificate: Option<Vec<u8>>,
}

impl Tls {
    /// Reads certificates and key.
    ///
    /// # Errors
    /// [`Error::Tls`] naming the file that cannot be used.
    pub(crate) fn load(files: &TlsFiles, clients: Option<&TlsClients>) -> Result<Tls, Error> {
        let provider = Arc::new(ring::default_provider());
        let chain = certificates(&files.certificate)?;
        let expires = not_after(&chain[0]).ok_or_else(|| unusable(&files.certificate, "it is not X.509"))?;
        let certificate = end_point(&chain[0]);
        let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|e| unusable(&files.key, e))?;
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|e| unusable(&files.certificate, e))?;
        let builder = match clients {
            None => builder.with_no_client_auth(),
            Some(clients) => builder.with_client_cert_verifier(verifier(&clients.authorities, provider)?),
        };
        let config = builder.with_single_cert(chain, key);
        // Also if the key is another certificate's.
        let mut config = config.map_err(|e| unusable(&files.certificate, e))?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        if expires < SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs()) {
            tracing::warn!(file = %files.certificate.display(), "the certificate has expired");
        }
        Ok(Tls { acceptor: TlsAcceptor::from(Arc::new(config)), check: clients.map(|c| c.check), expires, certificate })
    }
}

fn unusable(path: &Path, reason: impl std::fmt::Display) -> Error {
    Error::Tls { path: path.to_owned(), reason: reason.to_string() }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let certificates = read.map_err(|e| unusable(path, e))?;
    if certificates.is_empty() { Err(unusable(path, "it holds no certificate")) } else { Ok(certificates) }
}

/// Verifies certificates of clients that show one. Those that show none are told so later, in words, as Postgres does.
fn verifier(authorities: &Path, provider: Arc<CryptoProvider>) -> Result<Arc<dyn ClientCertVerifier>, Error> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(authorities)? {
        roots.add(certificate).map_err(|e| unusable(authorities, e))?;
    }
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).allow_unauthenticated();
    builder.build().map_err(|e| unusable(authorities, e))
}

fn not_after(certificate: &[u8]) -> Option<u64> {
    let parsed = Certificate::from_der(certificate).ok()?;
    Some(parsed.tbs_certificate.validity.not_after.to_unix_duration().as_secs())
}

/// Returns a certificate's first common name. One with a zero byte in it is none: it would look like another.
fn common_name(certificate: &[u8]) -> Option<String> {
    let parsed = Certificate::from_der(certificate).ok()?;
    let mut attributes = parsed.tbs_certificate.subject.0.iter().flat_map(|rdn| rdn.0.iter());
    let name = attributes.find(|attribute| attribute.oid == COMMON_NAME)?;
    std::str::from_utf8(name.value.value()).ok().filter(|name| !name.contains('\0')).map(str::to_owned)
}

/// Says why a client that logs in as `user` is not let in, if its certificate is not what `check` asks for. That a certificate
/// which was shown is signed as it must be has been verified in the handshake.
pub(crate) fn refusal(io: &MaybeTls, check: Option<ClientCheck>, user: &str) -> Option<Fatal> {
    let check = check?;
    let shown = match io {
        MaybeTls::Tls(stream) => stream.get_ref().1.peer_certificates().and_then(<[_]>::first),
        _ => None,
    };
    match (shown, check) {
        (None, _) => Some(Fatal::CertificateRequired),
        (Some(shown), ClientCheck::VerifyFull) if common_name(shown).as_deref() != Some(user) => {
            Some(Fatal::CertificateOfAnother)
        }
        _ => None,
    }
}

/// A client's socket after the negotiation.
pub(crate) struct Negotiated {
    /// The socket.
    pub(crate) io: MaybeTls,
    /// What was read from it already.
    pub(crate) read: BytesMut,
    /// Set when the session must end at once.
    pub(crate) fatal: Option<Fatal>,
}

/// Answers SSLRequest and GSSENCRequest, or takes a direct TLS handshake. `None`: the client wants TLS and there is none.
///
/// # Errors
/// [`io::Error`] if the socket breaks or the handshake fails; there is nobody to tell then.
pub(crate) async fn negotiate(socket: TcpStream, acceptor: Option<TlsAcceptor>) -> io::Result<Option<Negotiated>> {
    let Some(framed) = negotiate_tls::<()>(socket, acceptor).await? else { return Ok(None) };
    let parts = framed.into_parts();
    // pgwire would take what came in plain text behind the SSLRequest for the first bytes of the TLS session (CVE-2021-23214).
    let injected = matches!(parts.io, MaybeTls::Tls(_)) && !parts.read_buf.is_empty();
    let fatal = injected.then_some(Fatal::PlaintextAfterTls);
    Ok(Some(Negotiated { io: parts.io, read: parts.read_buf, fatal }))
}
