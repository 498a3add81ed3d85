//! What the statements become, and where positions lead.

use serde_json::json;

use super::*;

const NONCE: &str = "n0";

fn rewritten(text: &str) -> Rewritten {
    let plan = plan(text.as_bytes(), Encoding::Utf8, true).unwrap_or_else(|| panic!("{text}"));
    let found = Findings::default()
        .with("options", json!({"host": "é\\"}))
        .with("secrets", json!({"password": "v1.x"}))
        .with("channels", json!([{"channel": "n"}]))
        .with("validation", json!({}));
    let findings = plan.inspected().map(|_| Ok(found.clone())).collect();
    plan.render(NONCE, findings)
}

fn text(text: &str) -> String {
    String::from_utf8(rewritten(text).text).unwrap()
}

#[test]
fn each_statement_becomes_its_call() {
    for (statement, expected) in [
        (
            "create peer if not exists shop from POSTGRES with (password = 'geheim')",
            r#"CALL peergate.create_peer('shop', 'postgres', options => E'{"host":"\\u00e9\\\\"}'::pg_catalog.jsonb, secrets => '{"password":"v1.x"}'::pg_catalog.jsonb, if_not_exists => true, validation => '{}'::pg_catalog.jsonb, nonce => 'n0')"#,
        ),
        (
            "drop peer a, \"b'c\" cascade",
            "CALL peergate.drop_peer(ARRAY['a', 'b''c']::pg_catalog.text[], cascade => true, nonce => 'n0')",
        ),
        (
            "create mirror m from a to b for table t (x) to s.u with (mode = copy_only)",
            r#"CALL peergate.create_mirror('m', 'a', 'b', '{"tables":[{"columns":["x"],"from":{"name":"t","schema":"public"},"to":{"name":"u","schema":"s"}}]}'::pg_catalog.jsonb, options => '{"mode":"copy_only"}'::pg_catalog.jsonb, nonce => 'n0')"#,
        ),
        (
            "create mirror if not exists m from a to b for tables in schema p to q except (p.x)",
            r#"CALL peergate.create_mirror('m', 'a', 'b', '{"except":[{"name":"x","schema":"p"}],"schemas":[{"from":"p","to":"q"}]}'::pg_catalog.jsonb, if_not_exists => true, nonce => 'n0')"#,
        ),
        (
            "drop mirror if exists m keep target metadata",
            "CALL peergate.drop_mirror(ARRAY['m']::pg_catalog.text[], if_exists => true, keep_target_metadata => true, nonce => 'n0')",
        ),
        (
            "drop mirror m force",
            "CALL peergate.drop_mirror(ARRAY['m']::pg_catalog.text[], force => true, nonce => 'n0')",
        ),
        (
            "create alert a on mirror m when x > 1 for 5 or y = z notify n (url = 'geheim') with (o = 1)",
            r#"CALL peergate.create_alert('a', on_kind => 'mirror', on_name => 'm', conditions => '[{"for":"5 seconds","metric":"x","op":">","value":"1"},{"metric":"y","op":"=","value":"z"}]'::pg_catalog.jsonb, channels => '[{"channel":"n"}]'::pg_catalog.jsonb, options => '{"o":"1"}'::pg_catalog.jsonb, secrets => '{"password":"v1.x"}'::pg_catalog.jsonb, validation => '{}'::pg_catalog.jsonb, nonce => 'n0')"#,
        ),
        (
            "alter alert if exists a on all peers notify n",
            r#"CALL peergate.alter_alert('a', on_kind => 'peer', on_name => NULL, channels => '[{"channel":"n"}]'::pg_catalog.jsonb, secrets => '{"password":"v1.x"}'::pg_catalog.jsonb, if_exists => true, validation => '{}'::pg_catalog.jsonb, nonce => 'n0')"#,
        ),
        (
            "alter alert a when x > $1 for '5s'",
            "CALL peergate.alter_alert('a', conditions => pg_catalog.jsonb_build_array(pg_catalog.jsonb_build_object('metric', 'x', 'op', '>', 'value', $1::pg_catalog.text, 'for', '5s'::pg_catalog.text)), nonce => 'n0')",
        ),
        ("alter alert a disable", "CALL peergate.alter_alert('a', enabled => false, nonce => 'n0')"),
        ("alter alert a rename to b", "CALL peergate.rename_alert('a', 'b', nonce => 'n0')"),
        ("test alert a", "CALL peergate.test_alert('a', nonce => 'n0')"),
        (
            "wait for alert a timeout 5",
            "CALL peergate.wait_for_alert('a', timeout => '5 seconds'::pg_catalog.interval, nonce => 'n0')",
        ),
        (
            "create mirror m from a to b for $$select 'x'$$ with (target_table = 't')",
            r#"CALL peergate.create_query_mirror('m', 'a', 'b', query => 'select ''x'''::pg_catalog.text, options => '{"target_table":"t"}'::pg_catalog.jsonb, nonce => 'n0')"#,
        ),
        (
            "create mirror if not exists m from a to b for $1",
            "CALL peergate.create_query_mirror('m', 'a', 'b', query => $1::pg_catalog.text::pg_catalog.text, if_not_exists => true, nonce => 'n0')",
        ),
        ("execute mirror if exists m", "CALL peergate.execute_mirror('m', if_exists => true, nonce => 'n0')"),
        ("pause mirror m", "CALL peergate.pause_mirror('m', nonce => 'n0')"),
        ("resume mirror if exists m", "CALL peergate.resume_mirror('m', if_exists => true, nonce => 'n0')"),
        (
            "wait for mirror m lsn '0/1' timeout 5",
            "CALL peergate.wait_for_mirror('m', up_to => '0/1'::pg_catalog.pg_lsn, timeout => '5 seconds'::pg_catalog.interval, nonce => 'n0')",
        ),
        (
            "wait for mirror m state running",
            "CALL peergate.wait_for_mirror('m', up_to_state => 'running'::pg_catalog.text, nonce => 'n0')",
        ),
        (
            "create or replace peer shop from POSTGRES with (password = 'geheim')",
            r#"CALL peergate.create_peer('shop', 'postgres', options => E'{"host":"\\u00e9\\\\"}'::pg_catalog.jsonb, secrets => '{"password":"v1.x"}'::pg_catalog.jsonb, or_replace => true, validation => '{}'::pg_catalog.jsonb, nonce => 'n0')"#,
        ),
        (
            "alter peer shop set (password = 'geheim')",
            r#"CALL peergate.alter_peer('shop', options => E'{"host":"\\u00e9\\\\"}'::pg_catalog.jsonb, secrets => '{"password":"v1.x"}'::pg_catalog.jsonb, validation => '{}'::pg_catalog.jsonb, nonce => 'n0')"#,
        ),
        (
            "alter peer if exists a rename to \"B\"",
            "CALL peergate.rename_peer('a', 'B', if_exists => true, nonce => 'n0')",
        ),
        (
            "alter peer a owner to current_user",
            "CALL peergate.change_peer_owner('a', CURRENT_USER::pg_catalog.text, nonce => 'n0')",
        ),
        ("alter peer a refresh schema", "CALL peergate.refresh_peer('a', nonce => 'n0')"),
        (
            "alter peer if exists a refresh schema s, \"T\"",
            "CALL peergate.refresh_peer('a', ARRAY['s', 'T']::pg_catalog.text[], if_exists => true, nonce => 'n0')",
        ),
        ("validate peer a", "SELECT * FROM peergate.validate_peer('a', validation => '{}'::pg_catalog.jsonb)"),
        ("comment on peer a is 'x'", "CALL peergate.comment_on_peer('a', 'x', nonce => 'n0')"),
        ("comment on mirror m is null", "CALL peergate.comment_on_mirror('m', NULL, nonce => 'n0')"),
        ("show peers", "SELECT * FROM peergate.show_peers"),
        ("show peer a", "SELECT * FROM peergate.show_peer('a')"),
        (
            "explain alter mirror \"M\" refresh tables",
            "SELECT * FROM peergate.explain_mirror('CALL peergate.refresh_mirror_tables(''M'')', validation => '{}'::pg_catalog.jsonb)",
        ),
        (
            "explain (format json) alter mirror m drop table t",
            r#"SELECT peergate.explain_mirror_json('CALL peergate.drop_mirror_tables(''m'', ''[{"name":"t","schema":"public"}]''::pg_catalog.jsonb)', validation => '{}'::pg_catalog.jsonb) AS "QUERY PLAN""#,
        ),
        ("show task 7", "SELECT * FROM peergate.show_task('7'::pg_catalog.int8)"),
        ("cancel task 7", "CALL peergate.cancel_task('7'::pg_catalog.int8, nonce => 'n0')"),
        ("show mirror \"M\"", "SELECT * FROM peergate.show_mirror('M')"),
    ] {
        assert_eq!(text(statement), expected, "{statement}");
    }
}

#[test]
fn everything_around_stays_as_it_is() {
    assert_eq!(
        text("select 'é' ; /* x */ show peers -- y\n; select 'show peers'"),
        "select 'é' ; /* x */ SELECT * FROM peergate.show_peers -- y\n; select 'show peers'"
    );
    for text in [
        "select 1",
        "select 'create peer x from postgres'",
        "create table peers (peer int); alter table mirror set (fillfactor = 50)",
    ] {
        assert!(plan(text.as_bytes(), Encoding::Utf8, true).is_none(), "{text}");
    }
}

#[test]
fn what_is_malformed_is_cut_to_its_first_words() {
    let r = rewritten("select 1; create /* c */ peer shop frm postgres with (password = 'geheim'); select 2");
    assert_eq!(String::from_utf8_lossy(&r.text), "select 1; create /* c */ peer; select 2");
    assert_eq!(r.placed[0].refusal.as_ref().map(|r| r.at), Some(25));
    // Postgres complains of the noun, or of the end behind it.
    assert_eq!(r.place(25), Place::Inside(0, 25));
    let r = rewritten("alter peer shop sett (password 'geheim')");
    assert_eq!((r.text.as_slice(), r.place(6)), (b"alter peer".as_slice(), Place::Inside(0, 6)));
    assert_eq!(text("create or replace peer x frm postgres with (password 'geheim')"), "create or replace peer");
}

#[test]
fn what_cannot_be_done_yet_raises_where_it_stands() {
    let r = rewritten("create mirror m from a to b for table t (a) to u (b)");
    assert_eq!(
        String::from_utf8_lossy(&r.text),
        "CALL peergate.raise_error('0A000', 'renaming columns is not supported yet', at => 'refusal')"
    );
    assert_eq!(r.placed[0].spans.find("refusal"), Some(49));
}

#[test]
fn positions_behind_a_replacement_are_the_clients() {
    let original = "select 'é'; show peers; select nonsense; drop peer a; x";
    let r = rewritten(original);
    let new = String::from_utf8(r.text.clone()).unwrap();
    let at = |text: &str, what: &str| text[..text.find(what).unwrap()].chars().count();
    for what in ["select 'é'", "'é'", "nonsense"] {
        assert_eq!(r.place(at(&new, what)), Place::Outside(at(original, what)), "{what}");
    }
    assert_eq!(r.place(new.chars().count() - 1), Place::Outside(original.chars().count() - 1));
    assert_eq!(r.place(at(&new, "peergate.show_peers")), Place::Inside(0, at(original, "show")));
    assert_eq!(r.at_ordinal(1).map(|p| p.original.clone()), Some(at(original, "show")..at(original, "; select n")));
    assert_eq!(r.at_ordinal(2).map(|p| p.ordinal), None);
}

#[test]
fn a_bad_literal_is_shown_where_it_was_written() {
    let original = "wait for mirror \"é\" lsn 'x' timeout 'y'";
    let r = rewritten(original);
    let new = String::from_utf8(r.text.clone()).unwrap();
    let at = |text: &str, what: &str| text[..text.find(what).unwrap()].chars().count();
    assert_eq!(r.place(at(&new, "'x'")), Place::Inside(0, at(original, "'x'")));
    assert_eq!(r.place(at(&new, "'y'")), Place::Inside(0, at(original, "'y'")));
    assert_eq!(r.waits_for, ["é"]);
}

#[test]
fn a_long_name_is_left_to_the_server_to_cut() {
    let long = "a".repeat(64);
    assert!(text(&format!("drop peer {long}")).contains(&format!("ARRAY[peergate.truncate_identifier('{long}')]")));
    let r = rewritten(&format!("wait for mirror {long}"));
    assert_eq!(r.waits_for, ["a".repeat(63)]);
}

#[test]
fn a_prepared_create_peer_takes_its_values_from_a_parameter_of_its_own() {
    let plan_of = |text: &'static str| plan(text.as_bytes(), Encoding::Utf8, true).unwrap();
    let (r, prepared) =
        plan_of("create peer a from postgres with (host = 'geheim', password = $1)").render_prepared(NONCE, 0);
    assert_eq!(prepared.map(|p| p.hidden), Some(2));
    let text = String::from_utf8(r.text).unwrap();
    assert!(text.contains("$2::pg_catalog.text::pg_catalog.jsonb OPERATOR(pg_catalog.->) 'secrets'"), "{text}");
    assert!(
        text.ends_with(", nonce => CASE WHEN true THEN 'n0' ELSE pg_catalog.concat($1::pg_catalog.text) END)"),
        "{text}"
    );
    assert!(!text.contains("geheim"));
    let (_, prepared) = plan_of("create peer a from postgres").render_prepared(NONCE, 3);
    assert_eq!(prepared.map(|p| p.hidden), Some(4));
    let (r, prepared) =
        plan_of("select 1; create peer a from postgres with (password = 'geheim')").render_prepared(NONCE, 0);
    assert!(prepared.is_none());
    assert_eq!(r.text, b"select 1; CALL peergate.finish()");
}

#[test]
fn parameters_of_other_statements_are_passed_natively() {
    assert!(
        text("create mirror m from a to b for all tables with (mode = 'x', copy_parallel_workers = $1)").contains(
            "options => pg_catalog.jsonb_build_object('mode', 'x'::pg_catalog.text, 'copy_parallel_workers', $1::pg_catalog.text)"
        )
    );
    assert!(text("wait for mirror m timeout $1").contains("timeout => $1::pg_catalog.text::pg_catalog.interval"));
}

#[test]
fn other_encodings_are_read_or_refused_never_guessed() {
    let latin1 = b"show mirror \"\xe9\"";
    assert_eq!(
        plan(latin1, Encoding::Latin1, true).unwrap().render(NONCE, vec![]).text,
        b"SELECT * FROM peergate.show_mirror('\xe9')"
    );
    let text = plan(latin1, Encoding::AsciiSafe, true).unwrap().render(NONCE, vec![]).text;
    assert!(text.starts_with(b"CALL peergate.raise_error('0A000'"));
    assert!(plan(latin1, Encoding::Unsafe, true).is_none());
    let text = plan(br"show mirror m; drop peer a\b", Encoding::Utf8, false).unwrap().render(NONCE, vec![]).text;
    assert!(String::from_utf8(text).unwrap().contains("raise_error"));
}

#[test]
fn any_text_with_our_words_is_rewritten_without_panic() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let parts = [
        "create", "peer", "mirror", "drop", "from", "to", "for", "table", "with", "(", ")", "'", "\"", "$$", "$1", ",",
        ";", "é", "\\", "E'", "{", "}", ":", "=", "--", "\n", "/*", "*/", "wait", "show", "[", "]", ".", "1", "U&'",
        "-",
    ];
    for _ in 0..20_000 {
        let mut text = String::new();
        for _ in 0..12 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            text.push_str(parts[(state >> 33) as usize % parts.len()]);
            if state >> 60 > 3 {
                text.push(' ');
            }
        }
        if let Some(plan) = plan(text.as_bytes(), Encoding::Utf8, state & 1 == 0) {
            let r = plan.render(NONCE, vec![]);
            for position in 0..r.text.len() + 2 {
                let _ = r.place(position);
            }
        }
    }
}
