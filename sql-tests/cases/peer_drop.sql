-- A peer that a mirror uses is not dropped, unless the mirror may go too. DELETE is as safe as DROP.
create peer shop from postgres with (host = :'peer_host', port = :peer_port, user = 'postgres', database = 'shop');
create peer dwh from postgres with (host = :'peer_host', port = :peer_port, user = 'postgres', database = 'dwh');
create peer spare from postgres with (user = 'u', validate = false);
begin;
create mirror orders from shop to dwh for all tables;
savepoint s;
drop peer spare, shop;
rollback to s;
delete from peers where name = 'dwh';
rollback to s;
truncate peers;
rollback to s;
drop peer if exists nix, shop cascade;
select name from peers order by name;
select name from mirrors;
rollback;
drop peer spar;
drop peer if exists spar;
drop peer dwh restrict;
drop peer spare spare;
delete from peers where name = 'spare';
show peers \g (format=unaligned tuples_only) | sed 's/|[0-9]*|/|PORT|/'
