//! Round trips, folding, and what is refused where.

use super::*;
use crate::split::split;
use crate::statement::Value;

fn parse_all(text: &str) -> Parsed {
    let slices = split(text.as_bytes(), true);
    assert_eq!(slices.len(), 1, "{text}");
    parse(&slices[0], text.as_bytes(), &text[slices[0].range.clone()])
}

fn ours(text: &str) -> Ours {
    match parse_all(text) {
        Parsed::Ours(ours) => *ours,
        other => panic!("{text}: {other:?}"),
    }
}

fn refusal(text: &str) -> (String, String, usize) {
    match parse_all(text) {
        Parsed::Refused(r) => (r.sqlstate.to_string(), r.message, r.at),
        other => panic!("{text}: {other:?}"),
    }
}

#[test]
fn what_is_printed_parses_to_the_same() {
    for (text, canonical) in [
        ("create peer shop from postgres", ""),
        ("Create Peer If Not Exists Shop From POSTGRES With (Host = 'db1', port 5432)", "error"),
        (
            "CREATE PEER Shop FROM Postgres WITH (HOST 'db''1', port = 5432, tls = true, x = -1.5, m = require)",
            "CREATE PEER shop FROM postgres WITH (host = 'db''1', port = '5432', tls = 'true', x = '-1.5', m = 'require')",
        ),
        (
            r#"create peer "Odd.Name" from postgres with (password = E'a\'b\\', user = $$it's$$, host = $t$$1$t$, database = $2)"#,
            r#"CREATE PEER "Odd.Name" FROM postgres WITH (password = E'a''b\\', user = 'it''s', host = '$1', database = $2)"#,
        ),
        (
            "create peer a from postgres with (host = 'x'\n 'y', user=U&'\\00e9')",
            "CREATE PEER a FROM postgres WITH (host = 'xy', user = 'é')",
        ),
        ("create or replace peer a from postgres with (user u)", "error"),
        (
            "create or replace peer a from postgres with (user 'u')",
            "CREATE OR REPLACE PEER a FROM postgres WITH (user = 'u')",
        ),
        (
            "alter peer if exists A set (host 'h', password = $1, port = 5433)",
            "ALTER PEER IF EXISTS a SET (host = 'h', password = $1, port = '5433')",
        ),
        ("alter peer a reset (host, \"Odd\")", "ALTER PEER a RESET (host, \"Odd\")"),
        ("alter peer \"reset\" rename to \"Set\"", "ALTER PEER \"reset\" RENAME TO \"Set\""),
        ("alter peer a owner to current_role", "ALTER PEER a OWNER TO CURRENT_USER"),
        ("alter peer if exists \"refresh\" refresh schema", "ALTER PEER IF EXISTS refresh REFRESH SCHEMA"),
        ("alter peer a refresh schema s, \"Odd, one\"", "ALTER PEER a REFRESH SCHEMA s, \"Odd, one\""),
        (
            "create alert A on mirror M when LAG_SECONDS > 60 for interval '5 min' or state != blocked notify Slack(url 'https://h'), notify () with (repeat_interval = $1)",
            "CREATE ALERT a ON MIRROR m WHEN lag_seconds > '60' FOR '5 min' OR \"state\" <> 'blocked' NOTIFY slack (url = 'https://h'), \"notify\" WITH (repeat_interval = $1)",
        ),
        (
            "create or replace alert a on all peers when x >= $1 for 5 notify \"On\" (a = $2)",
            "CREATE OR REPLACE ALERT a ON ALL PEERS WHEN x >= $1 FOR '5 seconds' NOTIFY \"On\" (a = $2)",
        ),
        (
            "create alert if not exists a on all mirrors when x <= 1 or y < 2 or z = 3 notify n",
            "CREATE ALERT IF NOT EXISTS a ON ALL MIRRORS WHEN x <= '1' OR y < '2' OR z = '3' NOTIFY n",
        ),
        ("alter alert if exists a on peer \"all\"", "ALTER ALERT IF EXISTS a ON PEER \"all\""),
        ("alter alert a when x > 1 notify n (c = d)", "ALTER ALERT a WHEN x > '1' NOTIFY n (c = 'd')"),
        ("alter alert a set (b = 1)", "ALTER ALERT a SET (b = '1')"),
        ("alter alert a reset (b, c)", "ALTER ALERT a RESET (b, c)"),
        ("alter alert \"enable\" disable", "ALTER ALERT \"enable\" DISABLE"),
        ("alter alert a enable", "ALTER ALERT a ENABLE"),
        ("alter alert a rename to \"Or\"", "ALTER ALERT a RENAME TO \"Or\""),
        ("drop alert if exists a, \"B\"", "DROP ALERT IF EXISTS a, \"B\""),
        ("test alert a", "TEST ALERT a"),
        ("wait for alert a timeout 5", "WAIT FOR ALERT a TIMEOUT '5 seconds'"),
        ("show alerts", "SHOW ALERTS"),
        ("show alert a", "SHOW ALERT a"),
        ("comment on alert a is null", "COMMENT ON ALERT a IS NULL"),
        ("comment on peer a is $$it's$$", "COMMENT ON PEER a IS 'it''s'"),
        ("comment on mirror \"is\" is null", "COMMENT ON MIRROR \"is\" IS NULL"),
        ("comment on mirror m is $1", "COMMENT ON MIRROR m IS $1"),
        ("validate peer a", "VALIDATE PEER a"),
        ("validate peer \"A\" verbose", "VALIDATE PEER \"A\" VERBOSE"),
        ("show peer \"A\"", "SHOW PEER \"A\""),
        ("drop peer if exists a, \"B\" cascade", "DROP PEER IF EXISTS a, \"B\" CASCADE"),
        ("drop peer a restrict", "DROP PEER a"),
        (
            "grant all privileges on peer a, \"B\" to ann, group public, current_role",
            "GRANT USAGE ON PEER a, \"B\" TO ann, public, CURRENT_USER",
        ),
        (
            "revoke usage on peer a from session_user, \"current_user\" cascade",
            "REVOKE USAGE ON PEER a FROM SESSION_USER, \"current_user\"",
        ),
        (
            "alter mirror M add table t, s.t (id, \"N\") to x.y",
            "ALTER MIRROR m ADD TABLE public.t, s.t (id, \"N\") TO x.y",
        ),
        ("alter mirror m alter table t where (a = 1)", "ALTER MIRROR m ALTER TABLE public.t WHERE (a = 1)"),
        ("alter mirror m drop table t, s.u", "ALTER MIRROR m DROP TABLE public.t, s.u"),
        ("alter mirror m refresh tables", "ALTER MIRROR m REFRESH TABLES"),
        ("alter mirror m skip to lsn $1", "ALTER MIRROR m SKIP TO LSN $1"),
        ("alter mirror m set (on_error = stop, x 5)", "error"),
        ("alter mirror m set (on_error = stop, x = 5)", "ALTER MIRROR m SET (on_error = 'stop', x = '5')"),
        ("alter mirror m reset (on_error, x)", "ALTER MIRROR m RESET (on_error, x)"),
        ("alter mirror m rename to \"N\"", "ALTER MIRROR m RENAME TO \"N\""),
        ("verify mirror m", "VERIFY MIRROR m"),
        ("verify mirror repair repair", "VERIFY MIRROR repair REPAIR"),
        ("Verify Mirror \"M\" Table t, s.\"U\" Repair", "VERIFY MIRROR \"M\" TABLE public.t, s.\"U\" REPAIR"),
        ("resync mirror if exists m table t, s.u", "RESYNC MIRROR IF EXISTS m TABLE public.t, s.u"),
        (
            "create mirror m from a to b for all tables except (x, s.y)",
            "CREATE MIRROR m FROM a TO b FOR ALL TABLES EXCEPT (public.x, s.y)",
        ),
        (
            "create mirror if not exists m from a to b for tables in schema p, q to r except (t) with (mode = copy_only)",
            "CREATE MIRROR IF NOT EXISTS m FROM a TO b FOR TABLES IN SCHEMA p, q TO r EXCEPT (public.t) WITH (mode = 'copy_only')",
        ),
        (
            "create mirror m from a to b for table t (x, \"Y\") to s.u, v",
            "CREATE MIRROR m FROM a TO b FOR TABLE public.t (x, \"Y\") TO s.u, public.v",
        ),
        (
            "create mirror m from a to b with table mapping (public.t:public.u)",
            "CREATE MIRROR m FROM a TO b FOR TABLE public.t TO public.u",
        ),
        (
            "create mirror m from a to b with table mapping ({exclude: [c, d,], to: public.b, key: id, from: a}) with (do_initial_copy=true)",
            "CREATE MIRROR m FROM a TO b FOR TABLE public.a EXCEPT (c, d) TO public.b WITH (do_initial_copy = 'true')",
        ),
        (
            "create mirror m from a to b for table t except (x) where ( n in (1, 2) /* ) */ and \"N)\" <> ')' -- (\n ) to u, v (x) where ((a)->>'é' = 'ü')",
            "CREATE MIRROR m FROM a TO b FOR TABLE public.t EXCEPT (x) WHERE (n in (1, 2) /* ) */ and \"N)\" <> ')') TO public.u, public.v (x) WHERE ((a)->>'é' = 'ü')",
        ),
        (
            "create mirror if not exists m from a to b for $q$select 'it''s' from t where a between {{.start}} and {{.end}}$q$ with (target_table = 'x')",
            "CREATE MIRROR IF NOT EXISTS m FROM a TO b FOR $$select 'it''s' from t where a between {{.start}} and {{.end}}$$ WITH (target_table = 'x')",
        ),
        ("create mirror m from a to b for E'select $$a$$\\n'", "CREATE MIRROR m FROM a TO b FOR 'select $$a$$\n'"),
        ("create mirror m from a to b for $1", "CREATE MIRROR m FROM a TO b FOR $1"),
        ("Execute Mirror If Exists \"M\"", "EXECUTE MIRROR IF EXISTS \"M\""),
        ("execute mirror m", "EXECUTE MIRROR m"),
        (
            "create mirror m from a to b with schema mapping (p:q)",
            "CREATE MIRROR m FROM a TO b FOR TABLES IN SCHEMA p TO q",
        ),
        ("drop mirror if exists m, n keep target metadata", "DROP MIRROR IF EXISTS m, n KEEP TARGET METADATA"),
        ("drop mirror m keep target metadata force", "DROP MIRROR m KEEP TARGET METADATA FORCE"),
        ("drop mirror force force", "DROP MIRROR force FORCE"),
        ("pause mirror if exists \"if\"", "PAUSE MIRROR IF EXISTS \"if\""),
        ("resume /* x */ mirror m -- y", "RESUME MIRROR m"),
        ("wait for mirror m", "WAIT FOR MIRROR m"),
        ("wait for mirror m lsn '0/1' timeout '10s'", "WAIT FOR MIRROR m LSN '0/1' TIMEOUT '10s'"),
        (
            "wait for mirror m state running timeout interval '1 min'",
            "WAIT FOR MIRROR m STATE 'running' TIMEOUT '1 min'",
        ),
        ("wait for mirror m timeout 10", "WAIT FOR MIRROR m TIMEOUT '10 seconds'"),
        ("wait for mirror m lsn $1 timeout $2", "WAIT FOR MIRROR m LSN $1 TIMEOUT $2"),
        ("alter mirror m rename to n", "ALTER MIRROR m RENAME TO n"),
        ("alter mirror m refresh tables", "ALTER MIRROR m REFRESH TABLES"),
        ("alter mirror m drop table a, s.b", ""),
        ("alter mirror m skip to lsn '0/1'", ""),
        ("alter mirror m set (batch_rows_max = 5)", ""),
        ("alter mirror m reset (batch_rows_max)", ""),
        ("resync mirror if exists m table a, s.b", ""),
        ("resync mirror m", "RESYNC MIRROR m"),
        ("show peers", "SHOW PEERS"),
        ("show mirrors", "SHOW MIRRORS"),
        ("show mirror M", "SHOW MIRROR m"),
        ("show tasks", "SHOW TASKS"),
        ("explain create mirror m from a to b for all tables", "EXPLAIN CREATE MIRROR m FROM a TO b FOR ALL TABLES"),
        ("Explain (format JSON) alter mirror m add table t", "EXPLAIN (FORMAT JSON) ALTER MIRROR m ADD TABLE public.t"),
        ("explain (format text) alter mirror m refresh tables", "EXPLAIN ALTER MIRROR m REFRESH TABLES"),
        ("show task 7", "SHOW TASK '7'"),
        ("cancel task $1", "CANCEL TASK $1"),
    ] {
        if canonical == "error" {
            assert_eq!(refusal(text).0, "42601");
            continue;
        }
        let first = ours(text).statement;
        let printed = first.to_string();
        if !canonical.is_empty() {
            assert_eq!(printed, canonical);
        }
        assert_eq!(ours(&printed).statement, first, "{printed}");
    }
}

#[test]
fn what_is_not_ours_is_theirs() {
    for text in [
        "GRANT ALL ON peer TO ann",
        "grant usage on peer, other to ann",
        "REVOKE ALL PRIVILEGES ON peer FROM ann",
        "GRANT SELECT ON PEER TO ann",
        "select 'create peer x'",
        "create table peer (a int)",
        "\"create\" peer x",
        "create \"peer\" x from postgres",
        "explain create peer x",
        "show peer",
        "show peer.x",
        "comment on table peer is 'x'",
        "create or replace view peer as select 1",
        "show mirror",
        "show peers x",
        "show tasks.x",
        "execute mirror",
        "execute mirror (1)",
        "execute mirror('x')",
        "explain select * from mirror",
        "explain (format json) create table mirror ()",
        "explain create table mirror ()",
        "explain analyze alter table mirror add a int",
        "show task",
        "show task.x",
        "cancel tasks",
        "show mirror .x",
        "execute shop ($$ select 1 $$)",
        "create table alert (a int)",
        "show alert",
        "show alert.x",
        "test alerts",
        "alter table mirror rename to n",
        "resync table mirror",
    ] {
        assert_eq!(parse_all(text), Parsed::Theirs, "{text}");
    }
}

#[test]
fn a_value_may_stand_in_parentheses() {
    let bare = "create peer p from postgres with (host = 'h', port = 5, user 'it''s', password = $1, validate = false)";
    let within = "create peer p from postgres with (host = ('h'), port = (5), user ('it''s'), password = ($1), validate = (false))";
    assert_eq!(ours(within).statement, ours(bare).statement);
}

#[test]
fn syntax_errors_are_postgres_own_words_at_the_token() {
    for (text, message, at) in [
        ("create peer a from postgres with (x = ())", "syntax error at or near \")\"", 39),
        ("create peer a from postgres with (x = (('v')))", "syntax error at or near \"(\"", 39),
        ("create peer a from postgres with (x = ('v', y = 1)", "syntax error at or near \",\"", 42),
        ("create peer", "syntax error at end of input", 11),
        ("create peer shop", "syntax error at end of input", 16),
        ("create peer shop frm postgres", "syntax error at or near \"frm\"", 17),
        ("create peer if exists x", "syntax error at or near \"exists\"", 15),
        ("create peer é from postgres with (host)", "syntax error at or near \")\"", 38),
        ("create peer a from postgres with ()", "syntax error at or near \")\"", 34),
        ("create peer a from postgres with (x = )", "syntax error at or near \")\"", 38),
        ("create peer 'geheim' from postgres", "syntax error at or near \"'…'\"", 12),
        ("create peer \"\" from postgres", "zero-length delimited identifier at or near \"\"\"\"", 12),
        ("create peer a from postgres with (a = 1, a = 2)", "option \"a\" provided more than once", 41),
        ("create peer a from postgres with (password = 'geheim", "unterminated or malformed literal", 45),
        ("create or replace peer if not exists a", "syntax error at or near \"not\"", 26),
        ("alter peer a", "syntax error at end of input", 12),
        ("alter peer a set", "syntax error at end of input", 16),
        ("alter peer a set (password = 'geheim' host)", "syntax error at or near \"host\"", 38),
        ("alter peer a set (x = 1, x = 2)", "option \"x\" provided more than once", 25),
        ("alter peer a reset (x = 1)", "syntax error at or near \"=\"", 22),
        ("explain create mirror m", "syntax error at end of input", 23),
        ("explain (costs off) create mirror m from a to b for all tables", "unrecognized EXPLAIN option \"costs\"", 9),
        ("cancel task", "syntax error at end of input", 11),
        ("show task seven, 8", "syntax error at or near \",\"", 15),
        ("alter peer a refresh", "syntax error at end of input", 20),
        ("alter peer a refresh schema b,", "syntax error at end of input", 30),
        ("alter peer a rename b", "syntax error at or near \"b\"", 20),
        ("alter peer a options (password 'geheim')", "syntax error at or near \"options\"", 13),
        ("comment on peer a", "syntax error at end of input", 17),
        ("comment on peer a is 5", "syntax error at or near \"5\"", 21),
        ("drop peer a b", "syntax error at or near \"b\"", 12),
        ("drop peer a,", "syntax error at end of input", 12),
        ("create mirror m from a to b", "syntax error at end of input", 27),
        ("create mirror m from a to b for tables", "syntax error at end of input", 38),
        ("create mirror m from a to b with table mapping (a)", "syntax error at or near \")\"", 49),
        ("create mirror m from a to b with table mapping ({from: a})", "syntax error at or near \"}\"", 56),
        ("create mirror m from a to b for table t.u.v", "syntax error at or near \".\"", 41),
        ("pause mirror", "syntax error at end of input", 12),
        ("wait for mirror m state", "syntax error at end of input", 23),
        ("show mirror m n", "syntax error at or near \"n\"", 14),
    ] {
        assert_eq!(refusal(text), ("42601".to_owned(), message.to_owned(), at), "{text}");
    }
}

#[test]
fn what_the_engine_cannot_do_yet_is_said_where_it_stands() {
    for (text, at) in [
        ("create mirror m from a to b for table t where (x > $1)", 51),
        ("create mirror m from a to b for table t set (x = lower(x))", 40),
        ("create mirror m from a to b for table t (a) to u (b)", 49),
    ] {
        let (sqlstate, _, position) = refusal(text);
        assert_eq!((sqlstate.as_str(), position), ("0A000", at), "{text}");
    }
}

#[test]
fn spans_count_characters_and_fall_back_to_what_holds_the_part() {
    let spans =
        ours("create peer \"é\" from postgres\n with (host = 'ü', port 1)".replace("port 1", "port '1'").as_str())
            .spans;
    assert_eq!(spans.find("name"), Some(12));
    assert_eq!(spans.find("type"), Some(21));
    assert_eq!(spans.find("options"), Some(31));
    assert_eq!(spans.find("option.host.value"), Some(44));
    assert_eq!(spans.find("option.port"), Some(49));
    assert_eq!(spans.find("option.user"), Some(31));
    assert_eq!(ours("drop peer a, b").spans.find("name.2"), Some(13));
    assert_eq!(ours("drop peer a, b").spans.find("name"), Some(10));
    assert_eq!(ours("create mirror m from a to b for table t, u").spans.find("table.2"), Some(41));
    assert_eq!(spans.find("nonsense"), None);
}

#[test]
fn long_names_are_cut_at_a_character() {
    let long = "é".repeat(40);
    assert_eq!(cursor::truncated(&long).len(), 62);
    assert_eq!(ours(&format!("drop peer {long}")).spans.find("name"), Some(10));
}

#[test]
fn debug_shows_no_value() {
    let statement = ours("create peer a from postgres with (password = 'geheim')").statement;
    assert!(!format!("{statement:?}").contains("geheim"));
    assert!(format!("{:?}", Value::Parameter(3)).contains('3'));
}
