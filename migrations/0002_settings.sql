-- Why:   one table says which options exist, what they take and what they mean. CREATE PEER, CREATE MIRROR and plain
--        DML are all checked against it, so a misspelt option is an error and never a silent default.
-- Locks: none (new objects).        Undo: drop table peergate.settings.

create table peergate.settings (
    scope         text not null constraint settings_scope_check check (scope in ('peer', 'mirror')),
    name          text not null,
    type          text not null constraint settings_type_check check (type in ('boolean', 'integer', 'bytes', 'interval', 'text', 'enum')),
    default_value text,
    allowed       text[],
    min_value     bigint,
    max_value     bigint,
    secret        boolean not null default false,
    alias_of      text,
    description   text not null,
    primary key (scope, name),
    foreign key (scope, alias_of) references peergate.settings (scope, name)
);
comment on table  peergate.settings               is 'Every option of WITH ( … ), with its meaning and default. Written by: migrations.';
comment on column peergate.settings.scope         is 'What the option belongs to: peer or mirror.';
comment on column peergate.settings.name          is 'The option''s name, in lower case.';
comment on column peergate.settings.type          is 'What its value is: boolean, integer, bytes (a size such as 16MB), interval (a number is seconds), text, or enum (one of allowed).';
comment on column peergate.settings.default_value is 'The value when it is not given; NULL: nothing is sent, the peer''s own default holds.';
comment on column peergate.settings.allowed       is 'The values of an enum; NULL for other types.';
comment on column peergate.settings.min_value     is 'Smallest value of an integer or bytes option; NULL: no limit.';
comment on column peergate.settings.max_value     is 'Largest value of an integer or bytes option; NULL: no limit.';
comment on column peergate.settings.secret        is 'The value is sealed and never shown; it cannot be set by plain DML.';
comment on column peergate.settings.alias_of      is 'The option that this is another name for (PeerDB''s or libpq''s); NULL when it is not an alias.';
comment on column peergate.settings.description   is 'What the option does.';

insert into peergate.settings (scope, name, type, default_value, allowed, min_value, max_value, secret, alias_of, description) values
    ('peer', 'host',                 'text',    'localhost', null, null, null, false, null, 'Host name, address or directory of a Unix socket; several separated by commas are tried in order.'),
    ('peer', 'hostaddr',             'text',    null,   null, null, null, false, null, 'Numeric address to connect to; host is then only used to verify the certificate.'),
    ('peer', 'port',                 'text',    '5432', null, null, null, false, null, 'Port; one for all hosts or one for each, separated by commas.'),
    ('peer', 'user',                 'text',    null,   null, null, null, false, null, 'Role to connect as. Required.'),
    ('peer', 'database',             'text',    null,   null, null, null, false, null, 'Database to connect to; the role''s name when not given.'),
    ('peer', 'dbname',               'text',    null,   null, null, null, false, 'database', 'libpq''s name for database.'),
    ('peer', 'password',             'text',    null,   null, null, null, true,  null, 'Password of the role. Sealed.'),
    ('peer', 'uri',                  'text',    null,   null, null, null, true,  null, 'A postgres:// connection string; it is taken apart into the other options, which add to it and override it.'),
    ('peer', 'sslmode',              'enum',    'prefer', array['disable', 'allow', 'prefer', 'require', 'verify-ca', 'verify-full'], null, null, false, null, 'Whether TLS is used and what is verified, as in libpq.'),
    ('peer', 'sslrootcert',          'text',    null,   null, null, null, false, null, 'File with the certificates of the authorities trusted to sign the peer''s certificate, or system.'),
    ('peer', 'root_ca',              'text',    null,   null, null, null, false, null, 'PeerDB''s: the same certificates as PEM text.'),
    ('peer', 'sslcert',              'text',    null,   null, null, null, false, null, 'File with the client certificate.'),
    ('peer', 'sslkey',               'text',    null,   null, null, null, false, null, 'File with the client certificate''s key. The path is not a secret; the file is read by the engine.'),
    ('peer', 'tls_host',             'text',    null,   null, null, null, false, null, 'PeerDB''s: name expected in the peer''s certificate when it is not host.'),
    ('peer', 'require_tls',          'boolean', null,   null, null, null, false, null, 'PeerDB''s: true means sslmode require.'),
    ('peer', 'disable_tls',          'boolean', null,   null, null, null, false, null, 'PeerDB''s: true means sslmode disable.'),
    ('peer', 'skip_cert_verification', 'boolean', null, null, null, null, false, null, 'PeerDB''s: true turns certificate verification off when an authority is given.'),
    ('peer', 'channel_binding',      'enum',    'prefer', array['disable', 'prefer', 'require'], null, null, false, null, 'Whether SCRAM is bound to the TLS connection.'),
    ('peer', 'connect_timeout',      'integer', '10',   null, 1, 3600, false, null, 'Seconds to wait for a connection.'),
    ('peer', 'options',              'text',    null,   null, null, null, false, null, 'Command-line options for the server session, such as -c statement_timeout=0.'),
    ('peer', 'application_name',     'text',    'peergate', null, null, null, false, null, 'Shown in the peer''s pg_stat_activity.'),
    ('peer', 'target_session_attrs', 'enum',    'any',  array['any', 'read-write', 'read-only'], null, null, false, null, 'Which of several hosts will do.'),
    ('peer', 'keepalives',           'boolean', 'true', null, null, null, false, null, 'Whether TCP keepalives are sent.'),
    ('peer', 'keepalives_idle',      'integer', '60',   null, 1, 86400, false, null, 'Seconds of silence before a TCP keepalive is sent.'),
    ('peer', 'validate',             'boolean', 'true', null, null, null, false, null, 'Connect and check before the peer is stored. Not stored itself.'),

    ('mirror', 'mode',                  'enum',     'copy_and_stream', array['copy_and_stream', 'copy_only', 'stream_only'], null, null, false, null, 'Copy what is there and stream what changes, or only one of the two.'),
    ('mirror', 'create_tables',         'boolean',  'true', null, null, null, false, null, 'Create tables that the target lacks.'),
    ('mirror', 'copy_indexes',          'boolean',  'true', null, null, null, false, null, 'Create the source''s secondary indexes on tables that the mirror created.'),
    ('mirror', 'truncate_target',       'boolean',  'false', null, null, null, false, null, 'Empty target tables that hold rows before they are copied; otherwise such a table stops the mirror.'),
    ('mirror', 'copy_parallel_workers', 'integer',  '4',    null, 1, 64, false, null, 'Sessions that copy at the same time.'),
    ('mirror', 'batch_rows_max',        'integer',  '200000', null, 1, 10000000, false, null, 'Row changes after which a batch is written to the target.'),
    ('mirror', 'batch_bytes_max',       'bytes',    '32MB', null, 65536, 1073741824, false, null, 'Bytes of row changes after which a batch is written; two batches are in memory at the most.'),
    ('mirror', 'sync_interval',         'interval', '0',    null, null, null, false, null, 'Shortest time between two commits on the target; 0 commits as soon as the target is ready.'),
    ('mirror', 'max_batch_size',        'integer',  null,   null, null, null, false, 'batch_rows_max', 'PeerDB''s name for batch_rows_max.'),
    ('mirror', 'snapshot_max_parallel_workers', 'integer', null, null, null, null, false, 'copy_parallel_workers', 'PeerDB''s name for copy_parallel_workers.'),
    ('mirror', 'do_initial_copy',       'boolean',  null,   null, null, null, false, 'mode', 'PeerDB''s: true means mode copy_and_stream, false stream_only.'),
    ('mirror', 'initial_copy_only',     'boolean',  null,   null, null, null, false, 'mode', 'PeerDB''s: true means mode copy_only.');

-- What an option's value means, as text in its canonical form, or an error that names the option.
create function peergate.option_value(setting peergate.settings, given text) returns text language plpgsql stable as $$
declare
    result text;
    amount numeric;
begin
    begin
        result := case setting.type
            when 'boolean'  then given::boolean::text
            when 'integer'  then given::bigint::text
            when 'bytes'    then pg_size_bytes(given)::text
            when 'interval' then case when given ~ '^\s*[0-9.]+\s*$' then make_interval(secs => given::float8)
                                      else given::interval end::text
            else given
        end;
    exception when data_exception or syntax_error_or_access_rule_violation then
        result := null;
    end;
    if result is null or (setting.type = 'enum' and result <> all (setting.allowed)) then
        perform peergate.fail('22023', format('invalid value for option "%s": "%s"', setting.name, given),
            case setting.type
                when 'enum' then format('It takes one of: %s.', array_to_string(setting.allowed, ', '))
                when 'bytes' then 'It takes a size, such as 16MB.'
                when 'interval' then 'It takes an interval, such as 10s, or a number of seconds.'
                else format('It takes %s.', case setting.type when 'integer' then 'a whole number' else 'true or false' end)
            end,
            case setting.type when 'enum' then peergate.suggestion(given, setting.allowed) end,
            'option.' || setting.name || '.value');
    end if;
    if setting.type in ('integer', 'bytes') then
        amount := result::numeric;
        if amount < setting.min_value or amount > setting.max_value then
            perform peergate.fail('22023', format('%s is outside the valid range for option "%s"', given, setting.name),
                format('It must be between %s and %s.', setting.min_value, setting.max_value), null,
                'option.' || setting.name || '.value');
        end if;
    end if;
    return result;
end $$;
comment on function peergate.option_value is 'Checks the value of one option and gives its canonical form.';

-- Canonical options: aliases replaced, values checked. Secrets are refused here: they travel sealed, by CREATE PEER.
create function peergate.check_options(for_scope text, given jsonb) returns jsonb language plpgsql stable as $$
declare
    key     text;
    value   text;
    setting peergate.settings;
    result  jsonb := '{}';
    known   text[] := (select array_agg(s.name order by s.name) from peergate.settings s where s.scope = for_scope);
begin
    if jsonb_typeof(given) is distinct from 'object' then
        perform peergate.fail('22023', format('%s options must be a JSON object', for_scope), null, null, 'options');
    end if;
    for key, value in select o.key, o.value from jsonb_each_text(given) o loop
        select s.* into setting from peergate.settings s where s.scope = for_scope and s.name = key;
        if not found then
            perform peergate.fail('HV00D', format('unrecognized %s option "%s"', for_scope, key),
                'Valid options are: ' || array_to_string(known, ', ') || '.', peergate.suggestion(key, known), 'option.' || key);
        end if;
        if setting.secret then
            perform peergate.fail('22023', format('option "%s" is a secret and cannot be stored with the other options', key),
                null, 'Give it in CREATE PEER, through the gateway, which seals it.', 'option.' || key);
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
comment on function peergate.check_options is 'Checks options against peergate.settings and gives their canonical form.';

create function peergate.option(for_scope text, given jsonb, option_name text) returns text language sql stable as $$
    select coalesce(given ->> option_name, s.default_value)
    from peergate.settings s
    where s.scope = for_scope and s.name = option_name
$$;
comment on function peergate.option is 'The value of an option, or its default.';
