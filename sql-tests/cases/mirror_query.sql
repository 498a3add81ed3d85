-- A mirror of a query from its creation to its end: each statement about it, and what the catalog shows.
create peer shop from postgres with (host = :'peer_host', port = :peer_port, user = 'postgres', database = 'shop');
create peer dwh from postgres with (host = :'peer_host', port = :peer_port, user = 'postgres', database = 'dwh');
\connect :shop
create table orders (id bigint primary key, customer text not null, paid numeric(10, 2));
insert into orders select i, 'c' || i % 3, i from generate_series(1, 25) i;
\connect :gate
explain create mirror paid from shop to dwh for $$select * from orders$$ with (target_table = 'reports.paid', watermark_column = 'id');
explain create mirror paid from shop to dwh for $$select customer from orders$$ with (target_table = 'reports.paid', mode = upsert, key_columns = 'id');
create mirror paid from shop to dwh for $$select id, customer, paid from orders where id between {{.start}} and {{.end}}$$
    with (target_table = 'reports.paid', watermark_table = 'orders', watermark_column = 'id', partition_rows = 10, on_demand = true);
wait for mirror paid timeout 60;
execute mirror paid;
wait for mirror paid timeout 60;
select round, state, replaces, lower_bound, upper_bound, partitions, partitions_done, rows, rows_deleted, waits_for from mirror_rounds where mirror = 'paid';
select round, partition, lower_bound, upper_bound, state, rows from mirror_partitions where mirror = 'paid' order by 2;
show mirror paid;
select name, selection, options from mirrors;
\connect :shop
insert into orders values (26, 'new', 1);
\connect :gate
execute mirror if exists paid;
wait for mirror paid timeout 60;
\connect :dwh
select count(*), max(id) from reports.paid;
\d reports.paid
\connect :gate
explain alter mirror paid set (num_rows_per_partition = 5);
alter mirror paid set (num_rows_per_partition = 5, parallelism = 1);
alter mirror paid reset (parallel_workers);
resync mirror paid;
wait for mirror paid timeout 60;
select round, replaces, lower_bound, upper_bound, partitions, rows from mirror_rounds where mirror = 'paid' order by round;
comment on mirror paid is 'what was paid';
pause mirror paid;
resume mirror paid;
alter mirror paid rename to bills;
-- PeerDB's names, and a row for each key that follows its changes.
create mirror customers from shop to dwh for $$select customer, sum(paid) as paid from orders group by 1$$
    with (destination_table_name = 'customers', mode = 'upsert', unique_key_columns = 'customer', num_rows_per_partition = 1000, parallelism = 2,
          refresh_interval = 3600, watermark_column = '', staging_path = '', detect_deletes = true);
create mirror if not exists customers from shop to dwh for $$select 1$$ with (target_table = 'x', mode = overwrite);
wait for mirror customers timeout 60;
\connect :shop
delete from orders where customer = 'c1';
update orders set paid = 0 where id = 2;
\connect :gate
execute mirror customers;
wait for mirror customers timeout 60;
\connect :dwh
table customers order by 1;
\d customers
\connect :gate
create mirror once from shop to dwh for $$select count(*) as n from orders$$ with (target_table = 'once', run_once = true);
wait for mirror once timeout 60;
select name, source, target, state from mirrors order by name;
select kind, mirror, state from tasks order by id;
drop mirror customers, bills, once;
