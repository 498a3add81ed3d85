-- Why:   a change of a mirror's state is an event in the very transaction that makes it, whoever makes it: nothing is entered or left
--        silently. What an engine writes about a mirror counts only while the lease's epoch is its own.
-- Locks: mirror_runtime, mirror_drops, shortly.      Undo: drop the trigger, its function and the columns; delete the settings.

alter table peergate.mirror_runtime add column error_lsn pg_lsn;
comment on column peergate.mirror_runtime.error_lsn is 'Where in the source''s WAL the last error happened; NULL when it has no place there.';

create function peergate.note_transition() returns trigger language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    failed   boolean;
    asked    boolean;
    noted    text;
    mirror   text;
    about_id bigint;
begin
    if tg_op = 'DELETE' then
        about_id := old.mirror_id;
        select d.mirror into mirror from peergate.mirror_drops d where d.mirror_id = about_id;
        noted := 'dropping';
    else
        about_id := new.mirror_id;
        select d.name into mirror from peergate.mirror_definitions d where d.id = about_id;
    end if;
    if tg_op = 'INSERT' then
        noted := new.state;
    elsif tg_op = 'UPDATE' then
        failed := new.state in ('retrying', 'blocked', 'resync_required') and new.error_at is distinct from old.error_at;
        -- An attempt that fails as the one before it is no news.
        if old.state = new.state and (not failed or (old.error_sqlstate, old.error_message) is not distinct from (new.error_sqlstate, new.error_message)) then
            return null;
        end if;
        asked := new.state = 'retrying' and not failed;
        noted := new.state || case when failed then ': ' || new.error_message when asked then ': a person asked for a new attempt' else '' end;
    end if;
    insert into peergate.task_log (task_id, message)
    select t.id, noted from peergate.tasks t where t.mirror_id = about_id and t.state in ('pending', 'running');
    insert into peergate.mirror_events (mirror_id, mirror, level, kind, message, lsn, sqlstate, detail, hint, node_id)
    select about_id, coalesce(mirror, ''), case when not coalesce(failed, false) then 'info' when new.state = 'retrying' then 'warning' else 'error' end,
           case when failed then 'error' else 'state' end, noted,
           case when tg_op = 'INSERT' then null when tg_op = 'DELETE' then old.applied_lsn when failed then coalesce(new.error_lsn, new.applied_lsn) else new.applied_lsn end,
           case when failed then new.error_sqlstate end,
           case when failed then new.error_detail when tg_op <> 'INSERT' then 'It was ' || old.state || coalesce(': ' || old.error_message, '') || '.' end,
           case when failed then new.error_hint end,
           case when tg_op = 'UPDATE' and not asked then (select l.node_id from peergate.mirror_leases l where l.mirror_id = about_id) end;
    return null;
end $$;
comment on function peergate.note_transition is 'Records each change of a mirror''s state as an event, with what caused it, and in the log of its open tasks.';

create trigger note_transition after insert or delete or update of state on peergate.mirror_runtime
    for each row execute function peergate.note_transition();

insert into peergate.settings (scope, name, type, default_value, allowed, min_value, max_value, secret, alias_of, description) values
    ('mirror', 'wal_receiver_timeout', 'interval', '60s', null, null, null, false, null, 'Silence after which a connection to a peer is taken for dead and made anew; at least 15s.'),
    ('mirror', 'replication_origin', 'boolean', 'true', null, null, null, false, null, 'Mark the transactions on the target with a replication origin, if the peer''s role may; progress never depends on it.');
