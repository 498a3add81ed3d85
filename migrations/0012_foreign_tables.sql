-- Why:   each peer's tables as foreign tables in the catalog, so that joins across peers, views, cursors and privileges are
--        PostgreSQL's own. The engine reads the peer's catalogs and makes them; what it made is noted here, so that it changes only
--        what has changed, and so that DROP PEER takes it all away. A foreign server reaches its peer through the gateway with a token
--        that opens nothing else: the peer's own secrets never come near pg_user_mappings.
-- Locks: none on tables of users.        Undo: drop each peer's schemas and servers, then the objects of this file.

insert into peergate.settings (scope, name, type, default_value, allowed, min_value, max_value, secret, alias_of, description) values
    ('peer', 'import',    'text',    'all',   null, null, null, false, null, 'Which of the peer''s schemas have foreign tables in the catalog: all, none, or their names separated by commas.'),
    ('peer', 'updatable', 'boolean', 'false', null, null, null, false, null, 'Whether the peer''s foreign tables can be written to.');

create table peergate.peer_import_runs (
    peer_id       bigint primary key references peergate.peers (id) on delete cascade,
    state         text not null default 'pending' constraint peer_import_runs_state_check check (state in ('pending', 'running', 'ready', 'failed', 'off')),
    only_schemas  text[],
    due_at        timestamptz not null default clock_timestamp(),
    asked_at      timestamptz not null default clock_timestamp(),
    began_at      timestamptz,
    ended_at      timestamptz,
    tables        integer not null default 0,
    warnings      text[] not null default '{}',
    error_sqlstate text,
    error_message text,
    error_hint    text,
    token_hash    bytea,
    token_hash_before bytea,
    token_made_at timestamptz
);
comment on table  peergate.peer_import_runs                is 'How the foreign tables of each peer stand. Written by: CREATE PEER, REFRESH SCHEMA, the engine.';
comment on column peergate.peer_import_runs.peer_id        is 'The peer.';
comment on column peergate.peer_import_runs.state          is 'pending, running, ready, failed, or off (import = none).';
comment on column peergate.peer_import_runs.only_schemas   is 'The schemas that a REFRESH SCHEMA named; NULL: all.';
comment on column peergate.peer_import_runs.due_at         is 'When the engine looks at the peer next.';
comment on column peergate.peer_import_runs.asked_at       is 'When a statement asked for it last.';
comment on column peergate.peer_import_runs.began_at       is 'When the engine began last.';
comment on column peergate.peer_import_runs.ended_at       is 'When it ended last.';
comment on column peergate.peer_import_runs.tables         is 'Foreign tables that there are.';
comment on column peergate.peer_import_runs.warnings       is 'What could not be brought in, and why.';
comment on column peergate.peer_import_runs.error_sqlstate is 'SQLSTATE of what made the last run fail; NULL when it did not.';
comment on column peergate.peer_import_runs.error_message  is 'Message of what made the last run fail.';
comment on column peergate.peer_import_runs.error_hint     is 'What to do about it.';
comment on column peergate.peer_import_runs.token_hash     is 'SHA-256 of the token with which the foreign server logs in at the gateway.';
comment on column peergate.peer_import_runs.token_hash_before is 'The same of the token before it: sessions that had just read that one get in for five minutes.';
comment on column peergate.peer_import_runs.token_made_at  is 'When the token was made.';

create table peergate.peer_schemas (
    peer_id       bigint not null references peergate.peers (id) on delete cascade,
    remote_schema text not null,
    local_schema  text not null constraint peer_schemas_local_schema_key unique,
    primary key (peer_id, remote_schema)
);
comment on table  peergate.peer_schemas               is 'Which schema of the catalog holds the foreign tables for which schema of a peer. Written by: the engine.';
comment on column peergate.peer_schemas.peer_id       is 'The peer.';
comment on column peergate.peer_schemas.remote_schema is 'The schema on the peer.';
comment on column peergate.peer_schemas.local_schema  is 'The schema in the catalog: the peer''s name for public, else peer__schema.';

create table peergate.peer_objects (
    peer_id       bigint not null references peergate.peers (id) on delete cascade,
    remote_schema text not null,
    name          text not null,
    kind          text not null constraint peer_objects_kind_check check (kind in ('table', 'type')),
    definition    text not null,
    primary key (peer_id, remote_schema, kind, name)
);
comment on table  peergate.peer_objects               is 'The foreign tables and types that were made for peers. Written by: the engine.';
comment on column peergate.peer_objects.peer_id       is 'The peer.';
comment on column peergate.peer_objects.remote_schema is 'The schema on the peer.';
comment on column peergate.peer_objects.name          is 'The name, the same on both sides.';
comment on column peergate.peer_objects.kind          is 'table or type.';
comment on column peergate.peer_objects.definition    is 'The statement that made it: another one is due when this differs.';

insert into peergate.peer_import_runs (peer_id) select p.id from peergate.peers p;

-- A type that the catalog lacks travels as its text. A domain of its own, and not text, so that PostgreSQL evaluates what is said about
-- it here: the peer would compare its own type, by its own rules, or not know the operator.
create domain peergate_public.remote_text as text;
comment on domain peergate_public.remote_text is 'A value of a type that only the peer has, as text. Conditions on it are evaluated in the catalog.';

create view peergate.peer_imports as
select p.name as peer, r.state, r.tables, array_length(r.warnings, 1) as warnings, r.ended_at as refreshed_at, r.error_sqlstate, r.error_message, r.error_hint,
       (select array_agg(s.local_schema order by s.local_schema) from peergate.peer_schemas s where s.peer_id = p.id) as schemas,
       r.warnings as warning_texts
from peergate.peers p join peergate.peer_import_runs r on r.peer_id = p.id;
comment on view   peergate.peer_imports                is 'How the foreign tables of each peer stand.';
comment on column peergate.peer_imports.peer           is 'The peer.';
comment on column peergate.peer_imports.state          is 'pending, running, ready, failed, or off (import = none).';
comment on column peergate.peer_imports.tables         is 'Foreign tables that there are.';
comment on column peergate.peer_imports.warnings       is 'How many things could not be brought in; NULL: none.';
comment on column peergate.peer_imports.refreshed_at   is 'When the peer was looked at last.';
comment on column peergate.peer_imports.error_sqlstate is 'SQLSTATE of what made the last look fail; NULL when it did not.';
comment on column peergate.peer_imports.error_message  is 'Message of what made the last look fail.';
comment on column peergate.peer_imports.error_hint     is 'What to do about it.';
comment on column peergate.peer_imports.schemas        is 'The schemas of the catalog that hold the tables.';
comment on column peergate.peer_imports.warning_texts  is 'What could not be brought in, and why.';

create function peergate.import_peer() returns trigger language plpgsql security definer set search_path = pg_catalog, peergate as $$
begin
    if tg_op = 'INSERT' then
        insert into peergate.peer_import_runs (peer_id) values (new.id);
    else
        update peergate.peer_import_runs r set due_at = clock_timestamp(), asked_at = clock_timestamp(), state = 'pending' where r.peer_id = new.id;
        perform peergate.sync_peer_grants(new.id);
    end if;
    return null;
end $$;
comment on function peergate.import_peer is 'Has the engine bring a new or changed peer''s tables in.';

create trigger import_peer after insert or update of name, options, owner on peergate.peers
    for each row execute function peergate.import_peer();

-- The schema that a peer's tables are in is no other schema.
create or replace function peergate.check_peer_name(peer_id bigint, peer_name text) returns void language plpgsql stable
security definer set search_path = pg_catalog, peergate as $$
begin
    if peer_name in ('peergate', 'peergate_admin', 'peergate_public', current_database()) then
        perform peergate.fail('42P06', format('peer name "%s" is the name of a %s', peer_name,
            case when peer_name = current_database() then 'database' else 'schema' end),
            'A peer''s tables are found under its name.', 'Choose another name.', 'name');
    end if;
    if exists (select from pg_namespace where nspname = peer_name)
       and not exists (select from peergate.peer_schemas s where s.peer_id = check_peer_name.peer_id and s.local_schema = peer_name) then
        perform peergate.fail('42P06', format('peer name "%s" is the name of a schema', peer_name),
            'A peer''s tables are found under its name.', 'Choose another name.', 'name');
    end if;
end $$;
comment on function peergate.check_peer_name is 'Refuses names of peers that would hide a schema or the catalog''s database.';

create or replace function peergate.check_peer() returns trigger language plpgsql security definer set search_path = pg_catalog, peergate as $$
begin
    perform peergate.check_peer_name(new.id, new.name);
    new.options := peergate.check_options('peer', new.options);
    if not new.options ? 'user' then
        perform peergate.fail('42601', format('peer "%s" needs the option "user"', new.name), null,
            'Add user = ''…'' to the options.', 'options');
    end if;
    new.updated_at := now();
    return new;
end $$;

create function peergate.server_of(peer_id bigint) returns text language sql immutable as $$
    select format('peergate_%s', peer_id)
$$;
comment on function peergate.server_of is 'The name of a peer''s foreign server, which a renamed peer keeps.';

-- Those that may use the peer may read its tables, and write them if the peer lets itself be written to. The same roles, at once, as
-- privileges on what there is: a view that somebody made ends to work when its owner loses USAGE.
create function peergate.sync_peer_grants(about bigint) returns void language plpgsql
security definer set search_path = pg_catalog, peergate as $$
declare
    peer   peergate.peers;
    wanted oid[];
    target record;
    role   text;
    rights text;
begin
    select p.* into peer from peergate.peers p where p.id = about;
    wanted := array(select r.oid from pg_roles r where r.rolname = peer.owner
                    union select v.grantee from peergate.peer_privileges v left join pg_roles g on g.oid = v.grantee
                    where v.peer_id = about and (v.grantee = 0 or g.oid is not null));
    rights := case when (peer.options ->> 'updatable')::boolean then 'select, insert, update, delete' else 'select' end;
    for target in select n.oid, n.nspname, n.nspowner from peergate.peer_schemas s join pg_namespace n on n.nspname = s.local_schema where s.peer_id = about loop
        for role in select distinct case when a.grantee = 0 then 'public' else format('%I', g.rolname) end
                    from (select (aclexplode(n.nspacl)).grantee from pg_namespace n where n.oid = target.oid
                          union select (aclexplode(c.relacl)).grantee from pg_class c where c.relnamespace = target.oid and c.relkind = 'f') a
                    left join pg_roles g on g.oid = a.grantee
                    where a.grantee <> target.nspowner and (rights = 'select' or not a.grantee = any (wanted)) and (a.grantee = 0 or g.oid is not null) loop
            execute format('revoke all on all tables in schema %I from %s', target.nspname, role);
            execute format('revoke all on schema %I from %s', target.nspname, role);
        end loop;
        for role in select case when w = 0 then 'public' else format('%I', g.rolname) end from unnest(wanted) w left join pg_roles g on g.oid = w
                    where w <> target.nspowner loop
            execute format('grant usage on schema %I to %s', target.nspname, role);
            execute format('grant %s on all tables in schema %I to %s', rights, target.nspname, role);
        end loop;
    end loop;
end $$;
comment on function peergate.sync_peer_grants is 'Gives the privileges on a peer''s foreign tables to those that may use the peer, and to nobody else.';

create function peergate.follow_privileges() returns trigger language plpgsql security definer set search_path = pg_catalog, peergate as $$
begin
    if tg_op <> 'DELETE' then
        perform peergate.sync_peer_grants(new.peer_id);
    elsif exists (select from peergate.peers p where p.id = old.peer_id) then
        perform peergate.sync_peer_grants(old.peer_id);
    end if;
    return null;
end $$;
comment on function peergate.follow_privileges is 'GRANT and REVOKE USAGE ON PEER hold for its foreign tables at once.';

create trigger follow_privileges after insert or delete or update on peergate.peer_privileges
    for each row execute function peergate.follow_privileges();

-- What others have made of the peer's tables is not taken along unless that was asked for.
create function peergate.drop_foreign_tables() returns trigger language plpgsql security definer
set search_path = pg_catalog, peergate set client_min_messages = warning as $$
declare
    cascades text := case when current_setting('peergate.drop_cascades', true) = 'on' then 'cascade' else 'restrict' end;
    target   record;
    names    text;
    detail   text;
begin
    for target in select s.local_schema, n.oid from peergate.peer_schemas s join pg_namespace n on n.nspname = s.local_schema where s.peer_id = old.id loop
        if cascades = 'cascade' then
            execute format('drop schema %I cascade', target.local_schema);
            continue;
        end if;
        select string_agg(format('%I.%I', target.local_schema, c.relname), ', ') into names
        from pg_class c join pg_foreign_table f on f.ftrelid = c.oid join pg_foreign_server v on v.oid = f.ftserver
        where c.relnamespace = target.oid and v.srvname = peergate.server_of(old.id);
        if names is not null then
            execute 'drop foreign table ' || names;
        end if;
        select string_agg(format('%I.%I', target.local_schema, o.name), ', ') into names
        from peergate.peer_objects o join peergate.peer_schemas s on s.peer_id = o.peer_id and s.remote_schema = o.remote_schema
        where o.peer_id = old.id and o.kind = 'type' and s.local_schema = target.local_schema
          and exists (select from pg_type t where t.typnamespace = target.oid and t.typname = o.name);
        if names is not null then
            execute 'drop type ' || names;
        end if;
        execute format('drop schema %I', target.local_schema);
    end loop;
    if exists (select from pg_foreign_server where srvname = peergate.server_of(old.id)) then
        execute format('drop server %I cascade', peergate.server_of(old.id));
    end if;
    return old;
exception when dependent_objects_still_exist then
    get stacked diagnostics detail = pg_exception_detail;
    perform peergate.fail('2BP01', format('cannot drop peer "%s" because other objects depend on its tables', old.name),
        detail, 'Drop them first, or use DROP PEER … CASCADE.', 'name');
end $$;
comment on function peergate.drop_foreign_tables is 'Takes a peer''s foreign tables, schemas and server away with it.';

create trigger drop_foreign_tables before delete on peergate.peers
    for each row execute function peergate.drop_foreign_tables();

create or replace procedure peergate.drop_peer(names text[], if_exists boolean default false, cascade boolean default false, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    peer   peergate.peers;
    mirror peergate.mirror_definitions;
    n      integer;
begin
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
    perform set_config('peergate.drop_cascades', 'off', true);
    perform peergate.finish(nonce, 'DROP PEER');
end $$;

create procedure peergate.refresh_peer(peer_name text, only_schemas text[] default null, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    peer peergate.peers;
begin
    select p.* into peer from peergate.peers p where p.name = peer_name for key share;
    if not found then
        perform peergate.fail('42704', format('peer "%s" does not exist', peer_name), null,
            peergate.suggestion(peer_name, (select array_agg(p.name) from peergate.peers p)), 'name');
    end if;
    if peer.options ->> 'import' = 'none' then
        raise notice using errcode = '55000', message = format('peer "%s" has no foreign tables', peer_name),
            hint = 'Its option import is none.';
    else
        update peergate.peer_import_runs r
        set state = 'pending', due_at = clock_timestamp(), asked_at = clock_timestamp(), only_schemas = refresh_peer.only_schemas
        where r.peer_id = peer.id;
        perform pg_notify('peergate', 'import');
        raise notice using message = format('the tables of peer "%s" are being brought in', peer_name),
            hint = format('CALL peergate.wait_for_import(%L) returns when they are there.', peer_name);
    end if;
    perform peergate.finish(nonce, 'ALTER PEER');
end $$;
comment on procedure peergate.refresh_peer is 'ALTER PEER … REFRESH SCHEMA.';

-- Each turn of the loop looks with a new snapshot, which only READ COMMITTED gives.
create procedure peergate.wait_for_import(peer_name text, timeout interval default '1 minute')
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    started constant timestamptz := clock_timestamp();
    run     record;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        perform peergate.fail('25001', 'wait_for_import cannot run in a transaction that is not READ COMMITTED');
    end if;
    loop
        select r.*, peergate.is_uncommitted(r.xmin) as uncommitted into run
        from peergate.peers p join peergate.peer_import_runs r on r.peer_id = p.id where p.name = peer_name;
        if not found then
            perform peergate.fail('42704', format('peer "%s" does not exist', peer_name), null,
                peergate.suggestion(peer_name, (select array_agg(p.name) from peergate.peers p)), 'name');
        end if;
        if run.uncommitted then
            perform peergate.fail('55000', format('peer "%s" was changed by this transaction and nothing happens to it before COMMIT', peer_name),
                null, 'Commit first, then wait.', 'name');
        end if;
        exit when run.state in ('ready', 'off');
        if run.state = 'failed' then
            perform peergate.fail(coalesce(run.error_sqlstate, '55000'), format('the tables of peer "%s" could not be brought in: %s', peer_name, run.error_message),
                null, run.error_hint, 'name');
        end if;
        if clock_timestamp() > started + timeout then
            perform peergate.fail('57014', format('timed out waiting for the tables of peer "%s"', peer_name));
        end if;
        perform pg_sleep(0.02);
    end loop;
end $$;
comment on procedure peergate.wait_for_import is 'Returns when the tables of a peer have been brought in.';

create function peergate.notify_importers() returns trigger language plpgsql as $$
begin
    perform pg_notify('peergate', 'import');
    perform pg_notify('peergate', 'peers');
    return null;
end $$;
comment on function peergate.notify_importers is 'Tells engines that a peer is to be looked at, and gateways that its tables may have changed.';

create trigger notify_importers after insert or update of state on peergate.peer_import_runs
    for each statement execute function peergate.notify_importers();

-- Procedures and functions are executable by everybody unless that is taken away.
revoke all on all routines in schema peergate from public;
