//! What `peergate` was asked to do: flags, environment and file, as typed ([`RawConfig`]) and as meant ([`Config`]).
//!
//! It reads and checks; it opens no socket and makes no directory.

mod duration;
mod settings;

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;
use std::{fs, io};

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Deserialize;

pub use self::duration::Span;
pub use self::settings::Setting;

const LISTEN: &str = "127.0.0.1:9900";
const SESSIONS_MAX: usize = 10_000;
const LOGIN_TIMEOUT: Duration = Duration::from_secs(60);
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
const LOG: &str = "info";

/// The longest that a timeout may be.
const TIMEOUT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// The command line of `peergate`.
#[derive(Debug, Parser)]
#[command(
    name = "peergate",
    version,
    about = "Replication and federation of Postgres, in SQL, over Postgres' own protocol"
)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What `peergate` can be told to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Runs the gateway and the mirror engine until SIGTERM or SIGINT.
    #[command(after_help = ENVIRONMENT)]
    Serve(RawConfig),
    /// Seals the catalog's secrets anew with a new key. Give it what `serve` is given.
    #[command(after_help = ENVIRONMENT)]
    RotateKey(RawConfig),
    /// Writes the SQL that rebuilds the catalog's peers and mirrors, without secrets, to standard output. Give it what `serve` is given.
    #[command(after_help = ENVIRONMENT)]
    Dump(RawConfig),
    /// Shows it all at work, on sample servers of its own, and cleans up.
    Demo(DemoArguments),
    /// Says by its exit status whether a server listens and takes sessions, for Docker's HEALTHCHECK.
    Healthcheck(RawConfig),
}

/// What `peergate demo` takes.
#[derive(Clone, Debug, Args)]
pub struct DemoArguments {
    /// How long the sample servers are under load, in seconds
    #[arg(long, env = "DEMO_SECONDS", default_value_t = 60)]
    pub seconds: u64,
    /// pgbench's scale: 100,000 accounts each
    #[arg(long, env = "DEMO_SCALE", default_value_t = 10)]
    pub scale: u32,
    /// Keep the log of the demo's server in this file
    #[arg(long, env = "DEMO_LOG", value_name = "FILE")]
    pub log: Option<PathBuf>,
}

const ENVIRONMENT: &str = "\
Each flag can be given as an environment variable (PEERGATE_LISTEN, PEERGATE_DATA_DIR, …) and, under the flag's name with
underscores, in the configuration file. A flag wins over the environment, that over the file, that over the default.
SIGHUP reads the file, certificates and keys anew; what is wrong with them is logged, and then all stays as it was.

A TIME is a number and a unit as in Postgres (500ms, 10s, 1min, 2h); without a unit, seconds.

Further variables:
  PEERGATE_PASSWORD  Password of the embedded catalog's role peergate [default: made, and kept in DIR/password]
  PEERGATE_KEY       Key that seals the peers' secrets [default: made, and kept in DIR/key]
  PEERGATE_PG_BIN    Folder of the Postgres server programs for the embedded catalog [default: searched for]";

/// The configuration as typed in one place: the command line, the environment or the file.
///
/// `None` means that this place says nothing.
#[derive(Clone, Debug, Default, PartialEq, Args, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawConfig {
    /// Address and port to listen on [default: 127.0.0.1:9900]
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: Option<String>,
    /// Directory of the embedded catalog and the key [default: /var/lib/peergate as root, else ~/.local/share/peergate]
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// URL of the catalog's database [default: a private one in the data directory]
    #[arg(long, value_name = "URL")]
    pub catalog: Option<String>,
    /// What this process runs [default: all]
    #[arg(long)]
    pub role: Option<Role>,
    /// Whether clients may or must use TLS [default: allow if there is a certificate, else disable]
    #[arg(long, value_name = "MODE")]
    pub tls: Option<TlsMode>,
    /// File with the certificate shown to clients, PEM, with what is between it and its authority
    #[arg(long, value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// File with that certificate's private key, PEM, without a passphrase
    #[arg(long, value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// File with the authorities that sign clients' certificates, PEM
    #[arg(long, value_name = "FILE")]
    pub tls_client_ca: Option<PathBuf>,
    /// What a client's certificate must be, beside the catalog's own authentication; needs --tls required
    #[arg(long, value_name = "CHECK")]
    pub tls_client_cert: Option<ClientCheck>,
    /// Sessions at the same time [default: 10000]
    #[arg(long, value_name = "N")]
    pub sessions_max: Option<usize>,
    /// How long a login may take [default: 1min]
    #[arg(long, value_name = "TIME")]
    pub login_timeout: Option<Span>,
    /// How long running statements may go on after a stop was asked for [default: 10s]
    #[arg(long, value_name = "TIME")]
    pub drain_timeout: Option<Span>,
    /// Threads that serve sessions [default: one for two cores]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Address and port of /metrics, /healthz and /readyz, in plain HTTP for everybody who reaches it [default: none]
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub metrics_listen: Option<String>,
    /// Where the catalog's server reaches a gateway, for foreign tables [default: this process' own gateway, if the catalog is on this machine]
    #[arg(long, value_name = "HOST:PORT")]
    pub gateway_address: Option<String>,
    /// What to log, as a tracing filter such as info or warn,gateway=debug [default: info]
    #[arg(long, value_name = "FILTER")]
    pub log: Option<String>,
    /// Configuration file, TOML
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// The embedded catalog's password. Neither a flag, which everybody could see in `ps`, nor in the file.
    #[arg(skip)]
    #[serde(skip)]
    pub password: Option<Secret>,
    /// The key that seals secrets. Neither a flag nor in the file.
    #[arg(skip)]
    #[serde(skip)]
    pub key: Option<Secret>,
}

/// What a process runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Gateway and engine.
    #[default]
    All,
    /// The gateway only; engines elsewhere share the catalog.
    Gateway,
    /// The mirror engine only; it listens on nothing.
    Engine,
}

impl Role {
    /// Its name, as in `--role` and in the catalog's table `nodes`.
    pub fn name(self) -> &'static str {
        match self {
            Role::All => "all",
            Role::Gateway => "gateway",
            Role::Engine => "engine",
        }
    }

    /// Whether the process listens for clients.
    pub fn runs_gateway(self) -> bool {
        self != Role::Engine
    }

    /// Whether the process runs mirrors.
    pub fn runs_engine(self) -> bool {
        self != Role::Gateway
    }
}

/// Whether clients use TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TlsMode {
    /// Nobody can.
    Disable,
    /// Those that ask for it.
    Allow,
    /// Everybody must.
    Required,
}

impl TlsMode {
    /// Its name, as in `--tls`.
    pub fn name(self) -> &'static str {
        match self {
            TlsMode::Disable => "disable",
            TlsMode::Allow => "allow",
            TlsMode::Required => "required",
        }
    }
}

/// What a client's certificate must be, as `clientcert` in pg_hba.conf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClientCheck {
    /// Signed by an authority of ours.
    VerifyCa,
    /// That, and its common name is the role that the client logs in as.
    VerifyFull,
}

impl ClientCheck {
    /// Its name, as in `--tls-client-cert`.
    pub fn name(self) -> &'static str {
        match self {
            ClientCheck::VerifyCa => "verify-ca",
            ClientCheck::VerifyFull => "verify-full",
        }
    }
}

/// A text that is not to be seen in logs: its `Debug` hides it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

/// The configuration as meant: complete and checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Where to listen. Default 127.0.0.1:9900; port 0 takes any free port.
    pub listen: SocketAddr,
    /// Directory of the embedded catalog, the key file and the node's identity. Absolute.
    pub data_dir: PathBuf,
    /// Which database is the catalog. Default: an embedded one.
    pub catalog: CatalogSource,
    /// What to run. Default: all.
    pub role: Role,
    /// What to show to clients that ask for TLS; `None`: TLS is refused, the default.
    pub tls: Option<TlsFiles>,
    /// Sessions without TLS are refused. Default: they are not.
    pub tls_required: bool,
    /// The certificates that clients must show. Default: none.
    pub tls_clients: Option<TlsClients>,
    /// Sessions at the same time. Default 10,000.
    pub sessions_max: usize,
    /// How long a login may take. Default 1 min.
    pub login_timeout: Duration,
    /// How long running statements may go on after a stop was asked for. Default 10 s.
    pub drain_timeout: Duration,
    /// Threads that serve sessions. Default 0: one for two cores.
    pub threads: usize,
    /// Where metrics and health are shown. Default: nowhere.
    pub metrics_listen: Option<SocketAddr>,
    /// Where the catalog's server reaches a gateway: host and port. Default: this process' own gateway, if the catalog is on this machine.
    pub gateway_address: Option<(String, u16)>,
    /// The key that seals secrets, from `PEERGATE_KEY`; `None`: it is in a file in the data directory.
    pub key: Option<Secret>,
    /// What to log, as a tracing filter. Default `info`.
    pub log: String,
}

/// Which database is the catalog.
#[derive(Clone, Debug, PartialEq)]
pub enum CatalogSource {
    /// A private cluster in the data directory.
    Embedded {
        /// Password of its role `peergate`; `None`: made at the first start and kept in the data directory.
        password: Option<Secret>,
    },
    /// A database that somebody else runs.
    External {
        /// Its URL, which may hold a password.
        url: Secret,
    },
}

/// Files with a certificate and its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The chain, PEM, the server's own certificate first.
    pub certificate: PathBuf,
    /// The private key, PEM.
    pub key: PathBuf,
}

/// The certificates that clients must show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsClients {
    /// The authorities that sign them, PEM.
    pub authorities: PathBuf,
    /// What they must be.
    pub check: ClientCheck,
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The configuration file cannot be read.
    #[error("cannot read configuration file {}", path.display())]
    Unreadable {
        /// That file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The configuration file is not TOML, or says something that there is not.
    #[error("configuration file {}: {message}", path.display())]
    File {
        /// That file.
        path: PathBuf,
        /// What is wrong, with the line.
        message: String,
    },
    /// A value makes no sense.
    #[error("invalid {name} \"{value}\": {reason}")]
    Value {
        /// The setting, as in the file.
        name: &'static str,
        /// What was given.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Settings that do not go together.
    #[error("{0}")]
    Conflict(&'static str),
}

impl RawConfig {
    /// Puts the places together, the stronger first, and checks the result.
    ///
    /// `self` is the command line, `variable` looks up an environment variable (an empty one counts as unset); the file
    /// is the one that either of them names.
    ///
    /// # Errors
    /// [`ConfigError`], naming the place and the setting at fault.
    pub fn resolve(self, variable: impl Fn(&str) -> Option<String>) -> Result<Config, ConfigError> {
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        let typed = self.or(Self::from_env(&variable)?);
        let file = typed.config.as_deref().map(Self::from_file).transpose()?.unwrap_or_default();
        typed.or(file).check(&variable)
    }

    fn from_env(variable: &impl Fn(&str) -> Option<String>) -> Result<Self, ConfigError> {
        Ok(Self {
            listen: variable("PEERGATE_LISTEN"),
            data_dir: variable("PEERGATE_DATA_DIR").map(PathBuf::from),
            catalog: variable("PEERGATE_CATALOG"),
            role: choice("role", variable("PEERGATE_ROLE"))?,
            tls: choice("tls", variable("PEERGATE_TLS"))?,
            tls_cert: variable("PEERGATE_TLS_CERT").map(PathBuf::from),
            tls_key: variable("PEERGATE_TLS_KEY").map(PathBuf::from),
            tls_client_ca: variable("PEERGATE_TLS_CLIENT_CA").map(PathBuf::from),
            tls_client_cert: choice("tls_client_cert", variable("PEERGATE_TLS_CLIENT_CERT"))?,
            sessions_max: parsed("sessions_max", variable("PEERGATE_SESSIONS_MAX"))?,
            login_timeout: parsed("login_timeout", variable("PEERGATE_LOGIN_TIMEOUT"))?,
            drain_timeout: parsed("drain_timeout", variable("PEERGATE_DRAIN_TIMEOUT"))?,
            threads: parsed("threads", variable("PEERGATE_THREADS"))?,
            metrics_listen: variable("PEERGATE_METRICS_LISTEN"),
            gateway_address: variable("PEERGATE_GATEWAY_ADDRESS"),
            log: variable("PEERGATE_LOG"),
            config: variable("PEERGATE_CONFIG").map(PathBuf::from),
            password: variable("PEERGATE_PASSWORD").map(Secret),
            key: variable("PEERGATE_KEY").map(Secret),
        })
    }

    fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let text =
            fs::read_to_string(path).map_err(|source| ConfigError::Unreadable { path: path.to_path_buf(), source })?;
        toml::from_str(&text).map_err(|error| ConfigError::File {
            path: path.to_path_buf(),
            message: error.to_string().trim_end().to_owned(),
        })
    }

    /// Fills what `self` does not say from `weaker`.
    fn or(self, weaker: Self) -> Self {
        Self {
            listen: self.listen.or(weaker.listen),
            data_dir: self.data_dir.or(weaker.data_dir),
            catalog: self.catalog.or(weaker.catalog),
            role: self.role.or(weaker.role),
            tls: self.tls.or(weaker.tls),
            tls_cert: self.tls_cert.or(weaker.tls_cert),
            tls_key: self.tls_key.or(weaker.tls_key),
            tls_client_ca: self.tls_client_ca.or(weaker.tls_client_ca),
            tls_client_cert: self.tls_client_cert.or(weaker.tls_client_cert),
            sessions_max: self.sessions_max.or(weaker.sessions_max),
            login_timeout: self.login_timeout.or(weaker.login_timeout),
            drain_timeout: self.drain_timeout.or(weaker.drain_timeout),
            threads: self.threads.or(weaker.threads),
            metrics_listen: self.metrics_listen.or(weaker.metrics_listen),
            gateway_address: self.gateway_address.or(weaker.gateway_address),
            log: self.log.or(weaker.log),
            config: self.config.or(weaker.config),
            password: self.password.or(weaker.password),
            key: self.key.or(weaker.key),
        }
    }

    fn check(self, variable: &impl Fn(&str) -> Option<String>) -> Result<Config, ConfigError> {
        let role = self.role.unwrap_or_default();
        let tls = match (self.tls_cert, self.tls_key) {
            (Some(certificate), Some(key)) => Some(TlsFiles { certificate, key }),
            (None, None) => None,
            _ => return Err(ConfigError::Conflict("tls_cert and tls_key must be given together")),
        };
        let mode = self.tls.unwrap_or(if tls.is_some() { TlsMode::Allow } else { TlsMode::Disable });
        if mode != TlsMode::Disable && tls.is_none() {
            return Err(ConfigError::Conflict("tls needs tls_cert and tls_key"));
        }
        let tls_clients = match (self.tls_client_ca, self.tls_client_cert) {
            // Without TLS a client would have no certificate to show and would be let in.
            (Some(_), Some(_)) if mode != TlsMode::Required => {
                return Err(ConfigError::Conflict("tls_client_cert needs tls = \"required\""));
            }
            (Some(authorities), Some(check)) => Some(TlsClients { authorities, check }),
            (None, None) => None,
            _ => return Err(ConfigError::Conflict("tls_client_ca and tls_client_cert must be given together")),
        };
        let catalog = match self.catalog {
            Some(url) => CatalogSource::External { url: Secret(url) },
            // The embedded catalog belongs to one process: nobody else could share the work with it.
            None if role != Role::All => {
                return Err(ConfigError::Conflict(
                    "role gateway or engine needs catalog: an embedded one is not shared",
                ));
            }
            None => CatalogSource::Embedded { password: self.password.map(check_password).transpose()? },
        };
        let data_dir = self.data_dir.unwrap_or_else(|| default_data_dir(variable));
        let data_dir = std::path::absolute(&data_dir).map_err(|error| ConfigError::Value {
            name: "data_dir",
            value: data_dir.display().to_string(),
            reason: error.to_string(),
        })?;
        Ok(Config {
            listen: parse_address("listen", self.listen.as_deref().unwrap_or(LISTEN))?,
            data_dir,
            catalog,
            role,
            tls: tls.filter(|_| mode != TlsMode::Disable),
            tls_required: mode == TlsMode::Required,
            tls_clients,
            sessions_max: at_least_one("sessions_max", self.sessions_max, SESSIONS_MAX)?,
            login_timeout: match timeout("login_timeout", self.login_timeout, LOGIN_TIMEOUT)? {
                Duration::ZERO => return Err(ConfigError::Conflict("login_timeout must be more than nothing")),
                timeout => timeout,
            },
            drain_timeout: timeout("drain_timeout", self.drain_timeout, DRAIN_TIMEOUT)?,
            threads: match self.threads {
                None => 0,
                threads => at_least_one("threads", threads, 1)?,
            },
            metrics_listen: self.metrics_listen.map(|value| parse_address("metrics_listen", &value)).transpose()?,
            gateway_address: self.gateway_address.map(|value| host_and_port("gateway_address", &value)).transpose()?,
            key: self.key,
            log: self.log.unwrap_or_else(|| LOG.to_owned()),
        })
    }
}

fn choice<T: ValueEnum>(name: &'static str, value: Option<String>) -> Result<Option<T>, ConfigError> {
    let Some(value) = value else { return Ok(None) };
    T::from_str(&value, false).map(Some).map_err(|reason| ConfigError::Value { name, value, reason })
}

fn parsed<T: FromStr<Err: fmt::Display>>(name: &'static str, value: Option<String>) -> Result<Option<T>, ConfigError> {
    let Some(value) = value else { return Ok(None) };
    value.parse().map(Some).map_err(|error: T::Err| ConfigError::Value { name, reason: error.to_string(), value })
}

fn at_least_one(name: &'static str, value: Option<usize>, default: usize) -> Result<usize, ConfigError> {
    let reason = || "it must be at least 1".to_owned();
    match value.unwrap_or(default) {
        0 => Err(ConfigError::Value { name, value: "0".to_owned(), reason: reason() }),
        value => Ok(value),
    }
}

fn timeout(name: &'static str, value: Option<Span>, default: Duration) -> Result<Duration, ConfigError> {
    let value = value.map_or(default, |span| span.0);
    if value > TIMEOUT_MAX {
        let reason = "it can be a day at the most".to_owned();
        return Err(ConfigError::Value { name, value: Span(value).to_string(), reason });
    }
    Ok(value)
}

fn parse_address(name: &'static str, value: &str) -> Result<SocketAddr, ConfigError> {
    let invalid = |reason: String| ConfigError::Value { name, value: value.to_owned(), reason };
    value
        .to_socket_addrs()
        .map_err(|error| invalid(format!("{error}; it takes an address and a port, such as 127.0.0.1:9900")))?
        .next()
        .ok_or_else(|| invalid("the name has no address".to_owned()))
}

/// A host that is looked up where it is used, and a port.
fn host_and_port(name: &'static str, value: &str) -> Result<(String, u16), ConfigError> {
    let parts = value.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?)));
    match parts {
        Some((host, port)) if !host.is_empty() => {
            Ok((host.trim_start_matches('[').trim_end_matches(']').to_owned(), port))
        }
        _ => Err(ConfigError::Value {
            name,
            value: value.to_owned(),
            reason: "it takes a host and a port, such as gate.internal:9900".to_owned(),
        }),
    }
}

/// A line is what `initdb` reads from a password file.
fn check_password(password: Secret) -> Result<Secret, ConfigError> {
    if password.0.contains(['\n', '\r', '\0']) {
        return Err(ConfigError::Conflict("PEERGATE_PASSWORD must be one line"));
    }
    Ok(password)
}

fn default_data_dir(variable: &impl Fn(&str) -> Option<String>) -> PathBuf {
    if nix::unistd::Uid::effective().is_root() {
        return PathBuf::from("/var/lib/peergate");
    }
    let home = || Path::new(&variable("HOME").unwrap_or_else(|| ".".to_owned())).join(".local/share");
    variable("XDG_DATA_HOME").map(PathBuf::from).unwrap_or_else(home).join("peergate")
}

#[cfg(test)]
mod tests;
