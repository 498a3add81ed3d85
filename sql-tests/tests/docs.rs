//! Runs what the documentation shows: the examples of `docs/sql.md`, in their order, a script that is run twice, and `peergate dump`,
//! whose output rebuilds the same catalog. By real psql through real servers.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use catalog::cluster::TestCluster;

use crate::support::{Scratch, Server, binary, command, psql, turn};

/// The peers of the examples: one cluster, with the databases, roles and tables that they name.
fn peers() -> TestCluster {
    let cluster = TestCluster::start(&[("max_replication_slots", "20"), ("max_wal_senders", "20")]).unwrap();
    for (database, script) in [
        ("postgres", "create role repl superuser login; create role etl superuser login"),
        ("postgres", "create database shop"),
        ("postgres", "create database dwh"),
        (
            "shop",
            "create table orders (id int primary key); create table customers (id int primary key, name text, secret text);
             create table test (id int primary key); create schema sales; create table sales.deals (id int primary key);
             create schema audit; create table audit.log (id int primary key); insert into orders values (1); insert into customers values (1, 'a', 'b')",
        ),
        ("dwh", "create schema crm; create schema shop_sales; create schema sales"),
    ] {
        let done = run_psql(&cluster.url(database), &["-q", "-c", script]);
        assert!(done.status.success(), "{}", said(&done));
    }
    cluster
}

fn run_psql(target: &str, arguments: &[&str]) -> Output {
    command(psql()).args(["-X", "-v", "ON_ERROR_STOP=1"]).args(arguments).arg(target).output().unwrap()
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A server with a catalog of its own.
struct Gate {
    _server: Server,
    data_dir: PathBuf,
    url: String,
}

impl Gate {
    fn start(scratch: &Scratch, name: &str) -> Gate {
        let data_dir = scratch.0.join(name);
        let server = Server::start(&binary(), &data_dir, &scratch.0.join(format!("{name}.log")), &[]);
        let password = fs::read_to_string(data_dir.join("password")).unwrap();
        let url = format!(
            "host=127.0.0.1 port={} user=peergate dbname=peergate password={}",
            server.port(),
            password.trim_end()
        );
        Gate { _server: server, data_dir, url }
    }

    /// Runs a script, which has to end well, and returns what psql said.
    fn run(&self, scratch: &Scratch, script: &str, arguments: &[&str]) -> String {
        let file = scratch.0.join("script.sql");
        fs::write(&file, script).unwrap();
        let arguments = [arguments, &["-f", file.to_str().unwrap()]].concat();
        let done = run_psql(&self.url, &arguments);
        assert!(done.status.success(), "{}\n{script}", said(&done));
        said(&done)
    }

    fn dump(&self) -> String {
        let done = command(binary()).arg("dump").arg("--data-dir").arg(&self.data_dir).output().unwrap();
        assert!(done.status.success(), "{}", said(&done));
        String::from_utf8(done.stdout).unwrap()
    }
}

/// The examples of the page: what is in its blocks of SQL.
fn examples() -> Vec<String> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/sql.md");
    let page = fs::read_to_string(page).unwrap();
    let blocks = page.split("\n```sql\n").skip(1);
    blocks.map(|block| block.split_once("\n```").unwrap().0.to_owned()).collect()
}

#[test]
fn the_examples_of_the_page_run_and_the_catalog_can_be_dumped_and_rebuilt() {
    let _turn = turn();
    let scratch = Scratch::new();
    let peers = peers();
    let gate = Gate::start(&scratch, "first");
    let place = format!("host = '127.0.0.1', port = {}", peers.port());
    let here = |text: &str| {
        text.replace("host = 'db1'", &place)
            .replace("etl:secret@db2/", &format!("etl:secret@127.0.0.1:{}/", peers.port()))
    };
    let examples = examples();
    assert!(examples.len() > 12, "the page has examples");
    for example in &examples {
        gate.run(&scratch, &here(example), &["-q"]);
    }

    // A script as people keep it: it can be run again, in one transaction, and the second time changes nothing.
    let script = here(
        "create or replace peer shop from postgres with (host = 'db1', user = 'repl', password = 'secret', database = 'shop');
         create or replace peer \"Odd.name\" from postgres with (host = 'h', user = 'u', password = 'secret', sslmode = 'verify-full', validate = false);
         create peer if not exists odd_name from postgres with (host = 'h', user = 'u', password = 'secret', options = '-c x=''y''', validate = false);
         comment on peer shop is 'it''s the shop';
         grant usage on peer shop, \"Odd.name\" to public, peergate_reader;
         create mirror if not exists kept from shop to dwh for table orders to crm.kept, customers (id, name) to crm.kept_too with (batch_bytes_max = '1MB');
         create mirror if not exists \"Kept too\" from shop to dwh with table mapping ({from: sales.deals, to: crm.deals, exclude: [id]}) with (mode = stream_only);
         create mirror if not exists schemas from shop to dwh for tables in schema audit, sales to kept except (audit.log);
         create mirror if not exists kept_query from shop to dwh for $q$select name, '$$' as \"odd \\ one\" from customers where name > 'it''s'$q$
             with (target_table = 'crm.\"Odd\"', unique_key_columns = 'name, \"odd \\ one\"', mode = upsert, detect_deletes = true);
         create mirror if not exists kept_rounds from shop to dwh for $$select * from orders where id between {{.start}} and {{.end}}$$
             with (target_table = 'rounds', watermark_column = 'id', watermark_table = 'orders', refresh_interval = 60, parallelism = 3);
         pause mirror kept_query; pause mirror kept_rounds;
         comment on mirror kept is 'stays';
         create or replace alert \"Any lag\" on mirror kept when lag_seconds > 60 for '5 min' or state = blocked notify slack (url = 'https://h/secret'),
             webhook (url = 'https://h/secret', authorization = 'secret', timeout_seconds = 3), notify with (repeat_interval = 0);
         create alert if not exists quiet on all peers when unreachable_seconds >= 3600 notify notify (channel = 'x');
         comment on alert quiet is 'rests'; alter alert quiet disable; drop alert if exists gone;
         pause mirror kept; pause mirror \"Kept too\"; pause mirror schemas;
         alter mirror kept add table test (id) to crm.kept_test; alter mirror kept set (on_error = quarantine_table, batch_rows_max = 500);
         alter mirror kept reset (batch_bytes_max); alter mirror \"Kept too\" rename to \"Kept, two\"; alter mirror \"Kept, two\" rename to \"Kept too\";
         drop mirror if exists gone; drop peer if exists gone cascade;",
    );
    gate.run(&scratch, &script, &["-1"]);
    let generations = "\\t on\n\\a\nselect name, generation from peers order by name";
    let before = (gate.dump(), gate.run(&scratch, generations, &[]));
    let again = gate.run(&scratch, &script, &["-1"]);
    for notice in
        ["already exists, skipping", "has these options already", "is already paused", "does not exist, skipping"]
    {
        assert!(again.contains(notice), "{again}");
    }
    assert_eq!((gate.dump(), gate.run(&scratch, generations, &[])), before);

    // What ALTER MIRROR takes out is not written as if it had been there.
    gate.run(&scratch, "alter mirror kept drop table customers; alter mirror schemas add table audit.log", &[]);

    // Nothing runs in the second catalog: all mirrors are paused in the transaction that makes them.
    gate.run(&scratch, "pause mirror two; pause mirror everything", &[]);
    let dumped = gate.dump();
    assert!(!dumped.contains("secret'"), "{dumped}");
    for line in [
        "COMMENT ON PEER shop IS 'it''s the shop';",
        "GRANT USAGE ON PEER shop TO peergate_reader, public;",
        "ALTER PEER \"Odd.name\" OWNER TO peergate;",
        "PAUSE MIRROR \"Kept too\";",
        "CREATE ALERT \"Any lag\" ON MIRROR kept WHEN lag_seconds > '60' FOR '00:05:00' OR \"state\" = 'blocked' NOTIFY slack (url_env = 'PEERGATE_ALERT_ANY_LAG_URL'), webhook (authorization_env = 'PEERGATE_ALERT_ANY_LAG_AUTHORIZATION', timeout_seconds = '3', url_env = 'PEERGATE_ALERT_ANY_LAG_URL_2'), \"notify\" WITH (repeat_interval = '00:00:00');",
        "COMMENT ON ALERT quiet IS 'rests';",
        "ALTER ALERT quiet DISABLE;",
        "CREATE MIRROR kept FROM shop TO dwh FOR TABLE public.orders TO crm.kept, public.test (id) TO crm.kept_test WITH (batch_rows_max = '500', on_error = 'quarantine_table');",
        "FOR TABLES IN SCHEMA audit, sales TO kept;",
        "CREATE MIRROR kept_rounds FROM shop TO dwh FOR $$select * from orders where id between {{.start}} and {{.end}}$$ WITH (parallel_workers = '3', refresh_interval = '00:01:00', target_table = 'public.rounds', watermark_column = 'id', watermark_table = 'public.orders');",
        "FOR E'select name, ''$$'' as \"odd \\\\ one\" from customers where name > ''it''''s''' WITH",
        "password_env = 'PEERGATE_PEER_ODD_NAME_PASSWORD'",
        "password_env = 'PEERGATE_PEER_ODD_NAME_PASSWORD_2'",
    ] {
        assert!(dumped.contains(line), "{line}\n{dumped}");
    }
    let second = Gate::start(&scratch, "second");
    second.run(&scratch, &dumped, &[]);
    // What stood for a secret is now an option, and no longer needs to be explained.
    let without_comments =
        |text: &str| text.lines().filter(|line| !line.starts_with("-- The ")).map(sorted_options).collect::<Vec<_>>();
    assert_eq!(without_comments(&second.dump()), without_comments(&dumped));
}

/// A line whose options are in order: the reference to a secret is behind the options when it stands for one, else among them.
fn sorted_options(line: &str) -> String {
    match (line.starts_with("CREATE PEER"), line.split_once(" WITH (")) {
        (true, Some((before, options))) => {
            let mut options: Vec<&str> = options.trim_end_matches(");").split(", ").collect();
            options.sort_unstable();
            format!("{before} {options:?}")
        }
        _ => line.to_owned(),
    }
}
