#!/usr/bin/env bash
# pg_dump and pg_restore of the catalog database in all formats: through the gateway as directly.
. "$(dirname "$0")/common.sh"

ask "create table big as select i, repeat(md5(i::text), 3) as s, now() as at from generate_series(1, 50000) i" >/dev/null
ask "alter table big add primary key (i)" >/dev/null
# A large object, bytes that are no text, and names that have to be quoted.
ask "create table \"odd Näme\" (b bytea, \"select\" text); insert into \"odd Näme\" values ('\\x00ff5c', E'tab\\tü\\\\N')" >/dev/null
ask "select lo_from_bytea(0, '\\xdeadbeef')" >/dev/null
ask "create peer dumped from postgres with (host = 'h', user = 'u', password = 'geheim', validate = false)" >/dev/null

# A dump without the word against injected psql commands, which is made up each time.
constant() { sed '/^\\\(un\)\?restrict /d'; }

# Nothing is written meanwhile, so that the two are of the same state.
plain() { pg_dump "$@" | constant; }
plain >gate.sql
PGPORT=$DIRECT_PORT plain >direct.sql
cmp gate.sql direct.sql
grep -q 'COPY peergate.peers' gate.sql

plain --inserts --rows-per-insert=100 -T big >gate.inserts
PGPORT=$DIRECT_PORT plain --inserts --rows-per-insert=100 -T big >direct.inserts
cmp gate.inserts direct.inserts

pg_dump -Fc -f gate.custom
PGPORT=$DIRECT_PORT pg_dump -Fc -f direct.custom
pg_dump -Fd -j 3 -f gate.directory
PGPORT=$DIRECT_PORT pg_dump -Fd -j 3 -f direct.directory
for archive in gate.custom direct.custom gate.directory direct.directory; do
    pg_restore -f - "$archive" | constant >"$archive.sql"
    cmp gate.custom.sql "$archive.sql"
done

# Databases are made, filled and dropped through the gateway; what is in them then is what was dumped.
restored=${PGDATABASE}_restored
for archive in gate.custom gate.directory plain; do
    createdb "$restored"
    if [[ $archive == plain ]]; then
        psql -X -q -v ON_ERROR_STOP=1 -d "$restored" -f gate.sql >/dev/null
    else
        pg_restore -j 2 -d "$restored" "$archive"
    fi
    plain -d "$restored" >restored.sql
    cmp gate.sql restored.sql
    dropdb "$restored"
done

# The same in one transaction, over what is there.
pg_restore -1 --clean -d "$PGDATABASE" -t big gate.custom
expect "$(ask 'select count(*), sum(i) from big')" '50000|1250025000'

pg_dumpall --globals-only | constant >gate.globals
PGPORT=$DIRECT_PORT pg_dumpall --globals-only | constant >direct.globals
cmp gate.globals direct.globals

# A dump that is refused says so as it does directly.
for port in "$PGPORT" "$DIRECT_PORT"; do
    if PGPORT=$port pg_dump -t no_such_table >/dev/null 2>"refused.$port"; then
        echo "a table that is not there was dumped"
        exit 1
    fi
done
cmp "refused.$PGPORT" "refused.$DIRECT_PORT"
