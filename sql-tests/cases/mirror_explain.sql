-- EXPLAIN says what CREATE and ALTER MIRROR would do, and all that is in the way, and makes nothing.
\c :shop
create type mood as enum ('sad', 'ok');
create table orders (id int primary key, state mood);
insert into orders select i, 'ok' from generate_series(1, 1000) i;
create table notes (note text);
create table log (id int primary key);
analyze orders;
\c :dwh
create table filled (id int primary key, state text);
insert into filled values (1, 'x');
create table narrow (id int primary key);
\c :gate
create peer shop from postgres with (host = :'peer_host', port = :peer_port, user = 'postgres', database = 'shop');
create peer dwh from postgres with (host = :'peer_host', port = :peer_port, user = 'postgres', database = 'dwh');
\pset format unaligned
explain create mirror m from shop to dwh for table orders to crm.orders, notes;
-- All that is in the way is said at once.
explain create mirror m from shop to dwh for table orders to filled, log (id) to narrow, nowhere;
explain create mirror m from shop to dwh for table notes with (mode = stream_only);
explain (format json) create mirror m from shop to dwh for table log with (create_tables = false);
explain create mirror m from shop to dwh for table orders where (id <= 10) to crm.few;
explain create mirror m from shop to dwh for table orders where (nothing > 10) to crm.few;
select count(*) from mirrors;
select count(*) from tasks;
begin;
create mirror m from shop to dwh for table orders to crm.orders, log;
pause mirror m;
commit;
explain alter mirror m drop table log;
explain alter mirror m add table notes;
explain alter mirror m alter table log where (id > 3);
explain alter mirror m set (batch_rows_max = 7, on_error = quarantine_table);
explain alter mirror m rename to n;
select name, options, jsonb_array_length(selection -> 'tables') as tables from mirrors;
-- Its errors are the statement's own.
explain create mirror m from shop to dwh for all tables;
explain create mirror n from shop to nobody for all tables;
explain create mirror n from shop to dwh for all tables with (batch_rows = 5);
explain alter mirror n add table notes;
explain alter mirror m drop table nowhere;
explain create mirror n from shop to dwh;
explain (format json) create mirror n from shop to dwh for tables;
explain (costs off) create mirror n from shop to dwh for all tables;
explain (format yaml) create mirror n from shop to dwh for all tables;
explain analyze create mirror n from shop to dwh for all tables;
begin;
create peer other from postgres with (host = :'peer_host', port = :peer_port, user = 'postgres', database = 'dwh');
explain create mirror n from shop to other for all tables;
rollback;
begin read only;
explain create mirror n from shop to dwh for all tables;
rollback;
-- Neither side has got anything.
\c :shop
select pubname from pg_publication;
select slot_name from pg_replication_slots where database = current_database();
\c :dwh
select nspname from pg_namespace where nspname in ('crm', 'peergate');
\c :gate
set role peergate_admin;
explain alter mirror m rename to n;
set role peergate_operator;
explain create mirror n from shop to dwh for all tables;
reset role;
