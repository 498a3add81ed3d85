#!/usr/bin/env bash
# psql's own commands and variables, by script: what they print through the gateway is what they print directly.
. "$(dirname "$0")/common.sh"

# What changes from session to session is left out.
constant() { sed 's/ with PID [0-9]*\.$//'; }

# TLS is what the client asked for, and so is that the password's proof is bound to the certificate.
psql -X -c '\conninfo' | grep -q 'SSL connection (protocol: TLSv1.3'
PGCHANNELBINDING=require ask 'select 1' >/dev/null

# Runs script.sql both ways; fails unless what is printed, errors too, is the same.
same() {
    psql -X -a <script.sql 2>&1 | constant >gate.out
    PGPORT=$DIRECT_PORT psql -X -a <script.sql 2>&1 | constant >direct.out
    diff -u direct.out gate.out
}

cat >script.sql <<'SQL'
\set VERBOSITY verbose
\set SHOW_CONTEXT always
\timing off
\l template*
\dn+
\dt+ peergate.*
\dv peergate.*
\d+ peergate.peers
\d+ peergate.mirror_status
\df peergate.*
\du
\dconfig work_mem
\sf peergate.finish
select 1 as a, 'é🐘' as b, null as c \gx
select 'select ' || i from generate_series(1, 3) i \gexec
select 7 as seven \gset
\echo :seven
select 1 \; select 2 \; select nope;
\errverbose
begin; create temp table t (a int); \copy t from stdin
1
2
\.
select count(*) from t; select 1/0; select 'not reached';
rollback;
\set ON_ERROR_ROLLBACK on
begin;
select 1/0;
select 'reached';
commit;
\set ON_ERROR_ROLLBACK off
\set FETCH_COUNT 100
select count(*), sum(i) from generate_series(1, 1000) i;
select i from generate_series(1, 250) i offset 240;
\unset FETCH_COUNT
select gen from generate_series(1, 5) gen \crosstabview
select 1 as i, 'x' as j, 2 as v \crosstabview
listen channel; select pg_notify('channel', 'payload') is null; unlisten channel;
\encoding latin1
select 'Ã©' as l;
\encoding utf8
do $$ begin raise notice 'a % notice', 1; raise warning using message = 'w', detail = 'd', hint = 'h'; end $$;
prepare p as select $1::int; execute p (4); deallocate p;
explain (costs off) select * from pg_class where oid = 1;
values (1), (2)
\g (format=unaligned tuples_only=on)
\gdesc
select 1 as a, 'x'::text as b \gdesc
\z peergate.peers
\dd
table nope;
select $1;
\bind 1
SQL
same
grep -q 'ERROR:  42P01: relation "nope" does not exist' gate.out

# Copies by the client, both ways, of many rows.
ask "create table copied (i int, s text)" >/dev/null
psql -X -q -c "\\copy (select i, repeat(md5(i::text), 3) from generate_series(1, 200000) i) to 'rows.out'"
psql -X -q -c "\\copy copied from 'rows.out'"
psql -X -q -c "copy copied to stdout" >copied.out
cmp rows.out copied.out
psql -X -q -c "copy copied to stdout (format binary)" >copied.bin
psql -X -q -c "copy copied from stdin (format binary)" <copied.bin
expect "$(ask 'select count(*), sum(i) from copied')" '400000|40000200000'
expect "$(ask "select i, repeat(md5(i::text), 3) from generate_series(1, 200000) i" | md5sum)" \
    "$(PGPORT=$DIRECT_PORT ask "select i, repeat(md5(i::text), 3) from generate_series(1, 200000) i" | md5sum)"

# Large objects, which psql moves by function calls.
head -c 3000000 /dev/urandom >object.in
oid=$(psql -X -A -t -c '\lo_import object.in' -c '\echo :LASTOID' | tail -1)
psql -X -q -c "\\lo_export $oid object.out"
cmp object.in object.out

# One transaction around a file with our statements: all or nothing.
cat >file.sql <<'SQL'
create table filed (a int);
create peer filed from postgres with (host = 'h', user = 'u', validate = false);
create mirror filed from source to filed for table orders;
drop peer no_such_peer;
SQL
if psql -X -q -1 -v ON_ERROR_STOP=1 -f file.sql >file.out 2>&1; then
    echo "a file with a mistake was run"
    exit 1
fi
grep -q 'file.sql:4: ERROR:  peer "no_such_peer" does not exist' file.out
expect "$(ask "select to_regclass('filed'), (select count(*) from peers where name = 'filed')")" '|0'
sed -i '$d' file.sql
psql -X -q -1 -v ON_ERROR_STOP=1 -f file.sql 2>/dev/null
expect "$(ask "select to_regclass('filed'), (select count(*) from peers where name = 'filed')")" 'filed|1'

# One -c is one string, and one transaction.
psql -X -q -c "create table gone (a int); drop mirror filed; drop peer filed; select 1/0" 2>/dev/null && exit 1
expect "$(ask "select to_regclass('gone'), (select count(*) from peers where name = 'filed')")" '|1'
psql -X -q -c "drop mirror filed; drop peer filed; drop table filed" 2>/dev/null
expect "$(ask "select to_regclass('filed'), (select count(*) from peers where name = 'filed')")" '|0'
