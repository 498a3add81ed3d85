-- Why:   PeerDB's scripts give options that have nothing to do here. They are taken, with a NOTICE that says why they change nothing.
-- Locks: ACCESS EXCLUSIVE on peergate.settings, for a moment.        Undo: delete these options; alter table peergate.settings drop column no_effect.

alter table peergate.settings add column no_effect text;
comment on column peergate.settings.no_effect is 'Why the option is taken and changes nothing; NULL: it does something.';

insert into peergate.settings (scope, name, type, allowed, description, no_effect) values
    ('mirror', 'snapshot_num_rows_per_partition',  'integer', null, 'PeerDB''s. Changes nothing.', 'Tables are divided for the copy by their size.'),
    ('mirror', 'snapshot_num_partitions_override', 'integer', null, 'PeerDB''s. Changes nothing.', 'Tables are divided for the copy by their size.'),
    ('mirror', 'snapshot_num_tables_in_parallel',  'integer', null, 'PeerDB''s. Changes nothing.', 'The sessions of copy_parallel_workers copy ranges of all tables.'),
    ('mirror', 'snapshot_staging_path',            'text',    null, 'PeerDB''s. Changes nothing.', 'Nothing is staged on the way.'),
    ('mirror', 'cdc_staging_path',                 'text',    null, 'PeerDB''s. Changes nothing.', 'Nothing is staged on the way.'),
    ('mirror', 'system',                           'enum',    array['PG', 'Q'], 'PeerDB''s. Changes nothing.', 'Values always keep their PostgreSQL types.');

insert into peergate.settings (scope, name, type, description, unsupported) values
    ('mirror', 'script', 'text', 'PeerDB''s name of a transformation in Lua.', 'There are no scripts.'),
    ('mirror', 'resync', 'boolean', 'PeerDB''s. RESYNC MIRROR copies anew.', 'RESYNC MIRROR is the statement that copies anew; truncate_target empties tables that are there.');

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
        if setting.no_effect is not null then
            raise notice using message = format('%s option "%s" changes nothing', for_scope, key), detail = setting.no_effect;
            continue;
        end if;
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
