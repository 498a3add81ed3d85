-- Why:   what CREATE MIRROR, DROP PEER, DROP MIRROR, PAUSE, RESUME, WAIT FOR and SHOW do. The gateway rewrites each statement into
--        one of these calls inside the client's own message, so transactions, privileges and errors are PostgreSQL's.
-- Locks: none (new objects).        Undo: drop the routines of this file.

create function peergate.start_task(task_kind text, about_id bigint, about text) returns bigint language plpgsql as $$
declare
    task_id bigint;
begin
    -- What this one overtakes would never end by itself.
    update peergate.tasks set state = 'canceled', finished_at = clock_timestamp()
    where mirror_id = about_id and state in ('pending', 'running')
      and (task_kind = 'drop_mirror' or kind in ('pause_mirror', 'resume_mirror'));
    insert into peergate.tasks (kind, mirror_id, mirror) values (task_kind, about_id, about) returning id into task_id;
    perform pg_notify('peergate', '');
    return task_id;
end $$;
comment on function peergate.start_task is 'Makes a task and wakes the engines when the transaction commits.';

-- The names of an identifier list as a person would read them.
create function peergate.quoted_list(names text[]) returns text language sql immutable as $$
    select string_agg('"' || n || '"', ', ' order by n) from unnest(names) n
$$;
comment on function peergate.quoted_list is 'Names in double quotes, separated by commas.';

create procedure peergate.create_mirror(mirror_name text, source text, target text, selection jsonb, options jsonb default '{}',
    if_not_exists boolean default false, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    existing peergate.mirror_definitions;
    source_peer peergate.peers;
    target_peer peergate.peers;
    checked  jsonb;
    id       bigint;
    task_id  bigint;
    item     record;
begin
    checked := peergate.check_options('mirror', options);
    select d.* into existing from peergate.mirror_definitions d where d.name = mirror_name;
    if found then
        if not if_not_exists then
            perform peergate.fail('42710', format('mirror "%s" already exists', mirror_name), null, null, 'name');
        end if;
        raise notice using errcode = '42710', message = format('mirror "%s" already exists, skipping', mirror_name);
        if checked is distinct from existing.options or selection is distinct from existing.selection
           or (select p.name from peergate.peers p where p.id = existing.source_id) <> source
           or (select p.name from peergate.peers p where p.id = existing.target_id) <> target then
            raise notice 'the existing mirror "%" has a different definition, which was not changed', mirror_name;
        end if;
        perform peergate.finish(nonce, 'CREATE MIRROR');
        return;
    end if;
    -- A peer that is being dropped must not gain a mirror.
    select p.* into source_peer from peergate.peers p where p.name = source for key share;
    if not found then
        perform peergate.fail('42704', format('peer "%s" does not exist', source), null,
            peergate.suggestion(source, (select array_agg(p.name) from peergate.peers p)), 'source');
    end if;
    select p.* into target_peer from peergate.peers p where p.name = target for key share;
    if not found then
        perform peergate.fail('42704', format('peer "%s" does not exist', target), null,
            peergate.suggestion(target, (select array_agg(p.name) from peergate.peers p)), 'target');
    end if;
    if not (selection ? 'all' or selection ? 'schemas' or selection ? 'tables') then
        perform peergate.fail('22023', 'a mirror needs tables', 'The selection has none of "all", "schemas" and "tables".', null, 'tables');
    end if;
    if source_peer.id = target_peer.id and (selection ? 'all'
            or exists (select from jsonb_array_elements(selection -> 'schemas') s where s -> 'from' = s -> 'to')
            or exists (select from jsonb_array_elements(selection -> 'tables') t where t -> 'from' = t -> 'to')) then
        perform peergate.fail('22023', format('mirror "%s" would copy tables of peer "%s" onto themselves', mirror_name, source), null,
            'Choose another target peer, or name other target tables with TO.', 'target');
    end if;
    for item in select t.value -> 'from' as source_table, t.value -> 'to' as target_table, t.ordinality as n,
                       count(*) over (partition by t.value -> 'from') as sources, count(*) over (partition by t.value -> 'to') as targets
                from jsonb_array_elements(selection -> 'tables') with ordinality t order by t.ordinality desc loop
        if item.sources > 1 or item.targets > 1 then
            perform peergate.fail('42712', format('table "%s.%s" is named more than once',
                case when item.sources > 1 then item.source_table ->> 'schema' else item.target_table ->> 'schema' end,
                case when item.sources > 1 then item.source_table ->> 'name' else item.target_table ->> 'name' end),
                null, null, 'table.' || item.n);
        end if;
    end loop;
    id := nextval(pg_get_serial_sequence('peergate.mirror_definitions', 'id'));
    insert into peergate.mirror_definitions (id, name, source_id, target_id, selection, options, object_name, owner)
    overriding system value
    values (id, mirror_name, source_peer.id, target_peer.id, selection, checked,
            -- Two catalogs may mirror from one source: the number alone would not tell their slots apart.
            format('peergate_%s_%s', id, substr(md5(random()::text || clock_timestamp()::text), 1, 8)), session_user)
    on conflict (name) do nothing;
    if not found then
        perform peergate.fail('42710', format('mirror "%s" already exists', mirror_name), null, null, 'name');
    end if;
    insert into peergate.mirror_runtime (mirror_id) values (id);
    insert into peergate.mirror_leases (mirror_id) values (id);
    insert into peergate.mirror_table_runtime (mirror_id, source_schema, source_name, target_schema, target_name)
    select id, t -> 'from' ->> 'schema', t -> 'from' ->> 'name', t -> 'to' ->> 'schema', t -> 'to' ->> 'name'
    from jsonb_array_elements(selection -> 'tables') t;
    task_id := peergate.start_task('create_mirror', id, mirror_name);
    raise notice using message = format('task %s creates mirror "%s"', task_id, mirror_name),
        hint = format('WAIT FOR MIRROR %I returns when the target has caught up.', mirror_name);
    perform peergate.finish(nonce, 'CREATE MIRROR');
end $$;
comment on procedure peergate.create_mirror is 'CREATE MIRROR.';

create function peergate.remove_mirror(mirror peergate.mirror_definitions, keep_target_metadata boolean) returns void language plpgsql
security definer set search_path = pg_catalog, peergate as $$
declare
    task_id bigint := peergate.start_task('drop_mirror', mirror.id, mirror.name);
begin
    insert into peergate.mirror_drops (mirror_id, mirror, object_name, source, target, keep_target_metadata, task_id)
    select mirror.id, mirror.name, mirror.object_name, peergate.peer_document(mirror.source_id), peergate.peer_document(mirror.target_id),
           keep_target_metadata, task_id;
    delete from peergate.mirror_definitions where id = mirror.id;
    raise notice 'task % drops mirror "%"', task_id, mirror.name;
end $$;
comment on function peergate.remove_mirror is 'Drops a mirror and leaves the work order by which the engine cleans up on the peers.';

create function peergate.peer_document(id bigint) returns jsonb language sql stable as $$
    select jsonb_build_object('name', p.name, 'options', p.options, 'secrets',
        coalesce((select jsonb_object_agg(s.option, s.sealed) from peergate.peer_secrets s where s.peer_id = p.id), '{}'))
    from peergate.peers p where p.id = peer_document.id
$$;
comment on function peergate.peer_document is 'A peer as the engine reads it: name, options and sealed secrets.';

create procedure peergate.drop_mirror(names text[], if_exists boolean default false, keep_target_metadata boolean default false, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    mirror peergate.mirror_definitions;
    n      integer;
begin
    for n in 1 .. cardinality(names) loop
        select d.* into mirror from peergate.mirror_definitions d where d.name = names[n] for update;
        if found then
            perform peergate.remove_mirror(mirror, keep_target_metadata);
        elsif if_exists then
            raise notice 'mirror "%" does not exist, skipping', names[n];
        else
            perform peergate.fail('42704', format('mirror "%s" does not exist', names[n]), null,
                peergate.suggestion(names[n], (select array_agg(d.name) from peergate.mirror_definitions d)), 'name.' || n);
        end if;
    end loop;
    perform peergate.finish(nonce, 'DROP MIRROR');
end $$;
comment on procedure peergate.drop_mirror is 'DROP MIRROR.';

-- Behind both DROP PEER and DELETE FROM peers.
create function peergate.check_peer_unused() returns trigger language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    users text;
    many  boolean;
begin
    select string_agg(format('Mirror "%s" %s it.', d.name, case when d.source_id = old.id then 'reads from' else 'writes to' end), ' ' order by d.name),
           count(*) > 1
    into users, many
    from peergate.mirror_definitions d where old.id in (d.source_id, d.target_id);
    if users is not null then
        perform peergate.fail('2BP01',
            format('cannot drop peer "%s" because %s', old.name, case when many then 'mirrors depend on it' else 'a mirror depends on it' end),
            users, format('Drop the %s first, or use DROP PEER … CASCADE.', case when many then 'mirrors' else 'mirror' end), 'name');
    end if;
    return old;
end $$;
comment on function peergate.check_peer_unused is 'Refuses to delete a peer that a mirror uses, naming the mirrors.';

create trigger check_peer_unused before delete on peergate.peers
    for each row execute function peergate.check_peer_unused();

create procedure peergate.drop_peer(names text[], if_exists boolean default false, cascade boolean default false, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    peer   peergate.peers;
    mirror peergate.mirror_definitions;
    n      integer;
begin
    if cascade then
        for mirror in select d.* from peergate.mirror_definitions d
                      where exists (select from peergate.peers p where p.id in (d.source_id, d.target_id) and p.name = any (names))
                      order by d.name for update loop
            raise notice 'drop cascades to mirror "%"', mirror.name;
            perform peergate.remove_mirror(mirror, false);
        end loop;
    end if;
    for n in 1 .. cardinality(names) loop
        select p.* into peer from peergate.peers p where p.name = names[n] for update;
        if found then
            begin
                delete from peergate.peers p where p.id = peer.id;
            exception when dependent_objects_still_exist then
                declare
                    message text; detail text; hint text;
                begin
                    get stacked diagnostics message = message_text, detail = pg_exception_detail, hint = pg_exception_hint;
                    perform peergate.fail('2BP01', message, detail, hint, 'name.' || n);
                end;
            end;
        elsif if_exists then
            raise notice 'peer "%" does not exist, skipping', names[n];
        else
            perform peergate.fail('42704', format('peer "%s" does not exist', names[n]), null,
                peergate.suggestion(names[n], (select array_agg(p.name) from peergate.peers p)), 'name.' || n);
        end if;
    end loop;
    perform peergate.finish(nonce, 'DROP PEER');
end $$;
comment on procedure peergate.drop_peer is 'DROP PEER.';

-- Behind PAUSE, RESUME and UPDATE mirrors SET desired_state.
create function peergate.set_desired_state(mirror peergate.mirror_definitions, wanted text) returns void language plpgsql
security definer set search_path = pg_catalog, peergate as $$
declare
    current_state text := (select r.state from peergate.mirror_runtime r where r.mirror_id = mirror.id);
    task_id       bigint;
begin
    if current_state = 'completed' then
        perform peergate.fail('55000', format('mirror "%s" is completed', mirror.name), 'It only copies, and the copy is done.', null, 'name');
    end if;
    -- RESUME of a blocked mirror means: try again.
    if mirror.desired_state = wanted and not (wanted = 'running' and current_state in ('blocked', 'resync_required')) then
        raise notice using errcode = '55000', message = format('mirror "%s" is already %s', mirror.name, wanted);
        return;
    end if;
    update peergate.mirror_definitions d set desired_state = wanted, updated_at = now() where d.id = mirror.id;
    if wanted = 'running' then
        -- A person's RESUME is a new attempt: whoever waits for it is not to see the old error.
        update peergate.mirror_runtime r set state = 'retrying', retry_at = now() where r.mirror_id = mirror.id and r.state in ('blocked', 'resync_required');
    end if;
    task_id := peergate.start_task(case wanted when 'paused' then 'pause_mirror' else 'resume_mirror' end, mirror.id, mirror.name);
    raise notice 'task % % mirror "%"', task_id, case wanted when 'paused' then 'pauses' else 'resumes' end, mirror.name;
end $$;
comment on function peergate.set_desired_state is 'Pauses or resumes a mirror; a NOTICE when there is nothing to do.';

create function peergate.find_mirror(mirror_name text, if_exists boolean) returns peergate.mirror_definitions language plpgsql
security definer set search_path = pg_catalog, peergate as $$
declare
    mirror peergate.mirror_definitions;
begin
    select d.* into mirror from peergate.mirror_definitions d where d.name = mirror_name for update;
    if not found then
        if if_exists then
            raise notice 'mirror "%" does not exist, skipping', mirror_name;
        else
            perform peergate.fail('42704', format('mirror "%s" does not exist', mirror_name), null,
                peergate.suggestion(mirror_name, (select array_agg(d.name) from peergate.mirror_definitions d)), 'name');
        end if;
    end if;
    return mirror;
end $$;
comment on function peergate.find_mirror is 'The mirror of that name, locked; 42704 when there is none, or with if_exists a NOTICE and NULL.';

create procedure peergate.pause_mirror(mirror_name text, if_exists boolean default false, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    mirror peergate.mirror_definitions := peergate.find_mirror(mirror_name, if_exists);
begin
    if mirror.id is not null then
        perform peergate.set_desired_state(mirror, 'paused');
    end if;
    perform peergate.finish(nonce, 'PAUSE MIRROR');
end $$;
comment on procedure peergate.pause_mirror is 'PAUSE MIRROR.';

create procedure peergate.resume_mirror(mirror_name text, if_exists boolean default false, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    mirror peergate.mirror_definitions := peergate.find_mirror(mirror_name, if_exists);
begin
    if mirror.id is not null then
        perform peergate.set_desired_state(mirror, 'running');
    end if;
    perform peergate.finish(nonce, 'RESUME MIRROR');
end $$;
comment on procedure peergate.resume_mirror is 'RESUME MIRROR.';

create function peergate.write_mirrors() returns trigger language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    mirror peergate.mirror_definitions;
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
    if (to_jsonb(new) - 'desired_state') is distinct from (to_jsonb(old) - 'desired_state') then
        perform peergate.fail('0A000', 'only desired_state of a mirror can be updated', null, 'Drop the mirror and create it anew.');
    end if;
    if new.desired_state is null or new.desired_state not in ('running', 'paused') then
        perform peergate.fail('22023', format('invalid desired_state: "%s"', new.desired_state), 'It takes one of: running, paused.');
    end if;
    perform peergate.set_desired_state(mirror, new.desired_state);
    return new;
end $$;
comment on function peergate.write_mirrors is 'Makes plain DML on mirrors do what the statements do.';

create trigger write_mirrors instead of insert or update or delete on peergate.mirrors
    for each row execute function peergate.write_mirrors();

create trigger refuse_truncate before truncate on peergate.mirror_definitions
    for each statement execute function peergate.refuse_truncate();

-- A visible row whose writer is still in progress was written by this very transaction. pg_xact_status wants an xid with its epoch,
-- which a row's xmin lacks: counted from this transaction's own, later ones (its savepoints) have theirs.
create function peergate.is_uncommitted(xmin xid) returns boolean language sql stable as $$
    select coalesce(own.later < 2147483648 and pg_xact_status((own.id + own.later)::text::xid8) = 'in progress', false)
    from (select x.id, (xmin::text::bigint - x.id % 4294967296 + 4294967296) % 4294967296 as later
          from (select pg_current_xact_id_if_assigned()::text::bigint as id) x) own
$$;
comment on function peergate.is_uncommitted is 'Whether a visible row of that xmin was written by the transaction that asks.';

-- Each turn of the loop looks with a new snapshot, which only READ COMMITTED gives. Waiting here, and not in the gateway,
-- makes cancel and statement_timeout PostgreSQL's own.
create procedure peergate.wait_for_mirror(mirror_name text, up_to pg_lsn default null, up_to_state text default null,
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
                       else mirror.state = 'running' and mirror.applied_lsn >= wanted end;
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
    perform peergate.finish(nonce, 'WAIT');
end $$;
comment on procedure peergate.wait_for_mirror is 'WAIT FOR MIRROR. By default: until the target has all that the source had committed when the call began.';

create view peergate.show_peers as
select p.name, p.type, p.options ->> 'host' as host, p.options ->> 'port' as port, p.options ->> 'database' as database, p.options ->> 'user' as "user",
       (select count(*) from peergate.mirror_definitions d where p.id in (d.source_id, d.target_id)) as mirrors
from peergate.peers p order by p.name;
comment on view   peergate.show_peers          is 'What SHOW PEERS shows.';
comment on column peergate.show_peers.name     is 'The peer''s name.';
comment on column peergate.show_peers.type     is 'The kind of database.';
comment on column peergate.show_peers.host     is 'Where it is.';
comment on column peergate.show_peers.port     is 'Its port; NULL: 5432.';
comment on column peergate.show_peers.database is 'The database; NULL: the user''s name.';
comment on column peergate.show_peers."user"   is 'Role that Peergate connects as.';
comment on column peergate.show_peers.mirrors  is 'How many mirrors use it.';

create view peergate.show_mirrors as
select s.mirror as name, m.source, m.target, s.state,
       case when s.copied_at is null then round((s.copy_fraction * 100)::numeric, 1) end as "copied %",
       pg_size_pretty(s.lag_bytes) as lag, round(s.lag_seconds::numeric, 1) as "lag s",
       coalesce(s.rows_copied, 0) as rows_copied, s.rows_applied, s.error_message as last_error
from peergate.mirror_status s join peergate.mirrors m on m.name = s.mirror order by s.mirror;
comment on view   peergate.show_mirrors              is 'What SHOW MIRRORS shows.';
comment on column peergate.show_mirrors.name         is 'The mirror''s name.';
comment on column peergate.show_mirrors.source       is 'The peer it reads from.';
comment on column peergate.show_mirrors.target       is 'The peer it writes to.';
comment on column peergate.show_mirrors.state        is 'Where it is.';
comment on column peergate.show_mirrors."copied %"   is 'Part of the copy that is done; NULL when it is complete.';
comment on column peergate.show_mirrors.lag          is 'Source WAL that is not yet applied.';
comment on column peergate.show_mirrors."lag s"      is 'How long the oldest change that is not yet applied has waited, in seconds.';
comment on column peergate.show_mirrors.rows_copied  is 'Rows copied.';
comment on column peergate.show_mirrors.rows_applied is 'Row changes applied by streaming.';
comment on column peergate.show_mirrors.last_error   is 'Message of the last error; NULL when there is none since the mirror last ran well.';

-- A function, so that a name that does not exist is an error and not an empty result.
create function peergate.show_mirror(mirror_name text)
returns table ("table" text, target text, state text, "copied %" numeric, rows_copied bigint, inserts bigint, updates bigint, deletes bigint, truncates bigint, warning text)
language plpgsql stable security definer set search_path = pg_catalog, peergate as $$
begin
    if not exists (select from peergate.mirror_definitions d where d.name = mirror_name) then
        perform peergate.fail('42704', format('mirror "%s" does not exist', mirror_name), null,
            peergate.suggestion(mirror_name, (select array_agg(d.name) from peergate.mirror_definitions d)), 'name');
    end if;
    return query
        select format('%I.%I', t.source_schema, t.source_name), format('%I.%I', t.target_schema, t.target_name), t.state,
               round((t.copy_fraction * 100)::numeric, 1), t.rows_copied, t.rows_inserted, t.rows_updated, t.rows_deleted, t.truncates, t.warning
        from peergate.mirror_tables t where t.mirror = mirror_name order by t.source_schema, t.source_name;
end $$;
comment on function peergate.show_mirror is 'What SHOW MIRROR name shows: one row per table.';

create view peergate.show_tasks as
select t.id, t.kind, t.mirror, t.state, round((t.progress * 100)::numeric, 1) as "done %", t.created_at, t.finished_at, t.error_message as error
from peergate.tasks t order by t.id;
comment on view   peergate.show_tasks             is 'What SHOW TASKS shows.';
comment on column peergate.show_tasks.id          is 'The task''s number.';
comment on column peergate.show_tasks.kind        is 'What is being done.';
comment on column peergate.show_tasks.mirror      is 'The mirror it is about.';
comment on column peergate.show_tasks.state       is 'Where it is: pending, running, completed, failed or canceled.';
comment on column peergate.show_tasks."done %"    is 'Part that is done.';
comment on column peergate.show_tasks.created_at  is 'When the statement was given.';
comment on column peergate.show_tasks.finished_at is 'When it ended.';
comment on column peergate.show_tasks.error       is 'What made it fail, or holds it up.';

-- Procedures and functions are executable by everybody unless that is taken away.
revoke all on all routines in schema peergate from public;
