-- COMMENT ON says what a peer or mirror is for; NULL takes it away.
-- log: could not connect to peer
create peer a from postgres with (user = 'u', validate = false);
create peer b from postgres with (user = 'u', validate = false);
create mirror m from a to b for all tables;
comment on peer a is 'the shop''s own database';
comment on mirror m is $$nightly$$;
comment on mirror m is 'hourly';
select name, comment from peers order by name;
select name, comment from mirrors;
-- A comment is no change of the mirror that WAIT FOR would have to wait for.
begin;
comment on mirror m is 'waited for';
wait for mirror m state nowhere;
rollback;
comment on mirror m is null;
comment on peer a is '';
select (select count(*) from peers where comment is not null) as peers, (select count(*) from mirrors where comment is not null) as mirrors;
comment on peer c is 'x';
comment on mirror mm is 'x';
comment on peer a is 5;
comment on peer a;
comment on mirror m is $1;
drop peer a, b cascade;
select count(*) from mirror_comments;
