-- Why:   a mirror can be one of a query: its rows are written to a table of the target in rounds, by a watermark or as a whole. What was asked
--        for is in mirror_definitions as for all mirrors (selection {"query": …}), with options of a scope of their own; what the engine does is
--        shown by mirror_rounds and mirror_partitions. What decides is on the target (peergate.query_progress), written with the rows.
--        Routines that all mirrors share look which kind of mirror it is and call the one for it: those for mirrors of tables are as they were,
--        under other names (…_table_mirror).
-- Locks: ACCESS EXCLUSIVE on settings and tasks, briefly.
-- Undo:  drop the objects of this file, restore the routines that it replaces; delete the settings.

alter table peergate.settings
    drop constraint settings_scope_check,
    add constraint settings_scope_check check (scope in ('peer', 'mirror', 'query mirror', 'alert', 'webhook', 'slack', 'email', 'notify'));
comment on column peergate.settings.scope is 'What the option belongs to: peer, mirror, query mirror, alert, or a channel of alerts (webhook, slack, email, notify).';

insert into peergate.settings (scope, name, type, default_value, allowed, min_value, max_value, secret, alias_of, description) values
    ('query mirror', 'target_table',     'text',     null,     null, null, null, false, null, 'Table on the target that the rows are written to, as [schema.]table. Required.'),
    ('query mirror', 'mode',             'enum',     'append', array['append', 'upsert', 'overwrite'], null, null, false, null, 'What a round does with the query''s rows: add them, add or replace them by key_columns, or put them in the place of all that the table holds.'),
    ('query mirror', 'watermark_column', 'text',     null,     null, null, null, false, null, 'Column (smallint, int, bigint, date, timestamp, timestamptz) by which a round takes the rows that are new, or xmin: those of transactions that are new.'),
    ('query mirror', 'watermark_table',  'text',     null,     null, null, null, false, null, 'Table of the source that is asked for the watermark''s values; the query itself when not given. Needed with {{.start}} and {{.end}}.'),
    ('query mirror', 'key_columns',      'text',     null,     null, null, null, false, null, 'Columns of the target table by which upsert finds rows, separated by commas.'),
    ('query mirror', 'partition_rows',   'integer',  '50000',  null, 1, 1000000000, false, null, 'Rows of a partition: what is written, and noted as written, in one transaction.'),
    ('query mirror', 'parallel_workers', 'integer',  '2',      null, 1, 64, false, null, 'Partitions that are read and written at the same time.'),
    ('query mirror', 'refresh_interval', 'interval', '10s',    null, null, null, false, null, 'Pause between two rounds; at least 1s.'),
    ('query mirror', 'run_once',         'boolean',  'false',  null, null, null, false, null, 'One round, then the mirror is completed.'),
    ('query mirror', 'on_demand',        'boolean',  'false',  null, null, null, false, null, 'Rounds are run by EXECUTE MIRROR only.'),
    ('query mirror', 'create_table',     'boolean',  'true',   null, null, null, false, null, 'Create the target table if it is missing, with the columns of the query.'),
    ('query mirror', 'truncate_target',  'boolean',  'false',  null, null, null, false, null, 'The first round replaces what the target table holds.'),
    ('query mirror', 'detect_deletes',   'boolean',  'false',  null, null, null, false, null, 'At the end of each round, delete the rows whose keys the query has no more (mode upsert): the query is run once more as a whole.'),
    ('query mirror', 'wait_for_transactions', 'enum', 'all',   array['all', 'writers', 'none'], null, null, false, null, 'Which transactions of the source that are open when a round''s upper bound is chosen are waited for before rows below it are read: all of the database and all that write, those that write, or none.');

insert into peergate.settings (scope, name, type, alias_of, description) values
    ('query mirror', 'destination_table_name', 'text',    'target_table',     'PeerDB''s name for target_table.'),
    ('query mirror', 'num_rows_per_partition', 'integer', 'partition_rows',   'PeerDB''s name for partition_rows.'),
    ('query mirror', 'watermark_table_name',   'text',    'watermark_table',  'PeerDB''s name for watermark_table.'),
    ('query mirror', 'unique_key_columns',     'text',    'key_columns',      'PeerDB''s name for key_columns.'),
    ('query mirror', 'parallelism',            'integer', 'parallel_workers', 'PeerDB''s name for parallel_workers.'),
    ('query mirror', 'initial_copy_only',      'boolean', 'run_once',         'PeerDB''s name for run_once.'),
    ('query mirror', 'disabled',               'boolean', 'on_demand',        'PeerDB''s name for on_demand.'),
    ('query mirror', 'setup_watermark_table_on_destination', 'boolean', 'create_table', 'PeerDB''s name for create_table.'),
    ('query mirror', 'dst_table_full_resync',  'boolean', 'truncate_target',  'PeerDB''s name for truncate_target.'),
    ('query mirror', 'staging_path',           'text',    null,               'PeerDB''s; must be empty, as rows go from server to server.');
update peergate.settings s set min_value = o.min_value, max_value = o.max_value
from peergate.settings o where s.scope = 'query mirror' and o.scope = s.scope and o.name = s.alias_of;

comment on column peergate.mirror_definitions.selection is 'Which tables: {"all": true}, {"schemas": [{"from", "to"}]} or {"tables": [{"from": {"schema", "name"}, "to": {…}, "columns", "exclude", "where"}]}, with "except" for the first two; or {"query": text}.';
comment on column peergate.mirror_definitions.options   is 'Options by name, as peergate.settings lists them for scope mirror or query mirror; what is absent has its default.';

alter table peergate.tasks
    drop constraint tasks_kind_check,
    add constraint tasks_kind_check check (kind in
        ('create_mirror', 'alter_mirror', 'resync_mirror', 'pause_mirror', 'resume_mirror', 'drop_mirror', 'verify_mirror', 'execute_mirror'));
comment on column peergate.tasks.kind is 'What is being done: create_mirror, alter_mirror, resync_mirror, pause_mirror, resume_mirror, drop_mirror, verify_mirror or execute_mirror.';

create table peergate.query_rounds (
    mirror_id      bigint not null references peergate.mirror_definitions (id) on delete cascade,
    round          bigint not null,
    state          text not null default 'running' constraint query_rounds_state_check check (state in ('waiting', 'running', 'completed', 'failed')),
    replaces       boolean not null default false,
    lower_bound    text,
    upper_bound    text,
    partitions     integer not null default 0,
    rows           bigint not null default 0,
    bytes          bigint not null default 0,
    rows_deleted   bigint not null default 0,
    waits_for      text,
    error_sqlstate text,
    error_message  text,
    began_at       timestamptz not null default clock_timestamp(),
    ended_at       timestamptz,
    primary key (mirror_id, round)
);
comment on table  peergate.query_rounds                is 'Rounds of mirrors of queries; the last hundred of each are kept. Read them through the view mirror_rounds. Written by: the engine that holds the mirror''s lease.';
comment on column peergate.query_rounds.mirror_id      is 'The mirror.';
comment on column peergate.query_rounds.round          is 'The round''s number, counted from 1.';
comment on column peergate.query_rounds.state          is 'Where the round is: waiting (for transactions of the source), running, completed, or failed (it goes on with the next attempt).';
comment on column peergate.query_rounds.replaces       is 'Its rows take the place of all that the target table holds, when it is completed.';
comment on column peergate.query_rounds.lower_bound    is 'Watermark that earlier rounds have reached; NULL: none, or there is no watermark.';
comment on column peergate.query_rounds.upper_bound    is 'Watermark that this round reaches; NULL: nothing is new, or there is no watermark.';
comment on column peergate.query_rounds.partitions     is 'Partitions of the round.';
comment on column peergate.query_rounds.rows           is 'Rows written; of an upsert, those that were new or different.';
comment on column peergate.query_rounds.bytes          is 'Bytes read, in COPY''s format.';
comment on column peergate.query_rounds.rows_deleted   is 'Rows that were deleted because the query has them no more.';
comment on column peergate.query_rounds.waits_for      is 'What a waiting round waits for.';
comment on column peergate.query_rounds.error_sqlstate is 'SQLSTATE of what made it fail; NULL when nothing did.';
comment on column peergate.query_rounds.error_message  is 'What made it fail.';
comment on column peergate.query_rounds.began_at       is 'When the round began: what the source had committed then is on the target when it is completed.';
comment on column peergate.query_rounds.ended_at       is 'When it was completed; NULL while it is not.';

create table peergate.query_partitions (
    mirror_id   bigint not null,
    round       bigint not null,
    partition   integer not null,
    lower_bound text,
    upper_bound text,
    state       text not null default 'pending' constraint query_partitions_state_check check (state in ('pending', 'copying', 'done')),
    rows        bigint,
    bytes       bigint,
    began_at    timestamptz,
    ended_at    timestamptz,
    primary key (mirror_id, round, partition),
    foreign key (mirror_id, round) references peergate.query_rounds (mirror_id, round) on delete cascade
);
comment on table  peergate.query_partitions             is 'Partitions of the last ten rounds that had any, of mirrors of queries. Read them through the view mirror_partitions. Written by: the engine that holds the mirror''s lease.';
comment on column peergate.query_partitions.mirror_id   is 'The mirror.';
comment on column peergate.query_partitions.round       is 'The round.';
comment on column peergate.query_partitions.partition   is 'The partition''s number, counted from 1.';
comment on column peergate.query_partitions.lower_bound is 'Least watermark that is part of it; NULL: no limit.';
comment on column peergate.query_partitions.upper_bound is 'Greatest watermark that is part of it; NULL: no limit.';
comment on column peergate.query_partitions.state       is 'Where it is: pending, copying, or done (its rows and the note of that are committed on the target).';
comment on column peergate.query_partitions.rows        is 'Rows written; NULL while it is not done.';
comment on column peergate.query_partitions.bytes       is 'Bytes read, in COPY''s format; NULL while it is not done.';
comment on column peergate.query_partitions.began_at    is 'When its copy began.';
comment on column peergate.query_partitions.ended_at    is 'When it was done.';

create view peergate.mirror_rounds as
select d.name as mirror, r.round, r.state, r.replaces, r.lower_bound, r.upper_bound, r.partitions,
       (select count(*) from peergate.query_partitions p where p.mirror_id = r.mirror_id and p.round = r.round and p.state = 'done') as partitions_done,
       r.rows, r.bytes, r.rows_deleted, r.waits_for, r.error_sqlstate, r.error_message, r.began_at, r.ended_at
from peergate.query_rounds r join peergate.mirror_definitions d on d.id = r.mirror_id;
comment on view   peergate.mirror_rounds                 is 'The last hundred rounds of each mirror of a query.';
comment on column peergate.mirror_rounds.mirror          is 'The mirror''s name.';
comment on column peergate.mirror_rounds.round           is 'The round''s number, counted from 1.';
comment on column peergate.mirror_rounds.state           is 'Where the round is: waiting (for transactions of the source), running, completed, or failed (it goes on with the next attempt).';
comment on column peergate.mirror_rounds.replaces        is 'Its rows take the place of all that the target table holds, when it is completed.';
comment on column peergate.mirror_rounds.lower_bound     is 'Watermark that earlier rounds have reached; NULL: none, or there is no watermark.';
comment on column peergate.mirror_rounds.upper_bound     is 'Watermark that this round reaches; NULL: nothing is new, or there is no watermark.';
comment on column peergate.mirror_rounds.partitions      is 'Partitions of the round.';
comment on column peergate.mirror_rounds.partitions_done is 'How many of them are done; only known of the last ten rounds.';
comment on column peergate.mirror_rounds.rows            is 'Rows written; of an upsert, those that were new or different.';
comment on column peergate.mirror_rounds.bytes           is 'Bytes read, in COPY''s format.';
comment on column peergate.mirror_rounds.rows_deleted    is 'Rows that were deleted because the query has them no more.';
comment on column peergate.mirror_rounds.waits_for       is 'What a waiting round waits for.';
comment on column peergate.mirror_rounds.error_sqlstate  is 'SQLSTATE of what made it fail; NULL when nothing did.';
comment on column peergate.mirror_rounds.error_message   is 'What made it fail.';
comment on column peergate.mirror_rounds.began_at        is 'When the round began: what the source had committed then is on the target when it is completed.';
comment on column peergate.mirror_rounds.ended_at        is 'When it was completed; NULL while it is not.';

create view peergate.mirror_partitions as
select d.name as mirror, p.round, p.partition, p.lower_bound, p.upper_bound, p.state, p.rows, p.bytes, p.began_at, p.ended_at
from peergate.query_partitions p join peergate.mirror_definitions d on d.id = p.mirror_id;
comment on view   peergate.mirror_partitions             is 'The partitions of the last ten rounds that had any, of each mirror of a query.';
comment on column peergate.mirror_partitions.mirror      is 'The mirror''s name.';
comment on column peergate.mirror_partitions.round       is 'The round.';
comment on column peergate.mirror_partitions.partition   is 'The partition''s number, counted from 1.';
comment on column peergate.mirror_partitions.lower_bound is 'Least watermark that is part of it; NULL: no limit. Of xmin, the lower 32 bits.';
comment on column peergate.mirror_partitions.upper_bound is 'Greatest watermark that is part of it; NULL: no limit. Of xmin, the lower 32 bits.';
comment on column peergate.mirror_partitions.state       is 'Where it is: pending, copying, or done (its rows and the note of that are committed on the target).';
comment on column peergate.mirror_partitions.rows        is 'Rows written; NULL while it is not done.';
comment on column peergate.mirror_partitions.bytes       is 'Bytes read, in COPY''s format; NULL while it is not done.';
comment on column peergate.mirror_partitions.began_at    is 'When its copy began.';
comment on column peergate.mirror_partitions.ended_at    is 'When it was done.';

-- An identifier, or several, as an option's value; NULL when it is none.
create function peergate.parsed_name(given text) returns text[] language plpgsql immutable as $$
begin
    return (select array_agg(part::name::text order by n) from unnest(pg_catalog.parse_ident(given)) with ordinality p (part, n));
exception when invalid_parameter_value then
    return null;
end $$;
comment on function peergate.parsed_name is 'The parts of a name that is written as in SQL; NULL when it is no name.';

-- Commas within quotes are part of a name.
create function peergate.parsed_columns(given text) returns text[] language sql immutable as $$
    select case when bool_and(cardinality(peergate.parsed_name(part)) = 1) then array_agg((peergate.parsed_name(part))[1] order by n) end
    from unnest(regexp_split_to_array(given, ',(?=(?:[^"]*"[^"]*")*[^"]*$)')) with ordinality p (part, n)
$$;
comment on function peergate.parsed_columns is 'The columns of a list that is written as in SQL; NULL when it is no such list.';

create function peergate.query_option(options jsonb, option text) returns text language sql stable as $$
    select coalesce(options ->> option, (select s.default_value from peergate.settings s where s.scope = 'query mirror' and s.name = option))
$$;
comment on function peergate.query_option is 'The value of an option of a mirror of a query, or its default.';

create function peergate.check_query_name(option text, given text, written text) returns text language plpgsql stable as $$
declare
    parts text[] := peergate.parsed_name(given);
    table_expected boolean := option in ('target_table', 'watermark_table');
begin
    if option = 'key_columns' then
        parts := peergate.parsed_columns(given);
        if parts is not null and (select count(distinct p) from unnest(parts) p) = cardinality(parts) then
            return (select string_agg(quote_ident(p), ', ' order by n) from unnest(parts) with ordinality c (p, n));
        end if;
    elsif cardinality(parts) = 1 then
        return case when table_expected then format('%I.%I', 'public', parts[1]) else quote_ident(parts[1]) end;
    elsif cardinality(parts) = 2 and table_expected then
        return format('%I.%I', parts[1], parts[2]);
    end if;
    perform peergate.fail('22023', format('invalid value for option "%s": "%s"', written, given),
        case when table_expected then 'It takes a table''s name, such as public.orders.' when option = 'key_columns' then 'It takes columns, such as id, region.'
             else 'It takes a column''s name.' end, null, 'option.' || written || '.value');
end $$;
comment on function peergate.check_query_name is 'Checks an option that is a name, or several, and gives its canonical form.';

-- Options of a mirror of a query in their canonical form, or an error where they, or they and the query, do not go together.
create function peergate.check_query_options(given jsonb, query text) returns jsonb language plpgsql stable as $$
declare
    checked jsonb := peergate.check_options('query mirror', given);
    written jsonb;
    key     text;
    placeholders text[] := array(select distinct m[1] from regexp_matches(query, '\{\{\s*\.([[:alpha:]_]\w*)\s*\}\}', 'g') m order by 1);
begin
    -- How each option was called in the statement: errors point there.
    select coalesce(jsonb_object_agg(coalesce(s.alias_of, s.name), s.name), '{}') into written
    from jsonb_object_keys(given) k join peergate.settings s on s.scope = 'query mirror' and s.name = k;
    if checked ? 'staging_path' then
        if checked ->> 'staging_path' <> '' then
            perform peergate.fail('0A000', 'option "staging_path" must be empty', 'Rows go from server to server.', null, 'option.staging_path.value');
        end if;
        checked := checked - 'staging_path';
    end if;
    foreach key in array array['target_table', 'watermark_table', 'watermark_column', 'key_columns'] loop
        -- PeerDB's empty strings mean that there is none.
        if checked ->> key = '' and key <> 'target_table' then
            checked := checked - key;
        elsif checked ? key then
            checked := checked || jsonb_build_object(key, peergate.check_query_name(key, checked ->> key, coalesce(written ->> key, key)));
        end if;
    end loop;
    if not checked ? 'target_table' then
        perform peergate.fail('42601', 'option "target_table" is required', null, 'Name the table of the target that the query''s rows are written to.', 'options');
    end if;
    if query is null or btrim(query, E' \t\r\n;') = '' then
        perform peergate.fail('22023', 'the query is empty', null, null, 'query');
    end if;
    foreach key in array placeholders loop
        if key not in ('start', 'end') then
            perform peergate.fail('22023', format('unrecognized placeholder "{{.%s}}" in the query', key), 'Placeholders are {{.start}} and {{.end}}.',
                peergate.suggestion(key, array['start', 'end']), 'query');
        end if;
    end loop;
    if cardinality(placeholders) = 1 then
        perform peergate.fail('22023', format('the query has {{.%s}} and lacks {{.%s}}', placeholders[1], case placeholders[1] when 'start' then 'end' else 'start' end),
            'Each partition is the rows from {{.start}} to {{.end}}, both included.', null, 'query');
    end if;
    if cardinality(placeholders) > 0 and not checked ? 'watermark_column' then
        perform peergate.fail('22023', 'the query has placeholders and there is no watermark', null, 'Give watermark_column.', 'query');
    end if;
    if cardinality(placeholders) > 0 and checked ->> 'watermark_column' <> 'xmin' and not checked ? 'watermark_table' then
        perform peergate.fail('22023', 'a query with placeholders needs option "watermark_table"', 'The watermark''s values are looked up there.', null,
            'option.' || coalesce(written ->> 'watermark_column', 'watermark_column'));
    end if;
    if checked ? 'watermark_table' and not checked ? 'watermark_column' then
        perform peergate.fail('22023', format('option "%s" needs option "watermark_column"', written ->> 'watermark_table'), null, null, 'option.' || (written ->> 'watermark_table'));
    end if;
    case peergate.query_option(checked, 'mode')
        when 'upsert' then
            if not checked ? 'key_columns' then
                perform peergate.fail('22023', 'mode upsert needs option "key_columns"', 'Rows are found on the target by them.', null, 'option.mode.value');
            end if;
        when 'append' then
            if not checked ? 'watermark_column' and not (peergate.query_option(checked, 'run_once')::boolean or peergate.query_option(checked, 'on_demand')::boolean) then
                perform peergate.fail('22023', 'mode append needs option "watermark_column"', 'Each round would add all rows once more.',
                    'Give a watermark_column, run_once = true for a single copy, or another mode.', 'option.mode.value');
            end if;
        else
            if checked ->> 'watermark_column' = 'xmin' then
                perform peergate.fail('22023', 'mode overwrite takes all rows, and no watermark xmin', null, 'Leave watermark_column out.',
                    'option.' || (written ->> 'watermark_column') || '.value');
            end if;
    end case;
    if checked ? 'key_columns' and peergate.query_option(checked, 'mode') <> 'upsert' then
        perform peergate.fail('22023', format('option "%s" is for mode upsert', written ->> 'key_columns'), null, null, 'option.' || (written ->> 'key_columns'));
    end if;
    if peergate.query_option(checked, 'detect_deletes')::boolean and peergate.query_option(checked, 'mode') <> 'upsert' then
        perform peergate.fail('22023', 'option "detect_deletes" is for mode upsert', null, null, 'option.detect_deletes');
    end if;
    if peergate.query_option(checked, 'refresh_interval')::interval < interval '1 second' then
        perform peergate.fail('22023', format('%s is outside the valid range for option "refresh_interval"', given ->> 'refresh_interval'),
            'It must be at least 1s.', null, 'option.refresh_interval.value');
    end if;
    return checked;
end $$;
comment on function peergate.check_query_options is 'Checks the options of a mirror of a query, and that query and options go together; gives their canonical form.';

create procedure peergate.create_query_mirror(mirror_name text, source text, target text, query text, options jsonb default '{}',
    if_not_exists boolean default false, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    checked   jsonb := peergate.check_query_options(options, query);
    selection jsonb := jsonb_build_object('query', query);
    existing  record;
    source_id bigint;
    target_id bigint;
    id        bigint;
    task_id   bigint;
begin
    select d.options, d.selection, s.name as source, t.name as target into existing
    from peergate.mirror_definitions d join peergate.peers s on s.id = d.source_id join peergate.peers t on t.id = d.target_id where d.name = mirror_name;
    if found then
        if not if_not_exists then
            perform peergate.fail('42710', format('mirror "%s" already exists', mirror_name), null, null, 'name');
        end if;
        raise notice using errcode = '42710', message = format('mirror "%s" already exists, skipping', mirror_name);
        if (existing.options, existing.selection, existing.source, existing.target) is distinct from (checked, selection, source, target) then
            raise notice 'the existing mirror "%" has a different definition, which was not changed', mirror_name;
        end if;
        perform peergate.finish(nonce, 'CREATE MIRROR');
        return;
    end if;
    -- A peer that is being dropped must not gain a mirror.
    select p.id into source_id from peergate.peers p where p.name = source for key share;
    if not found then
        perform peergate.fail('42704', format('peer "%s" does not exist', source), null,
            peergate.suggestion(source, (select array_agg(p.name) from peergate.peers p)), 'source');
    end if;
    select p.id into target_id from peergate.peers p where p.name = target for key share;
    if not found then
        perform peergate.fail('42704', format('peer "%s" does not exist', target), null,
            peergate.suggestion(target, (select array_agg(p.name) from peergate.peers p)), 'target');
    end if;
    id := nextval(pg_get_serial_sequence('peergate.mirror_definitions', 'id'));
    insert into peergate.mirror_definitions (id, name, source_id, target_id, selection, options, object_name, owner)
    overriding system value
    values (id, mirror_name, source_id, target_id, selection, checked,
            format('peergate_%s_%s', id, substr(md5(random()::text || clock_timestamp()::text), 1, 8)), session_user)
    on conflict (name) do nothing;
    if not found then
        perform peergate.fail('42710', format('mirror "%s" already exists', mirror_name), null, null, 'name');
    end if;
    insert into peergate.mirror_runtime (mirror_id) values (id);
    insert into peergate.mirror_leases (mirror_id) values (id);
    task_id := peergate.start_task('create_mirror', id, mirror_name);
    raise notice using message = format('task %s creates mirror "%s"', task_id, mirror_name),
        hint = case when peergate.query_option(checked, 'on_demand')::boolean then format('EXECUTE MIRROR %I runs it.', mirror_name)
                    else format('WAIT FOR MIRROR %I returns when a round is completed.', mirror_name) end;
    perform peergate.finish(nonce, 'CREATE MIRROR');
end $$;
comment on procedure peergate.create_query_mirror is 'CREATE MIRROR … FOR a query.';

create procedure peergate.execute_mirror(mirror_name text, if_exists boolean default false, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    mirror  peergate.mirror_definitions := peergate.find_mirror(mirror_name, if_exists);
    task_id bigint;
begin
    if mirror.id is not null then
        if not mirror.selection ? 'query' then
            perform peergate.fail('55000', format('mirror "%s" is not one of a query', mirror.name), 'It follows its tables by itself.',
                format('WAIT FOR MIRROR %I returns when the target has caught up.', mirror.name), 'name');
        end if;
        if (select r.state from peergate.mirror_runtime r where r.mirror_id = mirror.id) = 'completed' then
            perform peergate.fail('55000', format('mirror "%s" is completed', mirror.name), 'It runs once, and that is done.',
                'A mirror with on_demand = true runs each time it is executed.', 'name');
        end if;
        if mirror.desired_state = 'paused' then
            perform peergate.fail('55000', format('mirror "%s" is paused', mirror.name), null, format('RESUME MIRROR %I lets it go on.', mirror.name), 'name');
        end if;
        insert into peergate.tasks (kind, mirror_id, mirror) values ('execute_mirror', mirror.id, mirror.name) returning id into task_id;
        perform peergate.try_again(mirror.id);
        perform pg_notify('peergate', '');
        raise notice using message = format('task %s runs mirror "%s"', task_id, mirror.name),
            hint = format('WAIT FOR MIRROR %I returns when it has run.', mirror.name);
    end if;
    perform peergate.finish(nonce, 'EXECUTE MIRROR');
end $$;
comment on procedure peergate.execute_mirror is 'EXECUTE MIRROR: the mirror of a query runs a round now.';

-- A person asks for a new attempt; whoever waits for it is not to see the old error.
create function peergate.try_again(about_id bigint) returns void language plpgsql security definer set search_path = pg_catalog, peergate as $$
begin
    if exists (select from peergate.mirror_runtime r where r.mirror_id = about_id and r.state in ('blocked', 'resync_required')) then
        update peergate.mirror_definitions d set updated_at = clock_timestamp() where d.id = about_id;
        update peergate.mirror_runtime r set state = 'retrying', retry_at = now() where r.mirror_id = about_id;
    end if;
end $$;
comment on function peergate.try_again is 'Gives a mirror that waits for a person another attempt.';

create function peergate.is_query_mirror(mirror_name text) returns boolean language sql stable
security definer set search_path = pg_catalog, peergate as $$
    select exists (select from peergate.mirror_definitions d where d.name = mirror_name and d.selection ? 'query')
$$;
comment on function peergate.is_query_mirror is 'Whether the mirror of that name is one of a query.';

create or replace function peergate.check_alterable(mirror peergate.mirror_definitions) returns void language plpgsql
security definer set search_path = pg_catalog, peergate as $$
begin
    if mirror.selection ? 'query' then
        perform peergate.fail('55000', format('mirror "%s" is one of a query', mirror.name), 'It has no tables of the source to choose.',
            format('RESYNC MIRROR %I runs the query anew; SET changes options.', mirror.name), 'name');
    end if;
    if (select r.state from peergate.mirror_runtime r where r.mirror_id = mirror.id) = 'completed' then
        perform peergate.fail('55000', format('mirror "%s" is completed', mirror.name), 'It only copies, and the copy is done.',
            'Drop the mirror and create it anew.', 'name');
    end if;
    if peergate.option('mirror', mirror.options, 'mode') = 'copy_only' then
        perform peergate.fail('55000', format('mirror "%s" only copies, and is copying', mirror.name), null, 'Drop the mirror and create it anew.', 'name');
    end if;
end $$;

-- What is written for mirrors of tables stays, under another name; a parameter's name may have the routine's before it.
do $$
declare
    item record;
begin
    for item in select p.oid, p.proname::text as name, n.new_name
                from (values ('create_mirror', 'create_table_mirror'), ('resync_mirror', 'resync_table_mirror'), ('set_mirror_options', 'set_table_mirror_options'),
                             ('check_verifiable', 'check_verifiable_tables'), ('show_mirror', 'show_table_mirror'),
                             ('wait_for_mirror', 'wait_for_table_mirror')) n (name, new_name)
                join pg_proc p on p.proname = n.name and p.pronamespace = 'peergate'::regnamespace loop
        execute regexp_replace(replace(pg_get_functiondef(item.oid), format('peergate.%s(', item.name), format('peergate.%s(', item.new_name)),
                               format('([^.[:alnum:]_])%s\.', item.name), format('\1%s.', item.new_name), 'g');
    end loop;
end $$;

comment on procedure peergate.create_table_mirror is 'CREATE MIRROR, of tables.';

create or replace procedure peergate.create_mirror(mirror_name text, source text, target text, selection jsonb, options jsonb default '{}',
    if_not_exists boolean default false, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
begin
    if selection ? 'query' then
        call peergate.create_query_mirror(mirror_name, source, target, selection ->> 'query', options, if_not_exists, nonce);
    else
        call peergate.create_table_mirror(mirror_name, source, target, selection, options, if_not_exists, nonce);
    end if;
end $$;
comment on procedure peergate.create_mirror is 'CREATE MIRROR.';

comment on procedure peergate.resync_table_mirror is 'RESYNC MIRROR, of tables.';

create or replace procedure peergate.resync_mirror(mirror_name text, tables jsonb default null, if_exists boolean default false, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    mirror peergate.mirror_definitions;
begin
    if not peergate.is_query_mirror(mirror_name) then
        call peergate.resync_table_mirror(mirror_name, tables, if_exists, nonce);
        return;
    end if;
    mirror := peergate.find_mirror(mirror_name, if_exists);
    if tables is not null then
        perform peergate.fail('55000', format('mirror "%s" is one of a query', mirror.name), 'It has no tables of the source to choose.',
            format('RESYNC MIRROR %I runs the query anew.', mirror.name), 'table.1');
    end if;
    if (select r.state from peergate.mirror_runtime r where r.mirror_id = mirror.id) = 'completed' then
        perform peergate.fail('55000', format('mirror "%s" is completed', mirror.name), 'It runs once, and that is done.',
            'Drop the mirror and create it anew, with truncate_target = true.', 'name');
    end if;
    perform peergate.start_table_task('resync_mirror', mirror, null, 'resyncs');
    perform peergate.try_again(mirror.id);
    perform peergate.finish(nonce, 'RESYNC MIRROR');
end $$;
comment on procedure peergate.resync_mirror is 'RESYNC MIRROR. What is on the target stays until the new copy takes its place.';

comment on procedure peergate.set_table_mirror_options is 'ALTER MIRROR … SET and RESET, of tables.';

create or replace procedure peergate.set_mirror_options(mirror_name text, options jsonb default '{}', reset text[] default '{}', nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    mirror  peergate.mirror_definitions;
    changed jsonb;
    key     text;
    setting peergate.settings;
begin
    if not peergate.is_query_mirror(mirror_name) then
        call peergate.set_table_mirror_options(mirror_name, options, reset, nonce);
        return;
    end if;
    mirror := peergate.find_mirror(mirror_name, false);
    changed := mirror.options;
    foreach key in array reset loop
        setting := peergate.find_setting('query mirror', key);
        changed := changed - coalesce(setting.alias_of, key);
    end loop;
    for key in select jsonb_object_keys(options) loop
        setting := peergate.find_setting('query mirror', key);
        changed := changed - coalesce(setting.alias_of, key);
    end loop;
    changed := peergate.check_query_options(changed || options, mirror.selection ->> 'query');
    -- What is on the target, and the note of how far it is, were written by these.
    for key in select k from unnest(reset || array(select jsonb_object_keys(options))) k loop
        setting := peergate.find_setting('query mirror', key);
        if coalesce(setting.alias_of, key) in ('target_table', 'mode', 'watermark_column', 'watermark_table', 'key_columns')
           and changed ->> coalesce(setting.alias_of, key) is distinct from mirror.options ->> coalesce(setting.alias_of, key) then
            perform peergate.fail('0A000', format('option "%s" of a mirror of a query cannot be changed', key), null,
                'Drop the mirror and create it anew.', 'option.' || key);
        end if;
    end loop;
    if changed is distinct from mirror.options then
        -- It begins anew where it is, with the options as they are now.
        update peergate.mirror_definitions d set options = changed, updated_at = clock_timestamp() where d.id = mirror.id;
        perform pg_notify('peergate', '');
    end if;
    perform peergate.finish(nonce, 'ALTER MIRROR');
end $$;
comment on procedure peergate.set_mirror_options is 'ALTER MIRROR … SET and RESET.';

comment on function peergate.check_verifiable_tables is 'The id of a mirror of tables that can be verified; 42704, 42P01 or 55000 when it cannot.';

create or replace function peergate.check_verifiable(mirror_name text, tables jsonb) returns bigint language plpgsql
security definer set search_path = pg_catalog, peergate as $$
begin
    if peergate.is_query_mirror(mirror_name) then
        perform peergate.fail('55000', format('mirror "%s" is one of a query', mirror_name), 'There is no table of the source to compare the target''s with.',
            format('RESYNC MIRROR %I runs the query anew and replaces what the target holds.', mirror_name), 'name');
    end if;
    return peergate.check_verifiable_tables(mirror_name, tables);
end $$;
comment on function peergate.check_verifiable is 'The id of a mirror that can be verified; 42704, 42P01 or 55000 when it cannot.';

comment on function peergate.show_table_mirror is 'What SHOW MIRROR name shows of a mirror of tables: one row per table.';

create or replace function peergate.show_mirror(mirror_name text)
returns table ("table" text, target text, state text, "copied %" numeric, rows_copied bigint, inserts bigint, updates bigint, deletes bigint, truncates bigint, warning text)
language plpgsql stable security definer set search_path = pg_catalog, peergate as $$
begin
    if not peergate.is_query_mirror(mirror_name) then
        return query select * from peergate.show_table_mirror(mirror_name);
        return;
    end if;
    -- One row for the query, about its last round and the sum of all that are kept.
    return query
        select '(query)'::text, d.options ->> 'target_table', r.state,
               (select case when count(*) > 0 then round(100.0 * count(*) filter (where p.state = 'done') / count(*), 1) end
                from peergate.query_partitions p where p.mirror_id = d.id and p.round = (select max(q.round) from peergate.query_rounds q where q.mirror_id = d.id)),
               r.rows_applied, null::bigint, null::bigint,
               (select coalesce(sum(q.rows_deleted), 0)::bigint from peergate.query_rounds q where q.mirror_id = d.id), null::bigint,
               (select q.waits_for from peergate.query_rounds q where q.mirror_id = d.id order by q.round desc limit 1)
        from peergate.mirror_definitions d join peergate.mirror_runtime r on r.mirror_id = d.id where d.name = mirror_name;
end $$;
comment on function peergate.show_mirror is 'What SHOW MIRROR name shows: one row per table, or one for the query.';

comment on procedure peergate.wait_for_table_mirror is 'WAIT FOR MIRROR, of tables, and for any mirror''s state.';

create or replace procedure peergate.wait_for_mirror(mirror_name text, up_to pg_lsn default null, up_to_state text default null,
    timeout interval default null, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    started constant timestamptz := clock_timestamp();
    mirror  record;
begin
    if up_to_state is not null or not peergate.is_query_mirror(mirror_name) then
        call peergate.wait_for_table_mirror(mirror_name, up_to, up_to_state, timeout, nonce);
        return;
    end if;
    if up_to is not null then
        perform peergate.fail('0A000', format('mirror "%s" is one of a query', mirror_name), 'It has no position in the source''s WAL.',
            'WAIT FOR MIRROR without LSN waits for a round that begins now.', 'lsn');
    end if;
    if current_setting('transaction_isolation') <> 'read committed' then
        perform peergate.fail('25001', 'WAIT FOR MIRROR cannot run in a transaction that is not READ COMMITTED',
            'Such a transaction does not see what happens after it began.');
    end if;
    loop
        select d.desired_state, peergate.is_uncommitted(d.xmin) as uncommitted, peergate.query_option(d.options, 'on_demand')::boolean as on_demand, r.*,
               exists (select from peergate.query_rounds q where q.mirror_id = d.id and q.state = 'completed' and q.began_at > started) as has_run,
               exists (select from peergate.tasks k where k.mirror_id = d.id and k.kind in ('create_mirror', 'resync_mirror', 'execute_mirror')
                       and k.state in ('pending', 'running')) as has_task
        into mirror
        from peergate.mirror_definitions d join peergate.mirror_runtime r on r.mirror_id = d.id where d.name = mirror_name;
        if not found then
            perform peergate.fail('42704', format('mirror "%s" does not exist', mirror_name), null, null, 'name');
        end if;
        if mirror.uncommitted then
            perform peergate.fail('55000', format('mirror "%s" was changed by this transaction and nothing happens to it before COMMIT', mirror_name),
                null, 'Commit first, then wait.', 'name');
        end if;
        -- One that runs on demand has run when nobody's demand is open.
        exit when mirror.state = 'completed' or (not mirror.has_task and (mirror.has_run or mirror.on_demand));
        if mirror.state in ('blocked', 'resync_required') then
            perform peergate.fail(coalesce(mirror.error_sqlstate, '55000'), format('mirror "%s" is %s: %s', mirror_name, mirror.state, coalesce(mirror.error_message, 'no reason was recorded')),
                mirror.error_detail, mirror.error_hint, 'name');
        end if;
        if mirror.desired_state = 'paused' then
            perform peergate.fail('55000', format('mirror "%s" is paused', mirror_name), null, format('RESUME MIRROR %I lets it go on.', mirror_name), 'name');
        end if;
        if clock_timestamp() > started + timeout then
            perform peergate.fail('57014', format('timed out waiting for mirror "%s"', mirror_name),
                format('It is %s', mirror.state)
                    || coalesce((select format(', and round %s is %s%s', q.round, q.state, coalesce(' for ' || q.waits_for, '')) from peergate.query_rounds q
                                 where q.mirror_id = mirror.mirror_id order by q.round desc limit 1), '') || '.',
                mirror.error_message);
        end if;
        perform pg_sleep(0.02);
    end loop;
    perform peergate.finish(nonce, 'WAIT');
end $$;
comment on procedure peergate.wait_for_mirror is 'WAIT FOR MIRROR. By default: until the target has all that the source had committed when the call began.';

-- Procedures and functions are executable by everybody unless that is taken away.
revoke all on all routines in schema peergate from public;
