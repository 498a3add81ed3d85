//! One client: first packet, login, relay, end. Who may log in is between the client and the catalog's server; the gateway passes
//! it on and holds no passwords of clients.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, SystemTime};

use bytes::BytesMut;
use catalog::Catalog;
use catalog::connect::Attempt;
use catalog::foreign::TOKEN_ROLE;
use catalog::wire::Socket;
use pg::SqlState;
use pg::frame::startup_length;
use pgwire::tokio::server::MaybeTls;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::admin;
use crate::backend::{Backend, Connected, cancel, cancel_packet, tune};
use crate::error::Fatal;
use crate::explain::Planner;
use crate::halves::Halves;
use crate::login::{Refused, authenticate, authenticate_token, open_peer};
use crate::metrics::Events;
use crate::peers::Directory;
use crate::registry::{Identity, Place, Registry};
use crate::relay::{End, Relay};
use crate::reload::Reloader;
use crate::rewrite::VerificationOrder;
use crate::server::{LiveCell, Phase};
use crate::startup::{First, Startup};
use crate::tls::{self, Tls, negotiate};

/// Consoles at the same time, those that are still logging in included.
const CONSOLES_MAX: usize = 32;

/// How long a goodbye may take.
const PARTING_TIMEOUT: Duration = Duration::from_secs(1);

/// How long the server may take to answer a cancel request, by closing.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(10);

/// What all sessions share.
pub(crate) struct Shared {
    pub(crate) backend: Backend,
    pub(crate) catalog: Catalog,
    /// Works out what mirrors would do.
    pub(crate) planner: Option<Planner>,
    /// The peers that can be named.
    pub(crate) peers: Directory,
    pub(crate) registry: Arc<Registry>,
    pub(crate) cancel_permits: Semaphore,
    /// What sessions may hold of frames that have to be seen whole, as [`crate::intake::HELD_BUFFERS_MAX`] says.
    pub(crate) held: Arc<Semaphore>,
    pub(crate) phase: watch::Receiver<Phase>,
    pub(crate) live: LiveCell,
    pub(crate) events: Events,
    /// Where it listens.
    pub(crate) address: SocketAddr,
    /// When it began.
    pub(crate) began: SystemTime,
    /// What the console has asked for.
    pub(crate) asked: watch::Sender<Asked>,
    /// Reads the configuration again, if there is one.
    pub(crate) reloader: OnceLock<Weak<Reloader>>,
}

/// What the console has asked for, of the server as a whole.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Asked {
    /// To take no new sessions.
    pub(crate) drain: bool,
    /// To stop.
    pub(crate) stop: bool,
}

impl Shared {
    /// Connects to the catalog's server, and notes how long that took.
    ///
    /// # Errors
    /// As [`Backend::connect`].
    pub(crate) async fn connect(&self) -> io::Result<Connected> {
        let began = Instant::now();
        let connected = self.backend.connect().await?;
        self.events.backend_connect_seconds.observe(began.elapsed().as_secs_f64());
        Ok(connected)
    }

    /// Returns whether the client was shown the certificate that this stands for: then what it binds its SCRAM exchange to means
    /// something to a server that shows it too.
    pub(crate) fn shows(&self, client: &Client, certificate: Option<&[u8]>) -> bool {
        let live = self.live.get();
        let own = live.tls.as_ref().and_then(|tls| tls.certificate.as_deref());
        client.is_tls() && own.is_some() && own == certificate
    }
}

/// A client's session, once it is known what it wants and its first packet has been answered or passed on.
pub(crate) struct Session {
    pub(crate) shared: Arc<Shared>,
    pub(crate) place: Place,
    /// The role that it logs in as.
    pub(crate) user: String,
    /// How its server was reached.
    pub(crate) attempt: Arc<Attempt>,
    /// Our statements are looked for: in the catalog, and where its grammar is spoken.
    pub(crate) intercepts: bool,
    /// The client can bind its SCRAM exchange to TLS: both sides show the same certificate.
    pub(crate) keeps_channel_binding: bool,
    /// What to add when the server says that there is no such database: the peers that the role could have meant.
    pub(crate) database_hint: Option<String>,
    /// Waits that are being announced; one at a time is enough.
    announcing: Rc<Cell<bool>>,
}

impl Session {
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

    /// Makes the task of a verification, in the background. The query that waits for it says so if it does not come.
    pub(crate) fn begin_verification(&self, order: VerificationOrder) {
        let shared = self.shared.clone();
        tokio::task::spawn_local(async move {
            let VerificationOrder { mirror_id, tables, repair, waiter, asked_by, in_transaction_block } = order;
            let catalog = &shared.catalog;
            let made = if in_transaction_block {
                let message = "VERIFY MIRROR … REPAIR cannot run inside a transaction block";
                catalog
                    .refuse_verification(mirror_id, &asked_by, waiter, SqlState::ACTIVE_SQL_TRANSACTION, message)
                    .await
            } else {
                catalog.begin_verification(mirror_id, tables.as_deref(), repair, &asked_by, waiter).await.map(|_| ())
            };
            if let Err(error) = made {
                tracing::warn!(error = %error, "cannot make the task of a verification");
            }
        });
    }
}

/// A client's socket, and what has been read from it but not yet used.
pub(crate) struct Client {
    pub(crate) io: MaybeTls,
    pub(crate) read: BytesMut,
}

impl Client {
    /// Returns whether it is encrypted.
    pub(crate) fn is_tls(&self) -> bool {
        matches!(self.io, MaybeTls::Tls(_))
    }

    /// Returns the name of the TLS version.
    fn tls_version(&self) -> Option<&'static str> {
        let MaybeTls::Tls(tls) = &self.io else { return None };
        match tls.get_ref().1.protocol_version()? {
            rustls::ProtocolVersion::TLSv1_2 => Some("TLSv1.2"),
            rustls::ProtocolVersion::TLSv1_3 => Some("TLSv1.3"),
            _ => Some("TLS"),
        }
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
///
/// What is over before the relaying begins, and what is rare, is boxed: else each session would keep room for it to its end.
pub(crate) async fn run(shared: Arc<Shared>, socket: TcpStream) {
    let Ok(address) = socket.peer_addr() else { return };
    let place = shared.registry.enter(address);
    let live = shared.live.get();
    // Room is left for cancel requests and for saying that there is none, but a flood is not answered.
    if tune(&socket).is_err() || place.before >= live.sessions_max.saturating_mul(2) {
        return;
    }
    let deadline = Instant::now() + live.login_timeout;
    let mut phase = shared.phase.clone();
    let hurry = async {
        // A connection that says nothing, such as a health check's, must not hold up a shutdown.
        let _ = phase.wait_for(|p| *p >= Phase::Draining).await;
        tokio::time::sleep(PARTING_TIMEOUT).await;
    };
    // Until there is a packet, there is nobody to say to that it took too long.
    let (client, first) = tokio::select! {
        begun = tokio::time::timeout_at(deadline, Box::pin(begin(&shared.events, address, socket, live.tls.as_ref()))) => match begun {
            Ok(Ok(Some(begun))) => begun,
            _ => return,
        },
        () = hurry => return,
    };
    let (packet, startup) = match first {
        Err(fatal) => return end(&shared, client, Some(fatal)).await,
        Ok((packet, First::Cancel(key))) => {
            // A cancel request must get through when there are too many sessions.
            return Box::pin(pass_cancel_on(&shared, client, &packet, &key)).await;
        }
        Ok((_, First::Negotiation(minor))) => {
            return end(&shared, client, Some(Fatal::UnsupportedProtocol(1234, minor))).await;
        }
        Ok((packet, First::Session(startup))) => (packet, startup),
    };
    place.entry.identify(Identity {
        user: startup.user.clone(),
        database: startup.database.clone(),
        application_name: startup.text("application_name").unwrap_or_default(),
        tls: client.tls_version(),
    });
    let console = startup.database == admin::DATABASE;
    // An operator gets in when nobody else does, but naming the console is no way around the limit.
    let full = if console { shared.registry.consoles() >= CONSOLES_MAX } else { place.before >= live.sessions_max };
    let refusal = if *shared.phase.borrow() != Phase::Open && !console {
        Some(Fatal::ShuttingDown)
    } else if live.tls_required && !client.is_tls() {
        Some(Fatal::TlsRequired)
    } else if full {
        Some(Fatal::TooManySessions)
    } else {
        tls::refusal(&client.io, live.tls.as_ref().and_then(|tls| tls.check), &startup.user)
    };
    if refusal.is_some() {
        return end(&shared, client, refusal).await;
    }
    let (client, fatal) = match Box::pin(route(&shared, &startup)).await {
        Err(fatal) => (client, Some(fatal)),
        Ok(route) => {
            let arrival = Arrival { shared: shared.clone(), place, client, startup, deadline };
            match route {
                Route::Console => Box::pin(on_console(arrival)).await,
                Route::Catalog { intercepts, database_hint } => {
                    on_catalog(arrival, packet, intercepts, database_hint).await
                }
                Route::Peer => Box::pin(on_peer(arrival)).await,
            }
        }
    };
    end(&shared, client, fatal).await;
}

/// A client that is to have a session.
struct Arrival {
    shared: Arc<Shared>,
    place: Place,
    client: Client,
    startup: Startup,
    /// When it has to be logged in.
    deadline: Instant,
}

/// Ends a session and counts why.
async fn end(shared: &Shared, client: Client, fatal: Option<Fatal>) {
    if let Some(fatal) = &fatal {
        shared.events.error(fatal.sqlstate().to_string());
    }
    client.end(fatal).await;
}

/// Where a session goes.
enum Route {
    /// To a database of the catalog's server.
    Catalog { intercepts: bool, database_hint: Option<String> },
    /// To the peer of the database's name.
    Peer,
    /// To the gateway itself.
    Console,
}

/// Finds out what the database's name stands for: the catalog, a peer, or another database of the catalog's server.
async fn route(shared: &Shared, startup: &Startup) -> Result<Route, Fatal> {
    if startup.database == shared.backend.database() {
        return Ok(Route::Catalog { intercepts: !startup.replication, database_hint: None });
    }
    // Other protocols than ours are the server's to refuse.
    if startup.version.0 != 3 {
        return Ok(Route::Catalog { intercepts: false, database_hint: None });
    }
    if startup.database == admin::DATABASE {
        return Ok(Route::Console);
    }
    let names = shared.catalog.peer_names(&startup.user, &startup.database).await.map_err(|error| {
        tracing::warn!(error = %error, "cannot ask the catalog for peers");
        Fatal::BackendUnreachable
    })?;
    if names.is_peer {
        return Ok(Route::Peer);
    }
    let database_hint =
        (!names.usable.is_empty()).then(|| format!("Peers to connect to: {}.", names.usable.join(", ")));
    Ok(Route::Catalog { intercepts: false, database_hint })
}

/// Serves a session whose server is the catalog's: from its first packet on, all is said between that server and the client.
async fn on_catalog(
    arrival: Arrival,
    packet: Vec<u8>,
    intercepts: bool,
    database_hint: Option<String>,
) -> (Client, Option<Fatal>) {
    let Arrival { shared, place, client, startup, deadline } = arrival;
    let connected = match shared.connect().await {
        Ok(connected) => connected,
        Err(error) => {
            tracing::warn!(error = %error, "cannot reach the catalog for a session");
            return (client, Some(Fatal::BackendUnreachable));
        }
    };
    let mut server = connected.socket;
    let said = async {
        server.write_all(&packet).await?;
        server.flush().await
    };
    if said.await.is_err() {
        return (client, Some(Fatal::BackendUnreachable));
    }
    let session = Session {
        keeps_channel_binding: shared.shows(&client, connected.certificate.as_deref()),
        shared,
        place,
        user: startup.user,
        attempt: connected.attempt,
        intercepts,
        database_hint,
        announcing: Rc::default(),
    };
    relay(session, client, server, Some(deadline)).await
}

/// Serves a session on a peer: the catalog lets the client in, and the gateway logs in on the peer for it.
async fn on_peer(arrival: Arrival) -> (Client, Option<Fatal>) {
    let Arrival { shared, place, mut client, mut startup, deadline } = arrival;
    let is_local = place.entry.client.ip().is_loopback();
    let opened = async {
        let access = if startup.user == TOKEN_ROLE {
            let access = authenticate_token(&shared, &mut client, &startup, is_local).await?;
            if !access.options.as_ref().is_ok_and(|options| options.flag("updatable")) {
                // The foreign tables say so, too; this holds whatever is asked for with the token.
                startup.parameters.push((b"options".to_vec(), b"-c default_transaction_read_only=on".to_vec()));
            }
            access
        } else {
            authenticate(&shared, &mut client, &startup).await?;
            let access = shared.catalog.peer_access(&startup.user, &startup.database).await.map_err(|error| {
                tracing::warn!(error = %error, "cannot ask the catalog for a peer");
                Refused::Fatal(Fatal::BackendUnreachable)
            })?;
            // Dropped between the look at its name and this one.
            access.ok_or(Refused::Fatal(Fatal::UnknownDatabase(startup.database.clone())))?
        };
        let peer = open_peer(&access, &startup).await.map_err(Refused::Fatal)?;
        client.io.write_all(&peer.greeting).await?;
        client.io.flush().await?;
        Ok(peer)
    };
    let peer = match in_time(deadline, opened).await {
        Ok(peer) => peer,
        Err(fatal) => return (client, fatal),
    };
    shared.events.login(true);
    place.relayed_to(&peer.key, peer.attempt.clone());
    let session = Session {
        shared,
        place,
        user: startup.user,
        attempt: peer.attempt,
        intercepts: false,
        keeps_channel_binding: false,
        database_hint: None,
        announcing: Rc::default(),
    };
    relay(session, client, peer.socket, None).await
}

/// Serves a session with the gateway itself.
async fn on_console(arrival: Arrival) -> (Client, Option<Fatal>) {
    let Arrival { shared, place, mut client, startup, deadline } = arrival;
    place.becomes_console();
    let rights = match in_time(deadline, admin::log_in(&shared, &place.entry, &mut client, &startup)).await {
        Ok(rights) => rights,
        Err(fatal) => return (client, fatal),
    };
    shared.events.login(true);
    let fatal = admin::serve(&shared, &place.entry, &mut client, &startup.user, rights).await;
    (client, fatal)
}

/// Waits for a login.
///
/// # Errors
/// What is left to say to a client that is not let in.
async fn in_time<T>(deadline: Instant, login: impl Future<Output = Result<T, Refused>>) -> Result<T, Option<Fatal>> {
    match tokio::time::timeout_at(deadline, login).await {
        Ok(Ok(opened)) => Ok(opened),
        Ok(Err(Refused::Told)) => Err(None),
        Ok(Err(Refused::Fatal(fatal))) => Err(Some(fatal)),
        Err(_) => Err(Some(Fatal::LoginTimeout)),
    }
}

type Begun = (Client, Result<(Vec<u8>, First), Fatal>);

/// Negotiates TLS and reads the first packet.
async fn begin(events: &Events, client: SocketAddr, socket: TcpStream, tls: Option<&Tls>) -> io::Result<Option<Begun>> {
    let negotiated = negotiate(socket, tls.map(|tls| tls.acceptor.clone())).await;
    match &negotiated {
        Ok(Some(negotiated)) if matches!(negotiated.io, MaybeTls::Tls(_)) => events.tls_handshake(true),
        // Other errors are those of a socket that broke.
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            tracing::info!(%client, error = %error, "a TLS handshake failed");
            events.tls_handshake(false);
        }
        _ => {}
    }
    let Some(negotiated) = negotiated? else { return Ok(None) };
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
async fn pass_cancel_on(shared: &Shared, client: Client, packet: &[u8], key: &[u8]) {
    shared.events.cancel();
    let session = shared.registry.by_key(key);
    if session.as_ref().is_some_and(|session| session.cancel_work()) {
        return client.end(None).await;
    }
    let forward = async {
        let _permit = shared.cancel_permits.acquire().await.map_err(io::Error::other)?;
        match session.as_ref().and_then(|session| session.behind()) {
            Some(behind) => cancel(&behind.attempt, packet).await,
            // Another gateway's, perhaps: its key is the catalog's server's own all the same.
            None => shared.backend.cancel(packet).await,
        }
    };
    match tokio::time::timeout(CANCEL_TIMEOUT, forward).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(error = %error, "cannot pass a cancel request on"),
        Err(_) => tracing::warn!("the server did not answer a cancel request"),
    }
    client.end(None).await;
}

/// Relays until one side ends or the gateway has to. Returns the client, and what is left to say to it. `login` is when a login that
/// is not through yet has to be.
async fn relay(session: Session, client: Client, server: Socket, login: Option<Instant>) -> (Client, Option<Fatal>) {
    let Client { io, read } = client;
    let (client, server) = (Halves::new(io), Halves::new(server));
    let relay = Rc::new(Relay::new(session, login.is_none()));
    // A task for each direction, and one for what can end the session from outside: each is woken often, for itself only.
    let mut tasks = JoinSet::new();
    tasks.spawn_local(relay.clone().client_to_server(client.half(), server.half(), read));
    tasks.spawn_local(relay.clone().server_to_client(server.half(), client.half(), server.half()));
    tasks.spawn_local({
        let relay = relay.clone();
        async move { End::Fatal(control(&relay, login).await) }
    });
    let end = match tasks.join_next().await {
        Some(Ok(end)) => end,
        // One of them has panicked, which ends the session as if it were its own.
        Some(Err(error)) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => End::Fatal(Fatal::Shutdown),
        },
        None => End::Fatal(Fatal::Shutdown),
    };
    tasks.shutdown().await;
    if !matches!(end, End::Server) && relay.is_abandoned() {
        Box::pin(stop_server(relay.session())).await;
    }
    let fatal = match end {
        End::Client | End::Server => None,
        End::Fatal(fatal) => relay.can_speak().then_some(fatal),
    };
    (Client { io: client.into_inner().expect("its tasks are over"), read: BytesMut::new() }, fatal)
}

/// Cancels what a session's server is doing. That nobody is there any more it would notice only when it has something to say.
async fn stop_server(session: &Session) {
    let Some(behind) = session.place.entry.behind() else { return };
    let stop = async {
        let _permit = session.shared.cancel_permits.acquire().await.map_err(io::Error::other)?;
        cancel(&behind.attempt, &cancel_packet(&behind.key)).await
    };
    if let Ok(Err(error)) = tokio::time::timeout(PARTING_TIMEOUT, stop).await {
        tracing::debug!(error = %error, "cannot cancel what a server does for a session that has ended");
    }
}

/// Waits for what ends a session from outside.
async fn control(relay: &Relay, login: Option<Instant>) -> Fatal {
    let session = relay.session();
    let login = async {
        if let Some(deadline) = login
            && tokio::time::timeout_at(deadline, relay.logged_in()).await.is_err()
        {
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
        () = login => Fatal::LoginTimeout,
        () = shutdown => Fatal::Shutdown,
        () = session.place.entry.killed() => Fatal::Shutdown,
    }
}
