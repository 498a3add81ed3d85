-- Why:   ALTER PEER … REFRESH SCHEMA is a statement now: of the peer's owner, as all of ALTER PEER, with IF EXISTS, and with errors for schemas
--        that are never brought in. What is asked for before the last wish was fulfilled is added to it; it took its place.
-- Locks: none.        Undo: drop procedure peergate.refresh_peer; create it as in 0012.

drop procedure peergate.refresh_peer(text, text[], text);
create procedure peergate.refresh_peer(peer_name text, only_schemas text[] default null, if_exists boolean default false, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    peer   peergate.peers := peergate.find_peer(peer_name, if_exists);
    import text := peergate.option('peer', peer.options, 'import');
    item   record;
begin
    if peer.id is not null and import = 'none' then
        raise notice using errcode = '55000', message = format('peer "%s" has no foreign tables', peer_name),
            hint = 'Its option import is none.';
    elsif peer.id is not null then
        for item in select s.schema, s.n from unnest(only_schemas) with ordinality s (schema, n)
                    where import <> 'all' and s.schema <> all (regexp_split_to_array(import, '\s*,\s*')) order by s.n loop
            perform peergate.fail('22023', format('schema "%s" of peer "%s" is not brought in', item.schema, peer_name),
                format('Its option import is "%s".', import), null, 'schema.' || item.n);
        end loop;
        update peergate.peer_import_runs r
        set state = 'pending', due_at = clock_timestamp(), asked_at = clock_timestamp(),
            -- What was asked for and is not done yet stays asked for.
            only_schemas = case when r.state not in ('pending', 'running') then refresh_peer.only_schemas
                                when r.only_schemas is null or refresh_peer.only_schemas is null then null
                                else r.only_schemas || refresh_peer.only_schemas end
        where r.peer_id = peer.id;
        perform pg_notify('peergate', 'import');
        raise notice using message = format('the tables of peer "%s" are being brought in', peer_name),
            hint = format('CALL peergate.wait_for_import(%L) returns when they are there.', peer_name);
    end if;
    perform peergate.finish(nonce, 'ALTER PEER');
end $$;
comment on procedure peergate.refresh_peer is 'ALTER PEER … REFRESH SCHEMA.';

-- Procedures and functions are executable by everybody unless that is taken away.
revoke all on all routines in schema peergate from public;
