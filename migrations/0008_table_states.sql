-- Why:   each table of a mirror has a life of its own: it may be copied, resynced or stopped while the others stream. Its row says from
--        where in the WAL its changes count, what is wrong with it, and whether its target holds rows that a new copy is to replace.
-- Locks: ACCESS EXCLUSIVE on mirror_runtime and mirror_table_runtime, briefly.
-- Undo:  drop the columns.

alter table peergate.mirror_table_runtime
    add column from_lsn       pg_lsn,
    add column replaces       boolean not null default false,
    add column error_sqlstate text,
    add column error_message  text,
    add column error_detail   text,
    add column error_hint     text,
    add column error_lsn      pg_lsn,
    add column error_at       timestamptz;
comment on column peergate.mirror_table_runtime.from_lsn       is 'Changes that commit before this are in the target table by its copy; those after it come by the stream. NULL while there is no complete copy.';
comment on column peergate.mirror_table_runtime.replaces       is 'The target table holds rows of an earlier, complete copy: a new copy takes their place in one transaction.';
comment on column peergate.mirror_table_runtime.error_sqlstate is 'SQLSTATE of what stops the table; NULL when nothing does.';
comment on column peergate.mirror_table_runtime.error_message  is 'What stops the table.';
comment on column peergate.mirror_table_runtime.error_detail   is 'More about what stops the table.';
comment on column peergate.mirror_table_runtime.error_hint     is 'What to do about what stops the table.';
comment on column peergate.mirror_table_runtime.error_lsn      is 'Where the source transaction commits that could not be applied to the table; NULL when it was not one.';
comment on column peergate.mirror_table_runtime.error_at       is 'When it stopped.';
update peergate.mirror_table_runtime set replaces = true where state = 'live';

create or replace view peergate.mirror_tables as
select d.name as mirror, t.source_schema, t.source_name, t.target_schema, t.target_name, t.state, t.key_columns,
       t.rows_copied, t.bytes_copied, t.bytes_total, t.copy_fraction, t.rows_inserted, t.rows_updated, t.rows_deleted,
       t.truncates, t.warning, t.created_table, t.updated_at,
       t.from_lsn, t.error_sqlstate, t.error_message, t.error_detail, t.error_hint, t.error_lsn, t.error_at
from peergate.mirror_table_runtime t
join peergate.mirror_definitions d on d.id = t.mirror_id;
comment on column peergate.mirror_tables.from_lsn       is 'Changes that commit before this are in the target table by its copy; those after it come by the stream. NULL while there is no complete copy.';
comment on column peergate.mirror_tables.error_sqlstate is 'SQLSTATE of what stops the table; NULL when nothing does.';
comment on column peergate.mirror_tables.error_message  is 'What stops the table.';
comment on column peergate.mirror_tables.error_detail   is 'More about what stops the table.';
comment on column peergate.mirror_tables.error_hint     is 'What to do about what stops the table.';
comment on column peergate.mirror_tables.error_lsn      is 'Where the source transaction commits that could not be applied to the table; NULL when it was not one.';
comment on column peergate.mirror_tables.error_at       is 'When it stopped.';

create or replace view peergate.mirror_status as
select d.name as mirror, r.state, r.received_lsn, r.applied_lsn, r.flushed_lsn, r.source_lsn,
       case when r.applied_lsn is not null then greatest(r.source_lsn - r.applied_lsn, 0) end::bigint as lag_bytes, r.lag_seconds, r.commit_time,
       r.transactions_applied, r.rows_applied, r.bytes_applied,
       (select sum(t.rows_copied)::bigint from peergate.mirror_table_runtime t where t.mirror_id = d.id) as rows_copied,
       (select sum(t.bytes_copied)::bigint from peergate.mirror_table_runtime t where t.mirror_id = d.id) as bytes_copied,
       (select sum(t.copy_fraction * greatest(t.bytes_total, 1)) / sum(greatest(t.bytes_total, 1))
        from peergate.mirror_table_runtime t where t.mirror_id = d.id) as copy_fraction,
       r.error_sqlstate, r.error_message, r.error_detail, r.error_hint, r.error_at, r.attempt, r.retry_at,
       l.node_id, l.epoch, r.system_id, r.timeline, r.snapshot_lsn, r.copied_at, r.source_lsn_at, r.updated_at, r.error_lsn
from peergate.mirror_definitions d
join peergate.mirror_runtime r on r.mirror_id = d.id
left join peergate.mirror_leases l on l.mirror_id = d.id;
comment on column peergate.mirror_status.error_lsn is 'Where the source transaction commits that could not be applied; NULL when the error has no place in the WAL.';

-- Whoever moves a table from state to state: no change goes without its event.
create function peergate.note_table_transition() returns trigger language plpgsql security definer set search_path = pg_catalog, peergate as $$
begin
    insert into peergate.mirror_events (mirror_id, mirror, level, kind, message, lsn, sqlstate, detail, hint, node_id)
    select new.mirror_id, d.name, case new.state when 'blocked' then 'error' else 'info' end, 'table',
           format('table "%s.%s" is %s', new.source_schema, new.source_name, new.state)
               || case when new.state = 'blocked' then coalesce(': ' || new.error_message, '') else '' end,
           case new.state when 'blocked' then new.error_lsn else new.from_lsn end,
           case new.state when 'blocked' then new.error_sqlstate end,
           case new.state when 'blocked' then new.error_detail end, case new.state when 'blocked' then new.error_hint end,
           (select l.node_id from peergate.mirror_leases l where l.mirror_id = new.mirror_id)
    from peergate.mirror_definitions d where d.id = new.mirror_id;
    return null;
end $$;
comment on function peergate.note_table_transition is 'Records each change of a table''s state as an event.';
revoke all on function peergate.note_table_transition from public;

create trigger note_table_transition after update of state on peergate.mirror_table_runtime
    for each row when (old.state is distinct from new.state) execute function peergate.note_table_transition();
