-- Why:   a peer changes: ALTER PEER, CREATE OR REPLACE PEER, COMMENT ON. A secret that such a change leaves out stays, unless the change
--        would send it elsewhere or with less protection; plain DML is held to the same. Every option of libpq has a row, also
--        those that cannot be had here, so that the error can say why.
-- Locks: peers and settings, ACCESS EXCLUSIVE for an instant each.
-- Undo:  drop the columns, tables and routines of this file; create peergate.create_peer and peergate.check_peer anew from 0003.

alter table peergate.settings add column unsupported text;
comment on column peergate.settings.unsupported is 'Why the option is refused, for one that libpq or PeerDB has and Peergate does not; NULL: it can be used.';

update peergate.settings set allowed = array['any', 'read-write', 'read-only', 'primary', 'standby', 'prefer-standby']
where scope = 'peer' and name = 'target_session_attrs';
update peergate.settings set description = 'File with the client certificate, or the certificate as PEM text.' where scope = 'peer' and name = 'sslcert';
update peergate.settings set description = 'File with the client certificate''s key, read by gateway and engine, or the key as PEM text, which is sealed.'
where scope = 'peer' and name = 'sslkey';

insert into peergate.settings (scope, name, type, default_value, allowed, min_value, max_value, secret, description) values
    ('peer', 'password_env',         'text',    null, null, null, null, false, 'Environment variable of gateway and engine that holds the password. Needs the privileges of pg_read_server_files.'),
    ('peer', 'password_file',        'text',    null, null, null, null, false, 'File whose first line is the password, read at each connection by gateway and engine. Needs the privileges of pg_read_server_files.'),
    ('peer', 'passfile',             'text',    null, null, null, null, false, 'Password file in the form of ~/.pgpass, read at each connection. Needs the privileges of pg_read_server_files.'),
    ('peer', 'fallback_application_name', 'text', null, null, null, null, false, 'Stands in when application_name is not given.'),
    ('peer', 'client_encoding',      'enum',    'UTF8', array['auto', 'UTF8'], null, null, false, 'Sessions of Peergate use UTF8; a client that connects to the peer by its name sets its own.'),
    ('peer', 'keepalives_interval',  'integer', '10', null, 1, 86400, false, 'Seconds after which a TCP keepalive that was not answered is sent again.'),
    ('peer', 'keepalives_count',     'integer', '6',  null, 1, 127, false, 'TCP keepalives that may go unanswered before the connection is given up.'),
    ('peer', 'tcp_user_timeout',     'integer', '60000', null, 0, 86400000, false, 'Milliseconds that sent data may stay unacknowledged before the connection is given up; 0: the system''s default.'),
    ('peer', 'gssencmode',           'enum',    'disable', array['disable', 'prefer'], null, null, false, 'GSSAPI encryption is never used; prefer means the same as disable.'),
    ('peer', 'sslnegotiation',       'enum',    'postgres', array['postgres', 'direct'], null, null, false, 'How TLS begins; direct saves a round trip and needs a peer of version 17.'),
    ('peer', 'sslcompression',       'boolean', 'false', null, null, null, false, 'Has no effect, as in libpq.'),
    ('peer', 'sslcertmode',          'enum',    'allow', array['disable', 'allow'], null, null, false, 'Whether the client certificate is sent.'),
    ('peer', 'sslcrl',               'text',    null, null, null, null, false, 'File with revocation lists; then every certificate of the chain needs one, as in libpq.'),
    ('peer', 'sslcrldir',            'text',    null, null, null, null, false, 'Directory of files with revocation lists.'),
    ('peer', 'sslsni',               'boolean', 'true', null, null, null, false, 'Whether the host''s name is sent in the clear when TLS begins.'),
    ('peer', 'ssl_min_protocol_version', 'enum', 'TLSv1.2', array['TLSv1', 'TLSv1.1', 'TLSv1.2', 'TLSv1.3'], null, null, false, 'Lowest version of TLS; never below TLSv1.2.'),
    ('peer', 'ssl_max_protocol_version', 'enum', null, array['TLSv1.2', 'TLSv1.3'], null, null, false, 'Highest version of TLS.'),
    ('peer', 'min_protocol_version', 'enum',    '3.0', array['3.0'], null, null, false, 'Lowest version of the Postgres protocol; 3.0 is what is spoken.'),
    ('peer', 'max_protocol_version', 'enum',    '3.0', array['3.0', '3.2', 'latest'], null, null, false, 'Highest version of the Postgres protocol; 3.0 is what is spoken.'),
    ('peer', 'load_balance_hosts',   'enum',    'disable', array['disable', 'random'], null, null, false, 'In which order several hosts are tried.'),
    ('peer', 'metadata_schema',      'text',    null, null, null, null, false, 'PeerDB''s: accepted and kept, without effect: what Peergate makes on a peer is in schema peergate.'),
    ('peer', 'client_tls',           'text',    null, null, null, null, true,  'PeerDB''s: {"certificate": …, "private_key": …} as PEM text; it is taken apart into sslcert and sslkey.');

insert into peergate.settings (scope, name, type, secret, unsupported, description) values
    ('peer', 'replication',        'text', false, 'Mirrors open their replication connections by themselves.', 'Not supported.'),
    ('peer', 'require_auth',       'text', false, 'Which methods of authentication will do cannot be restricted; channel_binding = require asks for SCRAM over TLS.', 'Not supported.'),
    ('peer', 'requirepeer',        'text', false, 'The owner of a Unix socket''s server is not looked at.', 'Not supported.'),
    ('peer', 'service',            'text', false, 'Peergate reads no service file; give the options themselves.', 'Not supported.'),
    ('peer', 'servicefile',        'text', false, 'Peergate reads no service file; give the options themselves.', 'Not supported.'),
    ('peer', 'krbsrvname',         'text', false, 'There is no GSSAPI authentication.', 'Not supported.'),
    ('peer', 'gsslib',             'text', false, 'There is no GSSAPI authentication.', 'Not supported.'),
    ('peer', 'gssdelegation',      'text', false, 'There is no GSSAPI authentication.', 'Not supported.'),
    ('peer', 'sslpassword',        'text', true,  'A key with a passphrase cannot be read; store one without, or as PEM text in sslkey, which is sealed.', 'Not supported.'),
    ('peer', 'sslkeylogfile',      'text', false, 'Keys of TLS sessions are not written down.', 'Not supported.'),
    ('peer', 'scram_client_key',   'text', true,  'SCRAM needs the password here.', 'Not supported.'),
    ('peer', 'scram_server_key',   'text', true,  'SCRAM needs the password here.', 'Not supported.'),
    ('peer', 'oauth_issuer',       'text', false, 'There is no OAuth authentication.', 'Not supported.'),
    ('peer', 'oauth_client_id',    'text', false, 'There is no OAuth authentication.', 'Not supported.'),
    ('peer', 'oauth_client_secret', 'text', true, 'There is no OAuth authentication.', 'Not supported.'),
    ('peer', 'oauth_scope',        'text', false, 'There is no OAuth authentication.', 'Not supported.'),
    ('peer', 'ssh_config',         'text', true,  'There are no SSH tunnels; make one beside Peergate and name its end as host and port.', 'Not supported.');

-- As it was, but that a name of one or two letters is near to no other name of that kind.
create or replace function peergate.suggestion(word text, candidates text[]) returns text language sql immutable as $$
    select format('Did you mean "%s"?', c)
    from unnest(candidates) c
    where peergate.edit_distance(lower(word), c) <= least(greatest(2, length(c) / 3), length(word) - 1)
    order by peergate.edit_distance(lower(word), c), c
    limit 1
$$;

create function peergate.supported_options(for_scope text) returns text[] language sql stable as $$
    select array_agg(s.name order by s.name) from peergate.settings s where s.scope = for_scope and s.unsupported is null
$$;
comment on function peergate.supported_options is 'The names of the options that can be used.';

-- The row of an option that a statement names, or an error at that name.
create function peergate.find_setting(for_scope text, option_name text) returns peergate.settings language plpgsql stable as $$
declare
    setting peergate.settings;
begin
    select s.* into setting from peergate.settings s where s.scope = for_scope and s.name = option_name;
    if not found then
        perform peergate.fail('HV00D', format('unrecognized %s option "%s"', for_scope, option_name),
            'Valid options are: ' || array_to_string(peergate.supported_options(for_scope), ', ') || '.',
            peergate.suggestion(option_name, peergate.supported_options(for_scope)), 'option.' || option_name);
    elsif setting.unsupported is not null then
        perform peergate.fail('0A000', format('%s option "%s" is not supported', for_scope, option_name), setting.unsupported, null,
            'option.' || option_name);
    end if;
    return setting;
end $$;
comment on function peergate.find_setting is 'The setting of that name; an error when there is none, or it is not supported.';

create or replace function peergate.check_options(for_scope text, given jsonb) returns jsonb language plpgsql stable as $$
declare
    key     text;
    value   text;
    setting peergate.settings;
    result  jsonb := '{}';
begin
    if jsonb_typeof(given) is distinct from 'object' then
        perform peergate.fail('22023', format('%s options must be a JSON object', for_scope), null, null, 'options');
    end if;
    for key, value in select o.key, o.value from jsonb_each_text(given) o loop
        setting := peergate.find_setting(for_scope, key);
        -- sslkey is a path, or the key itself.
        if setting.secret or (for_scope = 'peer' and key = 'sslkey' and value like '%-----BEGIN%') then
            perform peergate.fail('22023', format('option "%s" is a secret and cannot be stored with the other options', key),
                null, 'Give it in CREATE PEER or ALTER PEER, through the gateway, which seals it.', 'option.' || key);
        end if;
        if value is null then
            perform peergate.fail('22023', format('option "%s" cannot be null', key), null, null, 'option.' || key || '.value');
        end if;
        value := peergate.option_value(setting, value);
        if setting.alias_of = 'mode' then
            -- PeerDB says with two booleans what mode says with one word.
            if key = 'do_initial_copy' then
                value := case when not value::boolean then 'stream_only' else 'copy_and_stream' end;
            elsif value::boolean then
                if (given ->> 'do_initial_copy')::boolean is false then
                    perform peergate.fail('22023', 'option "initial_copy_only" contradicts do_initial_copy = false', null, null, 'option.' || key);
                end if;
                value := 'copy_only';
            else
                continue;
            end if;
            if key = 'do_initial_copy' and coalesce((given ->> 'initial_copy_only')::boolean, false) then
                continue;
            end if;
        end if;
        if result ? coalesce(setting.alias_of, key) then
            perform peergate.fail('42601', format('option "%s" provided more than once', coalesce(setting.alias_of, key)), null, null, 'option.' || key);
        end if;
        result := result || jsonb_build_object(coalesce(setting.alias_of, key), value);
    end loop;
    return result;
end $$;

alter table peergate.peers add column generation bigint not null default 1;
alter table peergate.peers add column comment text;
comment on column peergate.peers.generation is 'Counts the changes after which mirrors must connect anew: of options and secrets.';
comment on column peergate.peers.comment    is 'What COMMENT ON PEER said; NULL: nothing.';
comment on column peergate.peers.owner      is 'Role that owns the peer: the one that created it, or that ALTER PEER … OWNER TO named.';

-- Not a column of mirror_definitions: a comment is no change for the engine to act on, nor for WAIT FOR to be told of.
create table peergate.mirror_comments (
    mirror_id bigint primary key references peergate.mirror_definitions (id) on delete cascade,
    comment   text not null
);
comment on table  peergate.mirror_comments           is 'What COMMENT ON MIRROR said. Read it as mirrors.comment.';
comment on column peergate.mirror_comments.mirror_id is 'The mirror.';
comment on column peergate.mirror_comments.comment   is 'The comment.';

create or replace view peergate.mirrors as
select d.id, d.name, s.name as source, t.name as target, d.desired_state, r.state,
       case when r.applied_lsn is not null then greatest(r.source_lsn - r.applied_lsn, 0) end::bigint as lag_bytes, r.lag_seconds, r.rows_applied,
       r.error_message as last_error, d.selection, d.options, d.object_name, d.owner, d.created_at, d.updated_at, c.comment
from peergate.mirror_definitions d
join peergate.peers s on s.id = d.source_id
join peergate.peers t on t.id = d.target_id
join peergate.mirror_runtime r on r.mirror_id = d.id
left join peergate.mirror_comments c on c.mirror_id = d.id;
comment on column peergate.mirrors.comment is 'What COMMENT ON MIRROR said; NULL: nothing.';

create or replace function peergate.peer_document(id bigint) returns jsonb language sql stable as $$
    select jsonb_build_object('id', p.id, 'name', p.name, 'options', p.options, 'secrets',
        coalesce((select jsonb_object_agg(s.option, s.sealed) from peergate.peer_secrets s where s.peer_id = p.id), '{}'))
    from peergate.peers p where p.id = peer_document.id
$$;

-- The same text that secrets are sealed for (catalog/src/peer.rs): a test compares them.
create function peergate.destination(options jsonb) returns text language sql immutable as $$
    select format('host=%s hostaddr=%s port=%s', trim(coalesce(options ->> 'host', 'localhost')), trim(coalesce(options ->> 'hostaddr', '')),
                  trim(coalesce(options ->> 'port', '5432')))
$$;
comment on function peergate.destination is 'Where a peer''s secrets are sent: what they are sealed for.';

create function peergate.tls_strength(options jsonb) returns integer language sql immutable as $$
    select case
        when o.disable then 0
        when o.mode = 'disable' then 0
        when o.mode = 'allow' then 1
        when o.mode = 'prefer' then 2
        when o.skip then 3
        when o.mode = 'verify-full' then 5
        when o.mode = 'verify-ca' then 4
        when not o.authority then 3
        when o.given is null then 5
        else 4 end
    from (select options ->> 'sslmode' as given, coalesce((options ->> 'disable_tls')::boolean, false) as disable,
                 coalesce(options ->> 'sslmode', case when (options ->> 'require_tls')::boolean then 'require' else 'prefer' end) as mode,
                 coalesce((options ->> 'skip_cert_verification')::boolean, false) as skip,
                 options ?| array['sslrootcert', 'root_ca'] as authority) o
$$;
comment on function peergate.tls_strength is 'How well a connection is protected: 0 never by TLS, 1 if the server insists, 2 if it can, 3 always, 4 authority verified, 5 name verified too.';

create function peergate.secrets_hindrance(before jsonb, after jsonb) returns text language sql immutable as $$
    select coalesce(
        (select key from unnest(array['host', 'hostaddr', 'port']) with ordinality k (key, n)
         where peergate.destination(jsonb_strip_nulls(jsonb_build_object(key, before -> key)))
            <> peergate.destination(jsonb_strip_nulls(jsonb_build_object(key, after -> key))) order by n limit 1),
        case when peergate.tls_strength(after) < peergate.tls_strength(before) then
            coalesce((select key from unnest(array['sslmode', 'disable_tls', 'skip_cert_verification', 'require_tls', 'sslrootcert', 'root_ca'])
                      with ordinality k (key, n) where before -> key is distinct from after -> key order by n limit 1), 'sslmode') end,
        case when peergate.tls_strength(before) >= 4 then
            (select key from unnest(array['sslrootcert', 'root_ca', 'tls_host']) with ordinality k (key, n)
             where before -> key is distinct from after -> key order by n limit 1) end)
$$;
comment on function peergate.secrets_hindrance is 'The option for whose change secrets must be given again: they would go elsewhere, be less protected, or trust somebody else. NULL: they stay.';

create function peergate.may_read_server_files(role_name text) returns boolean language sql stable as $$
    select exists (select from pg_catalog.pg_roles r where r.rolname = role_name
                   and (r.rolsuper or pg_catalog.pg_has_role(r.oid, 'pg_read_server_files', 'usage')))
$$;
comment on function peergate.may_read_server_files is 'Whether a role may have files and environment variables of the server read.';

create function peergate.owns_peer(role_name text, peer_id bigint) returns boolean language sql stable
security definer set search_path = pg_catalog, peergate as $$
    select exists (
        select from pg_roles r join peergate.peers p on p.id = owns_peer.peer_id
        where r.rolname = role_name
          and (r.rolsuper
               or exists (select from pg_roles o where o.rolname in (p.owner, 'peergate_admin') and pg_has_role(r.oid, o.oid, 'usage'))))
$$;
comment on function peergate.owns_peer is 'Whether a role may change a peer: a superuser, or a member of its owner or of peergate_admin.';

-- References to secrets (password_env and its like) are as good as secrets: who may change where they are sent has them.
create or replace function peergate.check_peer() returns trigger language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    reference_names constant text[] := array['password_env', 'password_file', 'passfile'];
    given     constant text[] := string_to_array(current_setting('peergate.given_options', true), ' ');
    hindrance text;
    kept      text;
    reference text;
begin
    if tg_op = 'INSERT' or new.name <> old.name then
        perform peergate.check_peer_name(new.id, new.name);
    end if;
    new.options := peergate.check_options('peer', new.options) - 'validate';
    if not new.options ? 'user' then
        perform peergate.fail('42601', format('peer "%s" needs the option "user"', new.name), null,
            'Add user = ''…'' to the options.', 'options');
    end if;
    if new.options ? 'password_env' and new.options ? 'password_file' then
        perform peergate.fail('42601', 'options "password_env" and "password_file" exclude each other', null, null, 'option.password_file');
    end if;
    if new.options ? 'password_env' and (new.options ->> 'password_env' !~ '^[A-Za-z_][A-Za-z0-9_]*$'
           or new.options ->> 'password_env' in ('PEERGATE_KEY', 'PEERGATE_PASSWORD', 'PEERGATE_CATALOG')) then
        perform peergate.fail('22023', format('environment variable "%s" cannot hold a peer''s password', new.options ->> 'password_env'),
            null, null, 'option.password_env.value');
    end if;
    if tg_op = 'UPDATE' then
        if new.options is distinct from old.options then
            new.generation := old.generation + 1;
            -- The one that is given last is the one that counts.
            if new.options ?| array['password_env', 'password_file'] then
                delete from peergate.peer_secrets s where s.peer_id = old.id and s.option = 'password';
            end if;
        end if;
        hindrance := peergate.secrets_hindrance(old.options, new.options);
    end if;
    foreach reference in array reference_names loop
        if new.options ? reference and (tg_op = 'INSERT' or old.options -> reference is distinct from new.options -> reference or hindrance is not null)
           and not peergate.may_read_server_files(session_user) then
            perform peergate.fail('42501', format('permission denied to set option "%s"', reference),
                'Only roles with the privileges of pg_read_server_files may have files and environment variables of the server read.', null, 'option.' || reference);
        end if;
    end loop;
    if hindrance is not null then
        kept := coalesce((select min(s.option) from peergate.peer_secrets s where s.peer_id = old.id),
                         -- Those that are sealed and given again are not there now: see change_peer.
                         (select r from unnest(reference_names) r where old.options -> r = new.options -> r and r <> all (coalesce(given, '{}')) limit 1));
        if kept is not null then
            perform peergate.fail('22023', format('option "%s" of peer "%s" must be given again', kept, new.name),
                case when hindrance in ('host', 'hostaddr', 'port')
                     then format('It was given for %s, and is sent nowhere else by itself.', peergate.destination(old.options))
                     else 'It was given for a connection that is protected in another way.' end,
                format('ALTER PEER %I SET (%s …, %s = ''…'') gives both.', new.name, hindrance, kept), 'option.' || hindrance);
        end if;
    end if;
    new.updated_at := now();
    return new;
end $$;

-- What is still to be removed from a peer is removed with the options that it has now.
create function peergate.refresh_drops(changed bigint) returns void language sql security definer set search_path = pg_catalog, peergate as $$
    update peergate.mirror_drops d set source = peergate.peer_document(changed), retry_at = now() where (d.source ->> 'id')::bigint = changed;
    update peergate.mirror_drops d set target = peergate.peer_document(changed), retry_at = now() where (d.target ->> 'id')::bigint = changed;
$$;
comment on function peergate.refresh_drops is 'Gives the work orders of dropped mirrors a peer''s present options and secrets.';

create function peergate.peer_changed() returns trigger language plpgsql security definer set search_path = pg_catalog, peergate as $$
begin
    perform peergate.refresh_drops(new.id);
    return null;
end $$;
comment on function peergate.peer_changed is 'Takes a changed peer to the work orders of dropped mirrors.';

create trigger peer_changed after update of options, generation on peergate.peers
    for each row execute function peergate.peer_changed();

-- The peer of that name, locked, for a statement that changes it; NULL when it is not there and need not be.
create function peergate.find_peer(peer_name text, if_exists boolean default false, at text default 'name') returns peergate.peers language plpgsql
security definer set search_path = pg_catalog, peergate as $$
declare
    peer peergate.peers;
begin
    select p.* into peer from peergate.peers p where p.name = peer_name for no key update;
    if found then
        if not peergate.owns_peer(session_user, peer.id) then
            perform peergate.fail('42501', format('must be owner of peer "%s"', peer_name), null, null, at);
        end if;
    elsif if_exists then
        raise notice 'peer "%" does not exist, skipping', peer_name;
    else
        perform peergate.fail('42704', format('peer "%s" does not exist', peer_name), null,
            peergate.suggestion(peer_name, (select array_agg(p.name) from peergate.peers p)), at);
    end if;
    return peer;
end $$;
comment on function peergate.find_peer is 'The peer of that name, locked, if the session''s role may change it.';

-- Raises what the gateway found: in stage options before anything is stored, else when it tried to connect.
create function peergate.raise_finding(finding jsonb, of_stage text) returns void language plpgsql stable as $$
begin
    if finding ? 'message' and coalesce(finding ->> 'stage', 'connection') = of_stage then
        perform peergate.fail(finding ->> 'sqlstate', finding ->> 'message', finding ->> 'detail', finding ->> 'hint',
            coalesce(finding ->> 'at', case of_stage when 'connection' then 'name' end));
    end if;
end $$;
comment on function peergate.raise_finding is 'Raises what the gateway found out about a peer, if it is an error of that stage.';

-- wanted: all options that the peer is to have. given: the names that the statement has. secrets: sealed values; one that is the same
-- text as before was not changed. removed: secrets that are to go. sealed_for: the destination that the gateway took the secrets to be for.
create function peergate.change_peer(peer peergate.peers, wanted jsonb, given text[], secrets jsonb, removed text[], sealed_for text) returns void
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    secret      text;
    new_secrets boolean;
begin
    for secret in select jsonb_object_keys(secrets) loop
        perform peergate.find_setting('peer', secret);
        wanted := case secret when 'password' then wanted - array['password', 'password_env', 'password_file'] else wanted - secret end;
    end loop;
    -- A path takes the place of the key itself, and a reference that of the password.
    removed := removed || array(select r from unnest(array['sslkey', 'password']) r
                                where wanted ? r or r = 'password' and wanted ?| array['password_env', 'password_file']);
    wanted := peergate.check_options('peer', wanted) - 'validate';
    if secrets <> '{}' and sealed_for <> peergate.destination(wanted) then
        perform peergate.fail('55000', format('peer "%s" was changed meanwhile', peer.name),
            format('The secrets were sealed for %s, and the peer is at %s.', sealed_for, peergate.destination(wanted)),
            'Give host and port in the same statement, or commit what was changed before.', 'name');
    end if;
    new_secrets := exists (select from jsonb_each_text(secrets) n
                           where not exists (select from peergate.peer_secrets s where s.peer_id = peer.id and s.option = n.key and s.sealed = n.value))
                   or exists (select from peergate.peer_secrets s where s.peer_id = peer.id and s.option = any (removed));
    if wanted = peer.options and not new_secrets then
        raise notice 'peer "%" has these options already', peer.name;
        return;
    end if;
    -- Those that were given again are out of the way of the trigger, which refuses to send old ones elsewhere.
    delete from peergate.peer_secrets s where s.peer_id = peer.id and (s.option = any (removed) or secrets ? s.option);
    perform set_config('peergate.given_options', array_to_string(given, ' '), true);
    update peergate.peers p set options = wanted where p.id = peer.id;
    perform set_config('peergate.given_options', '', true);
    insert into peergate.peer_secrets (peer_id, option, sealed) select peer.id, s.key, s.value from jsonb_each_text(secrets) s;
    if new_secrets and wanted = peer.options then
        update peergate.peers p set generation = p.generation + 1, updated_at = now() where p.id = peer.id;
    end if;
    perform peergate.refresh_drops(peer.id);
end $$;
comment on function peergate.change_peer is 'Gives a peer other options and secrets. Behind ALTER PEER and CREATE OR REPLACE PEER.';

drop procedure peergate.create_peer(text, text, jsonb, jsonb, boolean, jsonb, text);

-- validation is what the gateway found when it connected: NULL when it did not try, {} when all is well, else
-- {"message": …, "detail": …, "hint": …, "sqlstate": …}. It is looked at after everything that needs no connection.
create procedure peergate.create_peer(peer_name text, peer_type text, options jsonb default '{}', secrets jsonb default '{}',
    if_not_exists boolean default false, validation jsonb default null, nonce text default null, or_replace boolean default false)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    existing peergate.peers;
    checked  jsonb;
    secret   text;
    id       bigint;
begin
    if lower(peer_type) <> 'postgres' then
        perform peergate.fail('0A000', format('peer type "%s" is not supported', peer_type), 'Supported types are: POSTGRES.',
            peergate.suggestion(peer_type, array['postgres']), 'type');
    end if;
    select p.* into existing from peergate.peers p where p.name = peer_name;
    if found and or_replace then
        existing := peergate.find_peer(peer_name);
        perform peergate.raise_finding(validation, 'options');
        perform peergate.check_options('peer', options);
        perform peergate.change_peer(existing, options - 'validate', array(select jsonb_object_keys(options)), secrets, '{}', peergate.destination(options));
        perform peergate.raise_finding(validation, 'connection');
    elsif found then
        if not if_not_exists then
            perform peergate.fail('42710', format('peer "%s" already exists', peer_name), null, null, 'name');
        end if;
        raise notice using errcode = '42710', message = format('peer "%s" already exists, skipping', peer_name);
        checked := peergate.check_options('peer', options) - 'validate';
        if checked is distinct from existing.options then
            raise notice 'the existing peer "%" has different options, which were not changed', peer_name;
        end if;
    else
        perform peergate.raise_finding(validation, 'options');
        insert into peergate.peers (name, type, options, owner)
        values (peer_name, 'postgres', options - 'validate', session_user)
        on conflict (name) do nothing
        returning peers.id into id;
        if id is null then
            perform peergate.fail('42710', format('peer "%s" already exists', peer_name), null, null, 'name');
        end if;
        perform peergate.check_options('peer', options);
        for secret in select jsonb_object_keys(secrets) loop
            perform peergate.find_setting('peer', secret);
        end loop;
        insert into peergate.peer_secrets (peer_id, option, sealed)
        select id, s.key, s.value from jsonb_each_text(secrets) s;
        perform peergate.raise_finding(validation, 'connection');
    end if;
    perform peergate.finish(nonce, 'CREATE PEER');
end $$;
comment on procedure peergate.create_peer is 'CREATE [OR REPLACE] PEER. secrets are sealed values by option name; validation is what the gateway found when it connected.';

create procedure peergate.alter_peer(peer_name text, options jsonb default '{}', secrets jsonb default '{}', reset text[] default '{}',
    sealed_for text default null, if_exists boolean default false, validation jsonb default null, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    peer    peergate.peers := peergate.find_peer(peer_name, if_exists);
    removed text[] := '{}';
    setting peergate.settings;
    option  text;
begin
    if peer.id is not null then
        perform peergate.raise_finding(validation, 'options');
        foreach option in array reset loop
            setting := peergate.find_setting('peer', option);
            removed := removed || coalesce(setting.alias_of, setting.name);
        end loop;
        -- Checked alone first: an alias takes the place of the option that it stands for.
        options := peergate.check_options('peer', options);
        perform peergate.change_peer(peer, peer.options - removed
                - case when options ?| array['password_env', 'password_file'] then array['password_env', 'password_file'] else '{}' end || options,
            array(select jsonb_object_keys(options)), secrets, removed, coalesce(sealed_for, peergate.destination(peer.options - removed || options)));
        perform peergate.raise_finding(validation, 'connection');
    end if;
    perform peergate.finish(nonce, 'ALTER PEER');
end $$;
comment on procedure peergate.alter_peer is 'ALTER PEER … SET and RESET. sealed_for: where the gateway took the peer to be when it sealed the secrets.';

create procedure peergate.rename_peer(peer_name text, new_name text, if_exists boolean default false, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    peer peergate.peers := peergate.find_peer(peer_name, if_exists);
begin
    if peer.id is not null then
        if exists (select from peergate.peers p where p.name = new_name) then
            perform peergate.fail('42710', format('peer "%s" already exists', new_name), null, null, 'new_name');
        end if;
        begin
            update peergate.peers p set name = new_name where p.id = peer.id;
        exception when duplicate_schema then
            declare
                message text; detail text; hint text;
            begin
                get stacked diagnostics message = message_text, detail = pg_exception_detail, hint = pg_exception_hint;
                perform peergate.fail('42P06', message, detail, hint, 'new_name');
            end;
        end;
    end if;
    perform peergate.finish(nonce, 'ALTER PEER');
end $$;
comment on procedure peergate.rename_peer is 'ALTER PEER … RENAME TO.';

create procedure peergate.change_peer_owner(peer_name text, new_owner text, if_exists boolean default false, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    peer peergate.peers := peergate.find_peer(peer_name, if_exists);
begin
    if peer.id is not null then
        if not exists (select from pg_roles r where r.rolname = new_owner) then
            perform peergate.fail('42704', format('role "%s" does not exist', new_owner), null,
                peergate.suggestion(new_owner, (select array_agg(r.rolname::text) from pg_roles r where r.rolname not like 'pg\_%')), 'role');
        end if;
        if not pg_has_role(session_user, new_owner, 'member') then
            perform peergate.fail('42501', format('must be able to become role "%s"', new_owner), null, null, 'role');
        end if;
        update peergate.peers p set owner = new_owner where p.id = peer.id;
    end if;
    perform peergate.finish(nonce, 'ALTER PEER');
end $$;
comment on procedure peergate.change_peer_owner is 'ALTER PEER … OWNER TO.';

create procedure peergate.comment_on_peer(peer_name text, comment text, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    peer peergate.peers := peergate.find_peer(peer_name);
begin
    update peergate.peers p set comment = nullif(comment_on_peer.comment, '') where p.id = peer.id;
    perform peergate.finish(nonce, 'COMMENT');
end $$;
comment on procedure peergate.comment_on_peer is 'COMMENT ON PEER; NULL or an empty text takes the comment away.';

create procedure peergate.comment_on_mirror(mirror_name text, comment text, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    mirror peergate.mirror_definitions;
begin
    select d.* into mirror from peergate.mirror_definitions d where d.name = mirror_name;
    if not found then
        perform peergate.fail('42704', format('mirror "%s" does not exist', mirror_name), null,
            peergate.suggestion(mirror_name, (select array_agg(d.name) from peergate.mirror_definitions d)), 'name');
    end if;
    delete from peergate.mirror_comments c where c.mirror_id = mirror.id;
    if comment_on_mirror.comment <> '' then
        insert into peergate.mirror_comments (mirror_id, comment) values (mirror.id, comment_on_mirror.comment);
    end if;
    perform peergate.finish(nonce, 'COMMENT');
end $$;
comment on procedure peergate.comment_on_mirror is 'COMMENT ON MIRROR; NULL or an empty text takes the comment away.';

-- As they were, but for who may: owners, as with every object of PostgreSQL, and admins.
create or replace function peergate.peers_to_grant(names text[]) returns bigint[] language plpgsql
security definer set search_path = pg_catalog, peergate as $$
declare
    peer peergate.peers;
    ids  bigint[] := '{}';
begin
    for n in 1 .. cardinality(names) loop
        peer := peergate.find_peer(names[n], false, 'name.' || n);
        ids := ids || peer.id;
    end loop;
    return ids;
end $$;

create or replace procedure peergate.drop_peer(names text[], if_exists boolean default false, cascade boolean default false, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    peer    peergate.peers;
    dropped peergate.peers[] := '{}';
    mirror  peergate.mirror_definitions;
    n       integer;
begin
    for n in 1 .. cardinality(names) loop
        peer := peergate.find_peer(names[n], if_exists, 'name.' || n);
        dropped := dropped || peer;
    end loop;
    perform set_config('peergate.drop_cascades', case when cascade then 'on' else 'off' end, true);
    if cascade then
        for mirror in select d.* from peergate.mirror_definitions d
                      where exists (select from peergate.peers p where p.id in (d.source_id, d.target_id) and p.name = any (names))
                      order by d.name for update loop
            raise notice 'drop cascades to mirror "%"', mirror.name;
            perform peergate.remove_mirror(mirror, false);
        end loop;
    end if;
    for n in 1 .. cardinality(names) loop
        if (dropped[n]).id is not null then
            begin
                delete from peergate.peers p where p.id = (dropped[n]).id;
            exception when dependent_objects_still_exist then
                declare
                    message text; detail text; hint text;
                begin
                    get stacked diagnostics message = message_text, detail = pg_exception_detail, hint = pg_exception_hint;
                    perform peergate.fail('2BP01', message, detail, hint, 'name.' || n);
                end;
            end;
        end if;
    end loop;
    perform set_config('peergate.drop_cascades', 'off', true);
    perform peergate.finish(nonce, 'DROP PEER');
end $$;

-- A function, so that a name that does not exist is an error and not an empty result.
create function peergate.show_peer(peer_name text) returns table (property text, value text, source text)
language plpgsql stable security definer set search_path = pg_catalog, peergate as $$
declare
    peer peergate.peers;
begin
    select p.* into peer from peergate.peers p where p.name = peer_name;
    if not found then
        perform peergate.fail('42704', format('peer "%s" does not exist', peer_name), null,
            peergate.suggestion(peer_name, (select array_agg(p.name) from peergate.peers p)), 'name');
    end if;
    return query
        select x.property, x.value, x.source from (
            select 1 as section, v.n, v.property, v.value, 'peer' as source
            from (values (1, 'type', peer.type), (2, 'owner', peer.owner), (3, 'comment', peer.comment),
                         (4, 'usage', (select string_agg(g.grantee, ', ' order by g.grantee) from (select case v.grantee when 0 then 'public' else v.grantee::text end as grantee from peergate.peer_privileges v where v.peer_id = peer.id) g)),
                         (5, 'mirrors', (select string_agg(quote_ident(d.name), ', ' order by d.name) from peergate.mirror_definitions d
                                         where peer.id in (d.source_id, d.target_id)))) v (n, property, value)
            union all
            select 2, 0, o.key, o.value, 'given' from jsonb_each_text(peer.options) o
            union all
            select 2, 0, s.option, '********', 'sealed' from peergate.peer_secrets s where s.peer_id = peer.id
            union all
            select 3, 0, s.name, s.default_value, 'default' from peergate.settings s
            where s.scope = 'peer' and s.default_value is not null and not peer.options ? s.name and s.name <> 'validate') x
        where x.value is not null
        order by x.section, x.n, x.property;
end $$;
comment on function peergate.show_peer is 'What SHOW PEER name shows: what the peer is, its options, and the defaults of those that it has not.';

-- Procedures and functions are executable by everybody unless that is taken away.
revoke all on all routines in schema peergate from public;
