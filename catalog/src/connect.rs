//! SQL sessions on a peer, or on the catalog: from options to a client, as libpq would connect.
//!
//! Not for: connections on which the protocol is spoken by hand (`wire`, which uses the same [`Attempt`]s).

mod kind;

use std::future::Future;
use std::io;
use std::time::Duration;

use fallible_iterator::FallibleIterator;
use pg::SqlState;
use postgres_protocol::message::backend;
use rand::seq::SliceRandom;
use tokio_postgres::config::{ChannelBinding, SslMode, SslNegotiation, TargetSessionAttrs};
use tokio_postgres::{Client, Config};

pub(crate) use self::kind::QUERY as KIND_QUERY;
pub use self::kind::ServerKind;
use crate::peer::PeerOptions;
use crate::tls::PeerTls;
use crate::wire;

/// How long CREATE PEER waits for a peer.
const CHECK_TIMEOUT: Duration = Duration::from_secs(5);

/// The oldest server that can be a peer.
const OLDEST_VERSION: u32 = 130_000;

/// A session could not be opened.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct ConnectError {
    /// What the server or the system said, with the address.
    pub message: String,
    /// The server's SQLSTATE; `None` when there was no answer.
    pub sqlstate: Option<SqlState>,
    /// What to do about it.
    pub hint: Option<String>,
}

impl ConnectError {
    fn new(message: impl Into<String>) -> ConnectError {
        ConnectError { message: message.into(), sqlstate: None, hint: None }
    }

    /// Says `what` went wrong in an attempt.
    pub(crate) fn at_address(attempt: &Attempt, what: &str) -> ConnectError {
        ConnectError::new(format!("{}: {what}", attempt.address))
    }

    /// Says that the server wants a password and there is none.
    pub(crate) fn no_password(address: &str) -> ConnectError {
        let message = format!("{address}: the server asks for a password and none is given");
        ConnectError { sqlstate: Some(SqlState::INVALID_PASSWORD), ..ConnectError::new(message) }
    }

    /// Says what the server answered an attempt.
    pub(crate) fn server(attempt: &Attempt, body: &backend::ErrorResponseBody) -> ConnectError {
        let (mut severity, mut message) = ("FATAL".to_owned(), String::new());
        let mut error = ConnectError::new("");
        let mut fields = body.fields();
        while let Ok(Some(field)) = fields.next() {
            let text = String::from_utf8_lossy(field.value_bytes()).into_owned();
            match field.type_() {
                b'S' => severity = text,
                b'M' => message = text,
                b'C' => error.sqlstate = SqlState::from_text(&text),
                b'H' => error.hint = Some(text),
                _ => {}
            }
        }
        error.message = format!("{}: {severity}: {message}", attempt.address);
        error
    }

    /// Says what went wrong at `address`.
    pub fn at(address: &str, error: &tokio_postgres::Error) -> ConnectError {
        match error.as_db_error() {
            Some(db) => ConnectError {
                message: format!("{address}: {}: {}", db.severity(), db.message()),
                sqlstate: SqlState::from_text(db.code().code()),
                hint: db.hint().map(str::to_owned),
            },
            None => {
                let cause = std::error::Error::source(error);
                let message = format!("{address}: {}", chain(error));
                // The client gives its errors no kind to tell them by.
                if cause.is_some_and(|cause| cause.to_string() == "password missing") {
                    return ConnectError::no_password(address);
                }
                let hint = cause.and_then(|cause| crate::tls::hint(cause.downcast_ref()?)).map(str::to_owned);
                ConnectError { hint, ..ConnectError::new(message) }
            }
        }
    }

    /// Says what the system answered at `address`.
    pub fn io(address: &str, error: &io::Error) -> ConnectError {
        let hint = crate::tls::hint(error).map(str::to_owned);
        ConnectError { hint, ..ConnectError::new(format!("{address}: {error}")) }
    }

    /// Whether this error tells more than `other`, which came first; `same_server` if both are from one host and port.
    ///
    /// A server that answered has more to say than one that did not. But "no pg_hba.conf entry" is what a second try with the other
    /// use of TLS often gets, and then the first try's error is the one that matters.
    fn tells_more_than(&self, other: &ConnectError, same_server: bool) -> bool {
        let rank = |error: &ConnectError| match error.sqlstate {
            None => 0,
            Some(SqlState::INVALID_AUTHORIZATION) => 1,
            Some(_) => 2,
        };
        rank(self) > rank(other) && !(same_server && rank(self) == 1)
    }
}

/// An error and its causes on one line, each once.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let said = cause.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        source = cause.source();
    }
    text
}

/// One way to connect: one host with one use of TLS.
#[derive(Clone)]
pub struct Attempt {
    /// The connection options; exactly one host, `ssl_mode` disable, prefer or require.
    pub config: Config,
    /// How TLS is made when it is used.
    pub tls: PeerTls,
    /// Host and port, for messages.
    pub address: String,
    /// What the server must be.
    pub kind: ServerKind,
    /// How long the attempt may take.
    pub timeout: Duration,
}

impl Attempt {
    async fn connect(&self) -> Result<Client, ConnectError> {
        let connected = tokio::time::timeout(self.timeout, self.config.connect(self.tls.clone())).await;
        let (client, connection) = match connected {
            Ok(result) => result.map_err(|e| ConnectError::at(&self.address, &e))?,
            Err(_) => {
                return Err(ConnectError::new(format!("{}: no answer within {:?}", self.address, self.timeout)));
            }
        };
        let address = self.address.clone();
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(address, error = chain(&error), "session ended");
            }
        });
        if self.kind != ServerKind::Any {
            let row = client.query_one(KIND_QUERY, &[]).await.map_err(|e| ConnectError::at(&self.address, &e))?;
            self.check_kind(row.get(0), row.get(1))?;
        }
        Ok(client)
    }

    /// Checks that the server is what is wanted.
    pub(crate) fn check_kind(&self, standby: bool, read_only: bool) -> Result<(), ConnectError> {
        self.kind.objection(standby, read_only).map_or(Ok(()), |what| Err(ConnectError::at_address(self, what)))
    }
}

/// All the ways to connect that a set of options allows, in the order in which libpq tries them.
#[derive(Clone)]
pub struct Connector {
    attempts: Vec<Attempt>,
}

impl Connector {
    /// Works out the attempts: several hosts in order, and for `prefer` and `allow` both uses of TLS on each.
    ///
    /// # Errors
    /// [`ConnectError`] if a certificate file cannot be read, or ports and hosts do not match.
    pub fn new(options: &PeerOptions) -> Result<Connector, ConnectError> {
        let tls = PeerTls::new(options).map_err(|e| ConnectError::new(e.to_string()))?;
        let list = |name: &str| -> Vec<String> {
            options.get(name).map(|t| t.split(',').map(|p| p.trim().to_owned()).collect()).unwrap_or_default()
        };
        let (hosts, addresses, ports) = (list("host"), list("hostaddr"), list("port"));
        let count = hosts.len().max(addresses.len()).max(1);
        if !matches!(ports.len(), 0 | 1) && ports.len() != count {
            return Err(ConnectError::new(format!("could not match {} port numbers to {count} hosts", ports.len())));
        }
        let mut order: Vec<usize> = (0..count).collect();
        if options.get("load_balance_hosts") == Some("random") {
            order.shuffle(&mut rand::rng());
        }
        let mut attempts = Vec::new();
        for (kind, n) in ServerKind::wanted(options).iter().flat_map(|kind| order.iter().map(move |n| (*kind, *n))) {
            let host = hosts.get(n).map_or("localhost", String::as_str);
            let port = if ports.len() == 1 { &ports[0] } else { ports.get(n).map_or("5432", String::as_str) };
            let port: u16 = port.parse().map_err(|_| ConnectError::new(format!("invalid port number: \"{port}\"")))?;
            let mut config = base_config(options, host, port)?;
            if let Some(address) = addresses.get(n) {
                let parsed = address.parse();
                config.hostaddr(parsed.map_err(|_| ConnectError::new(format!("invalid hostaddr: \"{address}\"")))?);
            }
            let timeout = options.get("connect_timeout").and_then(|t| t.parse().ok()).unwrap_or(10);
            let timeout = Duration::from_secs(timeout);
            let address =
                if host.starts_with('/') { format!("{host}/.s.PGSQL.{port}") } else { format!("{host}:{port}") };
            // A Unix socket never uses TLS, whatever sslmode says.
            for mode in if host.starts_with('/') { &[SslMode::Disable][..] } else { tls_order(options) } {
                let mut config = config.clone();
                config.ssl_mode(*mode);
                attempts.push(Attempt { config, tls: tls.clone(), address: address.clone(), kind, timeout });
            }
        }
        Ok(Connector { attempts })
    }

    /// Returns all the ways to connect.
    pub fn attempts(&self) -> &[Attempt] {
        &self.attempts
    }

    /// Opens a session; also tells which attempt it was, so that a further connection goes to the same server.
    ///
    /// # Errors
    /// [`ConnectError`] of the attempt that got furthest: one that the server answered before one that nobody did.
    pub async fn connect(&self) -> Result<(Client, &Attempt), ConnectError> {
        self.first(Attempt::connect).await
    }

    /// Opens a session on which the protocol is spoken by hand; `parameters` are those of the start-up packet for an attempt.
    ///
    /// # Errors
    /// As [`Connector::connect`].
    pub async fn log_in(
        &self,
        parameters: impl Fn(&Attempt) -> Vec<(String, String)>,
    ) -> Result<(wire::Session, &Attempt), ConnectError> {
        self.first(async |attempt: &Attempt| {
            let parameters = parameters(attempt);
            let parameters: Vec<_> = parameters.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
            wire::log_in(attempt, &parameters).await
        })
        .await
    }

    /// Makes the attempts in order until one succeeds.
    async fn first<T>(
        &self,
        attempt_it: impl AsyncFn(&Attempt) -> Result<T, ConnectError>,
    ) -> Result<(T, &Attempt), ConnectError> {
        let mut worst: Option<(ConnectError, &Attempt)> = None;
        for attempt in &self.attempts {
            match attempt_it(attempt).await {
                Ok(session) => return Ok((session, attempt)),
                Err(error) => {
                    if worst.as_ref().is_none_or(|(w, at)| error.tells_more_than(w, at.address == attempt.address)) {
                        worst = Some((error, attempt));
                    }
                }
            }
        }
        Err(worst.expect("there is at least one attempt").0)
    }
}

fn base_config(options: &PeerOptions, host: &str, port: u16) -> Result<Config, ConnectError> {
    let mut config = Config::new();
    config.host(host).port(port);
    let number = |name: &str, default: u64| options.get(name).and_then(|t| t.parse().ok()).unwrap_or(default);
    let seconds = |name: &str, default: u64| Duration::from_secs(number(name, default));
    let user = options.get("user").unwrap_or_default();
    let database = options.get("database").unwrap_or(user);
    config.user(user);
    config.dbname(database);
    if let Some(password) = options.password(host, port, database, user).map_err(ConnectError::new)? {
        config.password(password);
    }
    if let Some(text) = options.get("options") {
        config.options(text);
    }
    let name = options.get("application_name").or_else(|| options.get("fallback_application_name"));
    config.application_name(name.unwrap_or("peergate"));
    config.keepalives(options.get("keepalives").is_none_or(|_| options.flag("keepalives")));
    config.keepalives_idle(seconds("keepalives_idle", 60));
    config.keepalives_interval(seconds("keepalives_interval", 10));
    config.keepalives_retries(u32::try_from(number("keepalives_count", 6)).unwrap_or(6));
    match number("tcp_user_timeout", 60_000) {
        0 => {}
        milliseconds => drop(config.tcp_user_timeout(Duration::from_millis(milliseconds))),
    }
    config.target_session_attrs(match options.get("target_session_attrs") {
        Some("read-write") => TargetSessionAttrs::ReadWrite,
        Some("read-only") => TargetSessionAttrs::ReadOnly,
        _ => TargetSessionAttrs::Any,
    });
    if options.get("sslnegotiation") == Some("direct") {
        config.ssl_negotiation(SslNegotiation::Direct);
    }
    config.channel_binding(match options.get("channel_binding") {
        Some("disable") => ChannelBinding::Disable,
        Some("require") => ChannelBinding::Require,
        _ => ChannelBinding::Prefer,
    });
    Ok(config)
}

fn tls_order(options: &PeerOptions) -> &'static [SslMode] {
    if options.flag("disable_tls") {
        return &[SslMode::Disable];
    }
    // A server that is not asked whether it speaks TLS can only be spoken to in TLS.
    if options.get("sslnegotiation") == Some("direct") && options.get("sslmode") != Some("disable") {
        return &[SslMode::Require];
    }
    match options.get("sslmode") {
        None if options.flag("require_tls") => &[SslMode::Require],
        None | Some("prefer") => &[SslMode::Prefer, SslMode::Disable],
        Some("disable") => &[SslMode::Disable],
        Some("allow") => &[SslMode::Disable, SslMode::Require],
        Some(_) => &[SslMode::Require],
    }
}

/// Connects to a peer as CREATE PEER does, with a limit of 5 s, and checks that it can be one.
///
/// # Errors
/// [`ConnectError`] with the server's own message.
pub async fn check_peer(peer: &PeerOptions) -> Result<(), ConnectError> {
    let check = async {
        let connector = Connector::new(peer)?;
        let (client, attempt) = connector.connect().await?;
        let version = server_version(&client).await.map_err(|e| ConnectError::at(&attempt.address, &e))?;
        if version < OLDEST_VERSION {
            return Err(ConnectError {
                message: format!("{}: server version {} is too old", attempt.address, version / 10_000),
                sqlstate: None,
                hint: Some("PostgreSQL 13 is the oldest version that can be a peer.".to_owned()),
            });
        }
        Ok(())
    };
    within(CHECK_TIMEOUT, check).await
}

/// Returns the server's version as a number, such as 150018.
///
/// # Errors
/// [`tokio_postgres::Error`] if the session broke.
pub async fn server_version(client: &Client) -> Result<u32, tokio_postgres::Error> {
    let row = client.query_one("select current_setting('server_version_num')::int4", &[]).await?;
    Ok(row.get::<_, i32>(0).cast_unsigned())
}

async fn within<T>(limit: Duration, work: impl Future<Output = Result<T, ConnectError>>) -> Result<T, ConnectError> {
    let timed_out = |_| Err(ConnectError::new(format!("no answer within {limit:?}")));
    tokio::time::timeout(limit, work).await.unwrap_or_else(timed_out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempts(options: &[(&'static str, &str)]) -> Vec<(String, SslMode)> {
        let options = PeerOptions::plain(options.iter().map(|(k, v)| (*k, (*v).to_owned())));
        let connector = Connector::new(&options).unwrap();
        connector.attempts().iter().map(|a| (a.address.clone(), a.config.get_ssl_mode())).collect()
    }

    #[test]
    fn prefer_falls_back_to_plain_and_allow_to_tls() {
        let address = || "localhost:5432".to_owned();
        assert_eq!(attempts(&[("user", "u")]), [(address(), SslMode::Prefer), (address(), SslMode::Disable)]);
        assert_eq!(attempts(&[("sslmode", "allow")]), [(address(), SslMode::Disable), (address(), SslMode::Require)]);
        assert_eq!(attempts(&[("require_tls", "true")]), [(address(), SslMode::Require)]);
        assert_eq!(attempts(&[("disable_tls", "true")]), [(address(), SslMode::Disable)]);
    }

    #[test]
    fn hosts_and_ports_go_together() {
        let two = attempts(&[("host", "a,b"), ("port", "1,2"), ("sslmode", "require")]);
        assert_eq!(two, [("a:1".to_owned(), SslMode::Require), ("b:2".to_owned(), SslMode::Require)]);
        assert_eq!(
            attempts(&[("host", "/run"), ("sslmode", "require")]),
            [("/run/.s.PGSQL.5432".to_owned(), SslMode::Disable)]
        );
        let wrong = PeerOptions::plain([("host", "a,b,c".to_owned()), ("port", "1,2".to_owned())]);
        assert!(Connector::new(&wrong).is_err());
    }

    #[test]
    fn hosts_are_tried_again_for_the_next_best_kind() {
        let options = [("host", "a,b"), ("sslmode", "disable"), ("target_session_attrs", "prefer-standby")];
        let options = PeerOptions::plain(options.map(|(k, v)| (k, v.to_owned())));
        let connector = Connector::new(&options).unwrap();
        let tried: Vec<_> = connector.attempts().iter().map(|a| (a.address.as_str(), a.kind)).collect();
        let (standby, any) = (ServerKind::Standby, ServerKind::Any);
        assert_eq!(tried, [("a:5432", standby), ("b:5432", standby), ("a:5432", any), ("b:5432", any)]);
        assert_eq!(standby.objection(false, false), Some("server is not in hot standby mode"));
        assert_eq!(any.objection(false, false), None);
    }

    #[test]
    fn certificate_files_that_are_missing_are_named() {
        let options =
            PeerOptions::plain([("sslmode", "verify-full".to_owned()), ("sslrootcert", "/nowhere/ca.pem".to_owned())]);
        let error = Connector::new(&options).err().unwrap();
        assert!(error.message.contains("sslrootcert"), "{error}");
    }
}
