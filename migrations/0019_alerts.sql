-- Why:   somebody has to be told when a mirror lags, stops or lets WAL pile up, and when a peer cannot be reached. What was asked for
--        (alert_definitions), how it stands (alert_states), what happened (alert_events) and who was told (alert_deliveries) are rows: a
--        process that takes the next look goes by them, so that nothing fires twice. Secrets of channels are sealed like peers'.
-- Locks: settings, ACCESS EXCLUSIVE for an instant.
-- Undo:  drop the objects of this file; delete the settings of its scopes and restore settings_scope_check from 0002.

alter table peergate.settings
    drop constraint settings_scope_check,
    add constraint settings_scope_check check (scope in ('peer', 'mirror', 'alert', 'webhook', 'slack', 'email', 'notify'));
comment on column peergate.settings.scope is 'What the option belongs to: peer, mirror, alert, or a channel of an alert (webhook, slack, email, notify).';

insert into peergate.settings (scope, name, type, default_value, allowed, min_value, max_value, secret, alias_of, description) values
    ('alert', 'repeat_interval', 'interval', '04:00:00', null, null, null, false, null, 'How often it is told again while it lasts; 0: only once.'),
    ('alert', 'notify_recovery', 'boolean',  'true',     null, null, null, false, null, 'Whether it is told when it is over.'),

    ('webhook', 'url',                'text',    null, null, null, null, true,  null, 'Where the event is sent, by POST as JSON: http or https. Sealed, as such addresses are often secret.'),
    ('webhook', 'url_env',            'text',    null, null, null, null, false, null, 'Environment variable of the engine that holds the URL. Needs the privileges of pg_read_server_files.'),
    ('webhook', 'url_file',           'text',    null, null, null, null, false, null, 'File of the engine whose first line is the URL. Needs the privileges of pg_read_server_files.'),
    ('webhook', 'authorization',      'text',    null, null, null, null, true,  null, 'Value of the Authorization header, such as Bearer …. Sealed.'),
    ('webhook', 'authorization_env',  'text',    null, null, null, null, false, null, 'Environment variable of the engine that holds it. Needs the privileges of pg_read_server_files.'),
    ('webhook', 'authorization_file', 'text',    null, null, null, null, false, null, 'File of the engine whose first line it is. Needs the privileges of pg_read_server_files.'),
    ('webhook', 'sslrootcert',        'text',    null, null, null, null, false, null, 'File with the certificates of the authorities trusted to sign the server''s; the system''s when not given.'),
    ('webhook', 'timeout_seconds',    'integer', '10', null, 1, 60, false, null, 'How long an attempt may take.'),

    ('slack', 'url',             'text',    null, null, null, null, true,  null, 'The address of an incoming webhook of Slack, or of what takes the same (Mattermost, Rocket.Chat, Discord''s /slack). Sealed.'),
    ('slack', 'url_env',         'text',    null, null, null, null, false, null, 'Environment variable of the engine that holds the URL. Needs the privileges of pg_read_server_files.'),
    ('slack', 'url_file',        'text',    null, null, null, null, false, null, 'File of the engine whose first line is the URL. Needs the privileges of pg_read_server_files.'),
    ('slack', 'sslrootcert',     'text',    null, null, null, null, false, null, 'File with the certificates of the authorities trusted to sign the server''s; the system''s when not given.'),
    ('slack', 'timeout_seconds', 'integer', '10', null, 1, 60, false, null, 'How long an attempt may take.'),

    ('email', 'to',              'text',    null, null, null, null, false, null, 'Who gets the mail; several addresses separated by commas. Required.'),
    ('email', 'from',            'text',    null, null, null, null, false, null, 'Who sends it. Required.'),
    ('email', 'host',            'text',    'localhost', null, null, null, false, null, 'The SMTP server.'),
    ('email', 'port',            'integer', null, null, 1, 65535, false, null, 'Its port; 587, or 465 with tls = always, or 25 with tls = never, when not given.'),
    ('email', 'tls',             'enum',    'starttls', array['starttls', 'always', 'never'], null, null, false, null, 'How the connection is protected: from STARTTLS on, from the beginning, or not at all.'),
    ('email', 'user',            'text',    null, null, null, null, false, null, 'User to log in as; without one there is no login.'),
    ('email', 'password',        'text',    null, null, null, null, true,  null, 'Password of the user. Sealed.'),
    ('email', 'password_env',    'text',    null, null, null, null, false, null, 'Environment variable of the engine that holds the password. Needs the privileges of pg_read_server_files.'),
    ('email', 'password_file',   'text',    null, null, null, null, false, null, 'File of the engine whose first line is the password. Needs the privileges of pg_read_server_files.'),
    ('email', 'sslrootcert',     'text',    null, null, null, null, false, null, 'File with the certificates of the authorities trusted to sign the server''s; the system''s when not given.'),
    ('email', 'timeout_seconds', 'integer', '10', null, 1, 60, false, null, 'How long an attempt may take.'),

    ('notify', 'channel', 'text', 'peergate_alerts', null, null, null, false, null, 'Name for LISTEN, in the catalog''s database; the event comes as JSON.');

create table peergate.alert_definitions (
    id         bigint generated always as identity primary key,
    name       text not null constraint alert_definitions_name_key unique
                    constraint alert_definitions_name_check check (name <> '' and octet_length(name) <= 63),
    on_kind    text not null constraint alert_definitions_on_kind_check check (on_kind in ('mirror', 'peer')),
    mirror_id  bigint references peergate.mirror_definitions (id) on delete cascade,
    peer_id    bigint references peergate.peers (id) on delete cascade,
    conditions jsonb not null,
    channels   jsonb not null,
    options    jsonb not null default '{}',
    enabled    boolean not null default true,
    comment    text,
    owner      text not null default session_user,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    constraint alert_definitions_on_check check (case on_kind when 'mirror' then peer_id is null else mirror_id is null end)
);
create index alert_definitions_mirror_id_idx on peergate.alert_definitions (mirror_id);
create index alert_definitions_peer_id_idx on peergate.alert_definitions (peer_id);
comment on table  peergate.alert_definitions            is 'What was asked for: one row per alert. Read it through the view alerts. Written by: CREATE ALERT and its like.';
comment on column peergate.alert_definitions.id         is 'Identifies the alert for ever, whatever its name becomes.';
comment on column peergate.alert_definitions.name       is 'The alert''s name, unique, at most 63 bytes.';
comment on column peergate.alert_definitions.on_kind    is 'What it watches: mirror or peer.';
comment on column peergate.alert_definitions.mirror_id  is 'The mirror that it watches; NULL: all of them, or it watches peers.';
comment on column peergate.alert_definitions.peer_id    is 'The peer that it watches; NULL: all of them, or it watches mirrors.';
comment on column peergate.alert_definitions.conditions is 'When it fires, any of [{"metric", "op", "value", "for"}]; for is an interval.';
comment on column peergate.alert_definitions.channels   is 'Who is told, all of [{"channel", "options"}]; never a secret.';
comment on column peergate.alert_definitions.options    is 'Options by name, as peergate.settings lists them for scope alert; what is absent has its default.';
comment on column peergate.alert_definitions.enabled    is 'Whether it is looked at.';
comment on column peergate.alert_definitions.comment    is 'What COMMENT ON ALERT said; NULL: nothing.';
comment on column peergate.alert_definitions.owner      is 'Role that created the alert.';
comment on column peergate.alert_definitions.created_at is 'When the alert was created.';
comment on column peergate.alert_definitions.updated_at is 'When its definition last changed.';

create table peergate.alert_secrets (
    alert_id bigint not null references peergate.alert_definitions (id) on delete cascade,
    channel  integer not null,
    option   text not null,
    sealed   text not null constraint alert_secrets_sealed_check check (sealed ~ '^v1\.[0-9a-f]{8}\.[A-Za-z0-9+/=_-]+$'),
    key_id   text generated always as (split_part(sealed, '.', 2)) stored,
    primary key (alert_id, channel, option)
);
comment on table  peergate.alert_secrets          is 'Sealed secrets of alerts'' channels. Not readable by ordinary roles, and of no use without the key. Written by: CREATE ALERT, peergate rotate-key.';
comment on column peergate.alert_secrets.alert_id is 'The alert.';
comment on column peergate.alert_secrets.channel  is 'Which of its channels, counted from 1.';
comment on column peergate.alert_secrets.option   is 'The option whose value is sealed, such as url.';
comment on column peergate.alert_secrets.sealed   is 'Version, key id and ciphertext (XChaCha20-Poly1305), bound to what the secret is for.';
comment on column peergate.alert_secrets.key_id   is 'The key that seals it: the first 8 hexadecimal digits of the key''s SHA-256.';

-- The row that a process locks while it takes a look; users' transactions never do.
create table peergate.alert_runtime (
    alert_id     bigint primary key references peergate.alert_definitions (id) on delete cascade,
    evaluated_at timestamptz,
    node_id      text
) with (fillfactor = 50);
comment on table  peergate.alert_runtime              is 'Who looked at each alert, and when. Written by: the engines, of which one holds the row while it looks.';
comment on column peergate.alert_runtime.alert_id     is 'The alert.';
comment on column peergate.alert_runtime.evaluated_at is 'When it was last looked at; NULL: never.';
comment on column peergate.alert_runtime.node_id      is 'The process that did.';

create table peergate.alert_states (
    alert_id     bigint not null references peergate.alert_definitions (id) on delete cascade,
    subject_id   bigint not null,
    subject      text not null,
    since        jsonb not null default '{}',
    firing_since timestamptz,
    told_at      timestamptz,
    condition    text,
    incident_id  bigint,
    primary key (alert_id, subject_id)
);
comment on table  peergate.alert_states              is 'How alerts stand: a row for each mirror or peer for which a condition holds. Written by: the engine that looks at the alert.';
comment on column peergate.alert_states.alert_id     is 'The alert.';
comment on column peergate.alert_states.subject_id   is 'The mirror or peer.';
comment on column peergate.alert_states.subject      is 'Its name when it was last looked at.';
comment on column peergate.alert_states.since        is 'Since when each condition holds that does, by its text, in seconds since 1970.';
comment on column peergate.alert_states.firing_since is 'When it fired; NULL: a condition holds, but not yet for as long as it is to.';
comment on column peergate.alert_states.told_at      is 'When it was last told of.';
comment on column peergate.alert_states.condition    is 'The condition that fired.';
comment on column peergate.alert_states.incident_id  is 'The event of its firing.';

create table peergate.alert_events (
    id           bigint generated always as identity primary key,
    at           timestamptz not null default clock_timestamp(),
    alert_id     bigint not null,
    alert        text not null,
    kind         text not null constraint alert_events_kind_check check (kind in ('fired', 'repeated', 'recovered', 'test')),
    subject_kind text,
    subject_id   bigint,
    subject      text,
    condition    text,
    value        text,
    message      text not null,
    incident_id  bigint,
    node_id      text
);
create index alert_events_alert_id_idx on peergate.alert_events (alert_id, id);
comment on table  peergate.alert_events              is 'What alerts had to tell, kept after an alert is dropped. Written by: the engine that looks at the alert, and TEST ALERT.';
comment on column peergate.alert_events.id           is 'Orders the events.';
comment on column peergate.alert_events.at           is 'When it happened.';
comment on column peergate.alert_events.alert_id     is 'The alert, which may already be dropped.';
comment on column peergate.alert_events.alert        is 'The alert''s name at that time.';
comment on column peergate.alert_events.kind         is 'fired, repeated (it still lasts), recovered, or test.';
comment on column peergate.alert_events.subject_kind is 'mirror or peer; NULL for a test.';
comment on column peergate.alert_events.subject_id   is 'The mirror or peer.';
comment on column peergate.alert_events.subject      is 'Its name at that time.';
comment on column peergate.alert_events.condition    is 'The condition that holds; of a recovery, the one that fired.';
comment on column peergate.alert_events.value        is 'What the metric was.';
comment on column peergate.alert_events.message      is 'The event as a sentence.';
comment on column peergate.alert_events.incident_id  is 'The event fired that a repetition or recovery belongs to; for one that fired, itself.';
comment on column peergate.alert_events.node_id      is 'The process that saw it.';

create table peergate.alert_deliveries (
    id          bigint generated always as identity primary key,
    event_id    bigint not null references peergate.alert_events (id) on delete cascade,
    alert_id    bigint not null,
    channel     integer not null,
    kind        text not null,
    state       text not null default 'pending' constraint alert_deliveries_state_check check (state in ('pending', 'sent', 'failed', 'canceled')),
    attempt     integer not null default 0,
    retry_at    timestamptz not null default clock_timestamp(),
    error       text,
    finished_at timestamptz
);
create index alert_deliveries_pending_idx on peergate.alert_deliveries (alert_id, channel, id) where state = 'pending';
create index alert_deliveries_event_id_idx on peergate.alert_deliveries (event_id);
comment on table  peergate.alert_deliveries             is 'Each event on its way to each channel. Written by: the engines.';
comment on column peergate.alert_deliveries.id          is 'Orders the deliveries.';
comment on column peergate.alert_deliveries.event_id    is 'The event.';
comment on column peergate.alert_deliveries.alert_id    is 'The alert, which may already be dropped.';
comment on column peergate.alert_deliveries.channel     is 'Which of the alert''s channels, counted from 1.';
comment on column peergate.alert_deliveries.kind        is 'The channel''s kind: webhook, slack, email or notify.';
comment on column peergate.alert_deliveries.state       is 'pending, sent, failed (given up), or canceled (the alert or channel is gone, or the alert was disabled).';
comment on column peergate.alert_deliveries.attempt     is 'Attempts so far.';
comment on column peergate.alert_deliveries.retry_at    is 'When the next attempt is due; while one is made, when another process may think it dead.';
comment on column peergate.alert_deliveries.error       is 'Why the last attempt failed; NULL: none did.';
comment on column peergate.alert_deliveries.finished_at is 'When it was sent or given up; NULL: not yet.';

create table peergate.peer_reachability (
    peer_id           bigint primary key references peergate.peers (id) on delete cascade,
    checked_at        timestamptz,
    reached_at        timestamptz,
    unreachable_since timestamptz,
    error             text
);
comment on table  peergate.peer_reachability                   is 'Whether peers could be connected to, of those that an alert with unreachable_seconds watches. Written by: the engines.';
comment on column peergate.peer_reachability.peer_id           is 'The peer.';
comment on column peergate.peer_reachability.checked_at        is 'When a process last began to connect to it.';
comment on column peergate.peer_reachability.reached_at        is 'When it was last connected to; NULL: never.';
comment on column peergate.peer_reachability.unreachable_since is 'Since when it cannot be connected to; NULL: it can, or has not been tried.';
comment on column peergate.peer_reachability.error             is 'Why not.';

create function peergate.condition_text(condition jsonb) returns text language sql immutable as $$
    select format('%s %s %s', condition ->> 'metric', condition ->> 'op',
                  case condition ->> 'metric' when 'state' then quote_literal(condition ->> 'value') else condition ->> 'value' end)
           || coalesce(' FOR ' || quote_literal(condition ->> 'for'), '')
$$;
comment on function peergate.condition_text is 'A condition of an alert as CREATE ALERT has it.';

create function peergate.mirror_states() returns text[] language sql immutable as $$
    select array['created', 'preflight', 'schema', 'slot', 'copying', 'catchup', 'running', 'paused', 'retrying', 'blocked', 'resync_required', 'completed']
$$;
comment on function peergate.mirror_states is 'The states that a mirror can be in.';

-- Canonical conditions, or an error at the part at fault: condition.1.metric, condition.1.op, condition.1.value, condition.1.for.
create function peergate.check_conditions(on_kind text, given jsonb) returns jsonb language plpgsql stable as $$
declare
    metrics constant text[] := case on_kind
        when 'mirror' then array['lag_bytes', 'lag_seconds', 'slot_wal_bytes', 'state', 'errors', 'conflicts', 'unreachable_seconds']
        else array['slot_wal_bytes', 'unreachable_seconds'] end;
    ops     constant text[] := array['>', '>=', '<', '<=', '=', '<>'];
    item    record;
    metric  text;
    op      text;
    value   text;
    hold    interval;
    checked jsonb := '[]';
begin
    if jsonb_typeof(given) is distinct from 'array' or given = '[]' then
        perform peergate.fail('22023', 'the conditions of an alert must be a JSON array with at least one', null, null, 'conditions');
    end if;
    for item in select e.value as part, 'condition.' || e.ordinality as at from jsonb_array_elements(given) with ordinality e order by e.ordinality loop
        if jsonb_typeof(item.part) <> 'object' or item.part - array['metric', 'op', 'value', 'for'] <> '{}' then
            perform peergate.fail('22023', 'a condition is an object of metric, op, value and for', null, null, item.at);
        end if;
        metric := lower(item.part ->> 'metric');
        op := case item.part ->> 'op' when '!=' then '<>' else item.part ->> 'op' end;
        if metric is null or metric <> all (metrics) then
            perform peergate.fail('22023', format('unrecognized metric "%s"', metric),
                format('Metrics of a %s are: %s.', on_kind, array_to_string(metrics, ', ')), peergate.suggestion(metric, metrics), item.at || '.metric');
        end if;
        if op is null or op <> all (case metric when 'state' then array['=', '<>'] else ops end) then
            perform peergate.fail('22023', format('metric "%s" cannot be compared with %s', metric, coalesce(op, 'null')),
                format('It takes one of: %s.', case metric when 'state' then '=, <>' else array_to_string(ops, ', ') end), null, item.at || '.op');
        end if;
        value := trim(item.part ->> 'value');
        if metric = 'state' then
            value := lower(value);
            if value is null or value <> all (peergate.mirror_states()) then
                perform peergate.fail('22023', format('unrecognized mirror state "%s"', value),
                    'States are: ' || array_to_string(peergate.mirror_states(), ', ') || '.', peergate.suggestion(value, peergate.mirror_states()), item.at || '.value');
            end if;
        else
            begin
                value := case when metric like '%\_bytes' then pg_size_bytes(value)::text
                              when metric like '%\_seconds' and value !~ '^\s*[0-9.]+\s*$' then extract(epoch from value::interval)::text
                              when metric like '%\_seconds' then value::numeric::text
                              else value::bigint::text end;
            exception when data_exception or syntax_error_or_access_rule_violation then
                value := null;
            end;
            if value is null or value::numeric < 0 then
                perform peergate.fail('22023', format('invalid value for metric "%s": "%s"', metric, item.part ->> 'value'),
                    case when metric like '%\_bytes' then 'It takes a size, such as 16MB.'
                         when metric like '%\_seconds' then 'It takes a number of seconds, or an interval such as 5 minutes.'
                         else 'It takes a whole number.' end, null, item.at || '.value');
            end if;
            value := trim_scale(value::numeric)::text;
        end if;
        begin
            hold := case when item.part ->> 'for' ~ '^\s*[0-9.]+\s*$' then make_interval(secs => (item.part ->> 'for')::float8) else (item.part ->> 'for')::interval end;
        exception when data_exception then
            hold := '-1 second';
        end;
        if hold < '0' then
            perform peergate.fail('22023', format('invalid interval: "%s"', item.part ->> 'for'), 'It takes an interval, such as 5 minutes, or a number of seconds.', null, item.at || '.for');
        end if;
        checked := checked || jsonb_build_array(jsonb_build_object('metric', metric, 'op', op, 'value', value)
            || case when hold > '0' then jsonb_build_object('for', hold::text) else '{}' end);
    end loop;
    return checked;
end $$;
comment on function peergate.check_conditions is 'Checks the conditions of an alert and gives their canonical form.';

-- The options of one channel. Options that are secrets are refused: they travel sealed, and only their names are looked at.
create function peergate.check_channel(kind text, given jsonb, sealed text[], at text) returns jsonb language plpgsql stable as $$
declare
    checked  jsonb;
    key      text;
    message  text; detail text; hint text; part text; code text;
begin
    for key in select jsonb_object_keys(given) loop
        if exists (select from peergate.settings s where s.scope = kind and s.name = key and s.secret) then
            perform peergate.fail('22023', format('option "%s" is a secret and cannot be stored with the other options', key), null,
                'Give it in CREATE ALERT or ALTER ALERT, through the gateway, which seals it.', at || '.option.' || key);
        end if;
    end loop;
    begin
        checked := peergate.check_options(kind, given);
        foreach key in array sealed loop
            perform peergate.find_setting(kind, key);
        end loop;
    exception when others then
        -- What is at fault is an option of this channel, and not of the statement.
        get stacked diagnostics code = returned_sqlstate, message = message_text, detail = pg_exception_detail, hint = pg_exception_hint, part = column_name;
        perform peergate.fail(code, message, nullif(detail, ''), nullif(hint, ''), concat_ws('.', at, nullif(part, '')));
    end;
    for key in select k from jsonb_object_keys(checked) k where k ~ '_(env|file)$' loop
        if not peergate.may_read_server_files(session_user) then
            perform peergate.fail('42501', format('permission denied to set option "%s"', key),
                'Only roles with the privileges of pg_read_server_files may have files and environment variables of the server read.', null, at || '.option.' || key);
        end if;
        if key like '%\_env' and (checked ->> key !~ '^[A-Za-z_][A-Za-z0-9_]*$' or checked ->> key in ('PEERGATE_KEY', 'PEERGATE_PASSWORD', 'PEERGATE_CATALOG')) then
            perform peergate.fail('22023', format('environment variable "%s" cannot be read for an alert', checked ->> key), null, null, at || '.option.' || key || '.value');
        end if;
    end loop;
    if kind = 'notify' and octet_length(checked ->> 'channel') not between 1 and 63 then
        perform peergate.fail('22023', 'a channel''s name has 1 to 63 bytes', null, null, at || '.option.channel.value');
    end if;
    foreach key in array case kind when 'email' then array['from', 'to'] else '{}' end loop
        if coalesce(checked ->> key, '') = '' then
            perform peergate.fail('42601', format('channel %s needs the option "%s"', kind, key), null, format('Add %s = ''…'' to its options.', key), at);
        end if;
        if exists (select from regexp_split_to_table(checked ->> key, ',') a where a !~ '^\s*([^<>@]*<[^<>@\s]+@[^<>@\s]+>|[^<>@\s]+@[^<>@\s]+)\s*$')
           or key = 'from' and checked ->> key like '%,%' then
            perform peergate.fail('22023', format('invalid value for option "%s": "%s"', key, checked ->> key),
                case key when 'from' then 'It takes an address, such as ops@example.com.' else 'It takes addresses such as ops@example.com, separated by commas.' end,
                null, at || '.option.' || key || '.value');
        end if;
    end loop;
    return checked;
end $$;
comment on function peergate.check_channel is 'Checks the options of a channel of an alert and gives their canonical form.';

-- Stores the channels of an alert. secrets: sealed values, {"1": {"url": …}} by channel and option. A secret that is left out stays if it
-- goes where it went before; if it would go elsewhere, it must be given again.
create function peergate.set_channels(alert peergate.alert_definitions, given jsonb, secrets jsonb) returns void language plpgsql
security definer set search_path = pg_catalog, peergate as $$
declare
    kinds   constant text[] := array['webhook', 'slack', 'email', 'notify'];
    item    record;
    before  jsonb;
    kind    text;
    secret  text;
    options jsonb;
    sealed  jsonb;
    checked jsonb := '[]';
    kept    jsonb := '{}';
begin
    if jsonb_typeof(given) is distinct from 'array' or given = '[]' then
        perform peergate.fail('22023', 'the channels of an alert must be a JSON array with at least one', null, null, 'channels');
    end if;
    for item in select e.value as part, e.ordinality as n, 'channel.' || e.ordinality as at
                from jsonb_array_elements(given) with ordinality e order by e.ordinality loop
        if jsonb_typeof(item.part) <> 'object' or item.part - array['channel', 'options'] <> '{}' then
            perform peergate.fail('22023', 'a channel is an object of channel and options', null, null, item.at);
        end if;
        kind := lower(item.part ->> 'channel');
        if kind is null or kind <> all (kinds) then
            perform peergate.fail('22023', format('unrecognized channel "%s"', kind), 'Channels are: ' || array_to_string(kinds, ', ') || '.',
                peergate.suggestion(kind, kinds), item.at);
        end if;
        sealed := coalesce(secrets -> item.n::text, '{}');
        options := peergate.check_channel(kind, coalesce(item.part -> 'options', '{}'), array(select jsonb_object_keys(sealed)), item.at);
        before := case when alert.channels -> (item.n::integer - 1) ->> 'channel' = kind then alert.channels -> (item.n::integer - 1) -> 'options' end;
        foreach secret in array case kind when 'email' then array['password'] when 'notify' then '{}' when 'slack' then array['url'] else array['url', 'authorization'] end loop
            if (select count(*) from unnest(array[secret, secret || '_env', secret || '_file']) o where options ? o or sealed ? o) > 1 then
                perform peergate.fail('42601', format('options "%s", "%s" and "%s" exclude each other', secret, secret || '_env', secret || '_file'), null, null, item.at);
            end if;
            continue when sealed ? secret or options ?| array[secret || '_env', secret || '_file']
                or before is null or not exists (select from peergate.alert_secrets s where s.alert_id = alert.id and s.channel = item.n and s.option = secret);
            if kind = 'email' then
                continue when not options ? 'user';
                if (options -> 'host', options -> 'port', options -> 'user', options -> 'sslrootcert') is distinct from (before -> 'host', before -> 'port', before -> 'user', before -> 'sslrootcert')
                   or coalesce(options ->> 'tls', 'starttls') <> coalesce(before ->> 'tls', 'starttls') then
                    perform peergate.fail('22023', format('option "password" of channel %s must be given again', item.n),
                        'It was given for another server, user or protection, and is sent nowhere else by itself.', null, item.at);
                end if;
            elsif secret = 'authorization' then
                -- It belongs to the address.
                continue when sealed ? 'url' or options -> 'url_env' is distinct from before -> 'url_env' or options -> 'url_file' is distinct from before -> 'url_file';
            end if;
            kept := jsonb_set(kept, array[item.n::text], coalesce(kept -> item.n::text, '{}') || jsonb_build_object(secret,
                (select s.sealed from peergate.alert_secrets s where s.alert_id = alert.id and s.channel = item.n and s.option = secret)));
        end loop;
        if kind in ('webhook', 'slack') and not (sealed ? 'url' or options ?| array['url_env', 'url_file'] or coalesce(kept -> item.n::text ? 'url', false)) then
            perform peergate.fail('42601', format('channel %s needs the option "url"', kind), null, 'Add url = ''https://…'' to its options.', item.at);
        end if;
        kept := jsonb_set(kept, array[item.n::text], coalesce(kept -> item.n::text, '{}') || sealed);
        checked := checked || jsonb_build_array(jsonb_build_object('channel', kind, 'options', options));
    end loop;
    update peergate.alert_definitions d set channels = checked where d.id = alert.id;
    delete from peergate.alert_secrets s where s.alert_id = alert.id;
    insert into peergate.alert_secrets (alert_id, channel, option, sealed)
    select alert.id, c.key::integer, s.key, s.value from jsonb_each(kept) c, jsonb_each_text(c.value) s;
end $$;
comment on function peergate.set_channels is 'Checks and stores the channels of an alert and their sealed secrets.';

-- What an alert is ON: the kind, and the number of the mirror or peer that is named.
create function peergate.alert_subject(on_kind text, on_name text) returns bigint language plpgsql stable
security definer set search_path = pg_catalog, peergate as $$
declare
    names text[];
    found_id bigint;
begin
    if on_kind is null or on_kind not in ('mirror', 'peer') then
        perform peergate.fail('22023', format('an alert cannot be on a %s', coalesce(on_kind, 'null')), 'It is on a mirror, or on a peer.', null, 'on');
    end if;
    if on_name is null then
        return null;
    end if;
    if on_kind = 'mirror' then
        select d.id into found_id from peergate.mirror_definitions d where d.name = on_name;
        names := (select array_agg(d.name) from peergate.mirror_definitions d);
    else
        select p.id into found_id from peergate.peers p where p.name = on_name;
        names := (select array_agg(p.name) from peergate.peers p);
    end if;
    if found_id is null then
        perform peergate.fail('42704', format('%s "%s" does not exist', on_kind, on_name), null, peergate.suggestion(on_name, names), 'on');
    end if;
    return found_id;
end $$;
comment on function peergate.alert_subject is 'The number of the mirror or peer that an alert is on; NULL: all of them.';

create function peergate.find_alert(alert_name text, if_exists boolean default false, at text default 'name') returns peergate.alert_definitions language plpgsql
security definer set search_path = pg_catalog, peergate as $$
declare
    alert peergate.alert_definitions;
begin
    select d.* into alert from peergate.alert_definitions d where d.name = alert_name for no key update;
    if not found then
        if if_exists then
            raise notice 'alert "%" does not exist, skipping', alert_name;
        else
            perform peergate.fail('42704', format('alert "%s" does not exist', alert_name), null,
                peergate.suggestion(alert_name, (select array_agg(d.name) from peergate.alert_definitions d)), at);
        end if;
    end if;
    return alert;
end $$;
comment on function peergate.find_alert is 'The alert of that name, locked; 42704 when there is none, or with if_exists a NOTICE and NULL.';

-- Gives an alert what is not NULL. validation: what the gateway could not read of the channels.
create function peergate.change_alert(alert peergate.alert_definitions, on_kind text, on_name text, conditions jsonb, channels jsonb, secrets jsonb,
    options jsonb, enabled boolean) returns void language plpgsql
security definer set search_path = pg_catalog, peergate as $$
declare
    wanted_kind  text := coalesce(change_alert.on_kind, alert.on_kind);
    subject      bigint := case when change_alert.on_kind is null then coalesce(alert.mirror_id, alert.peer_id) else peergate.alert_subject(change_alert.on_kind, on_name) end;
    wanted_when  jsonb := peergate.check_conditions(wanted_kind, coalesce(change_alert.conditions, alert.conditions));
    wanted       jsonb := peergate.check_options('alert', coalesce(change_alert.options, alert.options));
    key          text;
begin
    foreach key in array array['repeat_interval'] loop
        if (wanted ->> key)::interval < '0' then
            perform peergate.fail('22023', format('option "%s" cannot be negative', key), null, null, 'option.' || key || '.value');
        end if;
    end loop;
    update peergate.alert_definitions d
    set on_kind = wanted_kind, mirror_id = case wanted_kind when 'mirror' then subject end, peer_id = case wanted_kind when 'peer' then subject end,
        conditions = wanted_when, options = wanted, enabled = coalesce(change_alert.enabled, d.enabled), updated_at = now()
    where d.id = alert.id;
    if change_alert.channels is not null then
        perform peergate.set_channels(alert, change_alert.channels, coalesce(secrets, '{}'));
    end if;
    if wanted_kind <> alert.on_kind then
        delete from peergate.alert_states s where s.alert_id = alert.id;
    end if;
    if alert.enabled and not change_alert.enabled then
        -- It begins anew when it is enabled, and tells then of what it finds.
        delete from peergate.alert_states s where s.alert_id = alert.id;
        update peergate.alert_deliveries d set state = 'canceled', finished_at = clock_timestamp() where d.alert_id = alert.id and d.state = 'pending';
    end if;
end $$;
comment on function peergate.change_alert is 'Gives an alert what is not NULL. Behind CREATE ALERT and ALTER ALERT.';

create procedure peergate.create_alert(alert_name text, on_kind text, on_name text, conditions jsonb, channels jsonb, options jsonb default '{}',
    secrets jsonb default '{}', if_not_exists boolean default false, or_replace boolean default false, validation jsonb default null, nonce text default null,
    enabled boolean default true)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    alert   peergate.alert_definitions;
begin
    select d.* into alert from peergate.alert_definitions d where d.name = alert_name;
    if found and not or_replace then
        if not if_not_exists then
            perform peergate.fail('42710', format('alert "%s" already exists', alert_name), null, null, 'name');
        end if;
        raise notice using errcode = '42710', message = format('alert "%s" already exists, skipping', alert_name);
        if (alert.on_kind, coalesce(alert.mirror_id, alert.peer_id), alert.conditions, alert.options, (select jsonb_agg(c - 'options') from jsonb_array_elements(alert.channels) c))
           is distinct from (create_alert.on_kind, peergate.alert_subject(create_alert.on_kind, on_name), peergate.check_conditions(create_alert.on_kind, create_alert.conditions),
                             peergate.check_options('alert', create_alert.options), (select jsonb_agg(c - 'options') from jsonb_array_elements(create_alert.channels) c)) then
            raise notice 'the existing alert "%" is defined in another way, which was not changed', alert_name;
        end if;
    else
        perform peergate.raise_finding(validation, 'options');
        if alert.id is null then
            insert into peergate.alert_definitions (name, on_kind, conditions, channels)
            values (alert_name, create_alert.on_kind, '[]', '[]') on conflict (name) do nothing returning * into alert;
            if alert.id is null then
                perform peergate.fail('42710', format('alert "%s" already exists', alert_name), null, null, 'name');
            end if;
            insert into peergate.alert_runtime (alert_id) values (alert.id);
        else
            alert := peergate.find_alert(alert_name);
        end if;
        perform peergate.change_alert(alert, create_alert.on_kind, on_name, create_alert.conditions, create_alert.channels, secrets, create_alert.options, create_alert.enabled);
    end if;
    perform peergate.finish(nonce, 'CREATE ALERT');
end $$;
comment on procedure peergate.create_alert is 'CREATE [OR REPLACE] ALERT. on_name NULL: all of the kind. secrets are sealed values by channel and option.';

create procedure peergate.alter_alert(alert_name text, on_kind text default null, on_name text default null, conditions jsonb default null,
    channels jsonb default null, secrets jsonb default null, options jsonb default null, reset text[] default '{}', enabled boolean default null,
    if_exists boolean default false, validation jsonb default null, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    alert   peergate.alert_definitions := peergate.find_alert(alert_name, if_exists);
    changed jsonb := alert.options;
    key     text;
begin
    if alert.id is not null then
        perform peergate.raise_finding(validation, 'options');
        foreach key in array reset loop
            perform peergate.find_setting('alert', key);
            changed := changed - key;
        end loop;
        if alter_alert.options is not null then
            changed := changed || peergate.check_options('alert', alter_alert.options);
        end if;
        if alter_alert.enabled = alert.enabled then
            raise notice using errcode = '55000', message = format('alert "%s" is already %s', alert.name, case when alert.enabled then 'enabled' else 'disabled' end);
        end if;
        perform peergate.change_alert(alert, alter_alert.on_kind, on_name, alter_alert.conditions, alter_alert.channels, secrets, changed, alter_alert.enabled);
    end if;
    perform peergate.finish(nonce, 'ALTER ALERT');
end $$;
comment on procedure peergate.alter_alert is 'ALTER ALERT, but for RENAME: what is NULL stays as it is.';

create procedure peergate.rename_alert(alert_name text, new_name text, if_exists boolean default false, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    alert peergate.alert_definitions := peergate.find_alert(alert_name, if_exists);
begin
    if alert.id is not null then
        if exists (select from peergate.alert_definitions d where d.name = new_name) then
            perform peergate.fail('42710', format('alert "%s" already exists', new_name), null, null, 'new_name');
        end if;
        update peergate.alert_definitions d set name = new_name, updated_at = now() where d.id = alert.id;
    end if;
    perform peergate.finish(nonce, 'ALTER ALERT');
end $$;
comment on procedure peergate.rename_alert is 'ALTER ALERT … RENAME TO.';

create procedure peergate.drop_alert(names text[], if_exists boolean default false, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    alert peergate.alert_definitions;
begin
    for n in 1 .. cardinality(names) loop
        alert := peergate.find_alert(names[n], if_exists, 'name.' || n);
        delete from peergate.alert_definitions d where d.id = alert.id;
    end loop;
    perform peergate.finish(nonce, 'DROP ALERT');
end $$;
comment on procedure peergate.drop_alert is 'DROP ALERT. What it was about to tell is not told.';

-- Also behind the DROP of the mirror or peer that an alert is on, which says so.
create function peergate.alert_dropped() returns trigger language plpgsql security definer set search_path = pg_catalog, peergate as $$
begin
    update peergate.alert_deliveries d set state = 'canceled', finished_at = clock_timestamp() where d.alert_id = old.id and d.state = 'pending';
    if old.mirror_id is not null and not exists (select from peergate.mirror_definitions m where m.id = old.mirror_id)
       or old.peer_id is not null and not exists (select from peergate.peers p where p.id = old.peer_id) then
        raise notice 'drop cascades to alert "%"', old.name;
    end if;
    return null;
end $$;
comment on function peergate.alert_dropped is 'Cancels what a dropped alert was about to tell.';

create trigger alert_dropped after delete on peergate.alert_definitions
    for each row execute function peergate.alert_dropped();
create trigger refuse_truncate before truncate on peergate.alert_definitions
    for each statement execute function peergate.refuse_truncate();

-- An event of an alert, with a delivery to each of its channels. incident: the event fired that it belongs to.
create function peergate.tell_alert(alert_id bigint, event_kind text, subject_id bigint, subject text, condition text, value text, message text,
    incident_id bigint, node_id text) returns bigint language plpgsql
security definer set search_path = pg_catalog, peergate as $$
declare
    alert peergate.alert_definitions := (select d from peergate.alert_definitions d where d.id = tell_alert.alert_id);
    new_id bigint;
begin
    insert into peergate.alert_events (alert_id, alert, kind, subject_kind, subject_id, subject, condition, value, message, incident_id, node_id)
    values (alert.id, alert.name, event_kind, case when event_kind <> 'test' then alert.on_kind end, tell_alert.subject_id, tell_alert.subject,
            tell_alert.condition, tell_alert.value, tell_alert.message, tell_alert.incident_id, tell_alert.node_id)
    returning alert_events.id into new_id;
    if event_kind = 'fired' then
        update peergate.alert_events e set incident_id = e.id where e.id = new_id;
    end if;
    if event_kind <> 'recovered' or peergate.option('alert', alert.options, 'notify_recovery')::boolean then
        insert into peergate.alert_deliveries (event_id, alert_id, channel, kind)
        select new_id, alert.id, c.n, c.channel ->> 'channel' from jsonb_array_elements(alert.channels) with ordinality c (channel, n) order by c.n;
    end if;
    return new_id;
end $$;
comment on function peergate.tell_alert is 'Records an event of an alert and has it delivered to the alert''s channels.';

create procedure peergate.test_alert(alert_name text, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    alert peergate.alert_definitions := peergate.find_alert(alert_name);
begin
    if not alert.enabled then
        raise notice using message = format('alert "%s" is disabled; the test is delivered all the same', alert_name);
    end if;
    perform peergate.tell_alert(alert.id, 'test', null, null, null, null, format('test of alert "%s", requested by %s', alert_name, session_user), null, null);
    raise notice using message = format('a test of alert "%s" goes to %s', alert_name,
            (select string_agg(c ->> 'channel', ', ' order by n) from jsonb_array_elements(alert.channels) with ordinality e (c, n))),
        hint = format('WAIT FOR ALERT %I returns when it has arrived, or says why it has not.', alert_name);
    perform peergate.finish(nonce, 'TEST ALERT');
end $$;
comment on procedure peergate.test_alert is 'TEST ALERT.';

-- Each turn of the loop looks with a new snapshot, as in wait_for_mirror.
create procedure peergate.wait_for_alert(alert_name text, timeout interval default null, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    started constant timestamptz := clock_timestamp();
    alert   peergate.alert_definitions;
    waited  bigint[];
    left_to integer;
    failure record;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        perform peergate.fail('25001', 'WAIT FOR ALERT cannot run in a transaction that is not READ COMMITTED',
            'Such a transaction does not see what happens after it began.');
    end if;
    select d.* into alert from peergate.alert_definitions d where d.name = alert_name;
    if not found then
        perform peergate.fail('42704', format('alert "%s" does not exist', alert_name), null,
            peergate.suggestion(alert_name, (select array_agg(d.name) from peergate.alert_definitions d)), 'name');
    end if;
    if exists (select from peergate.alert_deliveries d where d.alert_id = alert.id and d.state = 'pending' and peergate.is_uncommitted(d.xmin)) then
        perform peergate.fail('55000', format('what alert "%s" tells was begun by this transaction and is not sent before COMMIT', alert_name),
            null, 'Commit first, then wait.', 'name');
    end if;
    -- All that is on its way, and the last test, which may have failed already.
    waited := array(select d.id from peergate.alert_deliveries d where d.alert_id = alert.id
                    and (d.state = 'pending' or d.event_id = (select max(e.id) from peergate.alert_events e where e.alert_id = alert.id and e.kind = 'test')));
    loop
        select d.kind, d.channel, d.error into failure from peergate.alert_deliveries d
        where d.id = any (waited) and d.error is not null and d.state in ('pending', 'failed') order by d.id limit 1;
        if found then
            perform peergate.fail('58030', format('alert "%s" could not be delivered to channel %s (%s)', alert_name, failure.channel, failure.kind), failure.error, null, 'name');
        end if;
        left_to := (select count(*) from peergate.alert_deliveries d where d.id = any (waited) and d.state = 'pending');
        exit when left_to = 0;
        if clock_timestamp() > started + timeout then
            perform peergate.fail('57014', format('timed out waiting for alert "%s"', alert_name), format('%s deliveries are still on their way.', left_to));
        end if;
        perform pg_sleep(0.05);
    end loop;
    perform peergate.finish(nonce, 'WAIT');
end $$;
comment on procedure peergate.wait_for_alert is 'WAIT FOR ALERT: until all that the alert had to tell has been delivered; an error if an attempt failed.';

create procedure peergate.comment_on_alert(alert_name text, comment text, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    alert peergate.alert_definitions := peergate.find_alert(alert_name);
begin
    update peergate.alert_definitions d set comment = nullif(comment_on_alert.comment, '') where d.id = alert.id;
    perform peergate.finish(nonce, 'COMMENT');
end $$;
comment on procedure peergate.comment_on_alert is 'COMMENT ON ALERT; NULL or an empty text takes the comment away.';

create view peergate.alerts as
select d.id, d.name, d.on_kind, coalesce(m.name, p.name) as on_name, d.conditions, d.channels, d.options, d.enabled,
       (select count(*) from peergate.alert_states s where s.alert_id = d.id and s.firing_since is not null) as firing,
       (select count(*) from peergate.alert_deliveries x where x.alert_id = d.id and x.state = 'pending') as undelivered,
       (select x.error from peergate.alert_deliveries x where x.alert_id = d.id and x.error is not null and x.state in ('pending', 'failed') order by x.id desc limit 1) as delivery_error,
       r.evaluated_at, d.owner, d.created_at, d.updated_at, d.comment
from peergate.alert_definitions d
join peergate.alert_runtime r on r.alert_id = d.id
left join peergate.mirror_definitions m on m.id = d.mirror_id
left join peergate.peers p on p.id = d.peer_id;
comment on view   peergate.alerts                is 'One row per alert: what was asked for, and how it stands. INSERT, UPDATE and DELETE do as CREATE, ALTER and DROP ALERT.';
comment on column peergate.alerts.id             is 'Identifies the alert for ever, whatever its name becomes.';
comment on column peergate.alerts.name           is 'The alert''s name.';
comment on column peergate.alerts.on_kind        is 'What it watches: mirror or peer.';
comment on column peergate.alerts.on_name        is 'Name of the mirror or peer; NULL: all of them.';
comment on column peergate.alerts.conditions     is 'When it fires, any of [{"metric", "op", "value", "for"}]; for is an interval.';
comment on column peergate.alerts.channels       is 'Who is told, all of [{"channel", "options"}]; secrets are not among the options.';
comment on column peergate.alerts.options        is 'Options by name; what is absent has its default in settings.';
comment on column peergate.alerts.enabled        is 'Whether it is looked at.';
comment on column peergate.alerts.firing         is 'For how many mirrors or peers it fires now.';
comment on column peergate.alerts.undelivered    is 'Deliveries that are on their way.';
comment on column peergate.alerts.delivery_error is 'Why the last delivery failed of those that are on their way or given up; NULL: none did.';
comment on column peergate.alerts.evaluated_at   is 'When it was last looked at; NULL: never.';
comment on column peergate.alerts.owner          is 'Role that created the alert.';
comment on column peergate.alerts.created_at     is 'When the alert was created.';
comment on column peergate.alerts.updated_at     is 'When its definition last changed.';
comment on column peergate.alerts.comment        is 'What COMMENT ON ALERT said; NULL: nothing.';

create function peergate.write_alerts() returns trigger language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    may_change constant text[] := array['name', 'on_kind', 'on_name', 'conditions', 'channels', 'options', 'enabled', 'comment'];
    gone    text[];
begin
    if tg_op = 'DELETE' then
        call peergate.drop_alert(array[old.name]);
        return old;
    end if;
    if tg_op = 'INSERT' then
        call peergate.create_alert(new.name, coalesce(new.on_kind, 'mirror'), new.on_name, new.conditions, new.channels, coalesce(new.options, '{}'),
            enabled => coalesce(new.enabled, true));
        if new.comment is not null then
            call peergate.comment_on_alert(new.name, new.comment);
        end if;
        select v.* into new from peergate.alerts v where v.name = new.name;
        return new;
    end if;
    if (to_jsonb(new) - may_change) is distinct from (to_jsonb(old) - may_change) then
        perform peergate.fail('0A000', format('only %s of an alert can be updated', array_to_string(may_change, ', ')));
    end if;
    if new.enabled is null then
        perform peergate.fail('23502', 'enabled of an alert cannot be null');
    end if;
    gone := array(select k from jsonb_object_keys(old.options) k where not coalesce(new.options, '{}') ? k);
    call peergate.alter_alert(old.name, case when (new.on_kind, new.on_name) is distinct from (old.on_kind, old.on_name) then new.on_kind end, new.on_name,
        new.conditions, case when new.channels is distinct from old.channels then new.channels end, options => coalesce(new.options, '{}'), reset => gone,
        enabled => case when new.enabled <> old.enabled then new.enabled end);
    if new.comment is distinct from old.comment then
        call peergate.comment_on_alert(old.name, new.comment);
    end if;
    if new.name is distinct from old.name then
        call peergate.rename_alert(old.name, new.name);
    end if;
    return new;
end $$;
comment on function peergate.write_alerts is 'Makes plain DML on alerts do what the statements do.';

create trigger write_alerts instead of insert or update or delete on peergate.alerts
    for each row execute function peergate.write_alerts();

create view peergate.show_alerts as
select a.name, case when a.on_name is null then format('all %ss', a.on_kind) else format('%s %I', a.on_kind, a.on_name) end as "on",
       (select string_agg(peergate.condition_text(c), ' OR ' order by n) from jsonb_array_elements(a.conditions) with ordinality e (c, n)) as "when",
       (select string_agg(c ->> 'channel', ', ' order by n) from jsonb_array_elements(a.channels) with ordinality e (c, n)) as notify,
       case when not a.enabled then 'disabled' when a.firing > 0 then 'firing' else 'quiet' end as state, a.firing, a.undelivered, a.delivery_error
from peergate.alerts a order by a.name;
comment on view   peergate.show_alerts                is 'What SHOW ALERTS shows.';
comment on column peergate.show_alerts.name           is 'The alert''s name.';
comment on column peergate.show_alerts."on"           is 'What it watches.';
comment on column peergate.show_alerts."when"         is 'When it fires.';
comment on column peergate.show_alerts.notify         is 'Who is told.';
comment on column peergate.show_alerts.state          is 'quiet, firing or disabled.';
comment on column peergate.show_alerts.firing         is 'For how many mirrors or peers it fires.';
comment on column peergate.show_alerts.undelivered    is 'Deliveries that are on their way.';
comment on column peergate.show_alerts.delivery_error is 'Why the last delivery failed; NULL: it did not.';

-- A function, so that a name that does not exist is an error and not an empty result.
create function peergate.show_alert(alert_name text) returns table (at timestamptz, kind text, subject text, message text, deliveries text)
language plpgsql stable security definer set search_path = pg_catalog, peergate as $$
declare
    alert peergate.alert_definitions;
begin
    select d.* into alert from peergate.alert_definitions d where d.name = alert_name;
    if not found then
        perform peergate.fail('42704', format('alert "%s" does not exist', alert_name), null,
            peergate.suggestion(alert_name, (select array_agg(d.name) from peergate.alert_definitions d)), 'name');
    end if;
    return query
        select e.at, e.kind, e.subject, e.message,
               (select string_agg(format('%s %s', x.kind, x.state) || coalesce(': ' || x.error, ''), '; ' order by x.channel) from peergate.alert_deliveries x where x.event_id = e.id)
        from peergate.alert_events e where e.alert_id = alert.id order by e.id;
end $$;
comment on function peergate.show_alert is 'What SHOW ALERT name shows: what it told, and what became of that.';

-- Procedures and functions are executable by everybody unless that is taken away.
revoke all on all routines in schema peergate from public;
