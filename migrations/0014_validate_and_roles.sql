-- Why:   VALIDATE PEER gives what the gateway found as rows, so that it is a query like any other, in both protocols. The roles
--        peergate_admin, peergate_operator and peergate_reader are made and granted by the binary after each migration (catalog/src/roles.rs):
--        what is here only asks whether somebody is a member.
-- Locks: none (new objects).        Undo: drop the routines of this file; drop role peergate_admin, peergate_operator, peergate_reader.

-- A role that does not exist has no members.
create function peergate.is_member(role_name text, of_role text) returns boolean language sql stable as $$
    select exists (select from pg_catalog.pg_roles r, pg_catalog.pg_roles o
                   where r.rolname = role_name and o.rolname = of_role and pg_catalog.pg_has_role(r.oid, o.oid, 'usage'))
$$;
comment on function peergate.is_member is 'Whether a role is, or has the privileges of, another.';

create function peergate.may_validate_peer(role_name text, peer_id bigint) returns boolean language sql stable
security definer set search_path = pg_catalog, peergate as $$
    select peergate.owns_peer(role_name, peer_id) or peergate.may_use_peer(role_name, peer_id) or peergate.is_member(role_name, 'peergate_operator')
$$;
comment on function peergate.may_validate_peer is 'Whether a role may have a peer looked at: its owner, whoever may use it, and operators.';

-- report: an array of {"check", "status", "detail", "hint"}, which the gateway found; NULL when it saw no such peer.
create function peergate.validate_peer(peer_name text, report jsonb default null, validation jsonb default null)
returns table ("check" text, status text, detail text, hint text)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    peer peergate.peers;
begin
    select p.* into peer from peergate.peers p where p.name = peer_name;
    if not found then
        perform peergate.fail('42704', format('peer "%s" does not exist', peer_name), null,
            peergate.suggestion(peer_name, (select array_agg(p.name) from peergate.peers p)), 'name');
    end if;
    if not peergate.may_validate_peer(session_user, peer.id) then
        perform peergate.fail('42501', format('permission denied for peer "%s"', peer_name), null,
            format('GRANT USAGE ON PEER %I lets a role use it and have it looked at.', peer_name), 'name');
    end if;
    perform peergate.raise_finding(validation, 'options');
    if report is null then
        perform peergate.fail('55000', format('peer "%s" was created or renamed by this transaction', peer_name),
            'The gateway looks at peers as others see them.', 'Commit first, then validate.', 'name');
    end if;
    return query select r."check", r.status, r.detail, r.hint
                 from rows from (jsonb_to_recordset(report) as ("check" text, status text, detail text, hint text)) with ordinality r
                 order by r.ordinality;
end $$;
comment on function peergate.validate_peer is 'What VALIDATE PEER shows: one row for each check that the gateway made.';

-- Procedures and functions are executable by everybody unless that is taken away.
revoke all on all routines in schema peergate from public;
