#!/usr/bin/env bash
# sqitch: deploy, verify and revert changes with our statements in them, by psql and by DBD::Pg; a change that fails leaves nothing.
. "$(dirname "$0")/common.sh"

export SQITCH_FULLNAME=tester SQITCH_EMAIL=tester@example.com SQITCH_CONFIG=$PWD/none SQITCH_USER_CONFIG=$PWD/none TZ=UTC
target=db:pg:$PGDATABASE
quiet() { "$@" >sqitch.out 2>&1 || { cat sqitch.out; return 1; }; }

quiet sqitch init shop --engine pg
quiet sqitch add orders -n 'a table and its mirror'
cat >deploy/orders.sql <<'SQL'
BEGIN;
CREATE TABLE orders (id bigint PRIMARY KEY);
CREATE PEER shop FROM POSTGRES WITH (host = 'h', user = 'u', password = 'geheim', validate = false);
CREATE MIRROR orders FROM shop TO target FOR TABLE orders;
COMMIT;
SQL
cat >verify/orders.sql <<'SQL'
BEGIN;
SELECT id FROM orders WHERE false;
SELECT 1 / count(*) FROM peers WHERE name = 'shop';
SHOW MIRROR orders;
ROLLBACK;
SQL
cat >revert/orders.sql <<'SQL'
BEGIN;
DROP MIRROR orders;
DROP PEER shop;
DROP TABLE orders;
COMMIT;
SQL
quiet sqitch deploy --verify "$target"
quiet sqitch verify "$target"
grep -q 'Verify successful' sqitch.out
expect "$(ask "select name from peers where name = 'shop' union all select name from mirrors where name = 'orders'")" $'shop\norders'

# The second statement of ours fails: psql stops, and the change is not there, nor in sqitch's own tables.
quiet sqitch add broken -n 'cannot be'
cat >deploy/broken.sql <<'SQL'
BEGIN;
CREATE PEER half FROM POSTGRES WITH (host = 'h', user = 'u', validate = false);
CREATE PEER shop FROM POSTGRES WITH (host = 'h', user = 'u', validate = false);
COMMIT;
SQL
if sqitch deploy "$target" >sqitch.out 2>&1; then
    echo "a change that cannot be was deployed"
    exit 1
fi
grep -q 'peer "shop" already exists' sqitch.out
grep -q 'LINE 1: CREATE PEER shop' sqitch.out
expect "$(ask "select name from peers where name = 'half'")" ''
expect "$(ask "select change || ' ' || event from sqitch.events order by committed_at")" $'orders deploy\nbroken fail'

quiet sqitch revert -y "$target"
expect "$(ask "select name from peers where name = 'shop' union all select name from mirrors where name = 'orders'")" ''
expect "$(ask "select count(*) from sqitch.changes")" 0
