-- Names fold, are quoted and are cut as Postgres does it.
create peer Shop from postgres with (user = 'u', validate = false);
create peer "Shop" from postgres with (user = 'u', validate = false);
create peer "sh""op; drop peer shop" from postgres with (user = 'u', validate = false);
create peer größe from postgres with (user = 'ü', application_name = U&'\00e4', validate = false);
create peer "if" from postgres with (user = 'u', validate = false);
create peer abcdefghijklmnopqrstuvwxyz_abcdefghijklmnopqrstuvwxyz_abcdefghijklmnopqrstuvwxyz
    from postgres with (user = 'u', validate = false);
/* a comment; with a semicolon */ Drop /* nested /* comment; */ */ Peer -- and another;
  SHOP;
select name, length(name), options from peers order by name collate "C";
-- These are other statements' words.
select 'create peer x from postgres' as peer, $$show mirrors$$ as mirror;
prepare p as create peer x from postgres;
explain show peers;
create table peers_of_mine (peer int, mirror text);
select * from peers_of_mine;
drop table peers_of_mine;
