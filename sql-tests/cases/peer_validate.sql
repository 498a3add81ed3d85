-- VALIDATE PEER tells all it finds at once, each with what mends it, and leaves nothing behind.
create peer shop from postgres with (host = :'peer_host', port = :peer_port, user = 'postgres', database = 'shop');
\c :shop
create table keyed (id int primary key);
create table keyless (id int);
create table "Odd.name" (id int);
create table whole (id int);
alter table whole replica identity full;
create table later (id int primary key deferrable);
create unlogged table lost (id int primary key);
create role weak login;
alter table keyed owner to weak;
create database strict owner weak;
\c :gate
validate peer shop \g (format=unaligned tuples_only) | sed -E 's/in [0-9]+ ms/in N ms/; s/^clock\|ok\|.*/clock|ok|SKEW/; s/^version\|ok\|.*/version|ok|VERSION/'
validate peer shop verbose \g (format=unaligned tuples_only) | grep -E 'REPLICATION;|ON DATABASE'
-- A role that may nothing, in a database of its own.
create peer weak from postgres with (host = :'peer_host', port = :peer_port, user = 'weak', database = 'shop', options = '-c default_transaction_read_only=on');
validate peer weak \g (format=unaligned tuples_only) | grep -E 'failed|warning' | grep -v '^session_replication_role|^replication origins'
\c :shop
select (select count(*) from pg_replication_slots) as slots, (select count(*) from pg_publication) as publications, (select count(*) from pg_namespace where nspname like 'peergate%') as schemas;
\c :gate
alter peer weak set (port = 1, validate = false);
validate peer weak \g (format=unaligned tuples_only)
-- In a transaction it looks at what others see.
begin;
validate peer weak \g (format=unaligned tuples_only)
alter peer shop rename to store;
validate peer store;
rollback;
validate peer shp;
validate peer;
validate peer shop quietly;
drop peer shop, weak;
