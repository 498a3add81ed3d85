-- Why:   what a mirror should be (mirror_definitions, what the user said) and what it is (mirror_runtime and
--        mirror_table_runtime, what the engine sees) are kept in different rows, so that a user's open transaction never
--        blocks the engine. The views mirrors, mirror_status and mirror_tables are what people read.
-- Locks: none (new objects).        Undo: drop the tables of this file.

create table peergate.nodes (
    id           text primary key,
    host         text not null,
    role         text not null constraint nodes_role_check check (role in ('all', 'gateway', 'engine')),
    version      text not null,
    started_at   timestamptz not null default now(),
    heartbeat_at timestamptz not null default now()
);
comment on table  peergate.nodes              is 'The peergate processes that share this catalog. Written by: each process, about itself.';
comment on column peergate.nodes.id           is 'The process''s identity, kept in its data directory, so that a restart finds its own mirrors.';
comment on column peergate.nodes.host         is 'Name of the machine.';
comment on column peergate.nodes.role         is 'What it runs: all, gateway or engine.';
comment on column peergate.nodes.version      is 'Version of the binary.';
comment on column peergate.nodes.started_at   is 'When the process started.';
comment on column peergate.nodes.heartbeat_at is 'When it last reported; older than a minute means that it is gone.';

create table peergate.mirror_definitions (
    id            bigint generated always as identity primary key,
    name          text not null constraint mirror_definitions_name_key unique
                       constraint mirror_definitions_name_check check (name <> '' and octet_length(name) <= 63),
    source_id     bigint not null references peergate.peers (id),
    target_id     bigint not null references peergate.peers (id),
    selection     jsonb not null,
    options       jsonb not null default '{}',
    desired_state text not null default 'running' constraint mirror_definitions_desired_state_check check (desired_state in ('running', 'paused')),
    object_name   text not null constraint mirror_definitions_object_name_key unique,
    owner         text not null default session_user,
    created_at    timestamptz not null default now(),
    updated_at    timestamptz not null default now()
);
create index mirror_definitions_source_id_idx on peergate.mirror_definitions (source_id);
create index mirror_definitions_target_id_idx on peergate.mirror_definitions (target_id);
comment on table  peergate.mirror_definitions               is 'What was asked for: one row per mirror. Read it through the view mirrors. Written by: CREATE MIRROR and its like.';
comment on column peergate.mirror_definitions.id            is 'Identifies the mirror for ever, whatever its name becomes.';
comment on column peergate.mirror_definitions.name          is 'The mirror''s name, unique, at most 63 bytes.';
comment on column peergate.mirror_definitions.source_id     is 'The peer it reads from.';
comment on column peergate.mirror_definitions.target_id     is 'The peer it writes to.';
comment on column peergate.mirror_definitions.selection     is 'Which tables: {"all": true}, {"schemas": [{"from", "to"}]} or {"tables": [{"from": {"schema", "name"}, "to": {…}, "columns", "exclude"}]}, with "except" for the first two.';
comment on column peergate.mirror_definitions.options       is 'Options by name, as peergate.settings lists them for scope mirror; what is absent has its default.';
comment on column peergate.mirror_definitions.desired_state is 'What the user wants: running or paused. The engine makes it so.';
comment on column peergate.mirror_definitions.object_name   is 'Name of the mirror''s slot and publication on the source, and of its progress on the target.';
comment on column peergate.mirror_definitions.owner         is 'Role that created the mirror.';
comment on column peergate.mirror_definitions.created_at    is 'When the mirror was created.';
comment on column peergate.mirror_definitions.updated_at    is 'When its definition last changed.';

create table peergate.mirror_runtime (
    mirror_id       bigint primary key references peergate.mirror_definitions (id) on delete cascade,
    state           text not null default 'created' constraint mirror_runtime_state_check check (state in
                        ('created', 'preflight', 'schema', 'slot', 'copying', 'catchup', 'running', 'paused', 'retrying', 'blocked',
                         'resync_required', 'completed')),
    system_id       text,
    timeline        integer,
    publications    oid[],
    snapshot_lsn    pg_lsn,
    copied_at       timestamptz,
    received_lsn    pg_lsn,
    applied_lsn     pg_lsn,
    flushed_lsn     pg_lsn,
    source_lsn      pg_lsn,
    source_lsn_at   timestamptz,
    commit_time     timestamptz,
    lag_seconds     double precision,
    rows_applied    bigint not null default 0,
    bytes_applied   bigint not null default 0,
    transactions_applied bigint not null default 0,
    error_sqlstate  text,
    error_message   text,
    error_detail    text,
    error_hint      text,
    error_at        timestamptz,
    attempt         integer not null default 0,
    retry_at        timestamptz,
    updated_at      timestamptz not null default now()
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);
comment on table  peergate.mirror_runtime                is 'What is so: one row per mirror. Read it through the views mirrors and mirror_status. Written by: the engine that holds the mirror''s lease.';
comment on column peergate.mirror_runtime.mirror_id      is 'The mirror.';
comment on column peergate.mirror_runtime.state          is 'Where the mirror is: created, preflight, schema, slot, copying, catchup, running, paused, retrying, blocked, resync_required or completed.';
comment on column peergate.mirror_runtime.system_id      is 'System identifier of the source when the slot was made; another one means another server.';
comment on column peergate.mirror_runtime.timeline       is 'Timeline of the source when it was last seen.';
comment on column peergate.mirror_runtime.publications   is 'Oids of the mirror''s publications on the source; others of the same name were made by somebody else. NULL before they are made.';
comment on column peergate.mirror_runtime.snapshot_lsn   is 'Consistent point of the slot: the copy holds everything before it. NULL before the slot is made.';
comment on column peergate.mirror_runtime.copied_at      is 'When the copy was complete on the target; NULL: not yet, a restart copies anew.';
comment on column peergate.mirror_runtime.received_lsn   is 'All source WAL before this was read.';
comment on column peergate.mirror_runtime.applied_lsn    is 'All source WAL before this is durable on the target.';
comment on column peergate.mirror_runtime.flushed_lsn    is 'What was acknowledged to the slot; the source may remove WAL before it.';
comment on column peergate.mirror_runtime.source_lsn     is 'End of the source''s WAL when it was last asked.';
comment on column peergate.mirror_runtime.source_lsn_at  is 'When source_lsn was asked for, by the catalog''s clock.';
comment on column peergate.mirror_runtime.commit_time    is 'Commit time, on the source, of the last transaction applied.';
comment on column peergate.mirror_runtime.lag_seconds    is 'How long the oldest change that is not yet applied has waited; 0 when there is none.';
comment on column peergate.mirror_runtime.rows_applied   is 'Row changes applied by streaming since the mirror was created.';
comment on column peergate.mirror_runtime.bytes_applied  is 'Bytes of row changes applied by streaming since the mirror was created.';
comment on column peergate.mirror_runtime.transactions_applied is 'Source transactions applied by streaming since the mirror was created.';
comment on column peergate.mirror_runtime.error_sqlstate is 'SQLSTATE of the last error; NULL when there is none since the mirror last ran well.';
comment on column peergate.mirror_runtime.error_message  is 'Message of the last error.';
comment on column peergate.mirror_runtime.error_detail   is 'Detail of the last error.';
comment on column peergate.mirror_runtime.error_hint     is 'What to do about the last error.';
comment on column peergate.mirror_runtime.error_at       is 'When the last error happened.';
comment on column peergate.mirror_runtime.attempt        is 'Failed attempts since the mirror last ran well.';
comment on column peergate.mirror_runtime.retry_at       is 'When the next attempt is due; NULL when none is.';
comment on column peergate.mirror_runtime.updated_at     is 'When the engine last wrote this row.';

create table peergate.mirror_table_runtime (
    mirror_id      bigint not null references peergate.mirror_definitions (id) on delete cascade,
    source_schema  text not null,
    source_name    text not null,
    target_schema  text not null,
    target_name    text not null,
    state          text not null default 'pending' constraint mirror_table_runtime_state_check check (state in
                       ('pending', 'copying', 'copied', 'indexing', 'catchup', 'live', 'blocked', 'removed')),
    key_columns    text[],
    bytes_total    bigint,
    bytes_copied   bigint not null default 0,
    rows_copied    bigint not null default 0,
    copy_fraction  double precision not null default 0,
    rows_inserted  bigint not null default 0,
    rows_updated   bigint not null default 0,
    rows_deleted   bigint not null default 0,
    truncates      bigint not null default 0,
    warning        text,
    created_oid    oid,
    created_table  boolean not null generated always as (created_oid is not null) stored,
    updated_at     timestamptz not null default now(),
    primary key (mirror_id, source_schema, source_name),
    constraint mirror_table_runtime_target_key unique (mirror_id, target_schema, target_name)
) with (fillfactor = 50);
comment on table  peergate.mirror_table_runtime               is 'What is so: one row per table of a mirror. Read it through the view mirror_tables. Written by: the engine.';
comment on column peergate.mirror_table_runtime.mirror_id     is 'The mirror.';
comment on column peergate.mirror_table_runtime.source_schema is 'Schema of the table on the source.';
comment on column peergate.mirror_table_runtime.source_name   is 'Name of the table on the source.';
comment on column peergate.mirror_table_runtime.target_schema is 'Schema of the table on the target.';
comment on column peergate.mirror_table_runtime.target_name   is 'Name of the table on the target.';
comment on column peergate.mirror_table_runtime.state         is 'Where the table is: pending, copying, copied, indexing, catchup, live, blocked or removed.';
comment on column peergate.mirror_table_runtime.key_columns   is 'Columns by which rows are found on the target; NULL: none, only inserts can be streamed.';
comment on column peergate.mirror_table_runtime.bytes_total   is 'Size of the table on the source when its copy began, in bytes; NULL before that.';
comment on column peergate.mirror_table_runtime.bytes_copied  is 'Bytes written to the target by the copy, in COPY''s format.';
comment on column peergate.mirror_table_runtime.rows_copied   is 'Rows written to the target by the copy.';
comment on column peergate.mirror_table_runtime.copy_fraction is 'Part of the table''s blocks that have been copied, from 0 to 1.';
comment on column peergate.mirror_table_runtime.rows_inserted is 'Inserts streamed since the mirror was created.';
comment on column peergate.mirror_table_runtime.rows_updated  is 'Updates streamed since the mirror was created.';
comment on column peergate.mirror_table_runtime.rows_deleted  is 'Deletes streamed since the mirror was created.';
comment on column peergate.mirror_table_runtime.truncates     is 'Truncates streamed since the mirror was created.';
comment on column peergate.mirror_table_runtime.warning       is 'What a person should know about this table, such as that it has no key; NULL when there is nothing.';
comment on column peergate.mirror_table_runtime.created_oid   is 'The target table that the mirror created; NULL: none. Only this one may be dropped when the copy begins anew.';
comment on column peergate.mirror_table_runtime.created_table is 'The mirror created the target table.';
comment on column peergate.mirror_table_runtime.updated_at    is 'When the engine last wrote this row.';

-- Not tied to mirror_definitions: the lease must outlive a dropped mirror until its objects are removed from the peers.
create table peergate.mirror_leases (
    mirror_id  bigint primary key,
    node_id    text,
    epoch      bigint not null default 0,
    expires_at timestamptz not null default '-infinity'
);
comment on table  peergate.mirror_leases            is 'Which process runs a mirror. Written by: the engines.';
comment on column peergate.mirror_leases.mirror_id  is 'The mirror, which may already be dropped.';
comment on column peergate.mirror_leases.node_id    is 'The process that holds the lease; NULL: nobody yet.';
comment on column peergate.mirror_leases.epoch      is 'Counts the holders; the target refuses writes of an older epoch.';
comment on column peergate.mirror_leases.expires_at is 'Until when the lease holds, by the catalog''s clock.';

create table peergate.tasks (
    id             bigint generated always as identity primary key,
    kind           text not null constraint tasks_kind_check check (kind in ('create_mirror', 'pause_mirror', 'resume_mirror', 'drop_mirror')),
    mirror_id      bigint,
    mirror         text not null,
    state          text not null default 'pending' constraint tasks_state_check check (state in ('pending', 'running', 'completed', 'failed', 'canceled')),
    progress       double precision not null default 0 constraint tasks_progress_check check (progress between 0 and 1),
    error_sqlstate text,
    error_message  text,
    created_by     text not null default session_user,
    created_at     timestamptz not null default clock_timestamp(),
    started_at     timestamptz,
    finished_at    timestamptz
);
create index tasks_open_idx on peergate.tasks (mirror_id) where state in ('pending', 'running');
comment on table  peergate.tasks                is 'Work that a statement started. Written by: the statement, then the engine.';
comment on column peergate.tasks.id             is 'The number that the statement''s NOTICE named.';
comment on column peergate.tasks.kind           is 'What is being done: create_mirror, pause_mirror, resume_mirror or drop_mirror.';
comment on column peergate.tasks.mirror_id      is 'The mirror it is about, which may already be dropped.';
comment on column peergate.tasks.mirror         is 'The mirror''s name when the task began.';
comment on column peergate.tasks.state          is 'Where it is: pending, running, completed, failed or canceled.';
comment on column peergate.tasks.progress       is 'Part that is done, from 0 to 1.';
comment on column peergate.tasks.error_sqlstate is 'SQLSTATE of what made it fail, or holds it up; NULL when nothing does.';
comment on column peergate.tasks.error_message  is 'Message of what made it fail, or holds it up.';
comment on column peergate.tasks.created_by     is 'Role that gave the statement.';
comment on column peergate.tasks.created_at     is 'When the statement was given.';
comment on column peergate.tasks.started_at     is 'When an engine took it up; NULL before that.';
comment on column peergate.tasks.finished_at    is 'When it ended; NULL while it has not.';

create table peergate.task_log (
    id      bigint generated always as identity primary key,
    task_id bigint not null references peergate.tasks (id) on delete cascade,
    at      timestamptz not null default clock_timestamp(),
    message text not null
);
create index task_log_task_id_idx on peergate.task_log (task_id);
comment on table  peergate.task_log         is 'What happened in a task, line by line. Written by: the engine.';
comment on column peergate.task_log.id      is 'Orders the lines.';
comment on column peergate.task_log.task_id is 'The task.';
comment on column peergate.task_log.at      is 'When it happened.';
comment on column peergate.task_log.message is 'What happened.';

create table peergate.mirror_events (
    id        bigint generated always as identity primary key,
    at        timestamptz not null default clock_timestamp(),
    mirror_id bigint,
    mirror    text not null,
    level     text not null constraint mirror_events_level_check check (level in ('info', 'warning', 'error')),
    kind      text not null,
    message   text not null,
    lsn       pg_lsn,
    sqlstate  text,
    detail    text,
    hint      text,
    node_id   text
);
create index mirror_events_mirror_id_idx on peergate.mirror_events (mirror_id, id);
comment on table  peergate.mirror_events           is 'What happened to mirrors: changes of state, warnings and errors, kept after a mirror is dropped. Written by: the engine.';
comment on column peergate.mirror_events.id        is 'Orders the events.';
comment on column peergate.mirror_events.at        is 'When it happened.';
comment on column peergate.mirror_events.mirror_id is 'The mirror, which may already be dropped.';
comment on column peergate.mirror_events.mirror    is 'The mirror''s name at that time.';
comment on column peergate.mirror_events.level     is 'info, warning or error.';
comment on column peergate.mirror_events.kind      is 'What kind of event: state, copy, schema, table, error, lease or drop.';
comment on column peergate.mirror_events.message   is 'What happened.';
comment on column peergate.mirror_events.lsn       is 'Where in the source''s WAL it happened; NULL when it has no place there.';
comment on column peergate.mirror_events.sqlstate  is 'SQLSTATE of an error; NULL for other events.';
comment on column peergate.mirror_events.detail    is 'More about it.';
comment on column peergate.mirror_events.hint      is 'What to do about it.';
comment on column peergate.mirror_events.node_id   is 'The process that saw it.';

-- A dropped mirror's peers may be dropped in the same script, so the work order holds all that is needed to clean up.
create table peergate.mirror_drops (
    mirror_id    bigint primary key,
    mirror       text not null,
    object_name  text not null,
    source       jsonb not null,
    target       jsonb not null,
    keep_target_metadata boolean not null,
    task_id      bigint not null references peergate.tasks (id),
    attempt      integer not null default 0,
    retry_at     timestamptz not null default now()
);
create index mirror_drops_task_id_idx on peergate.mirror_drops (task_id);
comment on table  peergate.mirror_drops             is 'Dropped mirrors whose slot, publication and progress are still to be removed from the peers. Written by: DROP MIRROR; removed by the engine when done. Not readable by ordinary roles.';
comment on column peergate.mirror_drops.mirror_id   is 'The dropped mirror.';
comment on column peergate.mirror_drops.mirror      is 'Its name.';
comment on column peergate.mirror_drops.object_name is 'Name of its slot, publication and progress.';
comment on column peergate.mirror_drops.source      is 'The source peer as it was: name, options and sealed secrets.';
comment on column peergate.mirror_drops.target      is 'The target peer as it was: name, options and sealed secrets.';
comment on column peergate.mirror_drops.keep_target_metadata is 'Leave the progress row on the target.';
comment on column peergate.mirror_drops.task_id     is 'The task that DROP MIRROR started.';
comment on column peergate.mirror_drops.attempt     is 'Failed attempts so far.';
comment on column peergate.mirror_drops.retry_at    is 'When the next attempt is due.';

create view peergate.mirrors as
select d.id, d.name, s.name as source, t.name as target, d.desired_state, r.state,
       case when r.applied_lsn is not null then greatest(r.source_lsn - r.applied_lsn, 0) end::bigint as lag_bytes, r.lag_seconds, r.rows_applied,
       r.error_message as last_error, d.selection, d.options, d.object_name, d.owner, d.created_at, d.updated_at
from peergate.mirror_definitions d
join peergate.peers s on s.id = d.source_id
join peergate.peers t on t.id = d.target_id
join peergate.mirror_runtime r on r.mirror_id = d.id;
comment on view   peergate.mirrors               is 'One row per mirror: what was asked for, and how it stands. INSERT, UPDATE of desired_state and DELETE do as CREATE, PAUSE, RESUME and DROP MIRROR.';
comment on column peergate.mirrors.id            is 'Identifies the mirror for ever, whatever its name becomes.';
comment on column peergate.mirrors.name          is 'The mirror''s name.';
comment on column peergate.mirrors.source        is 'Name of the peer it reads from.';
comment on column peergate.mirrors.target        is 'Name of the peer it writes to.';
comment on column peergate.mirrors.desired_state is 'What the user wants: running or paused.';
comment on column peergate.mirrors.state         is 'Where the mirror is: created, preflight, schema, slot, copying, catchup, running, paused, retrying, blocked, resync_required or completed.';
comment on column peergate.mirrors.lag_bytes     is 'Source WAL that is not yet applied, in bytes; NULL before streaming.';
comment on column peergate.mirrors.lag_seconds   is 'How long the oldest change that is not yet applied has waited; NULL before streaming.';
comment on column peergate.mirrors.rows_applied  is 'Row changes applied by streaming since the mirror was created.';
comment on column peergate.mirrors.last_error    is 'Message of the last error; NULL when there is none since the mirror last ran well.';
comment on column peergate.mirrors.selection     is 'Which tables, as CREATE MIRROR said.';
comment on column peergate.mirrors.options       is 'Options by name; what is absent has its default in settings.';
comment on column peergate.mirrors.object_name   is 'Name of the mirror''s slot and publication on the source, and of its progress on the target.';
comment on column peergate.mirrors.owner         is 'Role that created the mirror.';
comment on column peergate.mirrors.created_at    is 'When the mirror was created.';
comment on column peergate.mirrors.updated_at    is 'When its definition last changed.';

create view peergate.mirror_status as
select d.name as mirror, r.state, r.received_lsn, r.applied_lsn, r.flushed_lsn, r.source_lsn,
       case when r.applied_lsn is not null then greatest(r.source_lsn - r.applied_lsn, 0) end::bigint as lag_bytes, r.lag_seconds, r.commit_time,
       r.transactions_applied, r.rows_applied, r.bytes_applied,
       (select sum(t.rows_copied)::bigint from peergate.mirror_table_runtime t where t.mirror_id = d.id) as rows_copied,
       (select sum(t.bytes_copied)::bigint from peergate.mirror_table_runtime t where t.mirror_id = d.id) as bytes_copied,
       (select sum(t.copy_fraction * greatest(t.bytes_total, 1)) / sum(greatest(t.bytes_total, 1))
        from peergate.mirror_table_runtime t where t.mirror_id = d.id) as copy_fraction,
       r.error_sqlstate, r.error_message, r.error_detail, r.error_hint, r.error_at, r.attempt, r.retry_at,
       l.node_id, l.epoch, r.system_id, r.timeline, r.snapshot_lsn, r.copied_at, r.source_lsn_at, r.updated_at
from peergate.mirror_definitions d
join peergate.mirror_runtime r on r.mirror_id = d.id
left join peergate.mirror_leases l on l.mirror_id = d.id;
comment on view   peergate.mirror_status                is 'How each mirror stands, as the engine last wrote it: at least each second while it is busy.';
comment on column peergate.mirror_status.mirror         is 'The mirror''s name.';
comment on column peergate.mirror_status.state          is 'Where the mirror is.';
comment on column peergate.mirror_status.received_lsn   is 'All source WAL before this was read.';
comment on column peergate.mirror_status.applied_lsn    is 'All source WAL before this is durable on the target.';
comment on column peergate.mirror_status.flushed_lsn    is 'What was acknowledged to the slot; the source may remove WAL before it.';
comment on column peergate.mirror_status.source_lsn     is 'End of the source''s WAL when it was last asked.';
comment on column peergate.mirror_status.lag_bytes      is 'source_lsn - applied_lsn, in bytes.';
comment on column peergate.mirror_status.lag_seconds    is 'How long the oldest change that is not yet applied has waited; 0 when there is none.';
comment on column peergate.mirror_status.commit_time    is 'Commit time, on the source, of the last transaction applied.';
comment on column peergate.mirror_status.transactions_applied is 'Source transactions applied by streaming since the mirror was created.';
comment on column peergate.mirror_status.rows_applied   is 'Row changes applied by streaming since the mirror was created.';
comment on column peergate.mirror_status.bytes_applied  is 'Bytes of row changes applied by streaming since the mirror was created.';
comment on column peergate.mirror_status.rows_copied    is 'Rows copied.';
comment on column peergate.mirror_status.bytes_copied   is 'Bytes copied, in COPY''s format.';
comment on column peergate.mirror_status.copy_fraction  is 'Part of the copy that is done, from 0 to 1, by size; NULL before the tables are known.';
comment on column peergate.mirror_status.error_sqlstate is 'SQLSTATE of the last error; NULL when there is none since the mirror last ran well.';
comment on column peergate.mirror_status.error_message  is 'Message of the last error.';
comment on column peergate.mirror_status.error_detail   is 'Detail of the last error.';
comment on column peergate.mirror_status.error_hint     is 'What to do about the last error.';
comment on column peergate.mirror_status.error_at       is 'When the last error happened.';
comment on column peergate.mirror_status.attempt        is 'Failed attempts since the mirror last ran well.';
comment on column peergate.mirror_status.retry_at       is 'When the next attempt is due; NULL when none is.';
comment on column peergate.mirror_status.node_id        is 'The process that runs the mirror; NULL: none yet.';
comment on column peergate.mirror_status.epoch          is 'Counts the processes that have run the mirror.';
comment on column peergate.mirror_status.system_id      is 'System identifier of the source.';
comment on column peergate.mirror_status.timeline       is 'Timeline of the source when it was last seen.';
comment on column peergate.mirror_status.snapshot_lsn   is 'Consistent point of the slot: the copy holds everything before it.';
comment on column peergate.mirror_status.copied_at      is 'When the copy was complete on the target; NULL: not yet.';
comment on column peergate.mirror_status.source_lsn_at  is 'When source_lsn was asked for.';
comment on column peergate.mirror_status.updated_at     is 'When the engine last wrote this.';

create view peergate.mirror_tables as
select d.name as mirror, t.source_schema, t.source_name, t.target_schema, t.target_name, t.state, t.key_columns,
       t.rows_copied, t.bytes_copied, t.bytes_total, t.copy_fraction, t.rows_inserted, t.rows_updated, t.rows_deleted,
       t.truncates, t.warning, t.created_table, t.updated_at
from peergate.mirror_table_runtime t
join peergate.mirror_definitions d on d.id = t.mirror_id;
comment on view   peergate.mirror_tables               is 'How each table of each mirror stands, as the engine last wrote it.';
comment on column peergate.mirror_tables.mirror        is 'The mirror''s name.';
comment on column peergate.mirror_tables.source_schema is 'Schema of the table on the source.';
comment on column peergate.mirror_tables.source_name   is 'Name of the table on the source.';
comment on column peergate.mirror_tables.target_schema is 'Schema of the table on the target.';
comment on column peergate.mirror_tables.target_name   is 'Name of the table on the target.';
comment on column peergate.mirror_tables.state         is 'Where the table is: pending, copying, copied, indexing, catchup, live, blocked or removed.';
comment on column peergate.mirror_tables.key_columns   is 'Columns by which rows are found on the target; NULL: none, only inserts can be streamed.';
comment on column peergate.mirror_tables.rows_copied   is 'Rows written to the target by the copy.';
comment on column peergate.mirror_tables.bytes_copied  is 'Bytes written to the target by the copy, in COPY''s format.';
comment on column peergate.mirror_tables.bytes_total   is 'Size of the table on the source when its copy began, in bytes; NULL before that.';
comment on column peergate.mirror_tables.copy_fraction is 'Part of the table''s blocks that have been copied, from 0 to 1.';
comment on column peergate.mirror_tables.rows_inserted is 'Inserts streamed since the mirror was created.';
comment on column peergate.mirror_tables.rows_updated  is 'Updates streamed since the mirror was created.';
comment on column peergate.mirror_tables.rows_deleted  is 'Deletes streamed since the mirror was created.';
comment on column peergate.mirror_tables.truncates     is 'Truncates streamed since the mirror was created.';
comment on column peergate.mirror_tables.warning       is 'What a person should know about this table, such as that it has no key; NULL when there is nothing.';
comment on column peergate.mirror_tables.created_table is 'The mirror created the target table.';
comment on column peergate.mirror_tables.updated_at    is 'When the engine last wrote this.';
