-- Why:   a slot that nobody reads makes the source keep its WAL until its disk is full. What each mirror's slot holds is looked at whatever
--        the mirror's state is, shown, and warned of; and a mirror can be dropped although a peer of it never comes back.
-- Locks: mirror_runtime, mirror_drops and the view mirror_status, shortly.    Undo: drop the columns; delete the settings; restore the view.

alter table peergate.mirror_runtime
    add column slot_wal_bytes     bigint,
    add column slot_wal_status    text,
    add column slot_safe_wal_size bigint,
    add column slot_failover      boolean,
    add column slot_over_budget   boolean not null default false,
    add column slot_checked_at    timestamptz,
    add column latency_seconds    double precision;
comment on column peergate.mirror_runtime.slot_wal_bytes     is 'WAL that the source keeps for the slot, in bytes; NULL: not known, or there is no slot.';
comment on column peergate.mirror_runtime.slot_wal_status    is 'As in the source''s pg_replication_slots: reserved, extended, unreserved (about to be removed) or lost; missing: there is no slot.';
comment on column peergate.mirror_runtime.slot_safe_wal_size is 'WAL that the source may still write before the slot is in danger, in bytes; NULL: no limit (max_slot_wal_keep_size), or lost.';
comment on column peergate.mirror_runtime.slot_failover      is 'The slot is synchronized to standbys of the source that ask for that (PostgreSQL 17 and later).';
comment on column peergate.mirror_runtime.slot_over_budget   is 'The slot keeps more than slot_wal_budget.';
comment on column peergate.mirror_runtime.slot_checked_at    is 'When a process last began to look at the slot.';
comment on column peergate.mirror_runtime.latency_seconds    is 'How long the last heartbeat took from the source to the target''s disk; NULL: none yet.';

create or replace view peergate.mirror_status as
select d.name as mirror, r.state, r.received_lsn, r.applied_lsn, r.flushed_lsn, r.source_lsn,
       case when r.applied_lsn is not null then greatest(r.source_lsn - r.applied_lsn, 0) end::bigint as lag_bytes, r.lag_seconds, r.commit_time,
       r.transactions_applied, r.rows_applied, r.bytes_applied,
       (select sum(t.rows_copied)::bigint from peergate.mirror_table_runtime t where t.mirror_id = d.id) as rows_copied,
       (select sum(t.bytes_copied)::bigint from peergate.mirror_table_runtime t where t.mirror_id = d.id) as bytes_copied,
       (select sum(t.copy_fraction * greatest(t.bytes_total, 1)) / sum(greatest(t.bytes_total, 1))
        from peergate.mirror_table_runtime t where t.mirror_id = d.id) as copy_fraction,
       r.error_sqlstate, r.error_message, r.error_detail, r.error_hint, r.error_at, r.attempt, r.retry_at,
       l.node_id, l.epoch, r.system_id, r.timeline, r.snapshot_lsn, r.copied_at, r.source_lsn_at, r.updated_at,
       r.error_lsn, r.slot_wal_bytes, r.slot_wal_status, r.slot_safe_wal_size, r.slot_failover, r.slot_checked_at, r.latency_seconds
from peergate.mirror_definitions d
join peergate.mirror_runtime r on r.mirror_id = d.id
left join peergate.mirror_leases l on l.mirror_id = d.id;
comment on column peergate.mirror_status.slot_wal_bytes     is 'WAL that the source keeps for the slot, in bytes; NULL: not known, or there is no slot.';
comment on column peergate.mirror_status.slot_wal_status    is 'reserved, extended, unreserved (about to be removed), lost, or missing: there is no slot.';
comment on column peergate.mirror_status.slot_safe_wal_size is 'WAL that the source may still write before the slot is in danger, in bytes; NULL: no limit, or lost.';
comment on column peergate.mirror_status.slot_failover      is 'The slot is synchronized to standbys of the source that ask for that.';
comment on column peergate.mirror_status.slot_checked_at    is 'When a process last began to look at the slot.';
comment on column peergate.mirror_status.latency_seconds    is 'How long the last heartbeat took from the source to the target''s disk; NULL: none yet (heartbeat_interval).';

insert into peergate.settings (scope, name, type, default_value, allowed, min_value, max_value, secret, alias_of, description) values
    ('mirror', 'slot_wal_budget', 'bytes', '10GB', null, 0, null, false, null, 'WAL that the source may keep for the mirror before that is warned of; 0: no limit.'),
    ('mirror', 'slot_wal_over_budget', 'enum', 'warn', array['warn', 'drop_slot'], null, null, false, null, 'What happens when the source keeps more than slot_wal_budget: drop_slot gives the mirror up to save the source.'),
    ('mirror', 'failover_slot', 'boolean', 'true', null, null, null, false, null, 'Make the slot one that standbys of the source can synchronize (PostgreSQL 17 and later).'),
    ('mirror', 'heartbeat_interval', 'interval', '0', null, null, null, false, null, 'How often a message of a few bytes is written to the source''s WAL and followed to the target, to measure the latency of an idle mirror; 0: never.');

alter table peergate.mirror_drops add column force boolean not null default false;
comment on column peergate.mirror_drops.force is 'A peer that cannot be cleaned up is given up: one more attempt, and what is left there is reported.';

-- FORCE is new.
drop procedure peergate.drop_mirror(text[], boolean, boolean, text);

create procedure peergate.drop_mirror(names text[], if_exists boolean default false, keep_target_metadata boolean default false, nonce text default null,
    force boolean default false)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    mirror  peergate.mirror_definitions;
    pending bigint;
    n       integer;
begin
    for n in 1 .. cardinality(names) loop
        select d.* into mirror from peergate.mirror_definitions d where d.name = names[n] for update;
        if found then
            perform peergate.remove_mirror(mirror, keep_target_metadata);
            update peergate.mirror_drops d set force = true where d.mirror_id = mirror.id and drop_mirror.force;
            continue;
        end if;
        -- One that is being dropped, and whose peers do not answer.
        select max(d.task_id) into pending from peergate.mirror_drops d where d.mirror = names[n];
        if pending is not null and force then
            update peergate.mirror_drops d set force = true, retry_at = now() where d.mirror = names[n];
            raise notice 'task % drops mirror "%"', pending, names[n];
        elsif if_exists then
            raise notice 'mirror "%" does not exist, skipping', names[n];
        elsif pending is not null then
            perform peergate.fail('55000', format('mirror "%s" is being dropped already', names[n]), format('Task %s removes what it left on its peers.', pending),
                format('DROP MIRROR %I FORCE gives up on a peer that cannot be reached.', names[n]), 'name.' || n);
        else
            perform peergate.fail('42704', format('mirror "%s" does not exist', names[n]), null,
                peergate.suggestion(names[n], (select array_agg(d.name) from peergate.mirror_definitions d)), 'name.' || n);
        end if;
    end loop;
    perform peergate.finish(nonce, 'DROP MIRROR');
end $$;
comment on procedure peergate.drop_mirror is 'DROP MIRROR.';
revoke all on procedure peergate.drop_mirror from public;

create trigger notify_engine after update of force on peergate.mirror_drops
    for each statement execute function peergate.notify_engine();
revoke all on function peergate.note_transition from public;

create function peergate.mirror_option(options jsonb, option text) returns text language sql stable as $$
    select coalesce(options ->> option, (select s.default_value from peergate.settings s where s.scope = 'mirror' and s.name = option))
$$;
comment on function peergate.mirror_option is 'The value of a mirror''s option, or its default.';
revoke all on function peergate.mirror_option from public;
