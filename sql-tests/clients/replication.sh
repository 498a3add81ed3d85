#!/usr/bin/env bash
# Programs of the replication protocol: pg_basebackup with the WAL streamed beside it, pg_receivewal, pg_recvlogical.
. "$(dirname "$0")/common.sh"

quiet() { "$@" >quiet.out 2>&1 || { cat quiet.out; return 1; }; }

ask "create table streamed as select generate_series(1, 1000) as i" >/dev/null
quiet pg_basebackup -D backup -X stream -c fast
quiet pg_verifybackup backup

quiet pg_recvlogical --slot "clients_$$" --create-slot -P test_decoding -d "$PGDATABASE"
ask "insert into streamed values (4711)" >/dev/null
end=$(ask "select pg_current_wal_lsn()")
pg_recvlogical --slot "clients_$$" --start --endpos "$end" -f changes -d "$PGDATABASE"
grep -q 'INSERT: i\[integer\]:4711' changes
quiet pg_recvlogical --slot "clients_$$" --drop-slot -d "$PGDATABASE"
expect "$(ask "select count(*) from pg_replication_slots where slot_name = 'clients_$$'")" 0

mkdir wal
ask "select pg_switch_wal()" >/dev/null
end=$(ask "select pg_current_wal_lsn()")
ask "insert into streamed values (1)" >/dev/null
quiet pg_receivewal -D wal --endpos "$end" --no-loop
[[ -n "$(ls wal)" ]]
