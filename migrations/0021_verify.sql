-- Why:   both sides of a mirror are compared at one position while changes go on. A run is a task; what it finds is kept: counts for each
--        table, and the keys of rows that differ. The statement gives rows when the run is done, so it waits in a function; the
--        task must be there for the engine meanwhile, so the gateway makes it, once the function has said that it may.
--        And a task that is made is heard of: an importer that looked for a peer that was due and found none had updated no row, and the trigger
--        told everybody all the same, the importer itself too, without an end, and so fast that other notifications were lost among these.
-- Locks: ACCESS EXCLUSIVE on tasks, SHARE ROW EXCLUSIVE on peer_import_runs, briefly.
-- Undo:  drop the tables, views and routines of this file; put tasks_kind_check back; make notify_importers a trigger for each statement.

alter table peergate.tasks
    drop constraint tasks_kind_check,
    add constraint tasks_kind_check check (kind in
        ('create_mirror', 'alter_mirror', 'resync_mirror', 'pause_mirror', 'resume_mirror', 'drop_mirror', 'verify_mirror'));
comment on column peergate.tasks.kind is 'What is being done: create_mirror, alter_mirror, resync_mirror, pause_mirror, resume_mirror, drop_mirror or verify_mirror.';

create table peergate.verification_runs (
    task_id      bigint primary key references peergate.tasks (id) on delete cascade,
    mirror_id    bigint not null references peergate.mirror_definitions (id) on delete cascade,
    repair       boolean not null,
    waiter       bigint,
    lsn          pg_lsn,
    error_detail text,
    error_hint   text
);
create index verification_runs_mirror_id_idx on peergate.verification_runs (mirror_id);
create index verification_runs_waiter_idx on peergate.verification_runs (waiter);
comment on table  peergate.verification_runs              is 'Comparisons of both sides of a mirror, with their tasks; the last ten of each mirror are kept. Read them through the view verifications. Written by: VERIFY MIRROR, then the engine.';
comment on column peergate.verification_runs.task_id      is 'The run''s task.';
comment on column peergate.verification_runs.mirror_id    is 'The mirror.';
comment on column peergate.verification_runs.repair       is 'Rows that differ are mended.';
comment on column peergate.verification_runs.waiter       is 'The advisory lock that the waiting session holds: once it is gone nobody wants the result. NULL: the run does not depend on a session.';
comment on column peergate.verification_runs.lsn          is 'The source''s position at which both sides are compared. NULL before that is known.';
comment on column peergate.verification_runs.error_detail is 'Detail of the error that ended the run.';
comment on column peergate.verification_runs.error_hint   is 'What to do about the error that ended the run.';

create table peergate.verification_tables (
    task_id       bigint not null references peergate.verification_runs (task_id) on delete cascade,
    source_schema text not null,
    source_name   text not null,
    target_schema text not null,
    target_name   text not null,
    result        text not null constraint verification_tables_result_check check (result in ('equal', 'different', 'repaired', 'skipped')),
    lsn           pg_lsn,
    source_rows   bigint,
    target_rows   bigint,
    missing       bigint not null default 0,
    different     bigint not null default 0,
    extra         bigint not null default 0,
    repaired      bigint not null default 0,
    message       text,
    finished_at   timestamptz not null default clock_timestamp(),
    primary key (task_id, source_schema, source_name)
);
comment on table  peergate.verification_tables               is 'What the comparison of each table found. Read it through the view verifications. Written by: the engine.';
comment on column peergate.verification_tables.task_id       is 'The run''s task.';
comment on column peergate.verification_tables.source_schema is 'Schema of the table on the source.';
comment on column peergate.verification_tables.source_name   is 'Name of the table on the source.';
comment on column peergate.verification_tables.target_schema is 'Schema of the table on the target.';
comment on column peergate.verification_tables.target_name   is 'Name of the table on the target.';
comment on column peergate.verification_tables.result        is 'equal, different, repaired (it was different, and all of it was mended) or skipped (it could not be compared; message says why).';
comment on column peergate.verification_tables.lsn           is 'The source''s position at which both sides of the table were compared.';
comment on column peergate.verification_tables.source_rows   is 'Rows on the source; NULL when it was skipped.';
comment on column peergate.verification_tables.target_rows   is 'Rows on the target; NULL when it was skipped.';
comment on column peergate.verification_tables.missing       is 'Rows that the source has and the target lacks.';
comment on column peergate.verification_tables.different     is 'Rows that both sides have by their key, with other values.';
comment on column peergate.verification_tables.extra         is 'Rows that the target has and the source lacks.';
comment on column peergate.verification_tables.repaired      is 'Rows that were mended. Those that the stream had put right meanwhile are not among them.';
comment on column peergate.verification_tables.message       is 'Why the table was skipped, or why rows were not mended; NULL when there is nothing to say.';
comment on column peergate.verification_tables.finished_at   is 'When the table was done.';

create table peergate.verification_differences (
    id            bigint generated always as identity primary key,
    task_id       bigint not null references peergate.verification_runs (task_id) on delete cascade,
    source_schema text not null,
    source_name   text not null,
    kind          text not null constraint verification_differences_kind_check check (kind in ('missing', 'different', 'extra')),
    key           text not null,
    copies        bigint not null
);
create index verification_differences_task_id_idx on peergate.verification_differences (task_id, source_schema, source_name, id);
comment on table  peergate.verification_differences               is 'The rows that differed in a run: the first 10,000 of each table. Written by: the engine.';
comment on column peergate.verification_differences.id            is 'Orders the rows.';
comment on column peergate.verification_differences.task_id       is 'The run''s task.';
comment on column peergate.verification_differences.source_schema is 'Schema of the table on the source.';
comment on column peergate.verification_differences.source_name   is 'Name of the table on the source.';
comment on column peergate.verification_differences.kind          is 'missing on the target, different, or extra (missing on the source).';
comment on column peergate.verification_differences.key           is 'The row''s key, as (columns)=(values); of a table without key the row, the first 300 characters of it.';
comment on column peergate.verification_differences.copies        is 'How many rows it is about: more than one only where rows have no key.';

create view peergate.verifications as
select d.name as mirror, v.task_id, k.state, v.repair, t.source_schema, t.source_name, t.target_schema, t.target_name, t.result, t.lsn,
       t.source_rows, t.target_rows, t.missing, t.different, t.extra, t.repaired, t.message, k.created_by, k.created_at, t.finished_at,
       t.task_id = max(t.task_id) over (partition by v.mirror_id, t.source_schema, t.source_name) as is_last
from peergate.verification_tables t
join peergate.verification_runs v on v.task_id = t.task_id
join peergate.tasks k on k.id = v.task_id
join peergate.mirror_definitions d on d.id = v.mirror_id;
comment on view   peergate.verifications               is 'What VERIFY MIRROR found: one row for each table of the last ten runs of each mirror. WHERE is_last: how each table stands.';
comment on column peergate.verifications.mirror        is 'The mirror''s name.';
comment on column peergate.verifications.task_id       is 'The run''s task.';
comment on column peergate.verifications.state         is 'Where the run is: pending, running, completed, failed or canceled.';
comment on column peergate.verifications.repair        is 'Rows that differ are mended.';
comment on column peergate.verifications.source_schema is 'Schema of the table on the source.';
comment on column peergate.verifications.source_name   is 'Name of the table on the source.';
comment on column peergate.verifications.target_schema is 'Schema of the table on the target.';
comment on column peergate.verifications.target_name   is 'Name of the table on the target.';
comment on column peergate.verifications.result        is 'equal, different, repaired or skipped.';
comment on column peergate.verifications.lsn           is 'The source''s position at which both sides of the table were compared.';
comment on column peergate.verifications.source_rows   is 'Rows on the source; NULL when it was skipped.';
comment on column peergate.verifications.target_rows   is 'Rows on the target; NULL when it was skipped.';
comment on column peergate.verifications.missing       is 'Rows that the source has and the target lacks.';
comment on column peergate.verifications.different     is 'Rows that both sides have by their key, with other values.';
comment on column peergate.verifications.extra         is 'Rows that the target has and the source lacks.';
comment on column peergate.verifications.repaired      is 'Rows that were mended.';
comment on column peergate.verifications.message       is 'Why the table was skipped, or why rows were not mended.';
comment on column peergate.verifications.created_by    is 'Role that gave the statement.';
comment on column peergate.verifications.created_at    is 'When the statement was given.';
comment on column peergate.verifications.finished_at   is 'When the table was done.';
comment on column peergate.verifications.is_last       is 'There is no later result of the table.';

-- Checks that a mirror can be verified, and returns its id. Does not lock it: a verification changes nothing of what is wanted.
create function peergate.check_verifiable(mirror_name text, tables jsonb) returns bigint language plpgsql
security definer set search_path = pg_catalog, peergate as $$
declare
    mirror record;
    item   record;
    found_state text;
begin
    select d.id, d.name, d.desired_state, peergate.is_uncommitted(d.xmin) as uncommitted, peergate.option('mirror', d.options, 'mode') as mode,
           r.state, r.copied_at, r.error_sqlstate, r.error_message, r.error_detail, r.error_hint into mirror
    from peergate.mirror_definitions d join peergate.mirror_runtime r on r.mirror_id = d.id where d.name = mirror_name;
    if not found then
        perform peergate.fail('42704', format('mirror "%s" does not exist', mirror_name), null,
            peergate.suggestion(mirror_name, (select array_agg(d.name) from peergate.mirror_definitions d)), 'name');
    end if;
    if mirror.uncommitted then
        perform peergate.fail('55000', format('mirror "%s" was changed by this transaction and nothing happens to it before COMMIT', mirror_name),
            null, 'Commit first, then verify.', 'name');
    end if;
    if mirror.mode = 'copy_only' then
        perform peergate.fail('55000', format('mirror "%s" only copies', mirror_name),
            'Nothing tells at which position of the source its target is.', null, 'name');
    end if;
    if mirror.desired_state = 'paused' then
        perform peergate.fail('55000', format('mirror "%s" is paused', mirror_name), null, format('RESUME MIRROR %I lets it go on.', mirror_name), 'name');
    end if;
    if mirror.state in ('blocked', 'resync_required') then
        perform peergate.fail('55000', format('mirror "%s" is %s: %s', mirror_name, mirror.state, coalesce(mirror.error_message, 'no reason was recorded')),
            mirror.error_detail, mirror.error_hint, 'name');
    end if;
    if mirror.copied_at is null then
        perform peergate.fail('55000', format('mirror "%s" has not been copied yet', mirror_name), format('It is %s.', mirror.state),
            format('WAIT FOR MIRROR %I returns when the target has caught up.', mirror_name), 'name');
    end if;
    for item in select t.value as given, t.ordinality as n
                from jsonb_array_elements(check_verifiable.tables) with ordinality t order by t.ordinality loop
        select t.state into found_state from peergate.mirror_table_runtime t where t.mirror_id = mirror.id and t.state <> 'removed'
            and t.source_schema = item.given ->> 'schema' and t.source_name = item.given ->> 'name';
        if not found then
            perform peergate.fail('42P01', format('table "%s" is not part of mirror "%s"', peergate.table_text(item.given), mirror.name), null,
                peergate.suggestion(item.given ->> 'name', (select array_agg(t.source_name) from peergate.mirror_table_runtime t
                                                            where t.mirror_id = mirror.id and t.state <> 'removed')), 'table.' || item.n);
        end if;
        if found_state in ('pending', 'copying', 'indexing', 'blocked') then
            perform peergate.fail('55000', format('table "%s" of mirror "%s" is %s', peergate.table_text(item.given), mirror.name, found_state), null,
                case found_state when 'blocked' then format('SHOW MIRROR %I tells why.', mirror.name)
                                 else format('WAIT FOR MIRROR %I returns when it has been copied.', mirror.name) end, 'table.' || item.n);
        end if;
    end loop;
    return mirror.id;
end $$;
comment on function peergate.check_verifiable is 'The id of a mirror that can be verified; 42704, 42P01 or 55000 when it cannot.';

create function peergate.begin_verification(mirror_id bigint, tables jsonb, repair boolean, asked_by text, waiter bigint) returns bigint language plpgsql
security definer set search_path = pg_catalog, peergate as $$
declare
    task_id bigint := peergate.start_task('verify_mirror', begin_verification.mirror_id,
        (select d.name from peergate.mirror_definitions d where d.id = begin_verification.mirror_id));
begin
    update peergate.tasks t set tables = begin_verification.tables, created_by = asked_by where t.id = task_id;
    insert into peergate.verification_runs (task_id, mirror_id, repair, waiter)
    values (task_id, begin_verification.mirror_id, begin_verification.repair, begin_verification.waiter);
    delete from peergate.verification_runs r where r.task_id in
        (select o.task_id from peergate.verification_runs o join peergate.tasks k on k.id = o.task_id
         where o.mirror_id = begin_verification.mirror_id and k.state not in ('pending', 'running') order by o.task_id desc offset 10);
    perform pg_notify('peergate', 'verify:' || (select d.name from peergate.mirror_definitions d where d.id = begin_verification.mirror_id));
    return task_id;
end $$;
comment on function peergate.begin_verification is 'Makes the task of a verification; engines take it up when the transaction commits.';

create function peergate.refuse_verification(mirror_id bigint, asked_by text, waiter bigint, code text, message text) returns void language plpgsql
security definer set search_path = pg_catalog, peergate as $$
declare
    task_id bigint;
begin
    insert into peergate.tasks (kind, mirror_id, mirror, state, error_sqlstate, error_message, created_by, finished_at)
    select 'verify_mirror', d.id, d.name, 'failed', code, refuse_verification.message, asked_by, clock_timestamp()
    from peergate.mirror_definitions d where d.id = refuse_verification.mirror_id
    returning id into task_id;
    insert into peergate.verification_runs (task_id, mirror_id, repair, waiter)
    select task_id, refuse_verification.mirror_id, true, refuse_verification.waiter where task_id is not null;
end $$;
comment on function peergate.refuse_verification is 'Tells whoever waits for a verification that it cannot be.';

create procedure peergate.start_verification(mirror_name text, tables jsonb default null, repair boolean default false)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    task_id bigint := peergate.begin_verification(peergate.check_verifiable(mirror_name, tables), tables, repair, session_user::text, null);
begin
    raise notice using message = format('task %s verifies mirror "%s"', task_id, mirror_name),
        hint = 'The view verifications shows what it finds.';
end $$;
comment on procedure peergate.start_verification is 'Starts a verification that nobody waits for, in the transaction of the caller.';

-- What VERIFY MIRROR shows, one row per table.
create function peergate.show_verification(task bigint)
returns table ("table" text, target text, result text, source_rows bigint, target_rows bigint, missing bigint, different bigint, extra bigint, repaired bigint, detail text)
language sql stable security definer set search_path = pg_catalog, peergate as $$
    select format('%I.%I', t.source_schema, t.source_name), format('%I.%I', t.target_schema, t.target_name), t.result, t.source_rows, t.target_rows,
           t.missing, t.different, t.extra, t.repaired,
           nullif(concat_ws('; ', t.message,
               (select string_agg(k.named, '; ' order by k.kind)
                from (select d.kind, d.kind || ' ' || string_agg(d.key || case when d.copies > 1 then format(' (%s times)', d.copies) else '' end, ', ' order by d.id)
                                   filter (where d.n <= 5) || case when max(d.n) > 5 then ', …' else '' end as named
                      from (select f.*, row_number() over (partition by f.kind order by f.id) as n from peergate.verification_differences f
                            where f.task_id = t.task_id and f.source_schema = t.source_schema and f.source_name = t.source_name) d
                      where d.n <= 6
                      group by d.kind) k)), '')
    from peergate.verification_tables t where t.task_id = show_verification.task
    order by t.source_schema, t.source_name
$$;
comment on function peergate.show_verification is 'What a verification found, one row per table, with the first keys that differ.';

-- The function waits in the client's own session, so that cancel and statement_timeout are PostgreSQL's own. It cannot make the task itself:
-- nobody would see it before the statement is over. It says that it may be made, and the gateway makes it.
create function peergate.verify_mirror(mirror_name text, tables jsonb default null, repair boolean default false, nonce text default null)
returns table ("table" text, target text, result text, source_rows bigint, target_rows bigint, missing bigint, different bigint, extra bigint, repaired bigint, detail text)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    started constant timestamptz := clock_timestamp();
    waits   constant bigint := hashtextextended(gen_random_uuid()::text, 0);
    about   constant bigint := peergate.check_verifiable(mirror_name, tables);
    told    timestamptz := started;
    task    record;
    mirror  record;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        perform peergate.fail('25001', 'VERIFY MIRROR cannot run in a transaction that is not READ COMMITTED',
            'Such a transaction does not see what happens after it began.');
    end if;
    if nonce is null then
        perform peergate.fail('0A000', 'verify_mirror() works through the gateway only', null,
            'CALL peergate.start_verification(…) starts a verification, and the view verifications shows what it finds.');
    end if;
    -- Held until the statement ends, however it ends: the engine looks whether it is still there.
    perform pg_advisory_xact_lock(waits);
    raise info using errcode = 'PGT03', message = format('%s:%s %s %s', nonce, about, waits, encode(convert_to(session_user::text, 'UTF8'), 'hex'));
    loop
        perform pg_sleep(0.02);
        -- A server notices that a client has gone when it tells it something. The gateway keeps this for itself.
        if clock_timestamp() > told + interval '1 second' then
            raise info using errcode = 'PGT03', message = nonce || ':waits';
            told := clock_timestamp();
        end if;
        select k.id, k.state, k.error_sqlstate, k.error_message, v.error_detail, v.error_hint into task
        from peergate.verification_runs v join peergate.tasks k on k.id = v.task_id where v.waiter = waits;
        if task.state = 'completed' then
            exit;
        elsif task.state in ('failed', 'canceled') then
            perform peergate.fail(coalesce(task.error_sqlstate, '57014'),
                coalesce(task.error_message, format('verification of mirror "%s" was canceled', mirror_name)), task.error_detail, task.error_hint, 'name');
        elsif task.id is null and clock_timestamp() > started + interval '30 seconds' then
            perform peergate.fail('58000', 'the gateway did not start the verification', null, 'Try again; the gateway''s log tells why.');
        end if;
        select d.desired_state, r.state, r.error_message, r.error_sqlstate, r.error_detail, r.error_hint into mirror
        from peergate.mirror_definitions d join peergate.mirror_runtime r on r.mirror_id = d.id where d.id = about;
        if not found then
            perform peergate.fail('42704', format('mirror "%s" was dropped while it was verified', mirror_name), null, null, 'name');
        elsif mirror.desired_state = 'paused' then
            perform peergate.fail('55000', format('mirror "%s" was paused while it was verified', mirror_name), null, null, 'name');
        elsif mirror.state in ('blocked', 'resync_required') then
            perform peergate.fail(coalesce(mirror.error_sqlstate, '55000'), format('mirror "%s" is %s: %s', mirror_name, mirror.state,
                coalesce(mirror.error_message, 'no reason was recorded')), mirror.error_detail, mirror.error_hint, 'name');
        end if;
    end loop;
    return query select * from peergate.show_verification(task.id);
end $$;
comment on function peergate.verify_mirror is 'VERIFY MIRROR: waits for the verification that the gateway starts, and shows what it found.';

drop trigger notify_importers on peergate.peer_import_runs;
create trigger notify_importers after insert or update of state on peergate.peer_import_runs
    for each row execute function peergate.notify_importers();

-- Procedures and functions are executable by everybody unless that is taken away.
revoke all on all routines in schema peergate from public;
