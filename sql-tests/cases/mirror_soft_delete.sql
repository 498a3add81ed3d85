-- Rows that are deleted on the source stay on the target, marked, and say when they were written.
\c :shop
create table orders (id int primary key, code text unique, note text); insert into orders select i, 'c' || i, 'note ' || i from generate_series(1, 5) i;
create table log (what text); insert into log values ('seen');
\c :gate
create peer shop from postgres with (host = :'peer_host', port = :peer_port, user = 'postgres', database = 'shop');
create peer dwh from postgres with (host = :'peer_host', port = :peer_port, user = 'postgres', database = 'dwh');
create mirror m from shop to dwh for table orders, log with (soft_delete_column = 'deleted', synced_at_column = 'synced_at');
wait for mirror m;
\c :dwh
\d orders
\c :shop
delete from orders where id in (2, 3, 4);
insert into orders values (3, 'c2', 'again');
update orders set id = 50 where id = 5;
truncate log;
insert into log values ('new');
\c :gate
wait for mirror m;
\c :dwh
select id, code, note, deleted, synced_at is not null as synced from orders order by id;
select what, deleted from log order by 1;
\c :gate
verify mirror m;
-- What marks rows cannot be taken away or become something else; when they were written can.
alter mirror m set (soft_delete_column = 'gone');
alter mirror m reset (soft_delete_column);
alter mirror m set (disable_peerdb_columns = true);
alter mirror m set (synced_at_column = 'deleted');
alter mirror m reset (synced_at_column);
explain create mirror n from shop to dwh for table orders to others with (soft_delete_col_name = 'note');
\c :dwh
create table plain (id int primary key, code text, note text);
\c :gate
\pset format unaligned
explain create mirror n from shop to dwh for table orders to plain with (soft_delete_column = 'Gone', synced_at_column = 'at');
\pset format aligned
create mirror n from shop to dwh for table log to others with (soft_delete_col_name = 'a', synced_at_col_name = 'a');
create mirror n from shop to dwh for table log to others with (soft_delete_col_name = 'a', soft_delete_column = 'b');
begin;
create mirror n from shop to dwh for table log to others with (soft_delete_col_name = 'a', synced_at_col_name = 'b', disable_peerdb_columns = true);
select name, options from mirrors order by name;
rollback;
