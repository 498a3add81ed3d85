-- A peer's tables are foreign tables of the catalog: by peer.schema.table, or in the schema of its name.
\c :shop
create type mood as enum ('sad', 'ok');
create table orders (id int primary key, state mood, note text);
insert into orders values (1, 'ok', 'a'), (2, 'sad', null);
create schema sales;
create table sales.items (order_id int, price numeric(10, 2));
insert into sales.items values (1, 9.5), (1, 0.5);
\c :dwh
create table customers (id int, name text);
insert into customers values (1, 'ann');
\c :gate
create peer shop from postgres with (host = :'peer_host', port = :peer_port, user = 'postgres', database = 'shop');
create peer dwh from postgres with (host = :'peer_host', port = :peer_port, user = 'postgres', database = 'dwh');
-- Joins across peers; a text that names a new peer's tables waits until they are there.
select o.id, o.state, sum(i.price), c.name
from shop.public.orders o join shop.sales.items i on i.order_id = o.id left join dwh.public.customers c on c.id = o.id
group by 1, 2, 4;
select peer, state, tables, schemas, error_message from peer_imports order by peer;
\det shop.*
explain (verbose, costs off) select id from shop.public.orders where id = 1;
select * from shop.public.nowhere;
select nonsense from shop.public.orders;
select * from nobody.public.orders;
insert into shop.public.orders values (3);
-- What has changed on the peer is brought in when that is asked for.
\c :shop
alter table orders add total int default 7;
create table sales.refunds (id int);
drop table sales.items;
\c :gate
alter peer shop refresh schema;
call peergate.wait_for_import('shop');
select * from shop.public.orders order by id;
select count(*) from shop.sales.refunds;
select count(*) from shop.sales.items;
alter peer if exists shop refresh schema sales, public;
alter peer if exists nobody refresh schema;
alter peer nobody refresh schema;
alter peer shop refresh;
alter peer dwh set (import = 'public');
alter peer dwh refresh schema public, sales;
alter peer dwh set (import = 'none');
alter peer dwh refresh schema;
-- Views are in the way of a drop.
create view seen as select * from shop.orders;
drop peer shop;
drop peer shop cascade;
select nspname from pg_namespace where nspname ~ '^shop';
create peer pg_catalog from postgres with (user = 'u', validate = false);
