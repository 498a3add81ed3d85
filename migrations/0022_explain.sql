-- Why:   EXPLAIN CREATE MIRROR and EXPLAIN ALTER MIRROR. The statement that is explained is run with the client's own privileges and undone,
--        so that its errors are the ones that it would have, and what the gateway has found out on the peers is given as rows or as JSON.
-- Locks: none (new objects).        Undo: drop the routines of this file.

create function peergate.rehearse(statement text) returns void language plpgsql set client_min_messages = warning as $$
begin
    begin
        execute statement;
        raise exception using errcode = 'PGT03', message = 'rehearsed';
    exception when sqlstate 'PGT03' then
        null;
    end;
end $$;
comment on function peergate.rehearse is 'Runs a statement about a mirror, and undoes it: only its errors stay.';

-- report: what the gateway found, {"rows": […], "plan": {…}}; NULL when it saw no such mirror.
create function peergate.check_explanation(statement text, report jsonb, validation jsonb) returns void language plpgsql as $$
begin
    perform peergate.rehearse(statement);
    perform peergate.raise_finding(validation, 'options');
    if report is null then
        perform peergate.fail('55000', 'a peer or the mirror was created or changed by this transaction',
            'The gateway looks at them as others see them.', 'Commit first, then explain.', 'name');
    end if;
end $$;
comment on function peergate.check_explanation is 'Raises what keeps a statement from being explained.';

create function peergate.explain_mirror(statement text, report jsonb default null, validation jsonb default null)
returns table (kind text, peer text, object text, action text, detail text, hint text) language plpgsql as $$
begin
    perform peergate.check_explanation(statement, report, validation);
    return query select r.kind, r.peer, r.object, r.action, r.detail, r.hint
                 from rows from (jsonb_to_recordset(report -> 'rows')
                                 as (kind text, peer text, object text, action text, detail text, hint text)) with ordinality r
                 order by r.ordinality;
end $$;
comment on function peergate.explain_mirror is 'What EXPLAIN of a statement about a mirror shows.';

create function peergate.explain_mirror_json(statement text, report jsonb default null, validation jsonb default null) returns json language plpgsql as $$
begin
    perform peergate.check_explanation(statement, report, validation);
    return jsonb_pretty(report -> 'plan')::json;
end $$;
comment on function peergate.explain_mirror_json is 'What EXPLAIN (FORMAT JSON) of a statement about a mirror shows.';

-- Procedures and functions are executable by everybody unless that is taken away.
revoke all on all routines in schema peergate from public;
