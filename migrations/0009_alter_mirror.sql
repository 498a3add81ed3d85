-- Why:   a mirror can be changed while it runs: tables come and go, tables or all of it are copied anew, a transaction that cannot be
--        applied is skipped, options and name change. What is wanted is in mirror_definitions and in open tasks; the engine makes it so.
-- Locks: ACCESS EXCLUSIVE on tasks and mirror_definitions, briefly.
-- Undo:  drop the columns and routines of this file; restore wait_for_mirror and write_mirrors from 0005.

alter table peergate.tasks
    drop constraint tasks_kind_check,
    add constraint tasks_kind_check check (kind in ('create_mirror', 'alter_mirror', 'resync_mirror', 'pause_mirror', 'resume_mirror', 'drop_mirror')),
    add column tables jsonb,
    add column taken_at timestamptz;
comment on column peergate.tasks.kind     is 'What is being done: create_mirror, alter_mirror, resync_mirror, pause_mirror, resume_mirror or drop_mirror.';
comment on column peergate.tasks.tables   is 'The tables that it is about, as [{"schema", "name"}]; NULL: the mirror as a whole.';
comment on column peergate.tasks.taken_at is 'When the engine made it part of what it does; NULL before that, and for tasks that are nothing but a wait.';

alter table peergate.mirror_definitions add column skip_lsns pg_lsn[] not null default '{}';
comment on column peergate.mirror_definitions.skip_lsns  is 'Source transactions that commit exactly here are not applied: ALTER MIRROR … SKIP TO LSN.';
comment on column peergate.mirror_definitions.updated_at is 'When its definition last changed, its tables aside: those may change while it runs.';

insert into peergate.settings (scope, name, type, default_value, allowed, min_value, max_value, secret, alias_of, description) values
    ('mirror', 'on_error', 'enum', 'stop', array['stop', 'quarantine_table'], null, null, false, null, 'What a row that cannot be written does: it stops the mirror, or its table alone, until RESYNC MIRROR … TABLE.');

-- Options that decide how a mirror begins, and so cannot be another once it has.
create function peergate.fixed_options() returns text[] language sql immutable as $$
    select array['mode', 'publication_name', 'replication_slot_name']
$$;
comment on function peergate.fixed_options is 'Options of a mirror that cannot be changed after it was created.';

create function peergate.table_text(named jsonb) returns text language sql immutable as $$
    select format('%s.%s', named ->> 'schema', named ->> 'name')
$$;
comment on function peergate.table_text is 'A table''s name as messages show it.';

-- Makes the task of a statement that changes a mirror's tables; the engine looks for it at once.
create function peergate.start_table_task(task_kind text, mirror peergate.mirror_definitions, named jsonb, what text) returns void language plpgsql
security definer set search_path = pg_catalog, peergate as $$
declare
    task_id bigint := peergate.start_task(task_kind, mirror.id, mirror.name);
begin
    update peergate.tasks t set tables = named where t.id = task_id;
    raise notice using message = format('task %s %s mirror "%s"', task_id, what, mirror.name),
        hint = format('WAIT FOR MIRROR %I returns when it is done.', mirror.name);
end $$;
comment on function peergate.start_table_task is 'Makes the task of a statement that changes a mirror''s tables, and says so.';

create function peergate.check_alterable(mirror peergate.mirror_definitions) returns void language plpgsql
security definer set search_path = pg_catalog, peergate as $$
begin
    if (select r.state from peergate.mirror_runtime r where r.mirror_id = mirror.id) = 'completed' then
        perform peergate.fail('55000', format('mirror "%s" is completed', mirror.name), 'It only copies, and the copy is done.',
            'Drop the mirror and create it anew.', 'name');
    end if;
    if peergate.option('mirror', mirror.options, 'mode') = 'copy_only' then
        perform peergate.fail('55000', format('mirror "%s" only copies, and is copying', mirror.name), null, 'Drop the mirror and create it anew.', 'name');
    end if;
end $$;
comment on function peergate.check_alterable is 'Refuses to change what a completed mirror does.';

create procedure peergate.add_mirror_tables(mirror_name text, tables jsonb, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    mirror   peergate.mirror_definitions := peergate.find_mirror(mirror_name, false);
    chosen   jsonb := mirror.selection;
    item     record;
    added    jsonb := '[]';
begin
    perform peergate.check_alterable(mirror);
    for item in select t.value as given, t.value -> 'from' as source_table, t.value -> 'to' as target_table, t.ordinality as n
                from jsonb_array_elements(add_mirror_tables.tables) with ordinality t order by t.ordinality loop
        if chosen ? 'tables' then
            if exists (select from jsonb_array_elements(chosen -> 'tables') t where t -> 'from' = item.source_table) then
                if not exists (select from jsonb_array_elements(chosen -> 'tables') t where t = item.given) then
                    perform peergate.fail('42710', format('table "%s" is already part of mirror "%s", in another way',
                        peergate.table_text(item.source_table), mirror.name), null, 'Drop it from the mirror first.', 'table.' || item.n);
                end if;
                raise notice using errcode = '42710', message = format('table "%s" is already part of mirror "%s", skipping',
                    peergate.table_text(item.source_table), mirror.name);
                continue;
            end if;
            if exists (select from jsonb_array_elements(chosen -> 'tables') t where t -> 'to' = item.target_table) then
                perform peergate.fail('42712', format('target table "%s" is already written by mirror "%s"',
                    peergate.table_text(item.target_table), mirror.name), null, 'Name another one with TO.', 'table.' || item.n);
            end if;
            if mirror.source_id = mirror.target_id and item.source_table = item.target_table then
                perform peergate.fail('22023', format('table "%s" would be copied onto itself', peergate.table_text(item.source_table)), null,
                    'Name another target table with TO.', 'table.' || item.n);
            end if;
            chosen := jsonb_set(chosen, '{tables}', chosen -> 'tables' || item.given);
        else
            if item.given - 'from' - 'to' <> '{}'::jsonb or (item.source_table <> item.target_table) then
                perform peergate.fail('0A000', format('mirror "%s" takes whole tables by their own names', mirror.name),
                    'It is one of all tables, or of schemas.', 'Create a mirror FOR TABLE for this one.', 'table.' || item.n);
            end if;
            if not coalesce(chosen -> 'except' @> jsonb_build_array(item.source_table), false) then
                if chosen ? 'all' or exists (select from jsonb_array_elements(chosen -> 'schemas') s where s -> 'from' = item.source_table -> 'schema') then
                    raise notice using errcode = '42710', message = format('table "%s" is already part of mirror "%s", skipping',
                        peergate.table_text(item.source_table), mirror.name);
                    continue;
                end if;
                perform peergate.fail('22023', format('mirror "%s" does not take tables of schema "%s"', mirror.name, item.source_table ->> 'schema'), null,
                    'Create a mirror for it.', 'table.' || item.n);
            end if;
            chosen := jsonb_set(chosen, '{except}', (select coalesce(jsonb_agg(e), '[]') from jsonb_array_elements(chosen -> 'except') e where e <> item.source_table));
        end if;
        added := added || jsonb_build_array(item.source_table);
    end loop;
    if added <> '[]' then
        update peergate.mirror_definitions d set selection = chosen where d.id = mirror.id;
        perform peergate.start_table_task('alter_mirror', mirror, added, 'adds tables to');
    end if;
    perform peergate.finish(nonce, 'ALTER MIRROR');
end $$;
comment on procedure peergate.add_mirror_tables is 'ALTER MIRROR … ADD TABLE.';

create procedure peergate.drop_mirror_tables(mirror_name text, tables jsonb, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    mirror peergate.mirror_definitions := peergate.find_mirror(mirror_name, false);
    chosen jsonb := mirror.selection;
    item   record;
begin
    perform peergate.check_alterable(mirror);
    for item in select t.value as given, t.ordinality as n
                from jsonb_array_elements(drop_mirror_tables.tables) with ordinality t order by t.ordinality loop
        if not (case when chosen ? 'tables' then exists (select from jsonb_array_elements(chosen -> 'tables') t where t -> 'from' = item.given)
                     else not coalesce(chosen -> 'except' @> jsonb_build_array(item.given), false)
                          and exists (select from peergate.mirror_table_runtime t where t.mirror_id = mirror.id and t.state <> 'removed'
                                      and t.source_schema = item.given ->> 'schema' and t.source_name = item.given ->> 'name') end) then
            perform peergate.fail('42P01', format('table "%s" is not part of mirror "%s"', peergate.table_text(item.given), mirror.name), null,
                peergate.suggestion(item.given ->> 'name', (select array_agg(t.source_name) from peergate.mirror_table_runtime t
                                                            where t.mirror_id = mirror.id and t.state <> 'removed')), 'table.' || item.n);
        end if;
        if chosen ? 'tables' then
            chosen := jsonb_set(chosen, '{tables}', (select coalesce(jsonb_agg(t), '[]') from jsonb_array_elements(chosen -> 'tables') t where t -> 'from' <> item.given));
            if chosen -> 'tables' = '[]' then
                perform peergate.fail('55000', format('cannot drop the last table of mirror "%s"', mirror.name), null, 'Use DROP MIRROR.', 'table.' || item.n);
            end if;
        else
            chosen := chosen || jsonb_build_object('except', coalesce(chosen -> 'except', '[]') || jsonb_build_array(item.given));
        end if;
    end loop;
    update peergate.mirror_definitions d set selection = chosen where d.id = mirror.id;
    perform peergate.start_table_task('alter_mirror', mirror, drop_mirror_tables.tables, 'drops tables from');
    perform peergate.finish(nonce, 'ALTER MIRROR');
end $$;
comment on procedure peergate.drop_mirror_tables is 'ALTER MIRROR … DROP TABLE. The tables on the target stay as they are.';

create procedure peergate.refresh_mirror_tables(mirror_name text, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    mirror peergate.mirror_definitions := peergate.find_mirror(mirror_name, false);
begin
    perform peergate.check_alterable(mirror);
    if mirror.selection ? 'tables' then
        raise notice using errcode = '55000', message = format('mirror "%s" names its tables, there is nothing to refresh', mirror.name);
    else
        perform peergate.start_table_task('alter_mirror', mirror, null, 'refreshes the tables of');
    end if;
    perform peergate.finish(nonce, 'ALTER MIRROR');
end $$;
comment on procedure peergate.refresh_mirror_tables is 'ALTER MIRROR … REFRESH TABLES.';

create procedure peergate.resync_mirror(mirror_name text, tables jsonb default null, if_exists boolean default false, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    mirror peergate.mirror_definitions := peergate.find_mirror(mirror_name, if_exists);
    item   record;
begin
    if mirror.id is not null then
        perform peergate.check_alterable(mirror);
        for item in select t.value as given, t.ordinality as n
                    from jsonb_array_elements(resync_mirror.tables) with ordinality t order by t.ordinality loop
            if not exists (select from peergate.mirror_table_runtime t where t.mirror_id = mirror.id and t.state <> 'removed'
                           and t.source_schema = item.given ->> 'schema' and t.source_name = item.given ->> 'name') then
                perform peergate.fail('42P01', format('table "%s" is not part of mirror "%s"', peergate.table_text(item.given), mirror.name), null,
                    peergate.suggestion(item.given ->> 'name', (select array_agg(t.source_name) from peergate.mirror_table_runtime t
                                                                where t.mirror_id = mirror.id and t.state <> 'removed')), 'table.' || item.n);
            end if;
        end loop;
        perform peergate.start_table_task('resync_mirror', mirror, resync_mirror.tables, 'resyncs');
        if tables is null or exists (select from peergate.mirror_runtime r where r.mirror_id = mirror.id and r.state in ('blocked', 'resync_required')) then
            -- A person asks for a new attempt; whoever waits for it is not to see the old error.
            update peergate.mirror_definitions d set updated_at = clock_timestamp() where d.id = mirror.id;
            update peergate.mirror_runtime r set state = 'retrying', retry_at = now()
            where r.mirror_id = mirror.id and r.state in ('blocked', 'resync_required');
        end if;
    end if;
    perform peergate.finish(nonce, 'RESYNC MIRROR');
end $$;
comment on procedure peergate.resync_mirror is 'RESYNC MIRROR. What is on the target stays until the new copy takes its place.';

create procedure peergate.skip_mirror_transaction(mirror_name text, lsn pg_lsn, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    mirror  peergate.mirror_definitions := peergate.find_mirror(mirror_name, false);
    runtime peergate.mirror_runtime := (select r from peergate.mirror_runtime r where r.mirror_id = mirror.id);
begin
    if runtime.state <> 'blocked' or runtime.error_lsn is null then
        perform peergate.fail('55000', format('mirror "%s" is not stopped by a transaction', mirror.name), null, null, 'name');
    end if;
    if runtime.error_lsn is distinct from lsn then
        perform peergate.fail('22023', format('mirror "%s" is not stopped by a transaction at %s', mirror.name, lsn),
            format('The transaction that cannot be applied commits at %s.', runtime.error_lsn), null, 'lsn');
    end if;
    update peergate.mirror_definitions d
    set skip_lsns = array(select distinct s from unnest(d.skip_lsns || lsn) s where s >= coalesce(runtime.applied_lsn, s) order by s), updated_at = clock_timestamp()
    where d.id = mirror.id;
    perform peergate.set_desired_state(mirror, 'running');
    perform peergate.finish(nonce, 'ALTER MIRROR');
end $$;
comment on procedure peergate.skip_mirror_transaction is 'ALTER MIRROR … SKIP TO LSN: exactly the transaction that the mirror is stopped by is left out.';

create procedure peergate.set_mirror_options(mirror_name text, options jsonb default '{}', reset text[] default '{}', nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    mirror  peergate.mirror_definitions := peergate.find_mirror(mirror_name, false);
    checked jsonb := peergate.check_options('mirror', set_mirror_options.options);
    changed jsonb := mirror.options;
    key     text;
    setting peergate.settings;
begin
    foreach key in array reset loop
        select s.* into setting from peergate.settings s where s.scope = 'mirror' and s.name = key;
        if not found then
            perform peergate.fail('HV00D', format('unrecognized mirror option "%s"', key), null,
                peergate.suggestion(key, (select array_agg(s.name) from peergate.settings s where s.scope = 'mirror')), 'option.' || key);
        end if;
        changed := changed - coalesce(setting.alias_of, key);
    end loop;
    changed := changed || checked;
    foreach key in array peergate.fixed_options() loop
        if peergate.option('mirror', changed, key) is distinct from peergate.option('mirror', mirror.options, key) then
            perform peergate.fail('0A000', format('option "%s" of a mirror cannot be changed', key), null,
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

create procedure peergate.rename_mirror(mirror_name text, new_name text, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    mirror peergate.mirror_definitions := peergate.find_mirror(mirror_name, false);
begin
    if exists (select from peergate.mirror_definitions d where d.name = new_name) then
        perform peergate.fail('42710', format('mirror "%s" already exists', new_name), null, null, 'new_name');
    end if;
    update peergate.mirror_definitions d set name = new_name, updated_at = clock_timestamp() where d.id = mirror.id;
    perform pg_notify('peergate', '');
    perform peergate.finish(nonce, 'ALTER MIRROR');
end $$;
comment on procedure peergate.rename_mirror is 'ALTER MIRROR … RENAME TO.';

create or replace function peergate.write_mirrors() returns trigger language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    mirror peergate.mirror_definitions;
    gone   text[];
    listed jsonb;
begin
    if tg_op = 'INSERT' then
        call peergate.create_mirror(new.name, new.source, new.target, new.selection, coalesce(new.options, '{}'));
        select v.* into new from peergate.mirrors v where v.name = new.name;
        return new;
    end if;
    mirror := peergate.find_mirror(old.name, false);
    if tg_op = 'DELETE' then
        perform peergate.remove_mirror(mirror, false);
        return old;
    end if;
    if (to_jsonb(new) - '{desired_state,name,options,selection}'::text[]) is distinct from (to_jsonb(old) - '{desired_state,name,options,selection}'::text[]) then
        perform peergate.fail('0A000', 'only name, options, selection and desired_state of a mirror can be updated', null, 'Drop the mirror and create it anew.');
    end if;
    if new.options is distinct from old.options then
        gone := array(select k from jsonb_object_keys(old.options) k where not coalesce(new.options, '{}') ? k);
        call peergate.set_mirror_options(old.name, coalesce(new.options, '{}'), gone);
    end if;
    if new.selection is distinct from old.selection then
        if not coalesce(new.selection ? 'tables' and old.selection ? 'tables', false) then
            perform peergate.fail('0A000', 'only the tables of a mirror that names them can be updated', null, 'Use ALTER MIRROR.');
        end if;
        listed := (select coalesce(jsonb_agg(t), '[]') from jsonb_array_elements(new.selection -> 'tables') t
                   where not exists (select from jsonb_array_elements(old.selection -> 'tables') o where o = t));
        call peergate.add_mirror_tables(old.name, listed);
        listed := (select jsonb_agg(o -> 'from') from jsonb_array_elements(old.selection -> 'tables') o
                   where not exists (select from jsonb_array_elements(new.selection -> 'tables') t where t -> 'from' = o -> 'from'));
        if listed is not null then
            call peergate.drop_mirror_tables(old.name, listed);
        end if;
    end if;
    if new.name is distinct from old.name then
        call peergate.rename_mirror(old.name, new.name);
    end if;
    if new.desired_state is not distinct from old.desired_state and (new.options, new.selection, new.name) is distinct from (old.options, old.selection, old.name) then
        return new;
    end if;
    if new.desired_state is null or new.desired_state not in ('running', 'paused') then
        perform peergate.fail('22023', format('invalid desired_state: "%s"', new.desired_state), 'It takes one of: running, paused.');
    end if;
    mirror := peergate.find_mirror(new.name, false);
    perform peergate.set_desired_state(mirror, new.desired_state);
    return new;
end $$;

create or replace procedure peergate.wait_for_mirror(mirror_name text, up_to pg_lsn default null, up_to_state text default null,
    timeout interval default null, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    started constant timestamptz := clock_timestamp();
    states  constant text[] := array['created', 'preflight', 'schema', 'slot', 'copying', 'catchup', 'running', 'paused', 'retrying', 'blocked', 'resync_required', 'completed'];
    mirror  record;
    wanted  pg_lsn := up_to;
begin
    if up_to_state is not null and up_to_state <> all (states) then
        perform peergate.fail('22023', format('unrecognized mirror state "%s"', up_to_state),
            'States are: ' || array_to_string(states, ', ') || '.', peergate.suggestion(up_to_state, states), 'state');
    end if;
    if current_setting('transaction_isolation') <> 'read committed' then
        perform peergate.fail('25001', 'WAIT FOR MIRROR cannot run in a transaction that is not READ COMMITTED',
            'Such a transaction does not see what happens after it began.');
    end if;
    loop
        select d.desired_state, peergate.is_uncommitted(d.xmin) as uncommitted, r.* into mirror
        from peergate.mirror_definitions d join peergate.mirror_runtime r on r.mirror_id = d.id where d.name = mirror_name;
        if not found then
            perform peergate.fail('42704', format('mirror "%s" does not exist', mirror_name), null,
                peergate.suggestion(mirror_name, (select array_agg(d.name) from peergate.mirror_definitions d)), 'name');
        end if;
        if mirror.uncommitted then
            perform peergate.fail('55000', format('mirror "%s" was changed by this transaction and nothing happens to it before COMMIT', mirror_name),
                null, 'Commit first, then wait.', 'name');
        end if;
        if mirror.source_lsn_at > started then
            wanted := coalesce(wanted, mirror.source_lsn);
        end if;
        exit when case when up_to_state is not null then mirror.state = up_to_state
                       when mirror.state = 'completed' then true
                       when up_to is not null then mirror.state = 'running' and mirror.applied_lsn >= wanted
                       -- Tables that are copied by themselves count too, and what a statement has asked for.
                       else mirror.state = 'running' and mirror.applied_lsn >= wanted
                            and not exists (select from peergate.mirror_table_runtime t where t.mirror_id = mirror.mirror_id and t.state not in ('live', 'blocked', 'removed'))
                            and not exists (select from peergate.tasks k where k.mirror_id = mirror.mirror_id and k.kind in ('alter_mirror', 'resync_mirror')
                                            and k.state in ('pending', 'running')) end;
        if mirror.state in ('blocked', 'resync_required') then
            perform peergate.fail(coalesce(mirror.error_sqlstate, '55000'), format('mirror "%s" is %s: %s', mirror_name, mirror.state, coalesce(mirror.error_message, 'no reason was recorded')),
                mirror.error_detail, mirror.error_hint, 'name');
        end if;
        if mirror.desired_state = 'paused' then
            perform peergate.fail('55000', format('mirror "%s" is paused', mirror_name), null, format('RESUME MIRROR %I lets it go on.', mirror_name), 'name');
        end if;
        if clock_timestamp() > started + timeout then
            perform peergate.fail('57014', format('timed out waiting for mirror "%s"', mirror_name),
                format('It is %s', mirror.state) || coalesce(' and has applied ' || mirror.applied_lsn || ' of ' || wanted, '') || '.',
                mirror.error_message);
        end if;
        perform pg_sleep(0.02);
    end loop;
    if up_to_state is null and exists (select from peergate.mirror_table_runtime t where t.mirror_id = mirror.mirror_id and t.state = 'blocked') then
        raise warning using message = format('tables of mirror "%s" are blocked and do not follow the source', mirror_name),
            hint = format('SHOW MIRROR %I and mirror_tables tell which, and why.', mirror_name);
    end if;
    perform peergate.finish(nonce, 'WAIT');
end $$;

-- Procedures and functions are executable by everybody unless that is taken away.
revoke all on all routines in schema peergate from public;
