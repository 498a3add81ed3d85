-- ALTER PEER changes what it names and nothing else, in the transaction; a repetition changes nothing and says so.
create peer shop from postgres with (host = :'peer_host', port = :peer_port, user = 'postgres', database = 'shop');
alter peer shop set (application_name = 'one', connect_timeout '3');
alter peer shop set (application_name = 'one', connect_timeout '3');
select options - 'port' as options, generation from peers;
alter peer shop reset (connect_timeout, application_name);
alter peer shop reset (connect_timeout);
select options - 'port' as options, generation from peers;
alter peer shop set (uri = 'postgres://postgres@127.0.0.1/dwh', target_session_attrs = 'read-write');
select options - 'port' as options from peers;
-- The peer is connected to first, unless it is said not to: what it cannot be is not stored.
alter peer shop set (database = 'nowhere');
alter peer shop set (target_session_attrs = 'standby');
alter peer shop set (database = 'nowhere', validate = false);
select options ->> 'database' as database from peers;
begin;
alter peer shop rename to store;
alter peer store owner to current_user;
show peers \g (format=unaligned tuples_only) | sed 's/|[0-9]*|/|PORT|/'
rollback;
alter peer shop rename to shop;
create peer dwh from postgres with (user = 'u', validate = false);
alter peer shop rename to dwh;
alter peer shop rename to public;
alter peer shop rename to peergate_admin;
alter peer shp rename to x;
alter peer if exists shp rename to x;
alter peer if exists shp set (host = 'h');
alter peer shp reset (host);
alter peer shop owner to nobody_there;
alter peer shop owner to peergat;
alter peer dwh set (hosst = 'h', validate = false);
alter peer dwh set (sslmode = 'requir');
alter peer dwh set (host = 'a', host = 'b');
alter peer dwh reset (hosst);
alter peer dwh reset (user);
alter peer dwh set (password = 'geheim', password_env = 'X');
alter peer dwh set (password_env = 'PEERGATE_KEY', validate = false);
alter peer dwh set (password_env = 'no good', validate = false);
alter peer dwh set (require_auth = 'scram-sha-256', validate = false);
alter peer dwh set (sslpassword = 'geheim', validate = false);
alter peer dwh set (host = $1);
alter peer dwh add (host = 'h');
alter peer dwh;
alter peer dwh set ();
select name, options from peers order by name \g (format=unaligned tuples_only) | sed 's/"port": "[0-9]*"/PORT/'
