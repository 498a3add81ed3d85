#!/usr/bin/env bash
# pgbench in its three protocols, with pipelines, and with our statements in its scripts.
. "$(dirname "$0")/common.sh"

quiet() { "$@" >pgbench.out 2>&1 || { cat pgbench.out; return 1; }; }

quiet pgbench -i -s 1
expect "$(ask 'select count(*) from pgbench_accounts')" 100000

# Every transaction that pgbench counts is there: TPC-B leaves a row of history each, and the sums agree.
total=0
for protocol in simple extended prepared; do
    quiet pgbench -n -M $protocol -c 4 -j 2 -t 50
    grep -q 'number of transactions actually processed: 200/200' pgbench.out
    quiet pgbench -n -S -M $protocol -c 4 -j 2 -t 200
    total=$((total + 200))
    expect "$(ask "select count(*), (select sum(abalance) from pgbench_accounts) = sum(delta) from pgbench_history")" "$total|t"
done

cat >pipeline.sql <<'SQL'
\set aid random(1, 100000)
\startpipeline
begin;
update pgbench_accounts set abalance = abalance + 1 where aid = :aid;
select abalance from pgbench_accounts where aid = :aid;
insert into pgbench_history (tid, bid, aid, delta, mtime) values (1, 1, :aid, 1, now());
commit;
select 1;
\endpipeline
SQL
for protocol in extended prepared; do
    quiet pgbench -n -M $protocol -c 4 -j 2 -t 50 -f pipeline.sql
    total=$((total + 200))
    expect "$(ask "select count(*), (select sum(abalance) from pgbench_accounts) = sum(delta) from pgbench_history")" "$total|t"
done

cat >ours.sql <<'SQL'
begin;
create peer c:client_id from postgres with (host = 'h', port = :client_id, user = 'u', validate = false);
select id from peers where name = 'c' || :client_id;
rollback;
begin;
create peer if not exists d:client_id from postgres with (host = 'h', user = 'u', validate = false);
commit;
drop peer d:client_id;
SQL
# pgbench replaces variables of the extended protocol by parameters, which cannot be part of a name.
quiet pgbench -n -M simple -c 4 -j 2 -t 20 -f ours.sql
cat >ours_pipelined.sql <<'SQL'
\set port 1000 + :client_id
\startpipeline
begin;
create peer piped from postgres with (host = 'h', port = :port, user = 'u', validate = false);
select 1 / count(*) from peers where name = 'piped';
rollback;
show peers;
\endpipeline
SQL
for protocol in extended prepared; do
    quiet pgbench -n -M $protocol -c 4 -j 2 -t 20 -f ours_pipelined.sql
done
expect "$(ask "select string_agg(name, ' ' order by name) from peers")" 'source target'
