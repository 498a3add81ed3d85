//! `peergate healthcheck`: whether a server listens and brings a session as far as the question for a password.
//!
//! It needs no password itself, so a container can run it with nothing but the address.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;

use crate::embedded::ROLE;

/// How long each step may take.
const TIMEOUT: Duration = Duration::from_secs(4);

/// Source: PostgreSQL docs, protocol-message-formats, "SSLRequest".
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

/// Why a server is not well.
#[derive(Debug, thiserror::Error)]
pub enum Unhealthy {
    /// Nobody listens, or they do not answer.
    #[error("no answer from {address}")]
    NoAnswer {
        /// Where.
        address: SocketAddr,
        /// What came instead.
        source: io::Error,
    },
    /// Somebody answers, but not as Postgres does or not as a server that can be used.
    #[error("{address} answered: {answer}")]
    Refused {
        /// Where.
        address: SocketAddr,
        /// What they said.
        answer: String,
    },
}

/// Asks the server at `listen` for a session; a server that listens everywhere is asked on loopback.
///
/// With TLS the answer to the request for it is enough: what follows could only be read by a client that trusts the certificate.
///
/// # Errors
/// [`Unhealthy`], within seconds.
pub fn check(listen: SocketAddr) -> Result<(), Unhealthy> {
    let address = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => SocketAddr::new(Ipv4Addr::LOCALHOST.into(), listen.port()),
        IpAddr::V6(ip) if ip.is_unspecified() => SocketAddr::new(Ipv6Addr::LOCALHOST.into(), listen.port()),
        _ => listen,
    };
    match converse(address).map_err(|source| Unhealthy::NoAnswer { address, source })? {
        None => Ok(()),
        Some(answer) => Err(Unhealthy::Refused { address, answer }),
    }
}

/// Says what the server complained of, if it did.
fn converse(address: SocketAddr) -> io::Result<Option<String>> {
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(&SSL_REQUEST)?;
    let mut answer = [0];
    stream.read_exact(&mut answer)?;
    match answer[0] {
        b'S' => return Ok(None),
        b'N' => {}
        other => return Ok(Some(format!("byte {other:#04x} to the request for TLS"))),
    }
    stream.write_all(&startup())?;
    let mut header = [0; 5];
    stream.read_exact(&mut header)?;
    match header[0] {
        b'R' => Ok(None),
        b'E' => {
            let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]).saturating_sub(4).min(10_000);
            let mut body = vec![0; length as usize];
            stream.read_exact(&mut body)?;
            let message = body.split(|byte| *byte == 0).find_map(|field| field.strip_prefix(b"M"));
            Ok(Some(String::from_utf8_lossy(message.unwrap_or(b"an error")).into_owned()))
        }
        other => Ok(Some(format!("message {:?} to a start-up", char::from(other)))),
    }
}

/// Source: PostgreSQL docs, protocol-message-formats, "StartupMessage".
fn startup() -> Vec<u8> {
    let body = format!("user\0{ROLE}\0database\0{ROLE}\0application_name\0healthcheck\0\0");
    let mut message = Vec::with_capacity(8 + body.len());
    message.extend_from_slice(&(8 + body.len() as u32).to_be_bytes());
    message.extend_from_slice(&[0, 3, 0, 0]);
    message.extend_from_slice(body.as_bytes());
    message
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    /// Listens on all addresses and plays a server that gives `first` to the request for TLS and `second` to the start-up.
    fn answered(first: &'static [u8], second: &'static [u8]) -> Result<(), Unhealthy> {
        let listener = TcpListener::bind("0.0.0.0:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = [0; 8];
            stream.read_exact(&mut asked).unwrap();
            assert_eq!(asked, SSL_REQUEST);
            stream.write_all(first).unwrap();
            if !second.is_empty() {
                let mut startup = [0; 60];
                let _ = stream.read(&mut startup).unwrap();
                stream.write_all(second).unwrap();
            }
        });
        let result = check(address);
        server.join().unwrap();
        result
    }

    #[test]
    fn server_that_asks_for_a_password_or_offers_tls_is_well() {
        answered(b"N", b"R\0\0\0\x08\0\0\0\x0a").unwrap();
        answered(b"S", b"").unwrap();
    }

    #[test]
    fn server_that_refuses_sessions_is_not() {
        let refused = answered(b"N", b"E\0\0\0\x11SFATAL\0Mgone\0\0").unwrap_err();
        assert!(refused.to_string().ends_with("answered: gone"), "{refused}");
        assert!(answered(b"H", b"").is_err());
        assert!(matches!(answered(b"", b""), Err(Unhealthy::NoAnswer { .. })));
    }
}
