-- USAGE on a peer is granted and revoked as on Postgres' own objects, by its owner, in the transaction.
create role grant_ann; create role grant_bob;
create peer shop from postgres with (user = 'u', validate = false);
create peer dwh from postgres with (user = 'u', validate = false);
begin;
grant usage on peer shop, dwh to grant_ann, current_user;
revoke all privileges on peer dwh from grant_ann cascade;
select p.name, v.grantee from peer_privileges v join peers p on p.id = v.peer_id order by 1, 2::text;
rollback;
select count(*) from peer_privileges;
grant usage on peer shop to public, group grant_bob;
grant usage on peer shop to public;
select grantee, grantor from peer_privileges order by 1::text;
grant usage on peer shpo to grant_ann;
grant usage on peer shop, dwh to grant_ann, nobody_there;
revoke usage on peer shop from nobody_there;
grant usage on peer shop to grant_ann with grant option;
grant select on peer shop to grant_ann;
grant usage on peer shop grant_ann;
grant usage on peer shop to;
-- A table of that name is Postgres' business.
create table peer (a int);
grant all on peer to grant_ann;
revoke all on peer from grant_ann;
drop peer shop, dwh;
select count(*) from peer_privileges;
drop role grant_ann, grant_bob;
