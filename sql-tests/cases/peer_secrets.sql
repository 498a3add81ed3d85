-- A secret stays when it is left out, is asked for again before it would go elsewhere or less protected, and is never shown.
\set SHOW_CONTEXT never
create peer p from postgres with (host = 'h', user = 'u', password = 'geheim', sslmode = 'verify-full', validate = false);
alter peer p set (connect_timeout = 3, validate = false);
alter peer p set (host = 'evil', validate = false);
alter peer p set (hostaddr = '10.0.0.1', validate = false);
alter peer p set (port = 1, validate = false);
alter peer p reset (host);
alter peer p set (sslmode = 'prefer', validate = false);
alter peer p set (skip_cert_verification = true, validate = false);
alter peer p set (disable_tls = true, validate = false);
alter peer p set (sslrootcert = '/other/ca.pem', validate = false);
alter peer p reset (sslmode);
-- Plain DML, too.
update peers set options = options || '{"host": "evil"}';
update peers set options = options - 'sslmode';
update peers set options = options || '{"password": "x"}';
update peers set options = options || '{"sslkey": "-----BEGIN PRIVATE KEY-----"}';
update peers set options = options || '{"hosst": "x"}';
update peers set options = options || '{"application_name": "fine"}';
select options, generation from peers;
-- Given again, it goes with the change.
alter peer p set (host = 'elsewhere', password = 'other', validate = false);
alter peer p set (sslmode = 'require', password = 'other', validate = false);
alter peer p set (sslmode = 'verify-full', validate = false);
-- Another one takes its place.
alter peer p set (password_env = 'SHOP_PASSWORD', validate = false);
select option from peer_secrets;
alter peer p set (host = 'evil', validate = false);
update peers set options = options || '{"host": "evil"}';
alter peer p set (host = 'h', password_env = 'SHOP_PASSWORD', validate = false);
alter peer p set (password_file = '/run/secrets/shop', validate = false);
alter peer p set (password = 'geheim', validate = false);
alter peer p set (sslkey = '-----BEGIN PRIVATE KEY----- geheim', sslcert = '-----BEGIN CERTIFICATE-----', validate = false);
show peer p;
alter peer p reset (password, sslkey, sslcert);
select count(*) from peer_secrets;
-- In the transaction that made the peer, a secret needs the host and port that it is for.
begin;
create peer q from postgres with (host = 'h', port = 1, user = 'u', validate = false);
savepoint s;
alter peer q set (password = 'geheim');
rollback to s;
alter peer q set (host = 'h', port = 1, password = 'geheim');
rollback;
-- PeerDB's names.
alter peer p set (client_tls = '{"certificate": "-----BEGIN CERTIFICATE-----", "private_key": "-----BEGIN PRIVATE KEY----- geheim"}', require_tls = true, metadata_schema = '_peerdb_internal', validate = false);
alter peer p set (client_tls = 'geheim');
alter peer p set (ssh_config = '{"password": "geheim"}');
select options from peers;
\pset format unaligned
select count(*) as secrets_seen from peers p, peer_secrets s, tasks t where concat(p, s, t) like '%geheim%';
drop peer p;
