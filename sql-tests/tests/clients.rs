//! Runs real clients, as they are released, through a real `peergate serve` before a catalog on a server of its own.
//!
//! Each file in `clients/` is a client, but those called `common`; its extension says what runs it. `tokio_postgres` is here.
//! A client has a catalog and a gateway of its own, and is done when it exits with 0. It finds
//!
//! * `PGHOST`, `PGPORT`, `PGUSER`, `PGPASSWORD` (by SCRAM) and `PGDATABASE`: the catalog through the gateway, as a superuser;
//! * `PGSSLMODE` and `PGSSLROOTCERT`: that gateway takes nothing but TLS, and `verify-full` holds. The server has the same
//!   certificate, so that channel binding goes through. `tokio_postgres` does without TLS, as do the other tests of this crate;
//! * `DIRECT_PORT`: the port of the server itself, to compare with;
//! * an empty folder to work in, and the programs of the server under test first in `PATH`;
//! * in the catalog the peers `source` and `target` and the mirror `unfinished`, which no engine works on: waiting for it
//!   has no end.
//!
//! When it is done, its sessions on the server have to go away. A warning or error in the gateway's log fails it.
//!
//! `CLIENT=name` runs those whose name contains that. `scripts/setup.sh tests` installs what they are made of; with a gateway
//! and these variables set, each can be run by hand.

use std::collections::BTreeMap;
use std::env;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use catalog::cluster::{Binaries, TestCluster};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};

use crate::support::{DEADLINE, Scratch, Server, binary, command, ends, psql, target_folder, turn, unexpected_in};

mod tokio_postgres;

/// Clients that run at the same time.
const PARALLEL: usize = 2;

/// The role that clients log in as, and its password.
const USER: &str = "app";
const PASSWORD: &str = "secret of app";

#[test]
fn clients() {
    let _turn = turn();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let filter = env::var("CLIENT").unwrap_or_default();
    let clients: Vec<_> = list(&root.join("clients")).into_iter().filter(|(name, _)| name.contains(&filter)).collect();
    assert!(!clients.is_empty(), "no client is called {filter:?}");
    let results = root.join("results/clients");
    fs::create_dir_all(&results).unwrap();
    let ground = Ground {
        binary: binary(),
        cluster: TestCluster::start(&[]).unwrap(),
        scratch: Scratch::new(),
        results,
        installed: target_folder().join("clients"),
    };
    ground.make_role();
    ground.make_certificate();

    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..PARALLEL {
            scope.spawn(|| {
                while let Some((name, client)) = clients.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let started = Instant::now();
                    let problems = ground.check(name, client);
                    let verdict = if problems.is_empty() { "ok" } else { "FAILED" };
                    println!("{name:<24} {verdict:<6} {:>6} ms", started.elapsed().as_millis());
                    failures.lock().unwrap().extend(problems.into_iter().map(|problem| format!("{name}: {problem}")));
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

/// How a client is run.
enum Client {
    /// A script or source file, by the program for its extension.
    File(PathBuf),
    /// A function of this test.
    Here(fn(&Place)),
}

/// Where a client finds the catalog.
struct Place {
    port: u16,
    direct_port: u16,
    database: String,
}

/// All clients by name.
fn list(folder: &Path) -> BTreeMap<String, Client> {
    let mut clients: BTreeMap<_, _> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file() && path.file_stem().unwrap() != "common")
        .filter(|path| program(path).is_some())
        .map(|path| (path.file_stem().unwrap().to_str().unwrap().to_owned(), Client::File(path)))
        .collect();
    clients.insert("tokio_postgres".to_owned(), Client::Here(tokio_postgres::run));
    clients
}

/// The program that runs a file, with the arguments before the file's name; `None` for what is not a client.
fn program(path: &Path) -> Option<&'static [&'static str]> {
    match path.extension()?.to_str()? {
        "sh" => Some(&["bash"]),
        "py" => Some(&["python"]),
        "js" => Some(&["node"]),
        "java" => Some(&["java", "-cp", "/usr/share/java/postgresql.jar"]),
        _ => None,
    }
}

/// What all clients share.
struct Ground {
    binary: PathBuf,
    cluster: TestCluster,
    scratch: Scratch,
    results: PathBuf,
    /// Where `scripts/setup.sh tests` puts the packages of Python and Node.
    installed: PathBuf,
}

impl Ground {
    /// Makes the clients' role, and lets it in by its password only.
    fn make_role(&self) {
        self.ask("postgres", &format!("create role {USER} superuser login password '{PASSWORD}'")).unwrap();
        let rules = PathBuf::from(self.ask("postgres", "show hba_file").unwrap());
        let others = fs::read_to_string(&rules).unwrap();
        fs::write(&rules, format!("host all {USER} 127.0.0.1/32 scram-sha-256\n{others}")).unwrap();
        self.ask("postgres", "select pg_reload_conf()").unwrap();
        let wrong = || {
            let url = format!("postgres://{USER}:wrong@127.0.0.1:{}/postgres", self.cluster.port());
            command(psql()).args(["-X", "-c", "select 1", &url]).output().unwrap()
        };
        eventually("a wrong password is refused", || !wrong().status.success());
    }

    /// Makes an authority and a certificate for 127.0.0.1, and lets the server use TLS with it.
    fn make_certificate(&self) {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "authority of this test");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let key = KeyPair::generate().unwrap();
        let certificate =
            CertificateParams::new(["127.0.0.1".to_owned()]).unwrap().signed_by(&key, &authority).unwrap();
        fs::write(self.authority_file(), authority.pem()).unwrap();
        fs::write(self.certificate_file(), certificate.pem()).unwrap();
        fs::write(self.key_file(), key.serialize_pem()).unwrap();
        // Postgres wants its key to be readable by nobody else.
        fs::set_permissions(self.key_file(), Permissions::from_mode(0o600)).unwrap();
        let owner = fs::metadata(self.cluster.directory().join("pgdata")).unwrap();
        chown(self.key_file(), Some(owner.uid()), Some(owner.gid())).unwrap();

        for (name, file) in [("ssl_cert_file", self.certificate_file()), ("ssl_key_file", self.key_file())] {
            self.ask("postgres", &format!("alter system set {name} = '{}'", file.display())).unwrap();
        }
        self.ask("postgres", "alter system set ssl = on").unwrap();
        self.ask("postgres", "select pg_reload_conf()").unwrap();
        let url = format!("{}?sslmode=require", self.cluster.url("postgres"));
        let encrypted = || command(psql()).args(["-X", "-c", "select 1", &url]).output().unwrap().status.success();
        eventually("the server uses TLS", encrypted);
    }

    fn authority_file(&self) -> PathBuf {
        self.scratch.0.join("authority.crt")
    }

    fn certificate_file(&self) -> PathBuf {
        self.scratch.0.join("server.crt")
    }

    fn key_file(&self) -> PathBuf {
        self.scratch.0.join("server.key")
    }

    /// Runs a client and says what is wrong.
    fn check(&self, name: &str, client: &Client) -> Vec<String> {
        let database = format!("client_{name}").to_lowercase();
        let folder = self.scratch.0.join(name);
        let log = self.results.join(format!("{name}.log"));
        fs::create_dir_all(folder.join("work")).unwrap();
        self.ask("postgres", &format!("create database {database}")).unwrap();
        let catalog = self.cluster.url(&database);
        let data_dir = folder.join("data");
        let (certificate, key) = (self.certificate_file(), self.key_file());
        let mut options = vec!["--role", "gateway", "--catalog", &catalog];
        if matches!(client, Client::File(_)) {
            options.extend(["--tls", "required", "--tls-cert", certificate.to_str().unwrap()]);
            options.extend(["--tls-key", key.to_str().unwrap()]);
        }
        let server = Server::start(&self.binary, &data_dir, &log, &options);
        let place = Place { port: server.port(), direct_port: self.cluster.port(), database };

        let mut problems = Vec::new();
        let made = self.psql(
            place.port,
            &place.database,
            "create peer source from postgres with (host = 'h', user = 'u', validate = false);
             create peer target from postgres with (host = 'h', user = 'u', validate = false);
             create mirror unfinished from source to target for all tables;",
        );
        problems.extend(made.err());
        if problems.is_empty() {
            problems.extend(match client {
                Client::File(path) => self.run(name, path, &place, &folder.join("work")).err(),
                Client::Here(run) => catch_unwind(AssertUnwindSafe(|| run(&place)))
                    .err()
                    .map(|_| "panicked: its message is above".to_owned()),
            });
        }
        let sessions = format!(
            "select string_agg(concat_ws(' ', application_name, state, query), ', ') from pg_stat_activity
             where datname = '{}' and usename = '{USER}'",
            place.database
        );
        let mut left = String::new();
        let deadline = Instant::now() + Duration::from_secs(10);
        while problems.is_empty() && Instant::now() < deadline {
            left = self.ask("postgres", &sessions).unwrap();
            if left.is_empty() {
                break;
            }
        }
        if !left.is_empty() {
            problems.push(format!("its sessions are still on the server: {left}"));
        }
        problems.extend(server.stop().err());
        problems.extend(unexpected_in(&log, &[]));
        problems
    }

    /// Runs a client that is a file; its output is the error when it fails.
    fn run(&self, name: &str, path: &Path, place: &Place, folder: &Path) -> Result<(), String> {
        let output_path = self.results.join(format!("{name}.out"));
        let output = File::create(&output_path).unwrap();
        let server_programs = Binaries::find(None).unwrap().directory().to_owned();
        let python = self.installed.join("python/bin");
        let searched = env::var_os("PATH").unwrap_or_default();
        let path_variable = [server_programs, python].into_iter().chain(env::split_paths(&searched));
        let program = program(path).unwrap();
        let mut child = command(program[0])
            .args(&program[1..])
            .arg(path)
            .env("PATH", env::join_paths(path_variable).unwrap())
            .env("NODE_PATH", self.installed.join("node/node_modules"))
            .env("PYTHONDONTWRITEBYTECODE", "1")
            // Some, as Java does of its source, take texts to be in the locale's encoding.
            .env("LC_ALL", "C.UTF-8")
            .env("PGHOST", "127.0.0.1")
            .env("PGPORT", place.port.to_string())
            .env("PGUSER", USER)
            .env("PGPASSWORD", PASSWORD)
            .env("PGDATABASE", &place.database)
            .env("PGSSLMODE", "verify-full")
            .env("PGSSLROOTCERT", self.authority_file())
            .env("DIRECT_PORT", place.direct_port.to_string())
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .process_group(0)
            .spawn()
            .map_err(|error| format!("cannot run {}: {error}; scripts/setup.sh tests installs it", program[0]))?;
        let in_time = ends(&mut child, DEADLINE);
        // Whatever it left running.
        let _ = killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
        let status = child.wait().unwrap();
        let said = String::from_utf8_lossy(&fs::read(&output_path).unwrap()).into_owned();
        if !in_time {
            return Err(format!("did not end in {} s\n{said}", DEADLINE.as_secs()));
        }
        if status.success() { Ok(()) } else { Err(format!("{status}\n{said}")) }
    }

    /// What psql prints of statements on the server itself, as superuser.
    fn ask(&self, database: &str, text: &str) -> Result<String, String> {
        self.psql(self.cluster.port(), database, text)
    }

    fn psql(&self, port: u16, database: &str, text: &str) -> Result<String, String> {
        let url = format!("postgres://postgres@127.0.0.1:{port}/{database}?sslmode=prefer");
        let options = ["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", text, &url];
        let output = command(psql()).args(options).output().unwrap();
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }
}

/// Asks again until the answer is yes.
fn eventually(what: &str, mut ask: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !ask() {
        assert!(Instant::now() < deadline, "{what}");
    }
}
