//! TLS towards clients: negotiation, with guards that pgwire lacks, and reading of certificates.

use std::io;
use std::path::Path;
use std::sync::Arc;

use bytes::BytesMut;
use pgwire::tokio::server::{MaybeTls, negotiate_tls};
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::TcpStream;
pub(crate) use tokio_rustls::TlsAcceptor;

use crate::config::TlsFiles;
use crate::error::{Error, Fatal};

/// The name of the protocol in TLS' own negotiation, which direct TLS demands.
const ALPN: &[u8] = b"postgresql";

/// Reads certificate and key.
///
/// # Errors
/// [`Error::Tls`] naming the file that cannot be used.
pub(crate) fn acceptor(files: &TlsFiles) -> Result<TlsAcceptor, Error> {
    let unusable = |path: &Path, reason: String| Error::Tls { path: path.to_owned(), reason };
    let chain = CertificateDer::pem_file_iter(&files.certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| unusable(&files.certificate, e.to_string()))?;
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|e| unusable(&files.key, e.to_string()))?;
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|e| unusable(&files.certificate, e.to_string()))?
        .with_no_client_auth()
        .with_single_cert(chain, key);
    let mut config = config.map_err(|e| unusable(&files.certificate, e.to_string()))?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
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
