//! Listens, hands sockets to one single-threaded runtime per core, limits sessions and drains them at the end.
//!
//! A session's two sockets live on one thread: nothing is handed between threads while it runs. What a session does is in
//! `session`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use catalog::Catalog;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio::task::LocalSet;

use crate::backend::Backend;
use crate::cancel::Cancels;
use crate::config::TlsFiles;
use crate::error::Error;
use crate::session::{self, Shared};
use crate::tls::{TlsAcceptor, acceptor};

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
    /// The catalog's server has the very certificate of `tls`. Only then can a client bind SCRAM to its TLS session when the
    /// catalog is reached over TLS too.
    pub shared_certificate: bool,
    /// Sessions at the same time, those that are still logging in included.
    pub sessions_max: usize,
    /// How long a login may take, from the first byte to the first ReadyForQuery.
    pub login_timeout: Duration,
    /// How long running statements may go on after a shutdown was asked for.
    pub drain_timeout: Duration,
    /// Threads that serve sessions; 0: one per core.
    pub threads: usize,
}

impl ServerOptions {
    /// Returns the options with which a server listens on `listen` in plain text.
    pub fn new(listen: SocketAddr) -> ServerOptions {
        ServerOptions {
            listen,
            tls: None,
            tls_required: false,
            shared_certificate: false,
            sessions_max: 10_000,
            login_timeout: Duration::from_secs(60),
            drain_timeout: Duration::from_secs(10),
            threads: 0,
        }
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
    options: ServerOptions,
    shared: Arc<Shared>,
    acceptor: Option<TlsAcceptor>,
    phase: watch::Sender<Phase>,
}

impl Server {
    /// Binds the address and reads the certificate. Clients that connect from now on wait for [`Server::serve`].
    ///
    /// # Errors
    /// [`Error::Listen`], [`Error::Tls`], or [`Error::Options`] if clients could not log in: over TLS to both sides, libpq insists
    /// on a channel binding that only a shared certificate can give.
    pub async fn bind(options: ServerOptions, catalog: Catalog) -> Result<Server, Error> {
        let backend = Backend::new(catalog.connector());
        if options.tls.is_some() && backend.uses_tls() && !options.shared_certificate {
            return Err(Error::Options(
                "the catalog is reached over TLS with another certificate, so clients could not log in over TLS: reach the catalog \
                 through a Unix socket or with sslmode=disable on a private network, or give both the same certificate"
                    .to_owned(),
            ));
        }
        if options.tls_required && options.tls.is_none() {
            return Err(Error::Options("TLS is required but there is no certificate".to_owned()));
        }
        let acceptor = options.tls.as_ref().map(acceptor).transpose()?;
        let listen = |source| Error::Listen { address: options.listen, source };
        let listener = TcpListener::bind(options.listen).await.map_err(listen)?;
        let (phase, watched) = watch::channel(Phase::Open);
        let shared = Arc::new(Shared {
            backend,
            catalog,
            cancels: Cancels::default(),
            phase: watched,
            login_timeout: options.login_timeout,
            tls_required: options.tls_required,
            shared_certificate: options.shared_certificate,
            sessions: AtomicUsize::new(0),
            session_ended: Notify::new(),
            cancel_permits: Semaphore::new(CANCELS_MAX),
            sessions_max: options.sessions_max,
        });
        Ok(Server { listener, options, shared, acceptor, phase })
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
        let Server { listener, options, shared, acceptor, phase } = self;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let count = if options.threads == 0 { cores } else { options.threads };
        let mut threads = Vec::new();
        for n in 0..count {
            threads.push(Thread::start(n, shared.clone(), acceptor.clone())?);
        }
        let stopping = async {
            // A sender that is gone means that nobody will ever say so: stop.
            let _ = shutdown.wait_for(|stop| *stop).await;
        };
        tokio::pin!(stopping);
        let mut next = 0;
        loop {
            tokio::select! {
                () = &mut stopping => break,
                socket = accept(&listener) => hand_over(&threads, &mut next, socket),
            }
        }
        tracing::info!(sessions = shared.sessions.load(Ordering::Relaxed), "draining");
        phase.send_replace(Phase::Draining);
        let drained = async {
            loop {
                tokio::select! {
                    () = shared.wait_until_empty() => return,
                    socket = accept(&listener) => hand_over(&threads, &mut next, socket),
                }
            }
        };
        if tokio::time::timeout(options.drain_timeout, drained).await.is_err() {
            tracing::warn!(sessions = shared.sessions.load(Ordering::Relaxed), "ending sessions that are still busy");
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

/// One OS thread with its runtime and the sessions on it.
struct Thread {
    sockets: mpsc::UnboundedSender<std::net::TcpStream>,
    handle: std::thread::JoinHandle<()>,
}

impl Thread {
    fn start(n: usize, shared: Arc<Shared>, acceptor: Option<TlsAcceptor>) -> Result<Thread, Error> {
        let failed = |e| Error::System("cannot start a thread for sessions", e);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let (sockets, mut received) = mpsc::unbounded_channel::<std::net::TcpStream>();
        let run = move || {
            let local = LocalSet::new();
            local.block_on(&runtime, async {
                let mut phase = shared.phase.clone();
                loop {
                    let socket = tokio::select! {
                        socket = received.recv() => socket,
                        _ = phase.wait_for(|p| *p == Phase::Closing) => None,
                    };
                    let Some(socket) = socket else { break };
                    match TcpStream::from_std(socket) {
                        Ok(socket) => {
                            // A task of its own, so that a panic ends one session and not the thread.
                            tokio::task::spawn_local(session::run(shared.clone(), socket, acceptor.clone()));
                        }
                        Err(error) => tracing::warn!(error = %error, "cannot take over a connection"),
                    }
                }
                shared.wait_until_empty().await;
            });
        };
        let handle = std::thread::Builder::new().name(format!("sessions-{n}")).spawn(run).map_err(failed)?;
        Ok(Thread { sockets, handle })
    }
}
