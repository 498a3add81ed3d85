//! Changes of schema on a live mirror, amid rows, with and without privileges on the source.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::support::{Fixture, ask, start};

/// What of a table's columns is compared.
const COLUMNS: &str = "
    select string_agg(concat_ws(' ', c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity, a.attgenerated,
                                pg_get_expr(d.adbin, d.adrelid)), E'\\n' order by c.relname, a.attname)
    from pg_attribute a join pg_class c on c.oid = a.attrelid left join pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum
    where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p') and not c.relispartition and a.attnum > 0 and not a.attisdropped";

/// What of the indexes is compared.
const INDEXES: &str =
    "select string_agg(indexdef, E'\\n' order by indexdef) from pg_indexes where schemaname = 'public'";

/// A mirror of everything, whose source is read by a role that may replicate, owns the tables, and is no superuser.
async fn plain_mirror(schema: &str, options: &str) -> Fixture {
    let fixture = start().await;
    let role = "create role plain login replication; grant create on database shop to plain; grant all on schema public to plain;
                set role plain";
    fixture.source.batch_execute(role).await.unwrap();
    fixture.source.batch_execute(schema).await.unwrap();
    let port = fixture.cluster.port();
    let peer = format!(r#"{{"host": "127.0.0.1", "port": "{port}", "user": "plain", "database": "shop"}}"#);
    let create = format!(
        "call peergate.create_peer('plain', 'postgres', '{peer}');
         call peergate.create_mirror('m', 'plain', 'dwh', '{{\"all\": true}}', '{options}')"
    );
    fixture.control.batch_execute(&create).await.unwrap();
    fixture.caught_up().await;
    fixture
}

/// Makes the changes one after the other, and compares both sides after each.
async fn follow(fixture: &Fixture, changes: &[&str]) {
    for change in changes {
        fixture.source.batch_execute(change).await.unwrap_or_else(|e| panic!("{change}: {e}"));
        fixture.caught_up().await;
        fixture.assert_equal().await;
    }
}

/// Waits until a query on source and target gives the same.
async fn alike(fixture: &Fixture, query: &str) {
    let expected = ask(&fixture.source, query).await;
    let mut last = String::new();
    let same = crate::support::eventually(async || {
        last = ask(&fixture.target, query).await;
        last == expected
    });
    assert!(same.await, "source:\n{expected}\ntarget:\n{last}\n{}", fixture.explain().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_come_go_and_are_renamed_amid_rows() {
    let schema = "create table t (id int primary key, a int, b text); insert into t select i, i, i::text from generate_series(1, 5) i;
                  create table other (id int primary key)";
    let fixture = plain_mirror(schema, "{}").await;
    let changes = [
        "alter table t add column c int; insert into t values (10, 1, 'x', 7); update t set c = 1 where id = 1",
        // The rows that are there have the default's value, and those that follow another one.
        "begin; insert into t values (11, 1, 'y', 2); alter table t add column d text default 'it''s \\ odd';
         insert into t (id) values (12); alter table t alter d set default 'other'; insert into t (id) values (13);
         insert into other values (1); commit",
        "begin; update t set a = 100 where id = 2; alter table t rename column a to renamed; update t set renamed = 101 where id = 3;
         insert into t (id, renamed) values (14, 5); commit",
        // Names pass from column to column.
        "begin; alter table t rename b to x; alter table t rename d to b; alter table t rename x to d; update t set b = 'b', d = 'd' where id < 3; commit",
        "begin; delete from t where id = 5; alter table t drop column c; insert into t (id, b) values (15, 'after'); commit",
        // Comes and goes within a transaction, which rows have seen.
        "begin; alter table t add column scratch int; update t set scratch = id; update t set renamed = scratch * 2; alter table t drop column scratch;
         insert into t (id) values (16); commit",
        "begin; alter table t add column e numeric(5, 2) not null default 1.5; alter table t drop column d; insert into t (id, e) values (17, 2.25);
         savepoint s; alter table t add column gone int; insert into t (id) values (18); rollback to s; insert into t (id) values (19); commit",
    ];
    follow(&fixture, &changes).await;
    alike(&fixture, COLUMNS).await;
    let told = "select count(*) > 5 and bool_and(lsn is not null) from peergate.mirror_events where kind = 'schema' and message like '%as on the source%'";
    // Told a moment after it is done.
    fixture.wait_until(told, "t").await;
    assert_eq!(fixture.ask("select string_agg(concat_ws(' ', message, detail), '; ') from peergate.mirror_events where level = 'error'").await, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_row_tells_is_seen_all_the_same() {
    let schema = "create table t (id int primary key, a int not null, b int); insert into t values (1, 1, 1)";
    let fixture = plain_mirror(schema, r#"{"copy_constraints": "true"}"#).await;
    let change = "alter table t add column quiet int default 5; alter table t alter b set default 9; alter table t alter b set not null;
                  alter table t alter a drop not null; create index t_b on t (b); create unique index t_u on t (a, b);
                  alter table t add constraint positive check (id > 0)";
    fixture.source.batch_execute(change).await.unwrap();
    alike(&fixture, COLUMNS).await;
    alike(&fixture, INDEXES).await;
    fixture.source.batch_execute("alter table t add column sum int generated always as (id + 1) stored").await.unwrap();
    alike(&fixture, COLUMNS).await;
    let constraints = "select string_agg(conname, ',' order by conname) from pg_constraint where contype in ('c', 'f') and connamespace = 'public'::regnamespace";
    alike(&fixture, constraints).await;
    // What refuses rows is gone before rows come that it would refuse.
    let relaxed = "begin; drop index t_u; alter table t alter b drop not null; alter table t drop constraint positive;
                   insert into t (id, a, b) values (-2, null, null), (3, 1, 1), (4, 1, 1); commit";
    follow(
        &fixture,
        &[relaxed, "alter table t alter column sum drop expression; insert into t (id, sum) values (5, 0)"],
    )
    .await;
    alike(&fixture, COLUMNS).await;
    alike(&fixture, INDEXES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn types_and_keys_change() {
    let schema = "create table t (id int primary key, v varchar(10) not null default 'd', n numeric(6, 2)); insert into t values (1, 'a', 1.5), (2, 'b', 2.5);
                  create table k (a int primary key, b int not null, c text); insert into k values (1, 10, 'x'), (2, 20, 'y')";
    let fixture = plain_mirror(schema, "{}").await;
    let changes = [
        "begin; insert into t values (3, 'before', 1); alter table t alter v type varchar(200); insert into t values (4, repeat('long', 40), 1); commit",
        "begin; alter table t alter v type text, alter n type numeric(12, 2); update t set v = v || '!', n = 1234567890.25 where id = 1; commit",
        // Another key, and another name for it.
        "begin; update k set c = 'z' where a = 1; alter table k drop constraint k_pkey, add primary key (b); update k set a = 1; delete from k where b = 20; commit",
        "begin; alter table k rename constraint k_pkey to k_key; create unique index k_two on k (a, b); alter table k alter a set not null;
         alter table k replica identity using index k_two; insert into k values (7, 8, 'n'); update k set a = 9, c = 'm' where b = 8; commit",
        "begin; alter table k replica identity full; update k set c = 'full'; alter table k replica identity default; update k set c = 'default' where b = 8; commit",
    ];
    follow(&fixture, &changes).await;
    alike(&fixture, COLUMNS).await;
    alike(&fixture, INDEXES).await;
    // All values are computed anew, in whatever way, and none is sent: the table is copied once more, into columns of the new types.
    fixture.target.batch_execute("create view lengths as select id, length(v) from t").await.unwrap();
    follow(
        &fixture,
        &[
            "alter table t alter n type int using n / 1000, add column u uuid default gen_random_uuid(), add column s bigserial; insert into t values (10, 's', 1)",
            "begin; insert into t (id, v) values (11, 'x'); alter table t alter n type text; update t set n = 'text' where id = 10; commit",
        ],
    )
    .await;
    alike(&fixture, COLUMNS).await;
    assert_eq!(
        ask(&fixture.target, "select count(*) from lengths").await,
        ask(&fixture.target, "select count(*) from t").await
    );
    let copied = "select count(*) from peergate.mirror_events where message like 'table \"public.t\" is copied once more:%all its rows were written anew'";
    assert_ne!(fixture.ask(copied).await, "0");
    assert_eq!(fixture.ask("select string_agg(concat_ws(' ', message, detail), '; ') from peergate.mirror_events where level = 'error'").await, "");
    assert_eq!(fixture.ask("select string_agg(message, '; ') from peergate.mirror_events where message like 'table \"public.k\" is copied once%'").await, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_are_renamed_and_keep_being_mirrored() {
    let schema = "create table a (id int primary key, n int); insert into a values (1, 1); create table b (id int primary key); create schema attic";
    let fixture = plain_mirror(schema, "{}").await;
    follow(
        &fixture,
        &[
            "begin; alter table a rename to c; alter table c rename n to m; insert into c values (2, 2); commit",
            "insert into c values (3, 3)",
        ],
    )
    .await;
    fixture.wait_until("select string_agg(source_name || '=' || target_name || ':' || state, ' ' order by source_name) from peergate.mirror_tables", "b=b:live c=c:live").await;
    // Moved, and another takes the name.
    follow(&fixture, &["begin; alter table c set schema attic; alter table b rename to c; insert into attic.c values (4, 4); insert into c values (5); commit"]).await;
    fixture.wait_until("select string_agg(source_schema || '.' || source_name, ' ' order by 1) from peergate.mirror_tables where state = 'live'", "attic.c public.c").await;
    follow(&fixture, &["update attic.c set m = 0; delete from c"]).await;
    assert_eq!(
        ask(&fixture.target, "select count(*) from pg_tables where schemaname in ('public', 'attic')").await,
        "2"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_was_stopped_or_killed_knows_what_it_had() {
    let schema =
        "create table t (id int primary key, a int, b int); insert into t select i, i, -i from generate_series(1, 5) i";
    let mut fixture = plain_mirror(schema, "{}").await;
    fixture.stop_engine().await;
    let missed = "insert into t values (10, 1, 2); alter table t rename a to x; insert into t values (11, 1, 2); alter table t drop b;
                  insert into t values (12, 1); alter table t add b int default 3; insert into t values (13, 1); alter table t rename to u; insert into u values (14, 1)";
    fixture.source.batch_execute(missed).await.unwrap();
    fixture.start_engine("node-1");
    // Whether `b` is the old one or the new one cannot be told from outside once it has the same name and type.
    fixture.caught_up().await;
    fixture.assert_equal().await;
    alike(&fixture, COLUMNS).await;
    let told = "select count(*) from peergate.mirror_events where message like '%was altered more than once before the mirror looked at it'";
    assert_eq!(fixture.ask(told).await, "1");
    assert_eq!(fixture.ask("select string_agg(concat_ws(' ', message, detail), '; ') from peergate.mirror_events where level = 'error'").await, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn ddl_can_stop_the_mirror_or_be_left() {
    let schema = "create table t (id int primary key, a int); insert into t values (1, 1)";
    let fixture = plain_mirror(schema, r#"{"ddl": "block"}"#).await;
    fixture
        .source
        .batch_execute("insert into t values (2, 2); alter table t add b int default 4; insert into t values (3, 3, 3)")
        .await
        .unwrap();
    fixture.wait_for_state("blocked").await;
    let error = fixture
        .ask("select error_message || ' ' || error_detail || ' ' || error_hint from peergate.mirror_status")
        .await;
    assert!(
        error.contains("ddl = block")
            && error.contains("add column \"b\" integer default '4'::integer")
            && error.contains("RESUME MIRROR"),
        "{error}"
    );
    assert_eq!(ask(&fixture.target, "select count(*) from t where id = 3").await, "0");
    fixture.target.batch_execute("alter table t add b int").await.unwrap();
    fixture.control.batch_execute("call peergate.resume_mirror('m')").await.unwrap();
    fixture.caught_up().await;
    fixture.assert_equal().await;
    // Values that are not sent stop it too; whoever alters the target alike has them.
    fixture
        .source
        .batch_execute("alter table t alter b type text using b || '!'; insert into t values (4, 4, 'x')")
        .await
        .unwrap();
    fixture.wait_for_state("blocked").await;
    let error = fixture.ask("select error_message from peergate.mirror_status").await;
    assert_eq!(error, "column \"b\" has become text in table \"public.t\", and all its rows were written anew");
    assert_eq!(ask(&fixture.target, "select count(*) from t where id = 4").await, "0");
    fixture.target.batch_execute("alter table t alter b type text using b || '!'").await.unwrap();
    fixture.control.batch_execute("call peergate.resume_mirror('m')").await.unwrap();
    fixture.caught_up().await;
    fixture.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_that_the_target_lacks_can_be_left_out() {
    let schema = "create table t (id int primary key, a int); insert into t values (1, 1)";
    let mut fixture = plain_mirror(schema, r#"{"ddl": "ignore"}"#).await;
    fixture
        .source
        .batch_execute(
            "alter table t add b int default 4; insert into t values (2, 2, 2); update t set a = 9 where id = 1",
        )
        .await
        .unwrap();
    fixture.caught_up().await;
    let rows = "select string_agg(t::text, ' ' order by id) from t";
    assert_eq!(ask(&fixture.target, rows).await, "(1,9) (2,2)");
    fixture
        .wait_until(
            "select count(*) from peergate.mirror_events where level = 'warning' and detail like '%add column \"b\"%'",
            "1",
        )
        .await;
    fixture.stop_engine().await;
    fixture.source.batch_execute("alter table t drop a; insert into t values (3, 3)").await.unwrap();
    fixture.start_engine("node-1");
    fixture.caught_up().await;
    assert_eq!(ask(&fixture.target, rows).await, "(1,9) (2,2) (3,)");
}

#[tokio::test(flavor = "multi_thread")]
async fn sequences_and_constraints_are_carried_over() {
    let schema = "create table parent (id serial primary key, n int check (n > 0));
                  create table child (id bigint generated by default as identity (increment by 5) primary key,
                                      parent int references parent on delete cascade);
                  insert into parent (n) select 1 from generate_series(1, 30); insert into child (parent) select 7 from generate_series(1, 4)";
    let fixture = plain_mirror(schema, r#"{"copy_constraints": "true"}"#).await;
    let last = "select (select last_value from parent_id_seq) || ' ' || (select last_value from child_id_seq)";
    assert_eq!(ask(&fixture.target, last).await, "30 16");
    let constraints = "select string_agg(conname || ' ' || replace(pg_get_constraintdef(oid), ' NOT VALID', ''), E'\\n' order by conname) from pg_constraint
                       where contype in ('c', 'f') and connamespace = 'public'::regnamespace";
    alike(&fixture, constraints).await;
    // Whoever waits for the mirror may go over: no value is given twice.
    for round in 0..5 {
        follow(
            &fixture,
            &["insert into parent (n) select 1 from generate_series(1, 3); insert into child (parent) values (7)"],
        )
        .await;
        assert_eq!(ask(&fixture.target, last).await, format!("{} {}", 33 + 3 * round, 21 + 5 * round));
    }
    follow(&fixture, &["delete from parent where id = 7"]).await;
    // A value that was given on the target is not taken back.
    fixture.target.batch_execute("select setval('parent_id_seq', 1000)").await.unwrap();
    follow(&fixture, &["insert into parent (n) values (1)"]).await;
    assert_eq!(ask(&fixture.target, "select last_value from parent_id_seq").await, "1000");
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_are_emptied_in_every_way_amid_rows() {
    let schema = "create table parent (id int generated always as identity primary key, n int); create table child (id serial primary key, parent int references parent);
                  create table parent_only (id int primary key); create table heir () inherits (parent_only);
                  insert into parent (n) values (1), (2); insert into child (parent) values (1); insert into parent_only values (1)";
    let fixture = plain_mirror(schema, r#"{"copy_constraints": "true"}"#).await;
    let truncates = [
        "begin; insert into parent (n) values (3); truncate parent cascade; insert into parent (n) values (4); insert into child (parent) values (4); commit",
        "begin; insert into parent (n) values (5); truncate parent, child restart identity; insert into parent (n) values (6); insert into child (parent) values (1);
         savepoint s; truncate child; rollback to s; insert into child (parent) values (null); commit",
        "begin; insert into parent_only values (3); truncate parent_only; insert into parent_only values (2); commit",
        "begin; truncate child; alter table parent add column m int default 3; insert into parent (n) values (7); truncate parent cascade; insert into parent (n, m) values (8, 8); commit",
    ];
    follow(&fixture, &truncates).await;
    // Identities begin anew there too.
    assert_eq!(
        ask(&fixture.target, "select min(id) || ' ' || max(id) from parent").await,
        ask(&fixture.source, "select min(id) || ' ' || max(id) from parent").await
    );
}

/// Makes statements at random that a mirror can follow without a new copy.
struct Migrator {
    random: StdRng,
    /// Columns of the table besides its key, with whether they are of type text.
    columns: Vec<(String, bool)>,
    count: usize,
    next_id: usize,
}

impl Migrator {
    fn fresh(&mut self, what: &str) -> String {
        self.count += 1;
        format!("{what}{}", self.count)
    }

    fn value(&mut self, is_text: bool) -> String {
        let number = self.random.random_range(0..1000);
        if is_text { format!("'t {number}'") } else { number.to_string() }
    }

    fn rows(&mut self) -> String {
        match self.random.random_range(0..4) {
            0 if !self.columns.is_empty() => {
                let at = self.random.random_range(0..self.columns.len());
                let (name, is_text) = self.columns[at].clone();
                format!(
                    "update t set {name} = {} where id % 3 = {}",
                    self.value(is_text),
                    self.random.random_range(0..3)
                )
            }
            1 => format!("delete from t where id = {}", self.random.random_range(0..self.next_id)),
            2 => format!("update t set id = id + 100000 where id = {}", self.random.random_range(0..self.next_id)),
            _ => {
                self.next_id += 1;
                let columns = self.columns.clone();
                let names: String = columns.iter().map(|(name, _)| format!(", {name}")).collect();
                let values: String = columns.iter().map(|(_, is_text)| format!(", {}", self.value(*is_text))).collect();
                format!("insert into t (id{names}) values ({}{values})", self.next_id)
            }
        }
    }

    /// One change of schema; `old` are the columns that may still be changed in this transaction.
    fn change(&mut self, old: &mut Vec<String>) -> String {
        let kind = self.random.random_range(0..9);
        if kind < 4 || old.is_empty() {
            let (name, is_text) = (self.fresh("c"), self.random.random_bool(0.5));
            let kind = if is_text { "varchar(30)" } else { "int" };
            let default =
                if self.random.random_bool(0.5) { format!(" default {}", self.value(is_text)) } else { String::new() };
            self.columns.push((name.clone(), is_text));
            return format!("alter table t add column {name} {kind}{default}");
        }
        let name = old.swap_remove(self.random.random_range(0..old.len()));
        let at = self.columns.iter().position(|(n, _)| *n == name).unwrap();
        let is_text = self.columns[at].1;
        match kind {
            4 => {
                self.columns.remove(at);
                format!("alter table t drop column {name}")
            }
            5 => {
                let to = self.fresh("r");
                self.columns[at].0 = to.clone();
                format!("alter table t rename column {name} to {to}")
            }
            6 if is_text => format!("alter table t alter column {name} type varchar({})", 40 + self.count),
            7 => format!("alter table t alter column {name} set default {}", self.value(is_text)),
            _ => format!("create index {} on t ({name})", self.fresh("i")),
        }
    }

    fn transaction(&mut self) -> String {
        let mut old: Vec<String> = self.columns.iter().map(|(name, _)| name.clone()).collect();
        let mut statements = vec!["begin".to_owned()];
        for _ in 0..self.random.random_range(2..9) {
            let statement = if self.random.random_bool(0.3) { self.change(&mut old) } else { self.rows() };
            statements.push(statement);
        }
        // What comes after the last row is seen a little later than the rows.
        self.next_id += 1;
        statements.push(format!("insert into t (id) values ({})", self.next_id));
        statements.push("commit".to_owned());
        statements.join("; ")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn random_changes_of_schema_and_rows_are_followed_by_an_engine_that_dies() {
    let seed = std::env::var("SCHEMA_SEED").map_or_else(|_| rand::random(), |s| s.parse().unwrap());
    println!("SCHEMA_SEED={seed}");
    let mut fixture = plain_mirror("create table t (id int primary key); insert into t values (1)", "{}").await;
    let mut migrator = Migrator { random: StdRng::seed_from_u64(seed), columns: Vec::new(), count: 0, next_id: 1 };
    for round in 0..24 {
        let transaction = migrator.transaction();
        println!("{transaction};");
        fixture.source.batch_execute(&transaction).await.unwrap();
        if round % 6 == 5 {
            fixture.abort_engine().await;
            fixture.start_engine("node-1");
        }
        fixture.caught_up().await;
        fixture.assert_equal().await;
    }
    alike(&fixture, COLUMNS).await;
    alike(&fixture, INDEXES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn types_get_labels_and_tables_are_dropped() {
    let schema = "create type mood as enum ('sad', 'ok'); create table t (id int primary key, m mood, a mood[]); insert into t values (1, 'ok');
                  create table other (id int primary key); insert into other values (1)";
    let mut fixture = plain_mirror(schema, "{}").await;
    for change in [
        "alter type mood add value 'happy'; alter type mood add value 'so so' before 'ok'",
        "insert into t values (2, 'happy', '{so so}')",
        "create type kind as enum ('x', 'y')",
        "alter table t add column k kind default 'y'; insert into t values (3, 'sad', null, 'x')",
    ] {
        for statement in change.split("; ") {
            fixture.source.batch_execute(statement).await.unwrap();
        }
        fixture.caught_up().await;
        fixture.assert_equal().await;
    }
    assert_eq!(fixture.ask("select string_agg(concat_ws(' ', message, detail), '; ') from peergate.mirror_events where level = 'error'").await, "");
    // The others go on, now and after a restart.
    fixture
        .source
        .batch_execute("insert into other values (2); drop table other; insert into t (id) values (4)")
        .await
        .unwrap();
    fixture.caught_up().await;
    fixture.wait_until("select count(*) from peergate.mirror_events where message = 'table \"public.other\" was dropped on the source'", "1").await;
    fixture.stop_engine().await;
    fixture.source.batch_execute("insert into t (id) values (5)").await.unwrap();
    fixture.start_engine("node-1");
    fixture.caught_up().await;
    fixture.assert_equal().await;
    assert_eq!(ask(&fixture.target, "select count(*) from other").await, "2");
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_are_written_anew_are_told_from_rows_that_are_moved() {
    let schema = "create table t (id int primary key, n int); insert into t select i, i from generate_series(1, 100) i; create table other (id int)";
    let fixture = plain_mirror(schema, "{}").await;
    let copied =
        "select count(*) from peergate.mirror_events where message like 'table \"public.t\" is copied once more%'";
    let default = "select pg_get_expr(adbin, adrelid) from pg_attrdef where adrelid = 'other'::regclass";
    let moved = [
        "vacuum full t",
        "cluster t using t_pkey",
        "truncate t; insert into t select i, i from generate_series(1, 50) i",
    ];
    for (n, change) in moved.into_iter().enumerate() {
        follow(&fixture, &[change, &format!("alter table other alter id set default {n}")]).await;
        alike(&fixture, default).await;
        assert_eq!(fixture.ask(copied).await, "0", "{change}\n{}", fixture.explain().await);
    }
    fixture.source.batch_execute("alter table t alter n type int using n * 100").await.unwrap();
    alike(&fixture, "select sum(n) from t").await;
    assert_eq!(fixture.ask(copied).await, "1");
    follow(&fixture, &["update t set n = n + 1; insert into t values (1000, 1)"]).await;
}
