//! The configuration as a list of names and values: for `SHOW CONFIG`, and to tell what a reload changes.

use std::net::SocketAddr;
use std::path::Path;

use catalog::peer::PeerOptions;

use super::{CatalogSource, Config, DRAIN_TIMEOUT, LISTEN, LOG, LOGIN_TIMEOUT, Role, SESSIONS_MAX, Span, TlsMode};

/// One setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Its name in the configuration file.
    pub name: &'static str,
    /// Its value; secrets are left out.
    pub value: String,
    /// What it would be if nobody said anything.
    pub default: String,
    /// A reload can change it.
    pub changeable: bool,
}

impl Config {
    /// Returns all settings by name, in the order of the alphabet.
    pub fn settings(&self) -> Vec<Setting> {
        let setting = |name, value: String, default: &str, changeable| Setting {
            name,
            value,
            default: default.to_owned(),
            changeable,
        };
        let path = |path: Option<&Path>| path.map(|p| p.display().to_string()).unwrap_or_default();
        let mode = match (&self.tls, self.tls_required) {
            (None, _) => TlsMode::Disable,
            (Some(_), false) => TlsMode::Allow,
            (Some(_), true) => TlsMode::Required,
        };
        let clients = self.tls_clients.as_ref();
        let threads = if self.threads == 0 { String::new() } else { self.threads.to_string() };
        let span = |duration| Span(duration).to_string();
        vec![
            setting("catalog", catalog_name(&self.catalog), "embedded", false),
            setting("data_dir", path(Some(&self.data_dir)), "", false),
            setting("drain_timeout", span(self.drain_timeout), &span(DRAIN_TIMEOUT), true),
            setting(
                "gateway_address",
                self.gateway_address.as_ref().map(|(host, port)| format!("{host}:{port}")).unwrap_or_default(),
                "",
                false,
            ),
            setting("listen", self.listen.to_string(), LISTEN, false),
            setting("log", self.log.clone(), LOG, true),
            setting("login_timeout", span(self.login_timeout), &span(LOGIN_TIMEOUT), true),
            setting(
                "metrics_listen",
                self.metrics_listen.as_ref().map(SocketAddr::to_string).unwrap_or_default(),
                "",
                false,
            ),
            setting("role", self.role.name().to_owned(), Role::default().name(), false),
            setting("sessions_max", self.sessions_max.to_string(), &SESSIONS_MAX.to_string(), true),
            setting("threads", threads, "", false),
            setting("tls", mode.name().to_owned(), TlsMode::Disable.name(), true),
            setting("tls_cert", path(self.tls.as_ref().map(|f| f.certificate.as_path())), "", true),
            setting("tls_client_ca", path(clients.map(|c| c.authorities.as_path())), "", true),
            setting("tls_client_cert", clients.map_or("", |c| c.check.name()).to_owned(), "", true),
            setting("tls_key", path(self.tls.as_ref().map(|f| f.key.as_path())), "", true),
        ]
    }

    /// Takes from `new` what can be changed while the process runs.
    pub fn with_changes_of(&self, new: &Config) -> Config {
        Config {
            tls: new.tls.clone(),
            tls_required: new.tls_required,
            tls_clients: new.tls_clients.clone(),
            sessions_max: new.sessions_max,
            login_timeout: new.login_timeout,
            drain_timeout: new.drain_timeout,
            log: new.log.clone(),
            ..self.clone()
        }
    }

    /// Returns the names of the settings in which `other` differs.
    pub fn differences(&self, other: &Config) -> Vec<&'static str> {
        let pairs = self.settings().into_iter().zip(other.settings());
        // A password is not shown, but may be what has changed.
        let differs =
            |a: &Setting, b: &Setting| a.value != b.value || a.name == "catalog" && self.catalog != other.catalog;
        pairs.filter(|(a, b)| differs(a, b)).map(|(a, _)| a.name).collect()
    }
}

/// Says where the catalog is, without the password that its URL may hold.
fn catalog_name(catalog: &CatalogSource) -> String {
    let CatalogSource::External { url } = catalog else { return "embedded".to_owned() };
    let Ok(options) = PeerOptions::from_uri(url.reveal()) else { return "external".to_owned() };
    let part = |before: &str, name| options.get(name).map(|value| format!("{before}{value}")).unwrap_or_default();
    format!("postgres://{}{}{}{}", part("", "user") + "@", part("", "host"), part(":", "port"), part("/", "database"))
}

#[cfg(test)]
mod tests {
    use super::super::RawConfig;
    use super::*;

    fn config(change: impl FnOnce(&mut RawConfig)) -> Config {
        let mut raw = RawConfig { data_dir: Some("/data".into()), ..RawConfig::default() };
        change(&mut raw);
        raw.resolve(|_| None).unwrap()
    }

    #[test]
    fn settings_are_the_keys_of_the_file_and_hold_no_secret() {
        let config = config(|raw| raw.catalog = Some("postgres://u:hush@h:1/d".to_owned()));
        let settings = config.settings();
        assert!(settings.is_sorted_by_key(|setting| setting.name));
        assert_eq!(settings[0].value, "postgres://u@h:1/d");
        for setting in settings {
            // Whatever the value should be, the name is known.
            let error = toml::from_str::<RawConfig>(&format!("{} = []", setting.name)).unwrap_err().to_string();
            assert!(!error.contains("unknown field"), "{error}");
        }
    }

    /// The sample says all that there is, and what it says can be used.
    #[test]
    fn the_sample_file_is_complete_and_true() {
        let sample = include_str!("../../../docs/peergate.toml");
        let sample = sample.replace("# tls = \"allow\"", "# tls = \"required\"");
        let given: Vec<&str> =
            sample.lines().filter_map(|l| l.strip_prefix("# ").filter(|l| l.contains(" = "))).collect();
        let config = toml::from_str::<RawConfig>(&given.join("\n")).unwrap().resolve(|_| None).unwrap();
        for setting in config.settings() {
            let line = given.iter().find(|line| line.starts_with(&format!("{} = ", setting.name)));
            let line = line.unwrap_or_else(|| panic!("{} is missing", setting.name));
            assert_eq!(line.contains("# restart"), !setting.changeable, "{line}");
            let shown = line.split(" = ").nth(1).unwrap().trim_start_matches('"');
            assert!(shown.starts_with(&setting.value), "{line} is not {}", setting.value);
        }
        assert_eq!(given.len(), config.settings().len());
    }

    #[test]
    fn a_reload_takes_what_can_be_changed_and_names_the_rest() {
        let old = config(|_| {});
        let new = config(|raw| {
            raw.listen = Some("127.0.0.1:1".to_owned());
            raw.sessions_max = Some(5);
            raw.log = Some("debug".to_owned());
        });
        let merged = old.with_changes_of(&new);
        assert_eq!(old.differences(&merged), ["log", "sessions_max"]);
        assert_eq!(merged.differences(&new), ["listen"]);
        let changeable = |c: &Config| c.settings().into_iter().filter(|s| s.changeable).collect::<Vec<_>>();
        assert_eq!(changeable(&merged), changeable(&new));
        let password = |p: &str| config(|raw| raw.catalog = Some(format!("postgres://u:{p}@h/d")));
        assert_eq!(password("a").differences(&password("b")), ["catalog"]);
    }
}
