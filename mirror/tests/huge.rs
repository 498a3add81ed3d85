//! Large rows and large transactions, within little memory. `docs/benchmarks.md` has the figures of truly large ones.

use crate::support::{ask, start_servers};

#[tokio::test(flavor = "multi_thread")]
async fn large_rows_and_transactions_of_every_shape() {
    // The walsender's patience is short: it must hear from us while the target is busy.
    let mut fixture = start_servers(&[("wal_sender_timeout", "2s")]).await;
    let tables: String = (0..100).map(|n| format!("create table t{n} (id int primary key, v text unique);")).collect();
    fixture.source.batch_execute(&format!("begin; {tables} commit; create table big (id int primary key, a text, b bytea, c text); alter table big alter a set storage external, alter b set storage external; create table log (id bigint, n int)")).await.unwrap();
    // Large values are there before the copy too: some as they are, some that the source has to unpack.
    let large = "create table heavy (id int primary key, a text, j jsonb, e text); alter table heavy alter e set storage external;
                 insert into heavy select i, repeat(md5(i::text), 400000), jsonb_build_object('k', repeat('y', 3000000)), repeat(i::text, 5000000) from generate_series(1, 3) i;
                 insert into heavy select i, null, '{}', '' from generate_series(4, 2000) i";
    fixture.source.batch_execute(large).await.unwrap();
    fixture.start_engine("node-1");
    fixture.create_mirror(r#"{"all": true}"#, r#"{"memory_max": "4MB"}"#).await;
    fixture.caught_up().await;
    let sizes = "select sum(length(a)) || ' ' || sum(length(j::text)) || ' ' || sum(length(e)) || ' ' || md5(string_agg(md5(concat(a, j, e)), '' order by id)) from heavy";
    assert_eq!(ask(&fixture.target, sizes).await, ask(&fixture.source, sizes).await);
    fixture
        .source
        .batch_execute("update heavy set id = id + 10000 where id < 3; delete from heavy where id = 3")
        .await
        .unwrap();
    let many_tables: String = (0..100)
        .map(|n| format!("insert into t{n} values (1, 'a'), (2, 'b'), (3, 'c'); update t{n} set v = 'd' where id = 1; update t{n} set v = 'a' where id = 2; delete from t{n} where id = 3;"))
        .collect();
    let subtransactions = "do $$ begin
        for i in 1..1000 loop
            begin
                insert into log values (-i, i);
                if i % 3 = 0 then raise division_by_zero; end if;
            exception when division_by_zero then null;
            end;
        end loop; end $$";
    for work in [
        "insert into log select i, 0 from generate_series(1, 200000) i",
        "insert into big values (1, repeat('x', 24000000), decode(repeat('00ff', 6000000), 'hex'), 'c'); update big set c = 'd'; update big set id = 2, a = a || 'y'",
        &format!("begin; {many_tables} commit"),
        &format!(
            "begin; {subtransactions}; savepoint a; insert into log values (0, 1); savepoint b; insert into log values (0, 2); rollback to a; insert into log values (0, 3); release a; commit"
        ),
        "begin; update big set id = 3; delete from big; insert into big values (4, repeat('z', 9000000)); truncate log; insert into log select i, 1 from generate_series(1, 50000) i; commit",
    ] {
        fixture.source.batch_execute(work).await.unwrap();
        fixture.caught_up().await;
        fixture.assert_equal().await;
    }
    let failures = "select count(*) from peergate.mirror_events where level <> 'info' and kind = 'error'";
    assert_eq!(fixture.ask(failures).await, "0");
    assert_eq!(ask(&fixture.target, "select count(*) from log where n = 1").await, "50000");
}
