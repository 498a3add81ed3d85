//! One POST over a connection of its own: events are rare, and a connection that is kept would be a stale one.

use base64::prelude::{BASE64_STANDARD, Engine as _};
use catalog::alert::channel::Channel;
use catalog::peer::PeerOptions;
use catalog::tls::PeerTls;
use http_body_util::{BodyExt, Full, Limited};
use hyper::Uri;
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue, USER_AGENT};
use hyper::rt::{Read, Write};
use hyper_util::rt::TokioIo;
use percent_encoding::percent_decode_str;
use tokio::net::TcpStream;

use super::{Error, timeout};

/// How much of an answer is read, in bytes; of one that says no, as many are shown as fit a line.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// How much of an answer is shown, in characters.
const SHOWN_CHARS_MAX: usize = 200;

/// Where a POST goes.
struct Target {
    host: String,
    port: u16,
    is_tls: bool,
    /// Path and query.
    path: String,
    /// User and password that the address holds, as Basic authorization.
    authorization: Option<String>,
}

impl Target {
    /// Takes an address apart. It is not quoted in the error: it may be a secret.
    fn parse(url: &str) -> Result<Target, Error> {
        let bad = || Error::Options("the url is not an address of http or https".to_owned());
        let uri: Uri = url.parse().map_err(|_| bad())?;
        let is_tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(bad()),
        };
        let authority = uri.authority().ok_or_else(bad)?;
        let userinfo =
            authority.as_str().rsplit_once('@').map(|(user, _)| percent_decode_str(user).collect::<Vec<u8>>());
        Ok(Target {
            host: authority.host().trim_matches(['[', ']']).to_owned(),
            port: authority.port_u16().unwrap_or(if is_tls { 443 } else { 80 }),
            is_tls,
            path: uri.path_and_query().map_or("/", |path| path.as_str()).to_owned(),
            authorization: userinfo.map(|user| format!("Basic {}", BASE64_STANDARD.encode(user))),
        })
    }

    fn address(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    fn unreachable(&self, error: impl std::fmt::Display) -> Error {
        Error::Unreachable { host: self.address(), reason: error.to_string() }
    }
}

/// Sends a JSON document; fails unless the answer is one of success.
pub(super) async fn post(
    channel: &Channel,
    url: &str,
    authorization: Option<String>,
    body: String,
) -> Result<(), Error> {
    let target = Target::parse(url)?;
    let timeout = timeout(channel);
    let authorization = authorization.or_else(|| target.authorization.clone());
    let attempt = async {
        let socket =
            TcpStream::connect((target.host.as_str(), target.port)).await.map_err(|e| target.unreachable(e))?;
        if !target.is_tls {
            return exchange(&target, TokioIo::new(socket), authorization, body).await;
        }
        let root = channel.get("sslrootcert").map(|path| ("sslrootcert", path.to_owned()));
        let options = PeerOptions::plain([("sslmode", "verify-full".to_owned())].into_iter().chain(root));
        let tls = PeerTls::new(&options).map_err(|error| Error::Options(error.to_string()))?;
        let (stream, _) = tls.handshake(&target.host, socket).await.map_err(|e| target.unreachable(e))?;
        exchange(&target, TokioIo::new(stream), authorization, body).await
    };
    let answered = tokio::time::timeout(timeout, attempt).await;
    answered.unwrap_or_else(|_| Err(Error::Timeout { host: target.address(), timeout }))
}

async fn exchange(
    target: &Target,
    io: impl Read + Write + Unpin + Send + 'static,
    authorization: Option<String>,
    body: String,
) -> Result<(), Error> {
    let (mut sender, connection) = http1::handshake(io).await.map_err(|e| target.unreachable(e))?;
    let default_port = if target.is_tls { 443 } else { 80 };
    let address = target.address();
    let host =
        if target.port == default_port { &address[..address.rfind(':').unwrap_or(address.len())] } else { &address };
    let mut request = hyper::Request::post(&target.path)
        .header(HOST, host)
        .header(CONTENT_TYPE, "application/json")
        .header(USER_AGENT, concat!("peergate/", env!("CARGO_PKG_VERSION")));
    if let Some(authorization) = authorization {
        let value = HeaderValue::try_from(authorization);
        let mut value = value.map_err(|_| Error::Options("authorization is not one line of text".to_owned()))?;
        value.set_sensitive(true);
        request = request.header(AUTHORIZATION, value);
    }
    let request = request.body(Full::new(Bytes::from(body)));
    let request = request.map_err(|_| Error::Options("the url is not an address of http or https".to_owned()))?;
    // The connection moves while the answer is waited for, and ends with it.
    let answer = async {
        let answer = sender.send_request(request).await.map_err(|e| target.unreachable(e))?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
        Ok((status, body.map(|body| body.to_bytes()).unwrap_or_default()))
    };
    let driver = async {
        let _ = connection.await;
        std::future::pending::<()>().await;
    };
    let (status, body) = tokio::select! {
        answer = answer => answer?,
        () = driver => unreachable!("it is pending"),
    };
    if status.is_success() {
        return Ok(());
    }
    let shown: String = String::from_utf8_lossy(&body).split_whitespace().collect::<Vec<_>>().join(" ");
    let shown: String = shown.chars().filter(|c| !c.is_control()).take(SHOWN_CHARS_MAX).collect();
    let answer = if shown.is_empty() { status.to_string() } else { format!("{status}: {shown}") };
    Err(Error::Refused { host: address, answer })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_taken_apart() {
        let target = Target::parse("https://us%40er:pw@[::1]:8443/a?b=c").unwrap();
        assert_eq!((target.host.as_str(), target.port, target.is_tls), ("::1", 8443, true));
        assert_eq!((target.path.as_str(), target.address().as_str()), ("/a?b=c", "[::1]:8443"));
        assert_eq!(target.authorization.as_deref(), Some("Basic dXNAZXI6cHc="));
        let target = Target::parse("http://hook").unwrap();
        assert_eq!((target.port, target.path.as_str(), target.authorization), (80, "/", None));
        for url in ["", "/path", "ftp://geheim/", "http://"] {
            assert!(!Target::parse(url).err().unwrap().to_string().contains("geheim"), "{url}");
        }
    }
}
