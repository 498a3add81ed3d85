//! One client: first packet, login, relay, end. Authentication is between the client and the catalog's server; the gateway passes
//! it on and holds no passwords.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use catalog::Catalog;
use pg::frame::startup_length;
use pgwire::tokio::server::MaybeTls;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Notify, Semaphore, watch};

use crate::backend::{Backend, BackendStream, tune};
use crate::cancel::{AsCancels, Cancels};
use crate::error::Fatal;
use crate::intercept::Interceptor;
use crate::relay::{End, Relay};
use crate::server::{LiveCell, Phase};
use crate::startup::{First, Startup};
use crate::tls::{self, Tls, negotiate};

/// How long a goodbye may take.
const PARTING_TIMEOUT: Duration = Duration::from_secs(1);

/// How long the server may take to answer a cancel request, by closing.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(10);

/// What all sessions share.
pub(crate) struct Shared {
    pub(crate) backend: Backend,
    pub(crate) catalog: Catalog,
    pub(crate) cancels: Cancels,
    pub(crate) cancel_permits: Semaphore,
    pub(crate) phase: watch::Receiver<Phase>,
    pub(crate) live: LiveCell,
    pub(crate) shared_certificate: bool,
    pub(crate) sessions: AtomicUsize,
    pub(crate) session_ended: Notify,
}

impl AsCancels for Shared {
    fn cancels(&self) -> &Cancels {
        &self.cancels
    }
}

impl Shared {
    /// Waits until no session is left.
    pub(crate) async fn wait_until_empty(&self) {
        loop {
            let ended = self.session_ended.notified();
            tokio::pin!(ended);
            // Registered before the look, so that the last one's end is not missed.
            ended.as_mut().enable();
            if self.sessions.load(Ordering::Acquire) == 0 {
                return;
            }
            ended.await;
        }
    }

    fn enter(self: &Arc<Self>) -> Place {
        let before = self.sessions.fetch_add(1, Ordering::AcqRel);
        Place { shared: self.clone(), before }
    }
}

/// A session's place among those that are counted.
struct Place {
    shared: Arc<Shared>,
    /// How many there were already.
    before: usize,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.sessions.fetch_sub(1, Ordering::AcqRel);
        self.shared.session_ended.notify_waiters();
    }
}

/// What is known of a session once its first packet is read.
pub(crate) struct Session {
    pub(crate) shared: Arc<Shared>,
    pub(crate) startup: Startup,
    /// Where the client is: the server sees only the gateway.
    pub(crate) client: SocketAddr,
    /// The client can bind its SCRAM exchange to TLS: both sides use the same certificate.
    pub(crate) keeps_channel_binding: bool,
    /// Waits that are being announced; one at a time is enough.
    announcing: Rc<Cell<bool>>,
}

impl Session {
    /// Returns the session's interception: on in the catalog only, and not where another grammar is spoken.
    pub(crate) fn interceptor(&self) -> Interceptor {
        let here = self.shared.backend.database() == Some(self.startup.database.as_str());
        let nonce = format!("{:032x}", rand::random::<u128>());
        Interceptor::new(here && !self.startup.replication, nonce)
    }

    /// Tells the engines, in the background, that mirrors are waited for.
    pub(crate) fn announce(&self, mirrors: Vec<String>) {
        if mirrors.is_empty() || self.announcing.replace(true) {
            return;
        }
        let (shared, announcing) = (self.shared.clone(), self.announcing.clone());
        tokio::task::spawn_local(async move {
            for mirror in mirrors {
                if let Err(error) = shared.catalog.announce_wait(&mirror).await {
                    tracing::debug!(mirror, error = %error, "cannot announce a wait");
                }
            }
            announcing.set(false);
        });
    }
}

/// A client's socket, and what has been read from it but not yet used.
struct Client {
    io: MaybeTls,
    read: BytesMut,
}

impl Client {
    fn is_tls(&self) -> bool {
        matches!(self.io, MaybeTls::Tls(_))
    }

    /// Says why the session ends and closes, with TLS' own goodbye: without it a client may not show the message.
    async fn end(mut self, fatal: Option<Fatal>) {
        let parting = async {
            if let Some(fatal) = fatal {
                let mut out = BytesMut::new();
                fatal.encode(&mut out);
                self.io.write_all(&out).await?;
            }
            self.io.shutdown().await
        };
        // The client may be gone already, or not be reading.
        let _ = tokio::time::timeout(PARTING_TIMEOUT, parting).await;
    }

    /// Reads the first packet, which is small.
    async fn first_packet(&mut self) -> io::Result<Result<Vec<u8>, Fatal>> {
        loop {
            match startup_length(&self.read) {
                Err(_) => return Ok(Err(Fatal::Protocol("invalid length of startup packet"))),
                Ok(Some(length)) if self.read.len() >= length => return Ok(Ok(self.read.split_to(length).to_vec())),
                Ok(_) => {}
            }
            if self.io.read_buf(&mut self.read).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

/// Serves one client to its end.
pub(crate) async fn run(shared: Arc<Shared>, socket: TcpStream) {
    let place = shared.enter();
    let live = shared.live.get();
    // Room is left for cancel requests and for saying that there is none, but a flood is not answered.
    if tune(&socket).is_err() || place.before >= live.sessions_max.saturating_mul(2) {
        return;
    }
    let Ok(address) = socket.peer_addr() else { return };
    let deadline = tokio::time::Instant::now() + live.login_timeout;
    let mut phase = shared.phase.clone();
    let hurry = async {
        // A connection that says nothing, such as a health check's, must not hold up a shutdown.
        let _ = phase.wait_for(|p| *p >= Phase::Draining).await;
        tokio::time::sleep(PARTING_TIMEOUT).await;
    };
    // Until there is a packet, there is nobody to say to that it took too long.
    let (client, first) = tokio::select! {
        begun = tokio::time::timeout_at(deadline, begin(socket, live.tls.as_ref())) => match begun {
            Ok(Ok(Some(begun))) => begun,
            _ => return,
        },
        () = hurry => return,
    };
    let (packet, startup) = match first {
        Err(fatal) => return client.end(Some(fatal)).await,
        Ok((packet, First::Cancel(key))) => {
            // A cancel request must get through when there are too many sessions.
            return cancel(&shared, client, &packet, &key).await;
        }
        Ok((_, First::Negotiation(minor))) => return client.end(Some(Fatal::UnsupportedProtocol(1234, minor))).await,
        Ok((packet, First::Session(startup))) => (packet, startup),
    };
    let refusal = if *shared.phase.borrow() != Phase::Open {
        Some(Fatal::ShuttingDown)
    } else if live.tls_required && !client.is_tls() {
        Some(Fatal::TlsRequired)
    } else if place.before >= live.sessions_max {
        Some(Fatal::TooManySessions)
    } else {
        tls::refusal(&client.io, live.tls.as_ref().and_then(|tls| tls.check), &startup.user)
    };
    if refusal.is_some() {
        return client.end(refusal).await;
    }
    let mut server = match shared.backend.connect().await {
        Ok(server) => server,
        Err(error) => {
            tracing::warn!(error = %error, "cannot reach the catalog for a session");
            return client.end(Some(Fatal::BackendUnreachable)).await;
        }
    };
    let said = async {
        server.write_all(&packet).await?;
        server.flush().await
    };
    if said.await.is_err() {
        return client.end(Some(Fatal::BackendUnreachable)).await;
    }
    let session = Session {
        keeps_channel_binding: client.is_tls() && server.is_tls() && shared.shared_certificate,
        shared: shared.clone(),
        startup,
        client: address,
        announcing: Rc::default(),
    };
    let (client, fatal) = relay(&session, client, server, deadline).await;
    client.end(fatal).await;
}

type Begun = (Client, Result<(Vec<u8>, First), Fatal>);

/// Negotiates TLS and reads the first packet.
async fn begin(socket: TcpStream, tls: Option<&Tls>) -> io::Result<Option<Begun>> {
    let Some(negotiated) = negotiate(socket, tls.map(|tls| tls.acceptor.clone())).await? else { return Ok(None) };
    let mut client = Client { io: negotiated.io, read: negotiated.read };
    if let Some(fatal) = negotiated.fatal {
        return Ok(Some((client, Err(fatal))));
    }
    let packet = client.first_packet().await?;
    let first = packet.map(|packet| {
        let first = First::read(&packet);
        (packet, first)
    });
    Ok(Some((client, first)))
}

/// Passes a cancel request on, and waits until the server has dealt with it, as clients do.
async fn cancel(shared: &Arc<Shared>, client: Client, packet: &[u8], key: &[u8]) {
    if shared.cancels.cancel(key) {
        client.end(None).await;
        return;
    }
    let forward = async {
        let _permit = shared.cancel_permits.acquire().await.map_err(io::Error::other)?;
        let mut server = shared.backend.connect().await?;
        server.write_all(packet).await?;
        server.flush().await?;
        while server.read(&mut [0; 64]).await? > 0 {}
        io::Result::Ok(())
    };
    match tokio::time::timeout(CANCEL_TIMEOUT, forward).await {
        // The server closes hard, now and then.
        Ok(Ok(())) | Ok(Err(_)) => {}
        Err(_) => tracing::warn!("the catalog did not answer a cancel request"),
    }
    client.end(None).await;
}

/// Relays until one side ends or the gateway has to. Returns the client, and what is left to say to it.
async fn relay(
    session: &Session,
    client: Client,
    server: BackendStream,
    deadline: tokio::time::Instant,
) -> (Client, Option<Fatal>) {
    let Client { io, read } = client;
    let (client_read, client_write) = tokio::io::split(io);
    let (server_read, server_write) = tokio::io::split(server);
    let (mut client_read, mut client_write) = (client_read, client_write);
    let relay = Relay::new(session);
    let end = {
        let login = async {
            if tokio::time::timeout_at(deadline, relay.logged_in()).await.is_err() {
                return;
            }
            std::future::pending::<()>().await;
        };
        let shutdown = async {
            let mut phase = session.shared.phase.clone();
            // A server that is gone ends its sessions.
            let _ = phase.wait_for(|p| *p >= Phase::Draining).await;
            tokio::select! {
                () = relay.idle() => {}
                _ = phase.wait_for(|p| *p == Phase::Closing) => {}
            }
        };
        tokio::select! {
            end = relay.client_to_server(&mut client_read, server_write, read) => end,
            end = relay.server_to_client(server_read, &mut client_write) => end.unwrap_or(End::Client),
            () = login => End::Fatal(Fatal::LoginTimeout),
            () = shutdown => End::Fatal(Fatal::Shutdown),
        }
    };
    let fatal = match end {
        End::Client | End::Server => None,
        End::Fatal(fatal) => relay.can_speak().then_some(fatal),
    };
    (Client { io: client_read.unsplit(client_write), read: BytesMut::new() }, fatal)
}
