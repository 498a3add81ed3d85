-- Why:   columns that only the target has and the mirror writes: whether a row was deleted on the source, and when it was written last. Once rows
--        stay that were deleted, a mirror without the column would take them for rows that are there: the option cannot be taken back.
-- Locks: none (rows of settings, a trigger on mirror_definitions).
-- Undo:  drop the trigger and its function; delete the settings; restore set_table_mirror_options of 0023.

insert into peergate.settings (scope, name, type, default_value, allowed, min_value, max_value, secret, alias_of, description) values
    ('mirror', 'soft_delete_column', 'text', null, null, null, null, false, null, 'Column of the target''s tables, boolean, that is true in rows which were deleted on the source; they stay then. Empty: such rows go. Cannot be changed once it is set.'),
    ('mirror', 'soft_delete_col_name', 'text', null, null, null, null, false, 'soft_delete_column', 'PeerDB''s name for soft_delete_column.'),
    ('mirror', 'synced_at_column', 'text', null, null, null, null, false, null, 'Column of the target''s tables, timestamptz, that says when the mirror wrote the row last. Empty: none.'),
    ('mirror', 'synced_at_col_name', 'text', null, null, null, null, false, 'synced_at_column', 'PeerDB''s name for synced_at_column.'),
    ('mirror', 'disable_peerdb_columns', 'boolean', 'false', null, null, null, false, null, 'PeerDB''s: true means neither soft_delete_column nor synced_at_column, whatever they are.');

create function peergate.check_bookkeeping() returns trigger language plpgsql as $$
declare
    disabled boolean := peergate.option('mirror', new.options, 'disable_peerdb_columns')::boolean;
    soft     text := case when not disabled then nullif(new.options ->> 'soft_delete_column', '') end;
    synced   text := case when not disabled then nullif(new.options ->> 'synced_at_column', '') end;
    earlier  text;
begin
    -- Those of mirrors of queries are others.
    if new.selection ? 'query' then
        return new;
    end if;
    if soft = synced then
        perform peergate.fail('42701', 'soft_delete_column and synced_at_column have the same name', null, null, 'option.synced_at_column.value');
    end if;
    if octet_length(soft) > 63 or octet_length(synced) > 63 then
        perform peergate.fail('42622', 'the name of a column is at most 63 bytes long', null, null,
            case when octet_length(soft) > 63 then 'option.soft_delete_column.value' else 'option.synced_at_column.value' end);
    end if;
    if tg_op = 'UPDATE' and not coalesce((old.options ->> 'disable_peerdb_columns')::boolean, false) then
        earlier := nullif(old.options ->> 'soft_delete_column', '');
        if earlier is not null and earlier is distinct from soft then
            perform peergate.fail('0A000', format('rows that were deleted on the source are marked by column "%s" of the target, and that cannot be changed', earlier),
                'Without it they would be taken for rows that are there.', 'Create another mirror, of other target tables.', 'option.soft_delete_column');
        end if;
    end if;
    return new;
end $$;
comment on function peergate.check_bookkeeping is 'Checks the options of a mirror that name columns of its own.';

create trigger check_bookkeeping before insert or update of options on peergate.mirror_definitions
    for each row execute function peergate.check_bookkeeping();

-- As in 0009 and 0023, but for the hint: there is no need to drop the mirror before another has taken its place.
create or replace procedure peergate.set_table_mirror_options(mirror_name text, options jsonb default '{}', reset text[] default '{}', nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    mirror  peergate.mirror_definitions := peergate.find_mirror(mirror_name, false);
    checked jsonb := peergate.check_options('mirror', set_table_mirror_options.options);
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
            perform peergate.fail('0A000', format('option "%s" of a mirror cannot be changed', key), 'It decides how a mirror begins.',
                'Create another mirror, of other target tables or with truncate_target = true, and drop this one.', 'option.' || key);
        end if;
    end loop;
    if changed is distinct from mirror.options then
        -- It begins anew where it is, with the options as they are now.
        update peergate.mirror_definitions d set options = changed, updated_at = clock_timestamp() where d.id = mirror.id;
        perform pg_notify('peergate', '');
    end if;
    perform peergate.finish(nonce, 'ALTER MIRROR');
end $$;
comment on procedure peergate.set_table_mirror_options is 'ALTER MIRROR … SET and RESET, of tables.';

-- Procedures and functions are executable by everybody unless that is taken away.
revoke all on all routines in schema peergate from public;
