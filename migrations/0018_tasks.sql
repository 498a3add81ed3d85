-- Why:   SHOW TASK tells one task's story; CANCEL TASK ends a task where that leaves something whole: what is not taken up yet is forgotten,
--        tables that are being added are taken out again, and a mirror that is being made rests. All of that is what the statements for it do,
--        so the engine only has to end the copy of a table that is no longer wanted.
-- Locks: none (new objects).        Undo: drop the routines of this file.

create function peergate.show_task(task_id bigint)
returns table (at timestamptz, state text, "done %" numeric, message text)
language plpgsql stable security definer set search_path = pg_catalog, peergate as $$
begin
    if not exists (select from peergate.tasks t where t.id = task_id) then
        perform peergate.fail('42704', format('task %s does not exist', task_id), null, 'SHOW TASKS lists all of them.', 'task');
    end if;
    return query
        select l.at, l.state, l.done, l.message
        from peergate.tasks t,
             lateral (select 0::bigint as n, t.created_at as at, 'pending' as state, 0.0 as done,
                             concat(t.kind, ' of mirror "', t.mirror, '"', ', tables ' || (select string_agg(peergate.table_text(j), ', ') from jsonb_array_elements(t.tables) j),
                                    ', for role "', t.created_by, '"') as message
                      union all
                      select k.id, k.at, null, null, k.message from peergate.task_log k where k.task_id = t.id
                      union all
                      select 9223372036854775807, coalesce(t.finished_at, clock_timestamp()), t.state, round((t.progress * 100)::numeric, 1),
                             coalesce(t.error_sqlstate || ': ', '') || coalesce(t.error_message, '')) l
        where t.id = show_task.task_id order by l.n;
end $$;
comment on function peergate.show_task is 'What SHOW TASK id shows: what was asked for, what happened since, and how it stands.';

-- What keeps a task from being canceled is said with what can be done instead.
create procedure peergate.cancel_task(task_id bigint, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    task     peergate.tasks;
    mirror   peergate.mirror_definitions;
    obstacle text;
    advice   text;
    chosen   jsonb;
    undone   jsonb;
begin
    -- The mirror is locked before the task, as by all statements about mirrors.
    select d.* into mirror from peergate.mirror_definitions d join peergate.tasks t on t.mirror_id = d.id where t.id = cancel_task.task_id for update of d;
    select t.* into task from peergate.tasks t where t.id = cancel_task.task_id for update;
    if not found then
        perform peergate.fail('42704', format('task %s does not exist', cancel_task.task_id), null, 'SHOW TASKS lists all of them.', 'task');
    end if;
    if task.state = 'canceled' then
        raise notice using errcode = '55000', message = format('task %s is already canceled', task.id);
        perform peergate.finish(nonce, 'CANCEL TASK');
        return;
    end if;
    if task.state in ('completed', 'failed') then
        perform peergate.fail('55000', format('task %s has %s', task.id, task.state), null, null, 'task');
    end if;
    chosen := mirror.selection;
    case task.kind
        when 'alter_mirror' then
            select jsonb_agg(g.given) into undone
            from jsonb_array_elements(task.tables) g (given)
            where not exists (select from peergate.mirror_table_runtime r where r.mirror_id = mirror.id and r.state = 'live'
                              and r.source_schema = g.given ->> 'schema' and r.source_name = g.given ->> 'name');
            if task.tables is null and task.taken_at is not null then
                obstacle := 'New tables of the source have been taken in already.';
                advice := format('ALTER MIRROR %I DROP TABLE takes them out again.', mirror.name);
            elsif exists (select from jsonb_array_elements(task.tables) g (given)
                          where case when chosen ? 'tables' then not exists (select from jsonb_array_elements(chosen -> 'tables') t where t -> 'from' = g.given)
                                     else coalesce(chosen -> 'except' @> jsonb_build_array(g.given), false) end) then
                obstacle := 'It takes tables out of the mirror.';
                advice := format('ALTER MIRROR %I ADD TABLE takes them in again.', mirror.name);
            end if;
        when 'resync_mirror' then
            if task.taken_at is not null then
                obstacle := 'The new copy has begun, and what the target holds follows the source no more.';
                advice := format('PAUSE MIRROR %I lets it rest.', mirror.name);
            end if;
        when 'pause_mirror' then
            obstacle := 'It is only the wait until nothing is written any more.';
            advice := format('Use RESUME MIRROR %I.', mirror.name);
        when 'resume_mirror' then
            obstacle := 'It is only the wait until the mirror runs.';
            advice := format('Use PAUSE MIRROR %I.', mirror.name);
        when 'drop_mirror' then
            obstacle := 'The mirror is gone; what it made on its peers is being removed.';
            advice := format('DROP MIRROR %I FORCE gives up what cannot be removed.', task.mirror);
        else
            null;
    end case;
    if obstacle is not null then
        perform peergate.fail('55000', format('task %s cannot be canceled', task.id), obstacle, advice, 'task');
    end if;
    update peergate.tasks t set state = 'canceled', finished_at = clock_timestamp() where t.id = task.id;
    insert into peergate.task_log (task_id, message) values (task.id, format('canceled by role "%s"', session_user));
    if task.kind = 'create_mirror' then
        if mirror.desired_state <> 'paused' then
            perform peergate.set_desired_state(mirror, 'paused');
        end if;
    elsif task.kind = 'alter_mirror' and undone is not null then
        if chosen ? 'tables' then
            chosen := jsonb_set(chosen, '{tables}', (select coalesce(jsonb_agg(t), '[]') from jsonb_array_elements(chosen -> 'tables') t where not undone @> jsonb_build_array(t -> 'from')));
        else
            chosen := chosen || jsonb_build_object('except', coalesce(chosen -> 'except', '[]') || undone);
        end if;
        update peergate.mirror_definitions d set selection = chosen where d.id = mirror.id;
        perform peergate.start_table_task('alter_mirror', mirror, undone, 'drops tables from');
    end if;
    perform pg_notify('peergate', '');
    perform peergate.finish(nonce, 'CANCEL TASK');
end $$;
comment on procedure peergate.cancel_task is 'CANCEL TASK.';

-- Procedures and functions are executable by everybody unless that is taken away.
revoke all on all routines in schema peergate from public;
