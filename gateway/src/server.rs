//! Listens, hands sockets to single-threaded runtimes, limits sessions and drains them at the end.
//!
//! A session's two sockets live on one thread: nothing is handed between threads while it runs. What a session does is in
//! `session`.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use catalog::Catalog;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::{Semaphore, mpsc, watch};

use crate::backend::Backend;
use crate::config::{Config, TlsClients, TlsFiles};
use crate::error::Error;
use crate::explain::Planner;
use crate::intake::HELD_BUFFERS_MAX;
use crate::metrics::{Events, Figures};
use crate::peers::Directory;
use crate::registry::State;
use crate::reload::Reloader;
use crate::session::{self, Shared};
use crate::tls::Tls;

/// Cancel requests that are passed on at the same time.
const CANCELS_MAX: usize = 64;

/// How a gateway runs.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Certificate and key; `None`: plain text only.
    pub tls: Option<TlsFiles>,
    /// Refuse sessions that are not encrypted.
    pub tls_required: bool,
    /// The certificates that clients must show.
    pub tls_clients: Option<TlsClients>,
    /// Sessions at the same time, those that are still logging in included.
    pub sessions_max: usize,
    /// How long a login may take, from the first byte to the first ReadyForQuery.
    pub login_timeout: Duration,
    /// How long running statements may go on after a shutdown was asked for.
    pub drain_timeout: Duration,
    /// Threads that serve sessions; 0: one for two cores.
    pub threads: usize,
    /// Works out what mirrors would do; without it, there is no EXPLAIN of them.
    pub planner: Option<Planner>,
}

impl ServerOptions {
    /// Returns the options with which a server listens on `listen` in plain text.
    pub fn new(listen: SocketAddr) -> ServerOptions {
        ServerOptions {
            listen,
            tls: None,
            tls_required: false,
            tls_clients: None,
            sessions_max: 10_000,
            login_timeout: Duration::from_secs(60),
            drain_timeout: Duration::from_secs(10),
            threads: 0,
            planner: None,
        }
    }

    /// Takes the options from a configuration.
    pub fn from_config(config: &Config) -> ServerOptions {
        ServerOptions {
            tls: config.tls.clone(),
            tls_required: config.tls_required,
            tls_clients: config.tls_clients.clone(),
            sessions_max: config.sessions_max,
            login_timeout: config.login_timeout,
            drain_timeout: config.drain_timeout,
            threads: config.threads,
            ..ServerOptions::new(config.listen)
        }
    }
}

/// What can be changed while sessions are served. A session keeps what it began with.
pub(crate) struct Live {
    pub(crate) tls: Option<Tls>,
    pub(crate) tls_required: bool,
    pub(crate) sessions_max: usize,
    pub(crate) login_timeout: Duration,
    pub(crate) drain_timeout: Duration,
}

impl Live {
    fn load(options: &ServerOptions) -> Result<Live, Error> {
        if options.tls_required && options.tls.is_none() {
            return Err(Error::Options("TLS is required but there is no certificate".to_owned()));
        }
        let tls = options.tls.as_ref().map(|files| Tls::load(files, options.tls_clients.as_ref())).transpose()?;
        Ok(Live {
            tls,
            tls_required: options.tls_required,
            sessions_max: options.sessions_max,
            login_timeout: options.login_timeout,
            drain_timeout: options.drain_timeout,
        })
    }
}

/// A [`Live`] that is swapped as a whole.
pub(crate) struct LiveCell(RwLock<Arc<Live>>);

impl LiveCell {
    /// Returns what holds now.
    pub(crate) fn get(&self) -> Arc<Live> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, live: Live) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(live);
    }
}

/// Options that were found good, certificates and keys included, and can be put in force.
pub struct Prepared(Live);

/// Steers a server from outside. Cloned, it steers the same one.
#[derive(Clone)]
pub struct Control {
    shared: Arc<Shared>,
}

impl Control {
    /// Reads what the options name, and changes nothing yet.
    ///
    /// # Errors
    /// [`Error::Tls`] or [`Error::Options`], as [`Server::bind`].
    pub async fn prepare(&self, options: &ServerOptions) -> Result<Prepared, Error> {
        let live = Live::load(options)?;
        check_tls(&self.shared.backend, live.tls.as_ref()).await?;
        Ok(Prepared(live))
    }

    /// Returns whether new logins are refused.
    pub(crate) fn is_draining(&self) -> bool {
        *self.shared.phase.borrow() != Phase::Open
    }

    /// Returns what has happened.
    pub(crate) fn events(&self) -> &Events {
        &self.shared.events
    }

    /// Returns what the sessions are doing and have done.
    pub(crate) fn figures(&self) -> Figures {
        let live = self.shared.live.get();
        let census = self.shared.registry.census();
        let count = |state| census.sessions.iter().filter(|entry| entry.state() == state).count();
        Figures {
            sessions: State::ALL.iter().map(|state| (state.name(), count(*state))).collect(),
            sessions_max: live.sessions_max,
            connections: census.connections,
            totals: census.totals,
            draining: self.is_draining(),
            certificate_expires: live.tls.as_ref().map(|tls| tls.expires),
        }
    }

    /// Says what reads the configuration again, for the console's RELOAD.
    pub fn offer_reload(&self, reloader: &Arc<Reloader>) {
        let _ = self.shared.reloader.set(Arc::downgrade(reloader));
    }

    /// Waits until the console asks for a stop. The server stops by itself then; this is for what is beside it.
    pub async fn stop_asked(&self) {
        if self.shared.asked.subscribe().wait_for(|asked| asked.stop).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Puts options in force, for sessions that begin from now on.
    pub fn apply(&self, prepared: Prepared) {
        self.shared.live.set(prepared.0);
    }
}

/// How far a shutdown has come. Sessions follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// All is well.
    Open,
    /// Idle sessions end, running statements may finish.
    Draining,
    /// Time is up.
    Closing,
}

/// A gateway that has its socket and serves once [`Server::serve`] is called.
pub struct Server {
    listener: TcpListener,
    threads: usize,
    shared: Arc<Shared>,
    phase: watch::Sender<Phase>,
}

impl Server {
    /// Binds the address and reads the certificate. Clients that connect from now on wait for [`Server::serve`].
    ///
    /// # Errors
    /// [`Error::Listen`], [`Error::Tls`], or [`Error::Options`] if clients could not log in: over TLS to both sides, libpq insists
    /// on a channel binding that only the same certificate on both can give.
    pub async fn bind(options: ServerOptions, catalog: Catalog) -> Result<Server, Error> {
        let backend = Backend::new(catalog.connector());
        let live = Live::load(&options)?;
        check_tls(&backend, live.tls.as_ref()).await?;
        let listen = |source| Error::Listen { address: options.listen, source };
        let listener = TcpListener::bind(options.listen).await.map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let (phase, watched) = watch::channel(Phase::Open);
        let shared = Arc::new(Shared {
            backend,
            peers: Directory::new(catalog.clone()),
            catalog,
            planner: options.planner,
            registry: Arc::default(),
            phase: watched,
            events: Events::default(),
            address,
            began: SystemTime::now(),
            asked: watch::Sender::default(),
            reloader: OnceLock::new(),
            live: LiveCell(RwLock::new(Arc::new(live))),
            cancel_permits: Semaphore::new(CANCELS_MAX),
            held: Arc::new(Semaphore::new(HELD_BUFFERS_MAX)),
        });
        Ok(Server { listener, threads: options.threads, shared, phase })
    }

    /// Returns what steers the server while it serves.
    pub fn control(&self) -> Control {
        Control { shared: self.shared.clone() }
    }

    /// Returns the address that is listened on.
    ///
    /// # Errors
    /// [`Error::System`] if the system does not tell.
    pub fn local_addr(&self) -> Result<SocketAddr, Error> {
        self.listener.local_addr().map_err(|e| Error::System("cannot read the listening address", e))
    }

    /// Serves until `shutdown` becomes true (or its sender is gone), then drains: new logins are refused with 57P03, idle sessions
    /// end with 57P01, running statements finish within `drain_timeout`.
    ///
    /// # Errors
    /// [`Error::System`] if threads cannot be started. A failed accept is not an error: it is logged and tried again.
    pub async fn serve(self, mut shutdown: watch::Receiver<bool>) -> Result<(), Error> {
        let Server { listener, threads: count, shared, phase } = self;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let count = if count == 0 { threads_for(cores) } else { count };
        let mut threads = Vec::new();
        for n in 0..count {
            threads.push(Thread::start(n, shared.clone())?);
        }
        let (mut drain_asked, mut stop_asked) = (shared.asked.subscribe(), shared.asked.subscribe());
        let stopping = async {
            tokio::select! {
                // A sender that is gone means that nobody will ever say so: stop.
                _ = shutdown.wait_for(|stop| *stop) => {}
                _ = stop_asked.wait_for(|asked| asked.stop) => {}
            }
        };
        tokio::pin!(stopping);
        let following = shared.peers.follow();
        tokio::pin!(following);
        let mut next = 0;
        loop {
            tokio::select! {
                () = &mut stopping => break,
                () = &mut following => {}
                _ = drain_asked.wait_for(|asked| asked.drain), if *phase.borrow() == Phase::Open => {
                    tracing::info!(sessions = shared.registry.len(), "draining until a stop is asked for");
                    phase.send_replace(Phase::Draining);
                }
                socket = accept(&listener) => hand_over(&threads, &mut next, socket),
            }
        }
        tracing::info!(sessions = shared.registry.len(), "draining");
        phase.send_replace(Phase::Draining);
        let drained = async {
            loop {
                tokio::select! {
                    () = shared.registry.wait_for_consoles_only() => return,
                    socket = accept(&listener) => hand_over(&threads, &mut next, socket),
                }
            }
        };
        if tokio::time::timeout(shared.live.get().drain_timeout, drained).await.is_err() {
            tracing::warn!(sessions = shared.registry.len(), "ending sessions that are still busy");
        }
        phase.send_replace(Phase::Closing);
        drop(listener);
        let handles = threads.into_iter().map(|t| t.handle).collect::<Vec<_>>();
        let joined = tokio::task::spawn_blocking(|| handles.into_iter().for_each(|h| drop(h.join())));
        // The threads end with their last session; one that hangs in the system must not keep the process.
        let _ = tokio::time::timeout(Duration::from_secs(5), joined).await;
        Ok(())
    }
}

/// Over TLS to both sides, libpq insists on a channel binding that only the same certificate on both can give.
async fn check_tls(backend: &Backend, tls: Option<&Tls>) -> Result<(), Error> {
    let Some(tls) = tls.filter(|_| backend.uses_tls()) else { return Ok(()) };
    // A catalog that cannot be reached now is each session's problem.
    let shown = backend.connect().await.ok().and_then(|connected| connected.certificate);
    if shown.is_some() && shown != tls.certificate {
        return Err(Error::Options(
            "the catalog is reached over TLS with another certificate, so clients could not log in over TLS: reach the catalog \
             through a Unix socket or with sslmode=disable on a private network, or give both the same certificate"
                .to_owned(),
        ));
    }
    Ok(())
}

async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((socket, _)) => return socket,
            Err(error) => {
                // Most often: out of file descriptors. Sessions that end free some.
                tracing::warn!(error = %error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

fn hand_over(threads: &[Thread], next: &mut usize, socket: TcpStream) {
    *next = (*next + 1) % threads.len();
    match socket.into_std() {
        // A thread that is gone takes the client's socket with it.
        Ok(socket) => drop(threads[*next].sockets.send(socket)),
        Err(error) => tracing::warn!(error = %error, "cannot hand over a connection"),
    }
}

/// Returns how many threads serve sessions on a machine of that many cores. The server that they relay to takes as much time for the
/// simplest statement as the relay does; and a thread that has more to do finds more sockets ready each time it looks, and so waits less often.
fn threads_for(cores: usize) -> usize {
    cores.div_ceil(2)
}

/// One OS thread with its runtime and the sessions on it.
struct Thread {
    sockets: mpsc::UnboundedSender<std::net::TcpStream>,
    handle: std::thread::JoinHandle<()>,
}

impl Thread {
    fn start(n: usize, shared: Arc<Shared>) -> Result<Thread, Error> {
        let failed = |e| Error::System("cannot start a thread for sessions", e);
        let (sockets, received) = mpsc::unbounded_channel::<std::net::TcpStream>();
        let (began, begins) = std::sync::mpsc::sync_channel(1);
        // A runtime for tasks that stay where they are belongs to the thread that makes it.
        let run = move || match Builder::new_current_thread().enable_all().build_local(LocalOptions::default()) {
            Ok(runtime) => {
                drop(began.send(Ok(())));
                runtime.block_on(take_over(shared, received));
            }
            Err(error) => drop(began.send(Err(error))),
        };
        let handle = std::thread::Builder::new().name(format!("sessions-{n}")).spawn(run).map_err(failed)?;
        begins.recv().unwrap_or_else(|gone| Err(std::io::Error::other(gone))).map_err(failed)?;
        Ok(Thread { sockets, handle })
    }
}

/// Serves sessions on this thread until the server closes and all have ended.
async fn take_over(shared: Arc<Shared>, mut sockets: mpsc::UnboundedReceiver<std::net::TcpStream>) {
    let mut phase = shared.phase.clone();
    loop {
        let socket = tokio::select! {
            socket = sockets.recv() => socket,
            _ = phase.wait_for(|p| *p == Phase::Closing) => None,
        };
        let Some(socket) = socket else { break };
        match TcpStream::from_std(socket) {
            Ok(socket) => {
                // A task of its own, so that a panic ends one session and not the thread.
                tokio::task::spawn_local(session::run(shared.clone(), socket));
            }
            Err(error) => tracing::warn!(error = %error, "cannot take over a connection"),
        }
    }
    shared.registry.wait_until_empty().await;
}
