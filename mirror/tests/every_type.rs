//! Every type that a column can have, copied and streamed, as text and in binary.

use tokio_postgres::Client;

use crate::support::{ask, connect, describe, start};

/// Values of each built-in type, as text; those that are equal to nothing else, extreme, empty and oddly written among them.
///
/// Types without any have no input function that works: their columns are NULL.
const SAMPLES: &[(&str, &[&str])] = &[
    ("bool", &["t", "f"]),
    ("bytea", &["", r"\x00ff5c27", r"\xdeadbeef"]),
    ("char", &["a", "", r"\351"]),
    ("name", &["", "a name", "ünïcödé \"quoted\""]),
    ("int8", &["0", "-9223372036854775808", "9223372036854775807"]),
    ("int2", &["0", "-32768", "32767"]),
    ("int2vector", &["", "1 2 3"]),
    ("int4", &["0", "-2147483648", "2147483647"]),
    ("regproc", &["-", "now", "pg_catalog.txid_current"]),
    ("text", &["", "NULL", "with \"quotes\", 'these', \\ and {braces}", "line\nfeed\ttab\r\u{b}", "🐘 ünïcödé"]),
    ("oid", &["0", "4294967295"]),
    ("tid", &["(0,0)", "(4294967295,65535)"]),
    ("xid", &["0", "4294967295"]),
    ("cid", &["0", "4294967295"]),
    ("oidvector", &["", "1 4294967295"]),
    ("json", &["null", "{\"a\":  1, \"a\": [1, 2]}", "\"\\u00e9\""]),
    ("xml", &["", "<a b=\"c\">é</a>", "text only"]),
    ("pg_node_tree", &[]),
    ("pg_ndistinct", &[]),
    ("pg_dependencies", &[]),
    ("pg_mcv_list", &[]),
    ("pg_brin_bloom_summary", &[]),
    ("pg_brin_minmax_multi_summary", &[]),
    ("gtsvector", &[]),
    ("point", &["(0,-0)", "(Infinity,NaN)", "(1e-300,1.7976931348623157e308)"]),
    ("lseg", &["[(0,0),(1,1)]"]),
    ("path", &["((0,0),(1,1),(2,0))", "[(0,0),(1,1)]"]),
    ("box", &["(2,2),(1,1)"]),
    ("polygon", &["((0,0),(1,1),(2,0))"]),
    ("line", &["{1,2,3}"]),
    ("float4", &["0", "-0", "NaN", "Infinity", "-Infinity", "1e-45", "3.4028235e38", "0.1"]),
    ("float8", &["0", "-0", "NaN", "Infinity", "-Infinity", "5e-324", "1.7976931348623157e308", "0.1"]),
    ("circle", &["<(1,2),3>"]),
    ("money", &["0", "-92233720368547758.08", "92233720368547758.07", "1234.56"]),
    ("macaddr", &["08:00:2b:01:02:03"]),
    ("inet", &["10.0.0.1", "10.0.0.1/8", "::1", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/0"]),
    ("cidr", &["10.0.0.0/8", "::/0"]),
    ("macaddr8", &["08:00:2b:01:02:03:04:05"]),
    ("aclitem", &["postgres=r*w/postgres", "=arwdDxt/postgres"]),
    ("bpchar", &["", "a ", "  é"]),
    ("varchar", &["", "a ", "é"]),
    ("date", &["4713-01-01 BC", "5874897-12-31", "infinity", "-infinity", "2000-02-29"]),
    ("time", &["00:00", "24:00", "12:34:56.789012"]),
    (
        "timestamp",
        &[
            "4713-11-24 00:00:00 BC",
            "294276-12-31 23:59:59.999999",
            "infinity",
            "-infinity",
            "2001-02-03 04:05:06.000007",
        ],
    ),
    (
        "timestamptz",
        &[
            "4713-11-24 00:00:00+00 BC",
            "294276-12-31 23:59:59.999999+00",
            "infinity",
            "-infinity",
            "2001-02-03 04:05:06.000007+08",
        ],
    ),
    ("interval", &["-178000000 years", "178000000 years", "1 mon -1 day", "-04:05:06.789", "0"]),
    ("timetz", &["00:00:00+15:59:59", "24:00:00-15:59:59"]),
    ("bit", &["", "0", "101010101"]),
    ("varbit", &["", "1", "0001"]),
    ("numeric", &["0", "0.00", "NaN", "1e-1000", "-1e1000", "1.10", "1.1"]),
    ("refcursor", &["", "a cursor"]),
    ("regprocedure", &["-", "now()"]),
    ("regoper", &["0", "pg_catalog.||/"]),
    ("regoperator", &["0", "+(integer,integer)"]),
    ("regclass", &["-", "pg_catalog.pg_class"]),
    ("regcollation", &["-", "\"C\""]),
    ("regtype", &["-", "integer"]),
    ("regrole", &["-", "postgres"]),
    ("regnamespace", &["-", "pg_catalog"]),
    ("uuid", &["00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff"]),
    ("pg_lsn", &["0/0", "FFFFFFFF/FFFFFFFF"]),
    ("tsvector", &["", "a:1A,2 'b c':3"]),
    ("tsquery", &["", "a & !b <-> 'c d':*A"]),
    ("regconfig", &["-", "simple"]),
    ("regdictionary", &["-", "simple"]),
    ("jsonb", &["null", "{\"a\": [1.10, null]}", "[]"]),
    ("jsonpath", &["$.a[*] ? (@ > 1)"]),
    ("txid_snapshot", &["10:20:10,14"]),
    ("pg_snapshot", &["10:20:10,14"]),
    ("xid8", &["0", "18446744073709551615"]),
    ("int4range", &["empty", "(,)", "[1,5)"]),
    ("numrange", &["empty", "[1.10,NaN]", "(,1)"]),
    ("tsrange", &["empty", "[-infinity,infinity]"]),
    ("tstzrange", &["empty", "[2000-01-01 00:00:00+00,)"]),
    ("daterange", &["empty", "[2000-01-01,2000-01-02)"]),
    ("int8range", &["empty", "(,9223372036854775807)"]),
    ("int4multirange", &["{}", "{[1,3),[5,7)}"]),
    ("nummultirange", &["{}", "{(,1),[2,3.0]}"]),
    ("tsmultirange", &["{}", "{[2000-01-01,infinity]}"]),
    ("tstzmultirange", &["{}", "{(,2000-01-01 00:00:00+00)}"]),
    ("datemultirange", &["{}", "{[2000-01-01,2000-01-03)}"]),
    ("int8multirange", &["{}", "{(,)}"]),
];

/// Types of users' making, and values of them.
const MADE: &str = r#"
    create schema "Own ""types""";
    set search_path = "Own ""types""", public;
    create type mood as enum ('sad', 'it''s "ok"', 'Ünicode', '');
    create domain positive as numeric check (value > 0);
    create domain list as int[] check (array_length(value, 1) < 9);
    create domain moods as mood[];
    create type address as (street text, "No." positive, mood mood, gone int); alter type address drop attribute gone;
    create type person as (name varchar(20), homes address[], home address, at timestamptz);
    create domain valid_person as person check (value is null or (value).name is not null);
    create type span as range (subtype = float8);
    create type mood_range as range (subtype = mood);
    reset search_path;"#;

/// Types of users' making, and of extensions, with values.
const MADE_SAMPLES: &[(&str, &str, &[&str])] = &[
    ("", "mood", &["sad", "it's \"ok\"", "Ünicode", ""]),
    ("", "positive", &["1.10", "NaN"]),
    ("", "list", &["{}", "{1,NULL,3}", "[5:6]={1,2}"]),
    ("", "moods", &["{}", "{sad,NULL,\"\",\"it's \\\"ok\\\"\"}"]),
    ("", "address", &["(,,)", "(\"Main \"\"St\"\", 1\",1.10,\"Ünicode\")"]),
    ("", "person", &["(,,,)", "(x,\"{\"\"(a,1,sad)\"\",NULL}\",\"(b,,)\",infinity)"]),
    ("", "valid_person", &["(x,{},\"(,,)\",)"]),
    ("", "span", &["empty", "[-Infinity,NaN]"]),
    ("", "mood_range", &["empty", "[sad,Ünicode]"]),
    ("citext", "citext", &["", "Abc", "ABÇ"]),
    ("hstore", "hstore", &["", "\"a\"=>NULL, \"b\"=>\"NULL\"", "\"quote\\\"\"=>\"\""]),
    ("ltree", "ltree", &["", "a.b_c.1"]),
    ("ltree", "lquery", &["*.a{2}.!b"]),
    ("ltree", "ltxtquery", &["a & !b*"]),
    ("cube", "cube", &["(0)", "(1,2),(3,4)"]),
    ("seg", "seg", &["1.10 .. 2", "~3", "< 4"]),
    ("isn", "isbn", &["0-11-000533-3"]),
    ("isn", "ean13", &["9780393040029"]),
    ("intarray", "query_int", &["1&(2|!3)"]),
    ("postgis", "geometry", &["POINT(1 2)", "SRID=4326;MULTIPOLYGON(((0 0,1 0,1 1,0 0)))"]),
    ("postgis", "geography", &["POINT(1 2)"]),
    ("vector", "vector", &["[1,2.5,-3]"]),
];

fn quoted(text: &str) -> String {
    pg::name::quote_literal(text)
}

/// Makes tables for a type, with its values, and with arrays of them where it has any.
async fn make_tables(source: &Client, name: &str, type_sql: &str, samples: &[&str]) {
    let about = format!(
        "select (typarray <> 0)::text || exists (select from pg_type b where b.oid = t.typbasetype and b.typcategory = 'A') from pg_type t where t.oid = {}::regtype",
        quoted(type_sql)
    );
    let about = ask(source, &about).await;
    let has_array = about.starts_with("true");
    let arrays = if has_array { format!(", a {type_sql}[], odd {type_sql}[]") } else { String::new() };
    let mut sql = format!(
        "create table \"t_{name}\" (id int primary key, v {type_sql}{arrays}); insert into \"t_{name}\" (id) values (0);"
    );
    for (n, sample) in samples.iter().enumerate() {
        let value = format!("{}::{type_sql}", quoted(sample));
        let arrays = match about.as_str() {
            "truefalse" => format!(
                ", array[{value}, null, {value}], ('[-1:0][2:3]=' || array[[{value}, null], [null, {value}]]::text)::{type_sql}[]"
            ),
            // There is no constructor for arrays of a domain over arrays.
            "truetrue" => {
                let element = format!("'\"' || replace(replace({value}::text, '\\', '\\\\'), '\"', '\\\"') || '\"'");
                format!(
                    ", ('{{' || {element} || ',NULL}}')::{type_sql}[], ('[-1:0]={{NULL,' || {element} || '}}')::{type_sql}[]"
                )
            }
            _ => String::new(),
        };
        sql.push_str(&format!("insert into \"t_{name}\" values ({}, {value}{arrays});", n + 1));
    }
    if has_array {
        sql.push_str(&format!("insert into \"t_{name}\" values (-1, null, '{{}}', '{{NULL}}');"));
    }
    // A type that has an order can be a key.
    sql.push_str(&format!(
        "do $$ begin
            create table \"k_{name}\" (k {type_sql} primary key, n int);
            insert into \"k_{name}\" select distinct on (v) v, id from \"t_{name}\" where v is not null;
         exception when undefined_object then null; end $$;"
    ));
    source.batch_execute(&sql).await.unwrap_or_else(|e| panic!("{type_sql}: {}", describe(&e)));
}

/// Changes each table: rows come with values of others, values go from row to row, rows go; keys are found, changed and deleted.
async fn change_tables(source: &Client) {
    let tables = "select relname::text from pg_class where relkind = 'r' and relname ~ '^[tk]_' order by 1";
    let mut sql = String::new();
    for row in source.query(tables, &[]).await.unwrap() {
        let name: &str = row.get(0);
        let table = pg::name::quote_ident(name);
        let changes = if name.starts_with("t_") {
            format!(
                "create temp table copies as select * from {table}; update copies set id = id + 100; insert into {table} select * from copies; drop table copies;
                 update {table} t set v = o.v from {table} o where t.id = 0 and o.id = 1; update {table} set v = null where id = 101; delete from {table} where id = 102;"
            )
        } else {
            format!(
                "update {table} set n = n + 1; delete from {table} where n = 2;
                 create temp table gone as select * from {table} where n = 3; delete from {table} where n = 3; insert into {table} select k, 60 from gone; drop table gone;"
            )
        };
        sql.push_str(&changes);
    }
    source.batch_execute(&sql).await.unwrap_or_else(|e| panic!("{}", describe(&e)));
}

/// Compares all tables of two databases that meet a condition, by the text of their rows, and returns how many they are.
async fn compare(source: &Client, target: &Client, condition: &str) -> usize {
    let tables = format!(
        "select relname::text from pg_class c where relkind = 'r' and relname ~ '^[tk]_' and {condition} order by 1"
    );
    let tables = source.query(&tables, &[]).await.unwrap();
    for row in &tables {
        let table: &str = row.get(0);
        let rows = format!(
            "select string_agg(r::text, E'\\n' order by r::text collate \"C\") from {} r",
            pg::name::quote_ident(table)
        );
        assert_eq!(ask(target, &rows).await, ask(source, &rows).await, "{table}");
    }
    tables.len()
}

/// The tables that force no stream to be text: without oids of the server's catalog, vectors, and arrays of what cannot be sent.
const BINARY: &str = r"not exists (
    select from pg_attribute a join pg_type t on t.oid = a.atttypid left join pg_type e on e.oid = t.typelem and t.typcategory = 'A'
    where a.attrelid = c.oid and a.attnum > 0 and (e.typsend = 0 or t.typname ~ '^_?(reg[^_]|int2vector|oidvector|tsquery)'))";

#[tokio::test(flavor = "multi_thread")]
async fn every_type_is_the_same_in_copy_and_stream_as_text_and_in_binary() {
    let fixture = start().await;
    // How the databases' and roles' own sessions print values must not matter.
    let odd = "create database dwh2; alter database shop set datestyle = 'SQL, DMY'; alter database shop set intervalstyle = 'sql_standard';
               alter database shop set timezone = 'Asia/Kolkata'; alter database shop set extra_float_digits = 0; alter database shop set bytea_output = 'escape';
               alter database dwh set datestyle = 'German'; alter database dwh set timezone = 'America/Caracas'; alter database dwh2 set intervalstyle = 'iso_8601';
               alter database shop set xmlbinary = 'hex'; alter role postgres in database dwh2 set extra_float_digits = -15;
               alter database dwh set search_path = 'nowhere'; alter database shop set lc_monetary = 'C'; alter database shop set default_transaction_isolation = 'serializable'";
    for statement in odd.split(';') {
        fixture.control.batch_execute(statement).await.unwrap();
    }
    fixture.create_peer("dwh2").await;
    let second = connect(&fixture.cluster, "dwh2").await;
    let session = "set datestyle = 'ISO'; set timezone = 'UTC'; set extra_float_digits = 3; set intervalstyle = 'postgres'; set bytea_output = 'hex'; set search_path = public";
    for client in [&fixture.source, &fixture.target, &second] {
        client.batch_execute(session).await.unwrap();
    }
    let builtin = "select typname::text from pg_type where typnamespace = 'pg_catalog'::regnamespace and typtype in ('b', 'r', 'm') and typisdefined
                   and not (typcategory = 'A' and typelem <> 0 and typname like '\\_%') order by oid";
    for row in fixture.source.query(builtin, &[]).await.unwrap() {
        let name: &str = row.get(0);
        let (_, samples) =
            SAMPLES.iter().find(|(n, _)| *n == name).unwrap_or_else(|| panic!("no values for type {name}"));
        make_tables(&fixture.source, name, &format!("pg_catalog.{}", pg::name::quote_ident(name)), samples).await;
    }
    fixture.source.batch_execute(MADE).await.unwrap();
    for (extension, name, samples) in MADE_SAMPLES {
        let schema = if extension.is_empty() {
            "\"Own \"\"types\"\"\"".to_owned()
        } else {
            let there = format!("select count(*) from pg_available_extensions where name = '{extension}'");
            if ask(&fixture.source, &there).await == "0" {
                continue;
            }
            let create = format!(
                "create schema if not exists \"Ext {extension}\"; create extension if not exists {extension} schema \"Ext {extension}\""
            );
            fixture.source.batch_execute(&create).await.unwrap();
            format!("\"Ext {extension}\"")
        };
        make_tables(&fixture.source, name, &format!("{schema}.{name}"), samples).await;
    }
    // One such column makes a whole stream travel as text; without them it is binary.
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    let others = format!(
        "select json_agg(json_build_object('schema', 'public', 'name', relname)) from pg_class c where relname ~ '^[tk]_' and relkind = 'r' and not {BINARY}"
    );
    let selection = format!(r#"{{"all": true, "except": {}}}"#, ask(&fixture.source, &others).await);
    fixture
        .control
        .batch_execute(&format!("call peergate.create_mirror('m2', 'shop', 'dwh2', '{selection}', '{{}}')"))
        .await
        .unwrap();
    for mirror in ["m", "m2"] {
        fixture.mirror_caught_up(mirror).await;
    }
    let all = compare(&fixture.source, &fixture.target, "true").await;
    assert!(all > 130, "{all} tables");
    assert!(compare(&fixture.source, &second, BINARY).await > 110);
    let binary = "select string_agg(case when query like '%binary%' then 'binary' else 'text' end, ' ' order by query like '%binary%')
                  from pg_stat_activity where query like 'START_REPLICATION%'";
    assert_eq!(ask(&fixture.source, binary).await, "text binary");
    change_tables(&fixture.source).await;
    for mirror in ["m", "m2"] {
        fixture.mirror_caught_up(mirror).await;
    }
    compare(&fixture.source, &fixture.target, "true").await;
    compare(&fixture.source, &second, BINARY).await;
}
