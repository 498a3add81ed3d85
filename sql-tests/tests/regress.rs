//! Runs PostgreSQL's own regression tests through the gateway and directly: what psql prints has to be the same to the byte.
//!
//! Some fail directly too (the source package may be older than the server), so that the direct run is what is compared with,
//! not what PostgreSQL expects. Each way has a cluster of its own, as the tests make roles and tablespaces.
//!
//! The tests run in a database that is a migrated catalog, where the gateway looks at each statement. `REGRESS=all` (that is
//! `make regress`) runs all of them, there and in a database that is none, where it only relays. Else it is the schedule
//! `regress/subset_schedule`, which says what is in it. `scripts/setup.sh tests` fetches them.

use std::collections::BTreeMap;
use std::env;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use catalog::cluster::{Binaries, TestCluster};

use crate::support::{Scratch, Server, binary, command, ends, psql, target_folder, turn, unexpected_in};

/// How long one run of the tests may take.
const DEADLINE: Duration = Duration::from_secs(600);

/// The database that the tests run in; their output has its name.
const DATABASE: &str = "regression";

#[test]
fn regress() {
    let _turn = turn();
    if env::var("REGRESS").is_ok_and(|value| value == "all") {
        let relayed = compare("all_relayed", &Suite { schedule: "parallel_schedule", catalog: "catalog" });
        let in_catalog = compare("all_in_catalog", &Suite { schedule: "parallel_schedule", catalog: DATABASE });
        assert!(relayed && in_catalog, "the gateway changes what PostgreSQL's tests print: see above");
    } else {
        let same = compare("subset_in_catalog", &Suite { schedule: "subset_schedule", catalog: DATABASE });
        assert!(same, "the gateway changes what PostgreSQL's tests print: see above");
    }
}

/// Which tests are run, and where.
struct Suite {
    schedule: &'static str,
    /// The gateway's catalog; when it is not the tests' database, that is made by the runner and only relayed to.
    catalog: &'static str,
}

/// What came of one run.
struct Results {
    took: Duration,
    /// By test, whether it printed what PostgreSQL expects.
    passed: BTreeMap<String, bool>,
    /// By file name, what was printed.
    printed: BTreeMap<String, Vec<u8>>,
    problems: Vec<String>,
}

/// Runs both ways at the same time, prints the two counts, and says whether there was no difference.
fn compare(name: &str, suite: &Suite) -> bool {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("results/regress").join(name);
    let _ = fs::remove_dir_all(&folder);
    let (direct_folder, gateway_folder) = (folder.join("direct"), folder.join("gateway"));
    let scratch = Scratch::new();
    let tests = gather(&scratch.0);
    let (direct, gateway) = thread::scope(|scope| {
        let direct = scope.spawn(|| run(suite, &tests, &direct_folder, false));
        let gateway = run(suite, &tests, &gateway_folder, true);
        (direct.join().unwrap(), gateway)
    });
    let mut differing: Vec<&String> = direct
        .printed
        .iter()
        .filter(|(file, text)| gateway.printed.get(*file) != Some(text))
        .chain(gateway.printed.iter().filter(|(file, _)| !direct.printed.contains_key(*file)))
        .map(|(file, _)| file)
        .collect();
    differing.sort();
    for (way, results) in [("directly", &direct), ("through the gateway", &gateway)] {
        let passed = results.passed.values().filter(|passed| **passed).count();
        let (all, seconds) = (results.passed.len(), results.took.as_secs_f32());
        println!("regress {name}: {passed} of {all} tests print what PostgreSQL expects {way}, in {seconds:.1} s");
    }
    println!("regress {name}: {} of {} files differ", differing.len(), direct.printed.len());
    for file in &differing {
        let [from, to] = [&direct_folder, &gateway_folder].map(|folder| folder.join("results").join(file));
        let diff = command("diff").arg("-u").args([from, to]).output().unwrap();
        println!("{}", String::from_utf8_lossy(&diff.stdout));
    }
    for problem in direct.problems.iter().chain(&gateway.problems) {
        println!("regress {name}: {problem}");
    }
    let enough = direct.passed.values().filter(|passed| **passed).count() * 10 > direct.passed.len() * 8;
    if !enough {
        println!("regress {name}: so many fail directly that the comparison says little");
    }
    differing.is_empty()
        && direct.passed == gateway.passed
        && direct.problems.is_empty()
        && gateway.problems.is_empty()
        && enough
}

/// Puts the tests where a server that is another user than this process can read them: both ways the same, as paths are printed.
fn gather(scratch: &Path) -> PathBuf {
    let binaries = Binaries::find(None).unwrap();
    let fetched = target_folder().join("regress").join(binaries.major().to_string());
    assert!(fetched.join("complete").exists(), "{} is not there: scripts/setup.sh tests makes it", fetched.display());
    let tests = scratch.join("tests");
    assert!(command("cp").arg("-r").arg(fetched.join("tests")).arg(&tests).status().unwrap().success());
    let subset = Path::new(env!("CARGO_MANIFEST_DIR")).join("regress/subset_schedule");
    fs::copy(subset, tests.join("subset_schedule")).unwrap();
    // Of the server's own extensions, those whose functions a test calls from where its own are.
    for library in ["autoinc.so", "refint.so"] {
        let installed = binaries.directory().join("../lib").join(library);
        if installed.exists() {
            fs::copy(installed, tests.join(library)).unwrap();
        }
    }
    assert!(command("chmod").args(["-R", "a+rX"]).arg(&tests).status().unwrap().success());
    tests
}

/// Runs the tests on a new cluster; what they print is copied to a folder.
fn run(suite: &Suite, tests: &Path, folder: &Path, through_gateway: bool) -> Results {
    // Without autovacuum, whose moments show in plans.
    let cluster = TestCluster::start(&[("autovacuum", "off"), ("max_connections", "150")]).unwrap();
    fs::create_dir_all(folder).unwrap();
    let owner = fs::metadata(cluster.directory().join("pgdata")).unwrap();
    let output = cluster.directory().join("output");
    fs::create_dir(&output).unwrap();
    chown(&output, Some(owner.uid()), Some(owner.gid())).unwrap();

    let direct_port = cluster.port();
    let ask = |database: &str, text: &str| {
        let url = format!("postgres://postgres@127.0.0.1:{direct_port}/{database}");
        let status = command(psql()).args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-c", text, &url]).status().unwrap();
        assert!(status.success(), "{text}");
    };
    ask("postgres", &format!("create database {} template template0", suite.catalog));
    let in_catalog = suite.catalog == DATABASE;
    if in_catalog {
        // As the runner does in a database that it makes.
        for setting in ["lc_messages", "lc_monetary", "lc_numeric", "lc_time"] {
            ask("postgres", &format!("alter database {DATABASE} set {setting} to 'C'"));
        }
        ask("postgres", &format!("alter database {DATABASE} set bytea_output to 'hex'"));
        ask("postgres", &format!("alter database {DATABASE} set timezone_abbreviations to 'Default'"));
    }
    let log = folder.join("peergate.log");
    let url = cluster.url(suite.catalog);
    let data_dir = cluster.directory().join("data");
    let mut server = Some(Server::start(&binary(), &data_dir, &log, &["--role", "gateway", "--catalog", &url]));
    let mut problems = Vec::new();
    if !through_gateway {
        // It has made the catalog.
        problems.extend(server.take().unwrap().stop().err());
    }
    let port = server.as_ref().map_or(direct_port, Server::port);

    let said_path = folder.join("pg_regress.out");
    let said = File::create(&said_path).unwrap();
    let began = Instant::now();
    let binaries = Binaries::find(None).unwrap();
    let mut runner = command(runner(&binaries));
    runner
        .arg(format!("--bindir={}", binaries.directory().display()))
        .args(["--host=127.0.0.1", &format!("--port={port}"), "--user=postgres", "--max-connections=20"])
        .arg(format!("--dlpath={}", tests.display()))
        .arg(format!("--inputdir={}", tests.display()))
        .arg(format!("--outputdir={}", output.display()))
        .arg(format!("--schedule={}", tests.join(suite.schedule).display()));
    if in_catalog {
        runner.args(["--use-existing", &format!("--dbname={DATABASE}")]);
    }
    let is_root = nix::unistd::Uid::effective().is_root();
    if is_root {
        runner.uid(owner.uid()).gid(owner.gid());
    }
    let mut runner = runner
        .current_dir(&output)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(said.try_clone().unwrap())
        .stderr(said)
        .process_group(0)
        .spawn()
        .unwrap();
    if !ends(&mut runner, DEADLINE) {
        problems.push(format!("the tests did not end in {} s", DEADLINE.as_secs()));
        let group = nix::unistd::Pid::from_raw(runner.id() as i32);
        let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
    }
    let status = runner.wait().unwrap();
    let took = began.elapsed();
    if let Some(server) = server {
        problems.extend(server.stop().err());
        problems.extend(unexpected_in(&log, &[]));
    }

    let said = fs::read_to_string(&said_path).unwrap();
    let passed = verdicts(&said);
    // 1 is that tests failed; 2 that the runner did.
    if passed.is_empty() || !matches!(status.code(), Some(0 | 1)) {
        problems.push(format!("pg_regress ended with {status}:\n{said}"));
    }
    let mut printed = BTreeMap::new();
    fs::create_dir_all(folder.join("results")).unwrap();
    for entry in fs::read_dir(output.join("results")).into_iter().flatten() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        // Others are what the tests themselves export.
        if name.ends_with(".out") {
            let text = fs::read(&path).unwrap();
            fs::write(folder.join("results").join(&name), &text).unwrap();
            printed.insert(name, text);
        }
    }
    Results { took, passed, printed, problems }
}

/// The program that runs the tests, which packages put beside what builds extensions.
fn runner(binaries: &Binaries) -> PathBuf {
    let path = binaries.directory().join("../lib/pgxs/src/test/regress/pg_regress");
    assert!(path.exists(), "there is no {}: it comes with the package of psql", path.display());
    path
}

/// Which tests passed, from what the runner prints: `test name ... ok` or, in a group, `     name ... FAILED`; from 16 on in TAP.
fn verdicts(said: &str) -> BTreeMap<String, bool> {
    said.lines()
        .filter_map(|line| {
            if let Some(rest) = line.strip_prefix("ok ") {
                return Some((rest.split_whitespace().nth(2)?.to_owned(), true));
            }
            if let Some(rest) = line.strip_prefix("not ok ") {
                return Some((rest.split_whitespace().nth(2)?.to_owned(), false));
            }
            let (name, verdict) = line.split_once(" ... ")?;
            let name = name.trim_start_matches("test ").trim();
            Some((name.to_owned(), verdict.trim_start().starts_with("ok")))
        })
        .collect()
}

#[test]
fn verdicts_are_read() {
    let said = "parallel group (2 tests):  char boolean\n     boolean                      ... ok           32 ms\n     \
                char                         ... FAILED (test process exited with exit code 2)       18 ms\n\
                test copy                         ... ok          5 ms\nok 3         + varchar         10 ms\n\
                not ok 4     - text            11 ms\n";
    let expected = [("boolean", true), ("char", false), ("copy", true), ("varchar", true), ("text", false)];
    assert_eq!(verdicts(said), expected.map(|(name, passed)| (name.to_owned(), passed)).into());
}
