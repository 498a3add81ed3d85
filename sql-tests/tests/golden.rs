//! Runs `cases/*.sql` by real psql through a real `peergate serve`, and compares what psql prints with `cases/*.out`.
//!
//! A case is a claim, made by its first comment. Each has a catalog of its own, so none depends on another. A case that
//! mentions `:peer_port`, `:shop` or `:dwh` has a Postgres cluster of its own too, with the databases `shop` and `dwh`. For it
//! these psql variables are set:
//!
//! * `peer_host`, `peer_port`: where that cluster is, for CREATE PEER; its user is `postgres`, without a password;
//! * `shop`, `dwh`, `gate`: connection strings for `\connect`, to its databases and back to the gateway.
//!
//! A case in `cases/same/` says nothing of ours: it must print the same through the gateway and on the catalog itself.
//! A warning or error in the server's log fails a case unless a comment `-- log: text` in it allows lines with that text.
//!
//! `CASE=name` runs the cases whose name contains that, `UPDATE=1` writes what they print as what is expected,
//! `PEERGATE_BIN` names the binary to test, else it is built.

use std::collections::BTreeSet;
use std::env;
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use catalog::cluster::TestCluster;

use crate::support::{DEADLINE, Scratch, Server, binary, command, ends, psql, turn, unexpected_in};

/// Cases that run at the same time.
const PARALLEL: usize = 2;

#[test]
fn golden() {
    let _turn = turn();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let filter = env::var("CASE").unwrap_or_default();
    let update = env::var("UPDATE").is_ok_and(|value| !value.is_empty() && value != "0");
    let results = root.join("results");
    fs::create_dir_all(results.join("same")).unwrap();

    let (cases, mut failures) = list_cases(&root.join("cases"), update);
    let cases: Vec<_> = cases.into_iter().filter(|name| name.contains(&filter)).collect();
    assert!(!cases.is_empty(), "no case is called {filter:?}");
    let binary = binary();
    let scratch = Scratch::new();
    let template = scratch.0.join("template");
    Server::start(&binary, &template, &scratch.0.join("template.log"), &[]).stop().unwrap();

    let next = AtomicUsize::new(0);
    let found = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..PARALLEL {
            scope.spawn(|| {
                while let Some(name) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let started = Instant::now();
                    let case = Case {
                        name,
                        root,
                        results: &results,
                        binary: &binary,
                        template: &template,
                        scratch: &scratch.0,
                    };
                    let problems = case.check(update);
                    let verdict = if problems.is_empty() { "ok" } else { "FAILED" };
                    println!("{name:<40} {verdict:<6} {:>6} ms", started.elapsed().as_millis());
                    found.lock().unwrap().extend(problems.into_iter().map(|problem| format!("{name}: {problem}")));
                }
            });
        }
    });
    failures.extend(found.into_inner().unwrap());
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

/// The names of all cases, and what is wrong with the folder: a case without an expectation, or the reverse.
fn list_cases(folder: &Path, update: bool) -> (BTreeSet<String>, Vec<String>) {
    let names = |extension: &str| -> BTreeSet<String> {
        ["", "same"]
            .iter()
            .flat_map(|sub| {
                fs::read_dir(folder.join(sub)).into_iter().flatten().map(move |entry| (sub, entry.unwrap().path()))
            })
            .filter(|(_, path)| path.extension().is_some_and(|found| found == extension))
            .map(|(sub, path)| Path::new(sub).join(path.file_stem().unwrap()).to_str().unwrap().to_owned())
            .collect()
    };
    let (cases, expected) = (names("sql"), names("out"));
    let mut failures: Vec<String> =
        expected.difference(&cases).map(|name| format!("{name}.out has no {name}.sql")).collect();
    if !update {
        failures.extend(
            cases.difference(&expected).map(|name| format!("{name}.sql has no {name}.out: UPDATE=1 writes it")),
        );
    }
    (cases, failures)
}

struct Case<'a> {
    name: &'a str,
    root: &'a Path,
    results: &'a Path,
    binary: &'a Path,
    template: &'a Path,
    scratch: &'a Path,
}

impl Case<'_> {
    /// Runs it and says what is wrong.
    fn check(&self, update: bool) -> Vec<String> {
        let script = self.root.join("cases").join(format!("{}.sql", self.name));
        let expected_path = script.with_extension("out");
        let result_path = self.results.join(format!("{}.out", self.name));
        let text = fs::read_to_string(&script).unwrap();
        let mut problems = Vec::new();
        if !text.starts_with("-- ") {
            problems.push("its first line is not a comment that says what it claims".to_owned());
        }

        let through_gateway = self.run(&text, &script, Way::Gateway, &mut problems);
        fs::write(&result_path, &through_gateway).unwrap();
        if self.name.starts_with("same/") {
            let direct = self.run(&text, &script, Way::Catalog, &mut problems);
            if direct != through_gateway {
                let direct_path = result_path.with_extension("direct");
                fs::write(&direct_path, direct).unwrap();
                problems
                    .push(format!("prints something else without the gateway\n{}", diff(&direct_path, &result_path)));
            }
        }
        if update {
            fs::write(&expected_path, &through_gateway).unwrap();
        } else if fs::read_to_string(&expected_path).is_ok_and(|expected| expected != through_gateway) {
            problems.push(format!("prints something else\n{}", diff(&expected_path, &result_path)));
        }
        problems
    }

    /// What psql prints, with what changes from run to run replaced.
    fn run(&self, text: &str, script: &Path, way: Way, problems: &mut Vec<String>) -> String {
        let suffix = if matches!(way, Way::Gateway) { "gateway" } else { "catalog" };
        let data_dir = self.scratch.join(format!("{}-{suffix}", self.name.replace('/', "-")));
        let log_path = self.results.join(format!("{}.{suffix}.log", self.name));
        copy_tree(self.template, &data_dir);
        let peers =
            [":peer_port", ":'peer_port'", ":shop", ":dwh"].iter().any(|word| text.contains(word)).then(Peers::start);
        let server = Server::start(self.binary, &data_dir, &log_path, &[]);
        let raw_path = data_dir.join("raw.out");

        let mut psql = command(psql());
        let (host, port) = match way {
            Way::Gateway => {
                server.address.rsplit_once(':').map(|(host, port)| (host.to_owned(), port.to_owned())).unwrap()
            }
            Way::Catalog => (data_dir.join("run").to_str().unwrap().to_owned(), "5432".to_owned()),
        };
        psql.args(["-X", "-a", "-q", "-v", "VERBOSITY=verbose", "-v", "HISTFILE=/dev/null"]);
        psql.arg("-v").arg(format!("gate=host={host} port={port} user=peergate dbname=peergate"));
        if let Some(peers) = &peers {
            psql.args(peers.variables());
        }
        psql.env("PGHOST", &host).env("PGPORT", &port).env("PGUSER", "peergate").env("PGDATABASE", "peergate");
        psql.env("PGPASSWORD", fs::read_to_string(data_dir.join("password")).unwrap().trim_end());
        psql.env("PGTZ", "UTC")
            .env("PGCLIENTENCODING", "UTF8")
            .env("LC_ALL", "C.UTF-8")
            .current_dir(script.parent().unwrap());
        let output = File::create(&raw_path).unwrap();
        psql.stdin(File::open(script).unwrap()).stdout(output.try_clone().unwrap()).stderr(output);
        let mut child = psql.spawn().unwrap();
        if !ends(&mut child, DEADLINE) {
            child.kill().unwrap();
            child.wait().unwrap();
            problems.push("psql did not end in time".to_owned());
        }

        if let Err(problem) = server.stop() {
            problems.push(problem);
        }
        let allowed: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("-- log: ")).collect();
        problems.extend(unexpected_in(&log_path, &allowed));

        let mut replaced = vec![(host, "GATE_HOST"), (port, "GATE_PORT")];
        replaced.extend(peers.iter().map(|peers| (peers.cluster.port().to_string(), "PEER_PORT")));
        replaced.retain(|(value, _)| value != "127.0.0.1" && value != "5432");
        let raw = String::from_utf8_lossy(&fs::read(&raw_path).unwrap()).into_owned();
        normalise(&raw, &replaced)
    }
}

/// Whom psql talks to.
#[derive(Clone, Copy)]
enum Way {
    Gateway,
    Catalog,
}

/// A cluster with the databases that a case mirrors.
struct Peers {
    cluster: TestCluster,
}

impl Peers {
    fn start() -> Self {
        let peers = Self { cluster: TestCluster::start(&[]).unwrap() };
        for database in ["shop", "dwh"] {
            let status = Command::new(psql())
                .args(["-X", "-q", "-c", &format!("create database {database}"), &peers.cluster.url("postgres")])
                .status()
                .unwrap();
            assert!(status.success());
        }
        peers
    }

    fn variables(&self) -> Vec<String> {
        let port = self.cluster.port();
        let mut variables = vec!["peer_host=127.0.0.1".to_owned(), format!("peer_port={port}")];
        variables.extend(
            ["shop", "dwh"]
                .map(|database| format!("{database}=host=127.0.0.1 port={port} user=postgres dbname={database}")),
        );
        variables.into_iter().flat_map(|variable| ["-v".to_owned(), variable]).collect()
    }
}

/// Copies a folder with its owners and modes.
fn copy_tree(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap().success());
}

fn diff(expected: &Path, result: &Path) -> String {
    let output = Command::new("diff").arg("-u").arg(expected).arg(result).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Replaces what changes from run to run: the given values, LSNs, present timestamps, process ids, and lines with places in
/// Postgres' source.
///
/// Replacing does not keep the columns of a table aligned; a case that shows an LSN or a time does so with `\x` or `\a`.
fn normalise(text: &str, replaced: &[(String, &str)]) -> String {
    let mut result = String::new();
    for line in text.lines().filter(|line| !line.starts_with("LOCATION:  ")) {
        // A port may look like the SQLSTATE of a message.
        let (head, mut rest) = line.split_at(message_head(line));
        result.push_str(head);
        let mut before = None;
        while let Some(first) = rest.chars().next() {
            let at_word = !before.is_some_and(|c: char| c.is_ascii_alphanumeric() || c == '_');
            let known =
                replaced.iter().find_map(|(value, name)| rest.strip_prefix(value.as_str()).map(|after| (*name, after)));
            let is_word_end = |after: &str| !after.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
            let found = known
                .or_else(|| lsn(rest).map(|length| ("LSN", &rest[length..])))
                .or_else(|| timestamp(rest).map(|length| ("TIMESTAMP", &rest[length..])))
                .or_else(|| process_id(rest).map(|length| ("PID", &rest[length..])))
                .filter(|(_, after)| at_word && is_word_end(after));
            if let Some((name, after)) = found {
                result.push_str(name);
                before = Some('_');
                rest = after;
            } else {
                result.push(first);
                before = Some(first);
                rest = &rest[first.len_utf8()..];
            }
        }
        result.push('\n');
    }
    result
}

/// The length of `ERROR:  42501: ` and the like, with which a message begins; 0 if the line is none.
fn message_head(line: &str) -> usize {
    let severity = line.find(|c: char| !c.is_ascii_uppercase()).unwrap_or(0);
    let Some((code, _)) = line[severity..].strip_prefix(":  ").and_then(|rest| rest.split_once(": ")) else { return 0 };
    let is_code = code.len() == 5 && code.bytes().all(|b| b.is_ascii_digit() || b.is_ascii_uppercase());
    if severity > 0 && is_code { severity + ":  42501: ".len() } else { 0 }
}

/// The length of the LSN that `text` starts with. Short second halves, as in the fraction 1/2, are left alone.
fn lsn(text: &str) -> Option<usize> {
    let digits = |text: &str| text.find(|c: char| !matches!(c, '0'..='9' | 'A'..='F')).unwrap_or(text.len());
    let high = digits(text);
    let low = digits(text.get(high..)?.strip_prefix('/')?);
    ((1..=8).contains(&high) && (6..=8).contains(&low)).then_some(high + 1 + low)
}

/// The length of `PID 123`, as psql prints it of a notification.
fn process_id(text: &str) -> Option<usize> {
    let digits = text.strip_prefix("PID ")?;
    let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    (end > 0).then_some(text.len() - digits.len() + end)
}

/// The length of the timestamp that `text` starts with, from 2025 on: earlier ones were written in the case.
fn timestamp(text: &str) -> Option<usize> {
    let shape = "dddd-dd-dd dd:dd:dd";
    let fits = |(shape, c): (char, char)| if shape == 'd' { c.is_ascii_digit() } else { c == shape };
    if text.len() < shape.len() || !shape.chars().zip(text.chars()).all(fits) || text.get(..4)? < "2025" {
        return None;
    }
    let skip = |from: usize, first: &[char]| match text[from..].strip_prefix(first) {
        Some(rest) => {
            text.len() - rest.len() + rest.find(|c: char| !c.is_ascii_digit() && c != ':').unwrap_or(rest.len())
        }
        None => from,
    };
    Some(skip(skip(shape.len(), &['.']), &['+', '-']))
}

#[test]
fn what_changes_is_replaced_and_the_rest_is_not() {
    let replaced = [("45123".to_owned(), "PEER_PORT")];
    let normal = |text: &str| normalise(text, &replaced);
    assert_eq!(normal("port 45123, 451234, x45123"), "port PEER_PORT, 451234, x45123\n");
    assert_eq!(normal("ERROR:  45123: no 45123"), "ERROR:  45123: no PEER_PORT\n");
    assert_eq!(normal("at 16/B374D848, 1/2, ABCDEFABC/123456"), "at LSN, 1/2, ABCDEFABC/123456\n");
    assert_eq!(normal("2026-01-02 03:04:05.678+00 and 1999-01-02 03:04:05"), "TIMESTAMP and 1999-01-02 03:04:05\n");
    assert_eq!(normal("with PID 4711."), "with PID.\n");
    assert_eq!(normal("ERROR:  42601: é\nLOCATION:  scanner_yyerror, scan.l:1176"), "ERROR:  42601: é\n");
}
