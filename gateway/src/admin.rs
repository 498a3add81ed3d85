//! The admin console: `dbname=peergate_admin`, in the manner of pgbouncer's. The catalog says whether a client is who it says and what
//! it may do here; the session itself is the gateway's own, so it is there until the process ends.
//!
//! `command` reads statements, `view` and `tables` are what is shown, `console` speaks the protocol; here is what is done.

mod command;
mod console;
mod tables;
mod view;

use std::sync::Arc;
use std::time::SystemTime;

use bytes::BytesMut;
use catalog::connect::{Attempt, chain};
use catalog::watch::ConsoleRights;
use pg::SqlState;
use pg::frame::HEADER_BYTES;
use pgwire::messages::Message;
use pgwire::messages::response::{ReadyForQuery, TransactionStatus};
use pgwire::messages::startup::{BackendKeyData, ParameterStatus, SecretKey};
use tokio::io::AsyncWriteExt;
use tokio_postgres::config::Host;

use self::command::{Command, ConsoleError};
use self::console::{Console, Notice, Outcome, Reply, Run};
use self::view::{Doing, ListenerView, ServerView, SessionView, View};
use crate::backend::{cancel, cancel_packet};
use crate::config::TlsMode;
use crate::error::Fatal;
use crate::login::{AUTHENTICATION_OK, Refused, authenticate, next_frame};
use crate::metrics::resident_bytes;
use crate::registry::{Entry, State};
use crate::server::Phase;
use crate::session::{Client, Shared};
use crate::startup::Startup;

/// The database that is the console.
pub(crate) const DATABASE: &str = "peergate_admin";

/// What drivers take the console for: the oldest server whose ways they all know.
const SERVER_VERSION: &str = concat!("13.0 (Peergate ", env!("CARGO_PKG_VERSION"), ")");

/// Lets a client in and finds out what it may do.
///
/// # Errors
/// [`Refused`], also if it may do nothing.
pub(crate) async fn log_in(
    shared: &Shared,
    entry: &Entry,
    client: &mut Client,
    startup: &Startup,
) -> Result<ConsoleRights, Refused> {
    authenticate(shared, client, startup).await?;
    let rights = shared.catalog.console_rights(&startup.user).await.map_err(|error| {
        tracing::warn!(error = chain(&error), "cannot ask the catalog for a role's rights");
        Refused::Fatal(Fatal::BackendUnreachable)
    })?;
    if !rights.look {
        return Err(Refused::Fatal(Fatal::ConsoleDenied));
    }
    let application_name = startup.text("application_name").unwrap_or_default();
    client.io.write_all(&greeting(entry.id, &startup.user, &application_name)).await?;
    client.io.flush().await?;
    tracing::info!(user = startup.user, client = %entry.client, "console opened");
    Ok(rights)
}

fn greeting(id: u64, user: &str, application_name: &str) -> BytesMut {
    let mut out = BytesMut::from(AUTHENTICATION_OK);
    let settings = [
        ("application_name", application_name),
        ("client_encoding", "UTF8"),
        ("DateStyle", "ISO, MDY"),
        ("integer_datetimes", "on"),
        ("IntervalStyle", "postgres"),
        ("is_superuser", "off"),
        ("server_encoding", "UTF8"),
        ("server_version", SERVER_VERSION),
        ("session_authorization", user),
        ("standard_conforming_strings", "on"),
        ("TimeZone", "UTC"),
    ];
    for (name, value) in settings {
        encode(ParameterStatus::new(name.to_owned(), value.to_owned()), &mut out);
    }
    // No statement here takes long enough to be cancelled.
    encode(BackendKeyData::new(id as i32, SecretKey::I32(rand::random())), &mut out);
    encode(ReadyForQuery::new(TransactionStatus::Idle), &mut out);
    out
}

fn encode(message: impl Message, out: &mut BytesMut) {
    message.encode(out).expect("encoders of what we made do not fail");
}

/// Serves a client that is logged in, to its end. Returns what is left to say to it.
pub(crate) async fn serve(
    shared: &Arc<Shared>,
    entry: &Entry,
    client: &mut Client,
    user: &str,
    rights: ConsoleRights,
) -> Option<Fatal> {
    let mut console = Console::default();
    let mut operator = Operator { shared, user, rights };
    let mut phase = shared.phase.clone();
    loop {
        entry.set_status(b'I');
        let frame = tokio::select! {
            frame = next_frame(&mut client.io, &mut client.read) => frame,
            () = entry.killed() => return Some(Fatal::Shutdown),
            _ = phase.wait_for(|p| *p == Phase::Closing) => return Some(Fatal::Shutdown),
        };
        let frame = match frame {
            Ok(frame) => frame,
            Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                return Some(Fatal::Protocol("invalid message length"));
            }
            Err(_) => return None,
        };
        entry.set_status(0);
        let mut out = BytesMut::new();
        match console.answer(frame[0], &frame[HEADER_BYTES..], &mut operator, &mut out).await {
            Reply::Goes => {}
            Reply::Ends => return None,
            Reply::Violates => return Some(Fatal::Protocol("invalid message")),
        }
        let written = async {
            client.io.write_all(&out).await?;
            client.io.flush().await
        };
        // A client that reads nothing must not hold up the end; one that does gets the answer to its SHUTDOWN.
        let written = tokio::select! {
            biased;
            written = written => written,
            _ = phase.wait_for(|p| *p == Phase::Closing) => return None,
        };
        if written.is_err() {
            return None;
        }
    }
}

/// Does what a client says.
struct Operator<'a> {
    shared: &'a Arc<Shared>,
    user: &'a str,
    rights: ConsoleRights,
}

impl Run for Operator<'_> {
    async fn run(&mut self, command: &Command) -> Result<Outcome, ConsoleError> {
        let word = match command {
            Command::Show(show) => return Ok(Outcome::Rows(*show, tables::rows(*show, &view(self.shared)))),
            Command::Courtesy(tag) => return Ok(Outcome::Done(tag, Vec::new())),
            Command::Kill(_) => "KILL",
            Command::Cancel(_) => "CANCEL",
            Command::Reload => "RELOAD",
            Command::Drain => "DRAIN",
            Command::Shutdown => "SHUTDOWN",
        };
        if !self.rights.manage {
            let message = format!("permission denied for {word}");
            return Err(ConsoleError::new(SqlState::INSUFFICIENT_PRIVILEGE, message).hint(
                "Superusers and members of the role that owns schema peergate can. Members of pg_monitor can SHOW.",
            ));
        }
        tracing::info!(user = self.user, statement = ?command, "console");
        let notices = match command {
            Command::Kill(id) => {
                self.session(*id)?.kill();
                Vec::new()
            }
            Command::Cancel(id) => {
                cancel_session(&*self.session(*id)?).await?;
                Vec::new()
            }
            Command::Reload => self.reload().await?,
            Command::Drain => {
                self.shared.asked.send_modify(|asked| asked.drain = true);
                Vec::new()
            }
            _ => {
                self.shared.asked.send_modify(|asked| asked.stop = true);
                Vec::new()
            }
        };
        Ok(Outcome::Done(word, notices))
    }
}

impl Operator<'_> {
    fn session(&self, id: u64) -> Result<Arc<Entry>, ConsoleError> {
        self.shared.registry.session(id).ok_or_else(|| {
            ConsoleError::new(SqlState::UNDEFINED_OBJECT, format!("there is no session {id}"))
                .hint("SHOW SESSIONS has the ids.")
        })
    }

    async fn reload(&self) -> Result<Vec<Notice>, ConsoleError> {
        let Some(reloader) = self.shared.reloader.get().and_then(std::sync::Weak::upgrade) else {
            let message = "this gateway was started without a configuration that could be read again";
            return Err(ConsoleError::new(SqlState::FEATURE_NOT_SUPPORTED, message));
        };
        let failed = |message: String| {
            tracing::error!(error = message, "cannot reload: all stays as it was");
            let detail = Some("All stays as it was.".to_owned());
            ConsoleError { detail, ..ConsoleError::new(SqlState::CONFIG_FILE_ERROR, message) }
        };
        // It reads files, and this thread serves sessions.
        let reloaded = tokio::task::spawn_blocking(move || reloader.reload()).await;
        let reloaded = reloaded.map_err(|error| failed(error.to_string()))?.map_err(|error| failed(chain(&error)))?;
        reloaded.log();
        let notice = |severity, what: &str, names: &[&str]| {
            (!names.is_empty()).then(|| Notice { severity, message: format!("{what}: {}", names.join(", ")) })
        };
        let changed = notice("NOTICE", "changed", &reloaded.changed);
        Ok(changed
            .into_iter()
            .chain(notice("WARNING", "these change only with a restart", &reloaded.waiting))
            .collect())
    }
}

/// Cancels what a session is doing, wherever it is done.
async fn cancel_session(entry: &Entry) -> Result<(), ConsoleError> {
    if entry.cancel_work() {
        return Ok(());
    }
    let Some(behind) = entry.behind() else {
        let message = format!("session {} has no server session", entry.id);
        return Err(ConsoleError::new(SqlState::WRONG_STATE, message).hint("KILL ends it."));
    };
    cancel(&behind.attempt, &cancel_packet(&behind.key)).await.map_err(|error| {
        ConsoleError::new(SqlState::CONNECTION_FAILURE, format!("cannot pass the cancel request on: {error}"))
    })
}

/// Looks at everything once.
fn view(shared: &Shared) -> View {
    let live = shared.live.get();
    let census = shared.registry.census();
    let catalog = shared.backend.first_attempt().map(|attempt| server_view(attempt, None)).unwrap_or_default();
    let sessions = census.sessions.iter().map(|entry| session_view(entry, &catalog)).collect();
    let mode = match (&live.tls, live.tls_required) {
        (None, _) => TlsMode::Disable,
        (Some(_), false) => TlsMode::Allow,
        (Some(_), true) => TlsMode::Required,
    };
    let reloader = shared.reloader.get().and_then(std::sync::Weak::upgrade);
    View {
        now: SystemTime::now(),
        began: shared.began,
        sessions,
        totals: census.by_database,
        settings: reloader.map(|reloader| reloader.settings()).unwrap_or_default(),
        listener: ListenerView {
            address: shared.address,
            tls: mode.name(),
            certificate_expires: live.tls.as_ref().map(|tls| tls.expires),
        },
        catalog,
        sessions_max: live.sessions_max,
        draining: *shared.phase.borrow() != Phase::Open,
        resident_bytes: resident_bytes(),
    }
}

fn session_view(entry: &Entry, catalog: &ServerView) -> SessionView {
    let identity = entry.identity();
    let state = entry.state();
    let server = entry.behind().map(|behind| {
        let mut server = server_view(&behind.attempt, behind.pid());
        // On the catalog's server a name is a database, also one that Peergate itself has no session on.
        if (&server.host, server.port) == (&catalog.host, catalog.port) {
            server.database = identity.map(|i| i.database.clone()).unwrap_or_default();
        }
        server
    });
    SessionView {
        id: entry.id,
        user: identity.map(|i| i.user.clone()).unwrap_or_default(),
        database: identity.map(|i| i.database.clone()).unwrap_or_default(),
        application_name: identity.map(|i| i.application_name.clone()).unwrap_or_default(),
        tls: identity.and_then(|i| i.tls).unwrap_or_default(),
        client: entry.client,
        began: entry.began,
        state: Doing { name: state.name(), login: state == State::Login, idle: state == State::Idle },
        console: entry.is_console(),
        totals: entry.counters.totals(),
        server,
    }
}

/// Where a server is; the database is that of the attempt, a peer's own for a peer.
fn server_view(attempt: &Attempt, pid: Option<i32>) -> ServerView {
    let config = &attempt.config;
    let host = match config.get_hosts().first() {
        Some(Host::Tcp(name)) => name.clone(),
        Some(Host::Unix(folder)) => folder.display().to_string(),
        None => String::new(),
    };
    let port = config.get_ports().first().copied().unwrap_or(5432);
    let database = config.get_dbname().or(config.get_user()).unwrap_or_default().to_owned();
    ServerView { host, port, database, pid }
}
