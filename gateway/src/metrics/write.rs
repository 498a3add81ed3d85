//! Numbers as OpenMetrics text. Pure.

use std::fmt;

use catalog::watch::MirrorFigures;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use super::{Events, Figures, Sources};

/// Writes all that the sources say.
pub(super) fn write(sources: Sources<'_>) -> String {
    let mut registry = Registry::with_prefix("peergate");
    if let Some(events) = sources.events {
        register(&mut registry, events);
    }
    let Sources { role, began, resident_bytes, gateway, mirrors, .. } = sources;
    registry.register_collector(Box::new(Snapshot { role, began, resident_bytes, gateway, mirrors }));
    let mut text = String::new();
    encode(&mut text, &registry).expect("writing to a string does not fail");
    text
}

/// The metrics that count for themselves.
fn register(registry: &mut Registry, events: &Events) {
    registry.register("logins", "Logins that succeeded, and that the catalog or a peer refused", events.logins.clone());
    registry.register("tls_handshakes", "TLS handshakes with clients", events.tls_handshakes.clone());
    registry.register("cancels", "Cancel requests of clients", events.cancels.clone());
    registry.register("errors", "Sessions that the gateway itself ended with an error", events.errors.clone());
    let help = "Peergate's own statements that were run, other than SHOW";
    registry.register("statements", help, events.statements.clone());
    registry.register(
        "backend_connect_seconds",
        "Time to connect to the catalog's server for a session",
        events.backend_connect_seconds.clone(),
    );
}

/// What is read off when it is asked for.
#[derive(Debug)]
struct Snapshot {
    role: &'static str,
    began: f64,
    resident_bytes: Option<u64>,
    gateway: Option<Figures>,
    mirrors: Option<Vec<MirrorFigures>>,
}

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let out = &mut encoder;
        let version = env!("CARGO_PKG_VERSION");
        let info = [([("version", version), ("role", self.role)], 1_i64)];
        gauges(out, "build_info", "Version and role of the process, as labels", info)?;
        gauge(out, "start_time_seconds", "Unix time at which the process began", self.began)?;
        if let Some(bytes) = self.resident_bytes {
            gauge(out, "resident_memory_bytes", "Memory that the process has in use", as_i64(bytes))?;
        }
        gauge(out, "catalog_up", "The catalog answers", i64::from(self.mirrors.is_some()))?;
        if let Some(gateway) = &self.gateway {
            self.gateway(out, gateway)?;
        }
        self.mirrors.as_deref().map_or(Ok(()), |mirrors| mirrors_of(out, mirrors))
    }
}

impl Snapshot {
    fn gateway(&self, out: &mut DescriptorEncoder<'_>, figures: &Figures) -> fmt::Result {
        let sessions = figures.sessions.iter().map(|(state, count)| ([("state", *state)], *count as i64));
        gauges(out, "sessions", "Sessions of clients by what they are doing", sessions)?;
        gauge(out, "sessions_max", "Sessions that there may be", figures.sessions_max as i64)?;
        gauge(out, "draining", "No new sessions are taken", i64::from(figures.draining))?;
        if let Some(expires) = figures.certificate_expires {
            let help = "Unix time at which the certificate that clients are shown ends";
            gauge(out, "certificate_expiry_seconds", help, as_i64(expires))?;
        }
        counter(out, "connections", "Connections of clients", figures.connections)?;
        let bytes =
            [([("direction", "received")], figures.totals.received), ([("direction", "sent")], figures.totals.sent)];
        counters(out, "bytes", "Bytes from and to clients, without TLS", bytes)?;
        let help = "Transactions, and statements outside of one, that were finished";
        counter(out, "transactions", help, figures.totals.transactions)?;
        counter(out, "requests", "Requests that were answered", figures.totals.requests)
    }
}

fn mirrors_of(out: &mut DescriptorEncoder<'_>, mirrors: &[MirrorFigures]) -> fmt::Result {
    let label = |mirror: &MirrorFigures| [("mirror", mirror.mirror.clone())];
    let states = mirrors.iter().map(|m| ([("mirror", m.mirror.clone()), ("state", m.state.clone())], 1_i64));
    gauges(out, "mirror_state", "1 for the state that a mirror is in", states)?;
    let lag = mirrors.iter().filter_map(|m| m.lag_bytes.map(|bytes| (label(m), bytes)));
    gauges(out, "mirror_lag_bytes", "WAL of the source that is not on the target", lag)?;
    let lag = mirrors.iter().filter_map(|m| m.lag_seconds.map(|seconds| (label(m), seconds)));
    gauges(out, "mirror_lag_seconds", "How long the oldest change that is not on the target has waited", lag)?;
    type Read = fn(&MirrorFigures) -> i64;
    let totals: [(&str, &str, Read); 3] = [
        ("mirror_rows", "Rows copied and row changes applied", |m| m.rows),
        ("mirror_bytes", "Bytes copied and applied", |m| m.bytes),
        ("mirror_transactions", "Transactions of the source applied", |m| m.transactions),
    ];
    for (name, help, read) in totals {
        counters(out, name, help, mirrors.iter().map(|m| (label(m), u64::try_from(read(m)).unwrap_or(0))))?;
    }
    Ok(())
}

fn as_i64(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn gauge<N>(out: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: N) -> fmt::Result
where
    ConstGauge<N>: EncodeMetric,
{
    ConstGauge::new(value).encode(out.encode_descriptor(name, &format!("{help}."), None, MetricType::Gauge)?)
}

fn gauges<L, N>(
    out: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: impl IntoIterator<Item = (L, N)>,
) -> fmt::Result
where
    L: prometheus_client::encoding::EncodeLabelSet,
    ConstGauge<N>: EncodeMetric,
{
    let mut family = out.encode_descriptor(name, &format!("{help}."), None, MetricType::Gauge)?;
    for (labels, value) in values {
        ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

fn counter(out: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> fmt::Result {
    ConstCounter::new(value).encode(out.encode_descriptor(name, &format!("{help}."), None, MetricType::Counter)?)
}

fn counters<L>(
    out: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: impl IntoIterator<Item = (L, u64)>,
) -> fmt::Result
where
    L: prometheus_client::encoding::EncodeLabelSet,
{
    let mut family = out.encode_descriptor(name, &format!("{help}."), None, MetricType::Counter)?;
    for (labels, value) in values {
        ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Totals;

    #[test]
    fn all_is_written_with_its_labels() {
        let events = Events::default();
        events.login(true);
        events.error("53300".to_owned());
        events.backend_connect_seconds.observe(0.0002);
        let figures = Figures {
            sessions: vec![("idle", 3), ("active", 1)],
            totals: Totals { received: 7, sent: 9, ..Totals::default() },
            draining: true,
            certificate_expires: Some(2_000_000_000),
            ..Figures::default()
        };
        let mirror = MirrorFigures {
            mirror: "say \"hi\"".to_owned(),
            state: "running".to_owned(),
            lag_bytes: None,
            lag_seconds: Some(0.5),
            rows: 12,
            bytes: 34,
            transactions: 5,
        };
        let text = write(Sources {
            role: "all",
            began: 1.5,
            resident_bytes: None,
            gateway: Some(figures),
            events: Some(&events),
            mirrors: Some(vec![mirror]),
        });
        for line in [
            "peergate_logins_total{result=\"ok\"} 1",
            "peergate_logins_total{result=\"failed\"} 0",
            "# HELP peergate_draining No new sessions are taken.",
            "peergate_errors_total{sqlstate=\"53300\"} 1",
            "peergate_backend_connect_seconds_bucket{le=\"0.00025\"} 1",
            "# TYPE peergate_sessions gauge",
            "peergate_sessions{state=\"idle\"} 3",
            "peergate_bytes_total{direction=\"sent\"} 9",
            "peergate_draining 1",
            "peergate_transactions_total 0",
            "peergate_certificate_expiry_seconds 2000000000",
            "peergate_mirror_state{mirror=\"say \\\"hi\\\"\",state=\"running\"} 1",
            "peergate_mirror_lag_seconds{mirror=\"say \\\"hi\\\"\"} 0.5",
            "peergate_mirror_rows_total{mirror=\"say \\\"hi\\\"\"} 12",
            "peergate_catalog_up 1",
        ] {
            assert!(text.lines().any(|written| written == line), "{line} is not in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn what_is_not_there_is_left_out() {
        let text = write(Sources {
            role: "engine",
            began: 0.0,
            resident_bytes: Some(1),
            gateway: None,
            events: None,
            mirrors: None,
        });
        assert!(
            text.contains("peergate_catalog_up 0\n") && !text.contains("sessions") && !text.contains("mirror"),
            "{text}"
        );
    }
}
