-- CREATE OR REPLACE PEER makes a peer be what it says, keeps its mirrors and its secrets, and can be run twice.
-- log: could not connect to peer
create or replace peer shop from postgres with (host = 'h', user = 'u', password = 'geheim', connect_timeout = 3, validate = false);
create or replace peer shop from postgres with (host = 'h', user = 'u', password = 'geheim', connect_timeout = 3, validate = false);
select options, generation, (select count(*) from peer_secrets) as secrets from peers;
create peer dwh from postgres with (user = 'u', validate = false);
create mirror m from shop to dwh for all tables;
-- What is left out is gone, but for the secret.
create or replace peer shop from postgres with (host = 'h', user = 'v', validate = false);
select options, generation, (select count(*) from peer_secrets) as secrets, (select source from mirrors) as "m's source" from peers where name = 'shop';
create or replace peer shop from postgres with (host = 'evil', user = 'v', validate = false);
create or replace peer shop from postgres with (host = 'evil', user = 'v', password = 'new', validate = false);
create or replace peer shop from postgres with (user = 'v', validate = false);
create or replace peer shop from postgres with (host = '127.0.0.1', port = 1, user = 'v', password = 'geheim');
create or replace peer shop from postgres with (hots = 'h', user = 'v');
create or replace peer shop from postgres with (host = 'h', validate = false);
create or replace peer shop from mysql with (user = 'v');
create or replace peer public from postgres with (user = 'v', validate = false);
create or replace peer if not exists shop from postgres with (user = 'v');
create or replace peer shop;
select options, generation from peers where name = 'shop';
drop mirror m;
drop peer shop, dwh;
