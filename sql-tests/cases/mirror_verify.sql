-- VERIFY MIRROR compares both sides and says which rows differ; REPAIR mends them, and nothing else.
\c :shop
create table orders (id int primary key, note text); insert into orders select i, 'note ' || i from generate_series(1, 100) i;
create schema crm; create table crm.people ("Name" text primary key, age int, secret text);
insert into crm.people values ('ann', 30, 'x'), ('bob', 40, 'x'), ('O''Hara, "X"', 50, 'x');
create table log (at date, what text); insert into log select '2024-01-01', 'seen' from generate_series(1, 3);
\c :gate
create peer shop from postgres with (host = :'peer_host', port = :peer_port, user = 'postgres', database = 'shop');
create peer dwh from postgres with (host = :'peer_host', port = :peer_port, user = 'postgres', database = 'dwh');
\set VERBOSITY terse
verify mirror m;
create mirror m from shop to dwh for table orders, crm.people ("Name", age) to public.clients, log with (copy_parallel_workers = 1);
wait for mirror m;
verify mirror m;
verify mirror m;
-- Behind its back.
\c :dwh
update orders set note = 'other' where id = 7; delete from orders where id in (8, 9); insert into orders values (1000, 'extra');
update clients set age = 41 where "Name" = 'bob'; update clients set "Name" = 'Nobody' where "Name" like 'O%';
insert into log values ('2024-01-01', 'seen'), (null, 'new');
\c :gate
\x
verify mirror m;
verify mirror m table orders, crm.people;
\x
select source_name, kind, key, copies from verification_differences where task_id = (select max(task_id) from verifications) order by id;
verify mirror m table crm.people repair;
verify mirror m;
verify mirror m repair;
verify mirror m;
select mirror, source_schema, source_name, target_name, result, repair, lsn is not null as at, source_rows, repaired from verifications where is_last order by 3;
select state, kind, progress, count(*) from tasks where kind = 'verify_mirror' group by 1, 2, 3 order by 4;
select count(*) from task_log where message like 'both sides are compared at %';
-- In a transaction: what is mended stays, so it is refused; looking is not.
begin;
verify mirror m table log;
verify mirror m repair;
rollback;
verify mirror m table log\; select 1 as one;
verify mirror m repair\; select 1 as one;
begin isolation level repeatable read;
verify mirror m;
rollback;
-- What is wrong.
verify mirror mm;
verify mirror m table nix;
verify mirror m table orders, crm.poeple;
verify mirror;
verify mirror m tables orders;
verify mirror m table orders repairs;
verify mirror m repair table orders;
select peergate.verify_mirror('m');
begin;
alter mirror m set (batch_rows_max = 10);
verify mirror m;
rollback;
\set VERBOSITY verbose
pause mirror m;
verify mirror m;
resume mirror m;
create mirror copies from shop to dwh for table orders to copied with (mode = copy_only);
wait for mirror copies;
verify mirror copies;
drop mirror m, copies;
