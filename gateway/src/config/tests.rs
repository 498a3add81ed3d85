//! What is typed, set and written in a file, and what becomes of it.

use super::*;

fn serve(arguments: &[&str]) -> RawConfig {
    let typed = ["peergate", "serve"].iter().chain(arguments);
    match Arguments::try_parse_from(typed).unwrap().command {
        Command::Serve(raw) => raw,
        other => panic!("{other:?}"),
    }
}

fn resolve(arguments: &[&str], variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
    serve(arguments)
        .resolve(|name| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned()))
}

struct TemporaryFile(PathBuf);

impl TemporaryFile {
    fn new(text: &str) -> Self {
        let path = std::env::temp_dir().join(format!("peergate-config-{:016x}.toml", rand::random::<u64>()));
        fs::write(&path, text).unwrap();
        Self(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[test]
fn nothing_typed_means_the_defaults() {
    let config = resolve(&[], &[("XDG_DATA_HOME", "/data"), ("PEERGATE_ROLE", "")]).unwrap();
    assert_eq!(config.listen, "127.0.0.1:9900".parse().unwrap());
    assert_eq!(config.catalog, CatalogSource::Embedded { password: None });
    assert_eq!((config.role, config.tls, config.log.as_str()), (Role::All, None, "info"));
    let root = nix::unistd::Uid::effective().is_root();
    assert_eq!(config.data_dir, Path::new(if root { "/var/lib/peergate" } else { "/data/peergate" }));
}

#[test]
fn flag_wins_over_environment_over_file_over_default() {
    let file =
        TemporaryFile::new("listen = '127.0.0.3:1'\nrole = 'engine'\ncatalog = 'postgres://file'\nlog = 'debug'");
    let variables =
        [("PEERGATE_LISTEN", "127.0.0.2:1"), ("PEERGATE_CONFIG", file.path()), ("PEERGATE_CATALOG", "postgres://env")];
    let config = resolve(&["--listen", "127.0.0.1:1"], &variables).unwrap();
    assert_eq!(config.listen, "127.0.0.1:1".parse().unwrap());
    let config = resolve(&[], &variables).unwrap();
    assert_eq!(config.listen, "127.0.0.2:1".parse().unwrap());
    assert_eq!(config.catalog, CatalogSource::External { url: Secret::new("postgres://env") });
    assert_eq!((config.role, config.log.as_str()), (Role::Engine, "debug"));
    let config = resolve(&["--config", file.path()], &[]).unwrap();
    assert_eq!(config.listen, "127.0.0.3:1".parse().unwrap());
}

#[test]
fn unknown_key_in_the_file_is_refused() {
    for text in ["listne = '127.0.0.1:1'", "password = 'x'", "config = 'other.toml'", "[serve]\nlisten = '127.0.0.1:1'"]
    {
        let file = TemporaryFile::new(text);
        let error = resolve(&["--config", file.path()], &[]).unwrap_err().to_string();
        assert!(error.contains("unknown field"), "{text}: {error}");
    }
}

#[test]
fn nonsense_is_refused_by_name() {
    let message =
        |arguments: &[&str], variables: &[(&str, &str)]| resolve(arguments, variables).unwrap_err().to_string();
    assert!(message(&["--listen", "9900"], &[]).contains("invalid listen"));
    assert!(message(&[], &[("PEERGATE_ROLE", "boss")]).contains("invalid role"));
    assert!(message(&["--tls-cert", "f"], &[]).contains("together"));
    assert!(message(&["--role", "engine"], &[]).contains("needs catalog"));
    assert!(message(&[], &[("PEERGATE_PASSWORD", "two\nlines")]).contains("one line"));
    assert!(message(&["--config", "/nonexistent"], &[]).contains("cannot read"));
}

#[test]
fn what_goes_together_is_checked() {
    let both = ["--tls-cert", "c", "--tls-key", "k"];
    let with = |more: &[&str]| resolve(&[&both[..], more].concat(), &[]).map_err(|error| error.to_string());
    let files = TlsFiles { certificate: "c".into(), key: "k".into() };
    let config = with(&[]).unwrap();
    assert_eq!((config.tls, config.tls_required), (Some(files.clone()), false));
    assert_eq!(with(&["--tls", "disable"]).unwrap().tls, None);
    let config = with(&["--tls", "required"]).unwrap();
    assert_eq!((config.tls, config.tls_required), (Some(files), true));
    assert!(resolve(&["--tls", "allow"], &[]).unwrap_err().to_string().contains("needs tls_cert"));

    let clients = ["--tls-client-ca", "a", "--tls-client-cert", "verify-full"];
    assert!(with(&clients).unwrap_err().contains("required"));
    assert!(with(&clients[..2]).unwrap_err().contains("together"));
    let config = with(&[&clients[..], &["--tls", "required"]].concat()).unwrap();
    let expected = TlsClients { authorities: "a".into(), check: ClientCheck::VerifyFull };
    assert_eq!(config.tls_clients, Some(expected));
}

#[test]
fn limits_come_from_every_place() {
    let file = TemporaryFile::new("sessions_max = 5\nlogin_timeout = '2min'\ndrain_timeout = 3\nthreads = 1");
    let config = resolve(&["--config", file.path()], &[("PEERGATE_SESSIONS_MAX", "6")]).unwrap();
    assert_eq!((config.sessions_max, config.threads), (6, 1));
    assert_eq!((config.login_timeout, config.drain_timeout), (Duration::from_secs(120), Duration::from_secs(3)));
    let config = resolve(&["--drain-timeout", "0", "--metrics-listen", "127.0.0.1:1"], &[]).unwrap();
    assert_eq!(config.drain_timeout, Duration::ZERO);
    assert_eq!(config.metrics_listen, Some("127.0.0.1:1".parse().unwrap()));
    for (name, value) in [
        ("SESSIONS_MAX", "0"),
        ("SESSIONS_MAX", "many"),
        ("LOGIN_TIMEOUT", "0"),
        ("LOGIN_TIMEOUT", "1 fortnight"),
        ("DRAIN_TIMEOUT", "25h"),
        ("THREADS", "0"),
        ("METRICS_LISTEN", "9901"),
    ] {
        let error = resolve(&[], &[(&format!("PEERGATE_{name}"), value)]).unwrap_err().to_string();
        assert!(error.contains(&name.to_lowercase()), "{name}: {error}");
    }
    let file = TemporaryFile::new("listen = '127.0.0.1:1'\nlogin_timeout = 'soon'");
    let error = resolve(&["--config", file.path()], &[]).unwrap_err().to_string();
    assert!(error.contains("line 2") && error.contains("soon"), "{error}");
}

#[test]
fn secrets_are_not_printed() {
    let config = resolve(&[], &[("PEERGATE_PASSWORD", "hush"), ("PEERGATE_KEY", "hush")]).unwrap();
    assert!(!format!("{config:?}").contains("hush"));
    let config = resolve(&["--catalog", "postgres://u:hush@h/d"], &[]).unwrap();
    assert!(!format!("{config:?}").contains("hush"));
}
