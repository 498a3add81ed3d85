//! `peergate serve`, `peergate rotate-key` and `peergate dump`: what is started in which order, and stopped in the reverse.
//!
//! The only file that knows gateway and engine. They meet in the catalog; here they only get the same one.

use std::fs;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use catalog::Catalog;
use catalog::connect::{Connector, chain};
use catalog::foreign::GatewayAddress;
use catalog::peer::PeerOptions;
use catalog::rehearsal::Rehearsal;
use catalog::secret::Keyring;
use gateway::config::{CatalogSource, Config, Secret};
use gateway::embedded::{DataDir, EmbeddedCatalog, INTERNAL_ROLE, PasswordPlace, ROLE, internal_password};
use gateway::metrics::{self, Monitor};
use gateway::reload::Reloader;
use gateway::server::{Server, ServerOptions};
use mirror::engine::{self, EngineOptions};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// How long the engine may take to stop: it finishes or gives up the batch at hand, and resumes from the last durable one.
const ENGINE_STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// Open files that are needed for other things than sessions.
const FILES_BESIDE_SESSIONS: u64 = 100;

/// Runs what the configuration says until SIGTERM or SIGINT, then stops it in order.
///
/// # Errors
/// Whatever keeps it from starting, or makes gateway or engine end by themselves. What was started is stopped then too.
pub(crate) async fn serve(config: Config, reloader: Reloader) -> anyhow::Result<()> {
    let mut stop = StopSignal::new()?;
    // From now on it does not end the process.
    let hangup = signal(SignalKind::hangup()).context("cannot listen for signals")?;
    let reloader = Arc::new(reloader);
    let monitor = Monitor::new(config.role);
    // From the first moment, so that a start that takes long can be seen.
    let _monitoring = match config.metrics_listen {
        Some(address) => Some(monitor_on(address, monitor.clone()).await?),
        None => None,
    };
    let directory = DataDir::lock(&config.data_dir)?;
    let embedded = tokio::select! {
        embedded = start_embedded(&config, &directory) => embedded?,
        // A server that was just being started gets its end from the kernel.
        () = stop.received() => return Ok(()),
    };
    let result = serve_on(&config, &directory, embedded.as_ref(), &mut stop, Seen { reloader, monitor, hangup }).await;
    if let Some(embedded) = embedded {
        embedded.stop().await;
    }
    tracing::info!("stopped");
    result
}

async fn serve_on(
    config: &Config,
    directory: &DataDir,
    embedded: Option<&EmbeddedCatalog>,
    stop: &mut StopSignal,
    Seen { reloader, monitor, hangup }: Seen,
) -> anyhow::Result<()> {
    let access = CatalogAccess::new(config, embedded)?;
    let keyring = keyring(config)?;
    tokio::select! {
        migrated = access.migrate(&keyring) => migrated?,
        () = stop.received() => return Ok(()),
    }
    if config.metrics_listen.is_some() {
        monitor.watch_catalog(access.open(keyring.clone())?);
    }
    let (mut gateway, mut control) = (None, None);
    if config.role.runs_gateway() {
        raise_file_limit(config.sessions_max);
        // A pool of its own: its sessions live on the gateway's threads and end with them, before the engine does.
        let options = ServerOptions { planner: Some(plan_mirror), ..ServerOptions::from_config(config) };
        let server = Server::bind(options, access.open(keyring.clone())?).await?;
        let address = server.local_addr()?;
        if !address.ip().is_loopback() && config.tls.is_none() {
            tracing::info!(%address, "listening beyond this machine without TLS");
        }
        reloader.steer(server.control());
        server.control().offer_reload(&reloader);
        control = Some(server.control());
        monitor.watch_gateway(server.control());
        gateway = Some((address, Part::start(|shutdown| server.serve(shutdown))));
    }
    let mut engine = None;
    if config.role.runs_engine() {
        let options = EngineOptions { node_id: node_id(directory)?, host: host_name(), role: config.role.name() };
        let catalog = access.open(keyring)?;
        let importing = catalog.clone();
        let address = gateway_address(config, gateway.as_ref().map(|(address, _)| *address), catalog.connector());
        engine = Some(Part::start(|shutdown| async move {
            // Foreign tables are the engine's process' to keep in step, and alerts to look at; nothing of a mirror's waits for them.
            let alerts = alerts::run(catalog.clone(), options.node_id.clone(), shutdown.clone());
            let mirrors = engine::run(catalog, options, shutdown.clone());
            tokio::join!(mirrors, importing.keep_foreign_tables(address, shutdown), alerts).0
        }));
    }
    let _reloading = AbortOnDrop(tokio::spawn(reload_on(hangup, reloader.clone())));
    announce(gateway.as_ref().map(|(address, _)| *address), embedded);
    let mut gateway = gateway.map(|(_, part)| part);

    let console = async {
        match &control {
            Some(control) => control.stop_asked().await,
            None => std::future::pending().await,
        }
    };
    let ended = tokio::select! {
        // Before the gateway's end, which a stop that was asked for on the console brings about, too.
        biased;
        () = stop.received() => None,
        () = console => None,
        result = Part::ended(&mut gateway) => Some(result.context("the gateway has ended")),
        result = Part::ended(&mut engine) => Some(result.context("the engine has ended")),
    };
    // The gateway first: what its sessions still finish may be work for the engine, and WAIT FOR needs it.
    let drained = Part::stop(gateway, None).await;
    let stopped = Part::stop(engine, Some(ENGINE_STOP_TIMEOUT)).await;
    match ended {
        Some(Ok(())) => anyhow::bail!("gateway or engine has ended by itself"),
        Some(error) => error,
        None => drained.and(stopped),
    }
}

/// What the gateway asks of the engine: what a mirror would do.
fn plan_mirror(rehearsal: Rehearsal) -> Pin<Box<dyn Future<Output = serde_json::Value> + Send>> {
    Box::pin(async move { mirror::explain::explain(&rehearsal).await.to_json() })
}

/// Seals all secrets with a new key. Processes that share the key file take it up at once.
///
/// # Errors
/// If the key was given in the environment, or the catalog cannot be reached.
pub(crate) async fn rotate_key(config: Config) -> anyhow::Result<()> {
    let (embedded, _directory, access) = reach_catalog(&config).await?;
    let result = async {
        let keyring = keyring(&config)?;
        access.migrate(&keyring).await?;
        let catalog = access.open(keyring)?;
        // Before the new key is put in front, those that seal nothing any more are forgotten.
        let in_use = catalog.reseal().await?;
        catalog.keyring().rotate(&in_use)?;
        catalog.reseal().await?;
        anyhow::Ok(catalog.keyring().current_id()?)
    };
    let result = result.await;
    if let Some(embedded) = embedded {
        embedded.stop().await;
    }
    println!("peergate: all secrets are sealed with the new key {}", result?);
    Ok(())
}

/// Writes the statements that rebuild the catalog to standard output. Changes nothing.
///
/// # Errors
/// If there is no catalog, it cannot be reached, or is of another version.
pub(crate) async fn dump(config: Config) -> anyhow::Result<()> {
    if matches!(config.catalog, CatalogSource::Embedded { .. }) && !config.data_dir.join("pgdata").exists() {
        anyhow::bail!("there is no embedded catalog in {}", config.data_dir.display());
    }
    let (embedded, _directory, access) = reach_catalog(&config).await?;
    let script = async {
        let contents =
            access.open(keyring(&config)?)?.contents().await.map_err(|e| anyhow::anyhow!("{}", chain(&e)))?;
        anyhow::Ok(gateway::dump::script(&contents)?)
    };
    let script = script.await;
    if let Some(embedded) = embedded {
        embedded.stop().await;
    }
    io::stdout().lock().write_all(script?.as_bytes()).context("cannot write the dump")
}

/// Gives access to the catalog for one command, whether a server is running on it or not: an embedded one is started if need be.
async fn reach_catalog(config: &Config) -> anyhow::Result<(Option<EmbeddedCatalog>, Option<DataDir>, CatalogAccess)> {
    match DataDir::lock(&config.data_dir) {
        Ok(directory) => {
            let embedded = start_embedded(config, &directory).await?;
            let access = CatalogAccess::new(config, embedded.as_ref())?;
            Ok((embedded, Some(directory), access))
        }
        // A running server is no obstacle: its embedded catalog is there to be used.
        Err(gateway::embedded::EmbeddedError::InUse { .. }) => {
            let access = match &config.catalog {
                CatalogSource::External { .. } => CatalogAccess::new(config, None)?,
                CatalogSource::Embedded { .. } => {
                    let host = config.data_dir.join("run").to_string_lossy().into_owned();
                    CatalogAccess::embedded(&host, 5432, &internal_password(&config.data_dir)?)
                }
            };
            Ok((None, None, access))
        }
        Err(error) => Err(error.into()),
    }
}

async fn start_embedded(config: &Config, directory: &DataDir) -> anyhow::Result<Option<EmbeddedCatalog>> {
    match &config.catalog {
        CatalogSource::Embedded { password } => Ok(Some(EmbeddedCatalog::start(directory, password.as_ref()).await?)),
        CatalogSource::External { .. } => Ok(None),
    }
}

/// How Peergate itself connects to the catalog.
struct CatalogAccess {
    options: PeerOptions,
    /// For migrations: what they make in the embedded catalog belongs to the user's role, whoever's session makes it.
    migration_options: PeerOptions,
}

impl CatalogAccess {
    fn new(config: &Config, embedded: Option<&EmbeddedCatalog>) -> anyhow::Result<Self> {
        match (&config.catalog, embedded) {
            (CatalogSource::External { url }, _) => {
                let options = PeerOptions::from_uri(url.reveal()).context("cannot use the catalog's URL")?;
                Ok(Self { migration_options: options.clone(), options })
            }
            (CatalogSource::Embedded { .. }, Some(embedded)) => {
                let conninfo = embedded.conninfo();
                Ok(Self::embedded(&conninfo.host, conninfo.port, embedded.password()))
            }
            (CatalogSource::Embedded { .. }, None) => anyhow::bail!("there is no embedded catalog"),
        }
    }

    fn embedded(host: &str, port: u16, password: &Secret) -> Self {
        let options = |more: Option<(&'static str, String)>| {
            let common = [
                ("host", host.to_owned()),
                ("port", port.to_string()),
                ("user", INTERNAL_ROLE.to_owned()),
                ("password", password.reveal().to_owned()),
                ("database", ROLE.to_owned()),
                ("application_name", "peergate".to_owned()),
            ];
            PeerOptions::plain(common.into_iter().chain(more))
        };
        Self { options: options(None), migration_options: options(Some(("options", format!("-c role={ROLE}")))) }
    }

    fn open(&self, keyring: Arc<Keyring>) -> anyhow::Result<Catalog> {
        Ok(Catalog::new(Connector::new(&self.options)?, keyring)?)
    }

    async fn migrate(&self, keyring: &Arc<Keyring>) -> anyhow::Result<()> {
        let catalog = Catalog::new(Connector::new(&self.migration_options)?, Arc::clone(keyring))?;
        catalog.migrate().await.context("cannot migrate the catalog")
    }
}

fn keyring(config: &Config) -> anyhow::Result<Arc<Keyring>> {
    let keyring = match &config.key {
        Some(key) => Keyring::parse(key.reveal()).context("cannot use PEERGATE_KEY")?,
        None => Keyring::open_file(&config.data_dir.join("key"))?,
    };
    Ok(Arc::new(keyring))
}

/// Where the catalog's server reaches a gateway: as configured, or this process' own if both are on this machine.
fn gateway_address(config: &Config, own: Option<std::net::SocketAddr>, catalog: &Connector) -> Option<GatewayAddress> {
    if let Some((host, port)) = &config.gateway_address {
        return Some(GatewayAddress { host: host.clone(), port: *port });
    }
    let is_here = |host: &tokio_postgres::config::Host| match host {
        tokio_postgres::config::Host::Tcp(name) => {
            name == "localhost" || name.parse().is_ok_and(|address: std::net::IpAddr| address.is_loopback())
        }
        tokio_postgres::config::Host::Unix(_) => true,
    };
    let address =
        own.filter(|_| catalog.attempts().iter().all(|attempt| attempt.config.get_hosts().iter().all(is_here)))?;
    let host = match address.ip() {
        std::net::IpAddr::V4(ip) if ip.is_unspecified() => "127.0.0.1".to_owned(),
        std::net::IpAddr::V6(ip) if ip.is_unspecified() => "::1".to_owned(),
        ip => ip.to_string(),
    };
    Some(GatewayAddress { host, port: address.port() })
}

/// Who this process is among those that share the catalog; the same after a restart, so that it finds its own mirrors.
fn node_id(directory: &DataDir) -> anyhow::Result<String> {
    let path = directory.path().join("node");
    match fs::read_to_string(&path) {
        Ok(id) if !id.trim().is_empty() => return Ok(id.trim().to_owned()),
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot read {}", path.display()));
        }
        _ => {}
    }
    let id = format!("{}-{:08x}", host_name(), rand::random::<u32>());
    fs::write(&path, format!("{id}\n")).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(id)
}

fn host_name() -> String {
    let name = fs::read_to_string(Path::new("/proc/sys/kernel/hostname")).ok();
    name.map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).unwrap_or_else(|| "localhost".to_owned())
}

/// Says on stdout that clients may come, and how. A stdout that is closed is no reason to stop.
fn announce(address: Option<std::net::SocketAddr>, embedded: Option<&EmbeddedCatalog>) {
    let mut out = io::stdout().lock();
    let Some(address) = address else {
        let _ = writeln!(out, "peergate's engine is ready");
        return;
    };
    let _ = writeln!(out, "peergate is ready on {address}");
    let host = if address.ip().is_unspecified() { "127.0.0.1".to_owned() } else { address.ip().to_string() };
    match embedded.map(EmbeddedCatalog::password_place) {
        Some(PasswordPlace::File(path)) => {
            let _ = writeln!(out, "  psql \"host={host} port={} user={ROLE} dbname={ROLE}\"", address.port());
            let _ = writeln!(out, "  the password is in {}", path.display());
        }
        Some(PasswordPlace::Environment) => {
            let _ = writeln!(out, "  psql \"host={host} port={} user={ROLE} dbname={ROLE}\"", address.port());
            let _ = writeln!(out, "  the password is the one in PEERGATE_PASSWORD");
        }
        Some(PasswordPlace::Elsewhere) => {
            let _ = writeln!(out, "  psql \"host={host} port={} user={ROLE} dbname={ROLE}\"", address.port());
            let _ = writeln!(out, "  the password is the one that was set last");
        }
        None => {
            let _ = writeln!(out, "  psql \"host={host} port={} user=… dbname=peergate\"", address.port());
            let _ = writeln!(out, "  roles and passwords are those of the catalog");
        }
    }
    let _ = out.flush();
}

/// How an operator sees and steers the process.
struct Seen {
    reloader: Arc<Reloader>,
    monitor: Arc<Monitor>,
    hangup: Signal,
}

async fn monitor_on(address: SocketAddr, monitor: Arc<Monitor>) -> anyhow::Result<AbortOnDrop> {
    let listener =
        TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address} for metrics"))?;
    let address = listener.local_addr().context("cannot read the listening address")?;
    tracing::info!(%address, "serving /metrics, /healthz and /readyz");
    Ok(AbortOnDrop(tokio::spawn(metrics::serve(listener, monitor))))
}

/// Reloads at each SIGHUP.
async fn reload_on(mut hangup: Signal, reloader: Arc<Reloader>) {
    while hangup.recv().await.is_some() {
        let reloader = reloader.clone();
        match tokio::task::spawn_blocking(move || reloader.reload()).await {
            Ok(Ok(reloaded)) => reloaded.log(),
            Ok(Err(error)) => tracing::error!(error = chain(&error), "cannot reload: all stays as it was"),
            Err(error) => tracing::error!(error = %error, "cannot reload: all stays as it was"),
        }
    }
}

/// Raises the limit of open files as far as the system lets it, and says if that is not enough: a session needs two.
fn raise_file_limit(sessions_max: usize) {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    let limit = if soft < hard && setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() { hard } else { soft };
    let enough_for = limit.saturating_sub(FILES_BESIDE_SESSIONS) / 2;
    if enough_for < sessions_max as u64 {
        tracing::info!(sessions_max, enough_for, "the system's limit of open files is below that of sessions");
    }
}

/// A task that ends with what started it.
struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// SIGTERM or SIGINT, whichever comes first.
struct StopSignal {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignal {
    fn new() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Self { terminate: listen(SignalKind::terminate())?, interrupt: listen(SignalKind::interrupt())? })
    }

    async fn received(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
        tracing::info!("stopping");
    }
}

/// The gateway or the engine: a task, and what tells it to stop.
struct Part {
    task: JoinHandle<anyhow::Result<()>>,
    shutdown: watch::Sender<bool>,
}

impl Part {
    fn start<F, E>(start: impl FnOnce(watch::Receiver<bool>) -> F) -> Self
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: Into<anyhow::Error>,
    {
        let (shutdown, receiver) = watch::channel(false);
        let running = start(receiver);
        Self { task: tokio::spawn(async move { running.await.map_err(Into::into) }), shutdown }
    }

    /// Waits until it ends by itself; for ever if there is none.
    async fn ended(part: &mut Option<Self>) -> anyhow::Result<()> {
        match part {
            Some(part) => (&mut part.task).await?,
            None => std::future::pending().await,
        }
    }

    /// Tells it to stop and waits for its end.
    async fn stop(part: Option<Self>, timeout: Option<Duration>) -> anyhow::Result<()> {
        let Some(part) = part.filter(|part| !part.task.is_finished()) else { return Ok(()) };
        part.shutdown.send_replace(true);
        let Some(timeout) = timeout else { return part.task.await? };
        let abort = part.task.abort_handle();
        match tokio::time::timeout(timeout, part.task).await {
            Ok(result) => result?,
            Err(_) => {
                // No harm is done: what is not durable was not acknowledged.
                tracing::warn!(timeout_s = timeout.as_secs(), "the engine did not stop in time");
                abort.abort();
                Ok(())
            }
        }
    }
}
