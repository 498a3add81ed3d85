-- A peer is checked, stored without its secrets, and created once.
create peer shop from postgres with (host = :'peer_host', port = :peer_port, user = 'postgres', database = 'shop', password = 'geheim');
\set uri postgres://postgres:geheim@ :peer_host : :peer_port /dwh
create peer if not exists dwh from POSTGRES with (
    uri = :'uri', application_name = E'it\'s "dwh"', connect_timeout '7');
select name, type, options - 'host' - 'port' as options from peers order by name;
select p.name, s.option, s.sealed ~ '^v1\.' as sealed, s.sealed ~ 'geheim' as readable
from peer_secrets s join peers p on p.id = s.peer_id order by 1;

-- Again: an error; or a notice, and another when the options differ.
create peer shop
    from postgres with (user = 'postgres');
create peer if not exists shop
    from postgres with (user = 'postgres');

-- Not connected to when asked not to.
create peer "Odd.Name" from postgres with (host = 'nowhere.invalid', dbname = 'x', user = $$o'brien$$, validate = false);
show peers \g (format=unaligned tuples_only) | sed 's/|[0-9]*|/|PORT|/'
\set QUIET off
drop peer shop, dwh, "Odd.Name";
select count(*) from peer_secrets;
