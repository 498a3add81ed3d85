//! A web server and a mail server that keep what they get, and answer as they are told.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::support::wait_for;

/// A request or mail that came.
#[derive(Clone, Debug)]
pub(crate) struct Received {
    /// The request line and headers, or what the client said before the mail.
    pub(crate) head: String,
    /// The body, or the mail.
    pub(crate) body: String,
}

impl Received {
    /// The body as JSON.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }
}

/// A server on loopback.
#[derive(Clone)]
pub(crate) struct Receiver {
    port: u16,
    received: Arc<Mutex<Vec<Received>>>,
    answer: Arc<Mutex<String>>,
}

const OK: &str = "200 OK";

impl Receiver {
    /// Starts a web server.
    pub(crate) async fn web(tls: Option<TlsAcceptor>) -> Receiver {
        let (receiver, listener) = Receiver::bind().await;
        let shared = receiver.clone();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (shared, tls) = (shared.clone(), tls.clone());
                tokio::spawn(async move {
                    match tls {
                        Some(tls) => match tls.accept(socket).await {
                            Ok(stream) => shared.answer_request(stream).await,
                            Err(_) => return,
                        },
                        None => shared.answer_request(socket).await,
                    };
                });
            }
        });
        receiver
    }

    /// Starts a mail server; with `tls` it offers STARTTLS, and a login behind it.
    pub(crate) async fn mail(tls: Option<TlsAcceptor>) -> Receiver {
        let (receiver, listener) = Receiver::bind().await;
        let shared = receiver.clone();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (shared, tls) = (shared.clone(), tls.clone());
                tokio::spawn(async move { shared.take_mail(socket, tls).await });
            }
        });
        receiver
    }

    async fn bind() -> (Receiver, TcpListener) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let answer = Arc::new(Mutex::new(OK.to_owned()));
        (Receiver { port, received: Arc::default(), answer }, listener)
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Says how requests are answered from now on; `None`: well.
    pub(crate) fn answer_with(&self, status: Option<&str>) {
        status.unwrap_or(OK).clone_into(&mut self.answer.lock().unwrap());
    }

    pub(crate) fn all(&self) -> Vec<Received> {
        self.received.lock().unwrap().clone()
    }

    /// Waits until so many came, and returns all.
    pub(crate) async fn wait(&self, count: usize) -> Vec<Received> {
        wait_for(&format!("{count} received"), async || (self.all().len() >= count).then_some(())).await;
        self.all()
    }

    async fn answer_request(&self, stream: impl AsyncRead + AsyncWrite + Unpin) -> Option<()> {
        let mut stream = BufReader::new(stream);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if stream.read_line(&mut head).await.ok()? == 0 {
                return None;
            }
        }
        let length = head.to_lowercase().lines().find_map(|l| l.strip_prefix("content-length: ")?.parse().ok())?;
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await.ok()?;
        let answer = self.answer.lock().unwrap().clone();
        if answer == OK {
            self.received.lock().unwrap().push(Received { head, body: String::from_utf8(body).unwrap() });
        }
        let response = format!("HTTP/1.1 {answer}\r\ncontent-length: 11\r\n\r\nsaid\r\nso it ");
        stream.write_all(response.as_bytes()).await.ok()?;
        // What comes after the answer is the end.
        let _ = tokio::time::timeout(Duration::from_secs(5), stream.read_u8()).await;
        Some(())
    }

    async fn take_mail(&self, socket: TcpStream, tls: Option<TlsAcceptor>) -> Option<()> {
        let mut plain = BufReader::new(socket);
        plain.write_all(b"220 sink\r\n").await.ok()?;
        let Some(tls) = tls else { return self.dialogue(plain, String::new()).await };
        let mut head = String::new();
        loop {
            let mut line = String::new();
            if plain.read_line(&mut line).await.ok()? == 0 {
                return None;
            }
            head.push_str(&line);
            if line.starts_with("STARTTLS") {
                plain.write_all(b"220 go\r\n").await.ok()?;
                let stream = tls.accept(plain.into_inner()).await.ok()?;
                return self.dialogue(BufReader::new(stream), head).await;
            }
            plain.write_all(b"250-sink\r\n250 STARTTLS\r\n").await.ok()?;
        }
    }

    async fn dialogue<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        mut stream: BufReader<S>,
        mut head: String,
    ) -> Option<()> {
        loop {
            let mut line = String::new();
            if stream.read_line(&mut line).await.ok()? == 0 {
                return Some(());
            }
            head.push_str(&line);
            let verb = line.get(..4).unwrap_or_default().to_uppercase();
            let answer = self.answer.lock().unwrap().clone();
            let reply = match verb.as_str() {
                "EHLO" => "250-sink\r\n250 AUTH PLAIN\r\n".to_owned(),
                "AUTH" => "235 in\r\n".to_owned(),
                "MAIL" if answer != OK => format!("{answer}\r\n"),
                "DATA" => {
                    stream.write_all(b"354 go on\r\n").await.ok()?;
                    let mut body = String::new();
                    while !body.ends_with("\r\n.\r\n") {
                        if stream.read_line(&mut body).await.ok()? == 0 {
                            return None;
                        }
                    }
                    self.received.lock().unwrap().push(Received { head: head.clone(), body });
                    "250 taken\r\n".to_owned()
                }
                _ => "250 fine\r\n".to_owned(),
            };
            stream.write_all(reply.as_bytes()).await.ok()?;
        }
    }
}
