-- SHOW PEER shows what a peer is, what was given and what holds by default; never a secret.
create peer shop from postgres with (host = 'h', port = 5433, user = 'u', database = 'shop', password = 'geheim', validate = false);
comment on peer shop is 'the shop';
grant usage on peer shop to public;
show peer shop;
show peer shp;
show peer;
show peer shop x;
show peer.x;
drop peer shop;
