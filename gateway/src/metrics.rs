//! What monitoring reads: numbers for Prometheus, and whether the process is alive and ready. Pure but for asking the catalog; the HTTP
//! around it is in `http`.
//!
//! Sessions count for themselves (`registry`), and what they have counted is added up when somebody asks. Events that are
//! counted where they happen are rare: a few for each login.

mod http;
mod write;

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use catalog::Catalog;
use catalog::connect::chain;
use catalog::watch::MirrorFigures;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;

pub use self::http::serve;
use crate::config::Role;
use crate::registry::Totals;
use crate::server::Control;

/// How long the catalog may take to answer, so that a scrape does not fail with it.
const CATALOG_TIMEOUT: Duration = Duration::from_secs(2);

/// Upper bounds of the buckets of times to connect, in seconds.
const CONNECT_SECONDS: [f64; 12] = [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 1.0, 5.0];

/// Counts by one label.
type Counts = Family<[(&'static str, &'static str); 1], Counter>;

/// What happens now and then, counted where it happens.
#[derive(Debug)]
pub(crate) struct Events {
    logins: Counts,
    tls_handshakes: Counts,
    cancels: Counter,
    /// FATAL errors that the gateway itself said, by SQLSTATE.
    errors: Family<[(&'static str, String); 1], Counter>,
    pub(crate) backend_connect_seconds: Histogram,
    /// Statements of ours that were run, by their tags.
    statements: Family<[(&'static str, String); 1], Counter>,
}

impl Default for Events {
    fn default() -> Events {
        // There from the beginning, so that the first is a change and can be alerted on.
        let counts = || {
            let counts = Counts::default();
            for succeeded in [true, false] {
                counts.get_or_create(&[("result", result(succeeded))]).inc_by(0);
            }
            counts
        };
        Events {
            logins: counts(),
            tls_handshakes: counts(),
            cancels: Counter::default(),
            errors: Family::default(),
            backend_connect_seconds: Histogram::new(CONNECT_SECONDS),
            statements: Family::default(),
        }
    }
}

impl Events {
    /// Counts the end of a login.
    pub(crate) fn login(&self, succeeded: bool) {
        self.logins.get_or_create(&[("result", result(succeeded))]).inc();
    }

    /// Counts a TLS handshake.
    pub(crate) fn tls_handshake(&self, succeeded: bool) {
        self.tls_handshakes.get_or_create(&[("result", result(succeeded))]).inc();
    }

    /// Counts a cancel request.
    pub(crate) fn cancel(&self) {
        self.cancels.inc();
    }

    /// Counts a statement of ours; `tag` is the body of its CommandComplete.
    pub(crate) fn statement(&self, tag: &[u8]) {
        let name = String::from_utf8_lossy(tag.strip_suffix(b"\0").unwrap_or(tag)).into_owned();
        self.statements.get_or_create(&[("statement", name)]).inc();
    }

    /// Counts an error that ends a session.
    pub(crate) fn error(&self, sqlstate: String) {
        self.errors.get_or_create(&[("sqlstate", sqlstate)]).inc();
    }
}

fn result(succeeded: bool) -> &'static str {
    if succeeded { "ok" } else { "failed" }
}

/// What a gateway's sessions are doing and have done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Figures {
    /// Sessions by what they are doing.
    pub(crate) sessions: Vec<(&'static str, usize)>,
    /// How many there may be.
    pub(crate) sessions_max: usize,
    /// Clients that have connected so far.
    pub(crate) connections: u64,
    /// What they have counted.
    pub(crate) totals: Totals,
    /// No new logins are taken.
    pub(crate) draining: bool,
    /// When the certificate that is shown ends, in seconds since 1970.
    pub(crate) certificate_expires: Option<u64>,
}

/// What can be known of the process.
pub struct Monitor {
    role: Role,
    began: SystemTime,
    gateway: OnceLock<Control>,
    catalog: OnceLock<Catalog>,
}

impl Monitor {
    /// Begins with a process that is starting.
    pub fn new(role: Role) -> Arc<Monitor> {
        Arc::new(Monitor { role, began: SystemTime::now(), gateway: OnceLock::new(), catalog: OnceLock::new() })
    }

    /// Says that the catalog is there to be asked; its sessions are for this alone.
    pub fn watch_catalog(&self, catalog: Catalog) {
        let _ = self.catalog.set(catalog);
    }

    /// Says that the gateway listens.
    pub fn watch_gateway(&self, control: Control) {
        let _ = self.gateway.set(control);
    }

    /// Says why the process should get no clients now.
    ///
    /// # Errors
    /// The reason, on one line.
    pub async fn ready(&self) -> Result<(), String> {
        let Some(catalog) = self.catalog.get() else { return Err("starting".to_owned()) };
        match self.gateway.get() {
            None if self.role.runs_gateway() => return Err("starting".to_owned()),
            Some(gateway) if gateway.is_draining() => return Err("draining".to_owned()),
            _ => {}
        }
        match tokio::time::timeout(CATALOG_TIMEOUT, catalog.ping()).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(format!("the catalog does not answer: {}", chain(&error))),
            Err(_) => Err("the catalog does not answer".to_owned()),
        }
    }

    /// Writes all numbers in the OpenMetrics text format. A catalog that does not answer is a number, too.
    pub async fn metrics(&self) -> String {
        let mirrors = match self.catalog.get() {
            None => None,
            Some(catalog) => match tokio::time::timeout(CATALOG_TIMEOUT, catalog.mirror_figures()).await {
                Ok(Ok(mirrors)) => Some(mirrors),
                Ok(Err(error)) => {
                    tracing::debug!(error = chain(&error), "no figures of mirrors");
                    None
                }
                Err(_) => None,
            },
        };
        let gateway = self.gateway.get();
        write::write(Sources {
            role: self.role.name(),
            began: seconds(self.began),
            resident_bytes: resident_bytes(),
            gateway: gateway.map(Control::figures),
            events: gateway.map(Control::events),
            mirrors,
        })
    }
}

/// What the numbers are made of.
#[derive(Debug)]
struct Sources<'a> {
    role: &'static str,
    began: f64,
    resident_bytes: Option<u64>,
    gateway: Option<Figures>,
    events: Option<&'a Events>,
    /// `None` if the catalog does not answer.
    mirrors: Option<Vec<MirrorFigures>>,
}

fn seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// Returns how much memory the process has in use. Linux only.
pub(crate) fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}
