-- Why:   what every later file needs: one way to raise an error that names the part of the statement at
--        fault, one way to hand a command tag to the gateway, and suggestions for mistyped words.
-- Locks: none (new objects).        Undo: drop schema peergate cascade.

comment on schema peergate is 'Peergate''s catalog: what was asked for (peers, mirrors) and what is so (mirror_status, tasks, mirror_events). Written by SQL and by the mirror engine.';

-- A session that has not set its own search_path finds `peers` and `mirrors` without a prefix. A database that
-- has its own setting keeps it. For a role named peergate, "$user" would put our schema first, and its tables in it.
do $$
begin
    if not exists (select from pg_db_role_setting s, unnest(s.setconfig) c
                   where s.setdatabase = (select oid from pg_database where datname = current_database())
                     and s.setrole = 0 and c like 'search_path=%') then
        execute format('alter database %I set search_path = "$user", public, peergate', current_database());
    end if;
    if exists (select from pg_roles where rolname = 'peergate') then
        execute format('alter role peergate in database %I set search_path = public, peergate', current_database());
    end if;
exception when insufficient_privilege then
    raise warning 'search_path of database % was not set: statements need the prefix peergate', current_database();
end $$;

-- `at` names the part of the statement that is at fault ('source', 'option.host', 'table.2'); it travels in the error's
-- column field, and the gateway turns it into a position. RAISE takes no NULL options, hence the eight of them.
create function peergate.fail(code text, message text, detail text default null, hint text default null, at text default null)
returns void language plpgsql as $$
begin
    case
        when detail is null and hint is null and at is null then raise exception using errcode = code, message = message;
        when detail is null and hint is null then raise exception using errcode = code, message = message, column = at;
        when detail is null and at is null then raise exception using errcode = code, message = message, hint = hint;
        when hint is null and at is null then raise exception using errcode = code, message = message, detail = detail;
        when detail is null then raise exception using errcode = code, message = message, hint = hint, column = at;
        when hint is null then raise exception using errcode = code, message = message, detail = detail, column = at;
        when at is null then raise exception using errcode = code, message = message, detail = detail, hint = hint;
        else raise exception using errcode = code, message = message, detail = detail, hint = hint, column = at;
    end case;
end $$;
comment on function peergate.fail is 'Raises an error with the given SQLSTATE, message, DETAIL, HINT and part at fault.';

create procedure peergate.raise_error(code text, message text, detail text default null, hint text default null, at text default null)
language plpgsql as $$
begin
    perform peergate.fail(code, message, detail, hint, at);
end $$;
comment on procedure peergate.raise_error is 'What the gateway calls in place of a statement that must fail, so that it fails inside the client''s own transaction.';

-- INFO reaches the client whatever client_min_messages says. The gateway swallows this one and gives the statement its
-- own command tag; nonce is the session's secret, so that nobody else's notice is taken for ours.
create function peergate.finish(nonce text, tag text) returns void language plpgsql as $$
begin
    if nonce is not null then
        raise info using errcode = 'PGT01', message = nonce || ':' || tag;
    end if;
end $$;
comment on function peergate.finish is 'Tells the gateway the command tag of the statement that it rewrote into this call.';

-- An identifier in a rewritten statement is a string, which Postgres would not cut.
create function peergate.truncate_identifier(given text) returns text language plpgsql as $$
begin
    raise notice using errcode = '42622', message = format('identifier "%s" will be truncated to "%s"', given, given::name);
    return given::name::text;
end $$;
comment on function peergate.truncate_identifier is 'Cuts a name that is too long for an identifier, and says so as Postgres does.';

create function peergate.edit_distance(a text, b text) returns integer language plpgsql immutable strict as $$
declare
    previous integer[] := (select array_agg(i order by i) from generate_series(0, length(b)) i);
    current  integer[];
begin
    for i in 1 .. length(a) loop
        current := array[i];
        for j in 1 .. length(b) loop
            current := current || least(previous[j + 1] + 1, current[j] + 1,
                                        previous[j] + (substr(a, i, 1) <> substr(b, j, 1))::integer);
        end loop;
        previous := current;
    end loop;
    return previous[length(b) + 1];
end $$;
comment on function peergate.edit_distance is 'Levenshtein distance, for suggestions.';

create function peergate.suggestion(word text, candidates text[]) returns text language sql immutable as $$
    select format('Did you mean "%s"?', c)
    from unnest(candidates) c
    where peergate.edit_distance(lower(word), c) <= greatest(2, length(c) / 3)
    order by peergate.edit_distance(lower(word), c), c
    limit 1
$$;
comment on function peergate.suggestion is 'A hint naming the candidate nearest to word, or NULL when none is near.';
