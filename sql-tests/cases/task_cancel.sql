-- SHOW TASK tells a task's story, CANCEL TASK ends it where that leaves something whole, and says why where it does not.
\c :shop
create table a (id int primary key);
create table b (id int primary key);
create table c (id int primary key);
\c :gate
create peer shop from postgres with (host = :'peer_host', port = :peer_port, user = 'postgres', database = 'shop');
create peer dwh from postgres with (host = :'peer_host', port = :peer_port, user = 'postgres', database = 'dwh');
\a
begin;
create mirror m from shop to dwh for table a, b;
alter mirror m add table c;
alter mirror m drop table b;
resync mirror m table a;
pause mirror m;
show task 2;
-- A table that was to be added is taken out again, by a task of its own.
cancel task 2;
cancel task 2;
show task 2;
select selection -> 'tables' -> 0 -> 'from' ->> 'name' as first, jsonb_array_length(selection -> 'tables') as tables from mirrors;
commit;
cancel task 3;
cancel task 4;
-- What is being made rests.
cancel task 1;
cancel task '1';
select id, kind, state from tasks where id <> 5 order by id;
select desired_state from mirrors;
begin;
resume mirror m;
cancel task 7;
rollback;
begin;
drop mirror m;
cancel task 8;
rollback;
cancel task 99;
show task 99;
cancel task x;
cancel task;
show task 1, 2;
set role peergate_reader;
cancel task 1;
reset role;
