//! What the gateway's benchmarks run against: a server, and before it a real `peergate serve` and pgbouncer; and what the system says
//! of their processes.

#![allow(dead_code, reason = "each benchmark uses its part")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use catalog::cluster::{Binaries, TestCluster, end_with_parent, free_port};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid, User};

pub(crate) mod wire;

/// The database that is the catalog and holds the load's tables: the gateway looks for its statements there and nowhere else.
pub(crate) const DATABASE: &str = "bench";

/// How long a program may take to start or to end.
const DEADLINE: Duration = Duration::from_secs(30);

/// How a proxy reaches the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Link {
    /// TCP on the loopback device.
    Tcp,
    /// The server's Unix socket.
    Unix,
}

/// A proxy's process. Dropped, it is ended.
pub(crate) struct Proxy {
    child: Child,
    /// Where it listens on 127.0.0.1.
    pub(crate) port: u16,
}

impl Proxy {
    /// Starts the gateway, without an engine: only what serves clients is measured.
    pub(crate) fn peergate(cluster: &TestCluster, link: Link) -> Proxy {
        let url = match link {
            Link::Tcp => format!("{}?sslmode=disable", cluster.url(DATABASE)),
            Link::Unix => {
                let folder = cluster.directory().join("run");
                format!("postgres:///{DATABASE}?user=postgres&port={}&host={}", cluster.port(), folder.display())
            }
        };
        let mut command = Command::new(env!("CARGO_BIN_EXE_peergate"));
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("PEERGATE_")) {
            command.env_remove(name);
        }
        let data_dir = cluster.directory().join(format!("peergate-{link:?}"));
        command.args(["serve", "--role", "gateway", "--listen", "127.0.0.1:0", "--catalog", &url, "--data-dir"]);
        command.arg(data_dir).env("PEERGATE_LOG", "warn").stdin(Stdio::null()).stdout(Stdio::piped());
        end_with_parent(&mut command);
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address =
            line.trim().strip_prefix("peergate is ready on ").unwrap_or_else(|| panic!("peergate said: {line}"));
        let port = address.rsplit_once(':').unwrap().1.parse().unwrap();
        Proxy { child, port }
    }

    /// Starts pgbouncer as Debian ships it, with a server session for each client; as an unprivileged user, since it refuses root.
    pub(crate) fn pgbouncer(cluster: &TestCluster, link: Link) -> Proxy {
        let program = pgbouncer().expect("pgbouncer is not installed; scripts/setup.sh bench installs it");
        let host = match link {
            Link::Tcp => "127.0.0.1".to_owned(),
            Link::Unix => cluster.directory().join("run").display().to_string(),
        };
        let port = free_port().unwrap();
        let place = |name: &str| cluster.directory().join(format!("pgbouncer-{link:?}.{name}"));
        fs::write(place("users"), "\"postgres\" \"\"\n").unwrap();
        let settings = format!(
            "[databases]\n\
             {DATABASE} = host={host} port={} dbname={DATABASE}\n\
             [pgbouncer]\n\
             listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n\
             auth_type = trust\nauth_file = {}\n\
             pool_mode = session\nmax_client_conn = 6000\ndefault_pool_size = 6000\n\
             ignore_startup_parameters = extra_float_digits\n\
             log_connections = 0\nlog_disconnections = 0\nlog_stats = 0\n",
            cluster.port(),
            place("users").display(),
        );
        fs::write(place("ini"), settings).unwrap();
        let mut command = Command::new(program);
        command.arg("-q").arg(place("ini")).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        if Uid::effective().is_root() {
            let user = ["postgres", "nobody"].iter().find_map(|name| User::from_name(name).ok().flatten()).unwrap();
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        }
        end_with_parent(&mut command);
        let mut child = command.spawn().unwrap();
        let begun = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(child.try_wait().unwrap().is_none() && begun.elapsed() < DEADLINE, "pgbouncer did not start");
            std::thread::sleep(Duration::from_millis(10));
        }
        Proxy { child, port }
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// User and system time of all its threads so far.
    pub(crate) fn cpu(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        // The program's name, in parentheses, may hold anything; utime and stime are the 12th and 13th field behind it.
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        // Linux tells all programs hundredths of a second, whatever its own clock does.
        Duration::from_millis(ticks * 10)
    }

    /// Forgets how high its memory has been.
    pub(crate) fn forget_peak(&self) {
        fs::write(format!("/proc/{}/clear_refs", self.child.id()), "5").unwrap();
    }

    /// Its resident memory, now and at its highest, in kB.
    pub(crate) fn memory_kb(&self) -> (u64, u64) {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim().trim_end_matches(" kB").parse().unwrap()
        };
        (field("VmRSS:"), field("VmHWM:"))
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        let begun = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && begun.elapsed() < DEADLINE {
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The program, in `PATH` or where Debian puts it.
fn pgbouncer() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into()]);
    folders.map(|folder| folder.join("pgbouncer")).find(|program| program.exists())
}

/// Runs pgbench as the superuser on the database behind `port`; returns what it printed.
pub(crate) fn pgbench(port: u16, arguments: &[&str]) -> String {
    let mut command = Command::new(Binaries::find(None).unwrap().tool("pgbench").unwrap());
    command.args(["-h", "127.0.0.1", "-p", &port.to_string(), "-U", "postgres"]).args(arguments).arg(DATABASE);
    let output = command.env("PGSSLMODE", "disable").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
