-- Why:   a client can connect to a peer by its name, and works there with the credentials that the catalog holds. Who may do that is
--        the owner's to say: GRANT USAGE ON PEER. A table of our own, since PostgreSQL lets nobody keep privileges for objects that
--        it does not know; roles are stored by oid, so that a renamed role keeps what it has.
-- Locks: none (new objects).        Undo: drop the objects of this file.

create table peergate.peer_privileges (
    peer_id    bigint not null references peergate.peers (id) on delete cascade,
    grantee    regrole not null,
    grantor    regrole not null,
    granted_at timestamptz not null default now(),
    primary key (peer_id, grantee)
);
comment on table  peergate.peer_privileges            is 'Who may connect to peers by their names, beside owners and superusers. Written by: GRANT and REVOKE USAGE ON PEER.';
comment on column peergate.peer_privileges.peer_id    is 'The peer.';
comment on column peergate.peer_privileges.grantee    is 'The role that has USAGE, and with it its members; - means PUBLIC. A number is a role that was dropped.';
comment on column peergate.peer_privileges.grantor    is 'The role that granted it.';
comment on column peergate.peer_privileges.granted_at is 'When it was granted.';

-- A role that does not exist may nothing; that is no error, since it is asked before anybody has logged in.
create function peergate.may_use_peer(role_name text, peer_id bigint) returns boolean language sql stable
security definer set search_path = pg_catalog, peergate as $$
    select exists (
        select from pg_roles r
        join peergate.peers p on p.id = may_use_peer.peer_id
        where r.rolname = role_name
          and (r.rolsuper
               or exists (select from pg_roles o where o.rolname = p.owner and pg_has_role(r.oid, o.oid, 'usage'))
               or exists (select from peergate.peer_privileges v left join pg_roles g on g.oid = v.grantee
                          where v.peer_id = p.id and (v.grantee = 0 or g.oid is not null and pg_has_role(r.oid, g.oid, 'usage')))))
$$;
comment on function peergate.may_use_peer is 'Whether a role may connect to a peer: a superuser, a member of its owner, or one that has USAGE.';

-- The peers of a GRANT or REVOKE, in order, locked; the session's role must own them.
create function peergate.peers_to_grant(names text[]) returns bigint[] language plpgsql
security definer set search_path = pg_catalog, peergate as $$
declare
    peer peergate.peers;
    ids  bigint[] := '{}';
begin
    for n in 1 .. cardinality(names) loop
        select p.* into peer from peergate.peers p where p.name = names[n] for key share;
        if not found then
            perform peergate.fail('42704', format('peer "%s" does not exist', names[n]), null,
                peergate.suggestion(names[n], (select array_agg(p.name) from peergate.peers p)), 'name.' || n);
        end if;
        if not exists (select from pg_roles r where r.rolname = session_user
                       and (r.rolsuper or exists (select from pg_roles o where o.rolname = peer.owner and pg_has_role(r.oid, o.oid, 'usage')))) then
            perform peergate.fail('42501', format('must be owner of peer "%s"', names[n]), null, null, 'name.' || n);
        end if;
        ids := ids || peer.id;
    end loop;
    return ids;
end $$;
comment on function peergate.peers_to_grant is 'The numbers of the peers that GRANT and REVOKE name; an error for one that is not there or not owned.';

create function peergate.grantees(names text[]) returns regrole[] language plpgsql stable as $$
declare
    role  oid;
    roles regrole[] := '{}';
begin
    for n in 1 .. cardinality(names) loop
        select r.oid into role from pg_catalog.pg_roles r where r.rolname = names[n];
        if not found and names[n] <> 'public' then
            perform peergate.fail('42704', format('role "%s" does not exist', names[n]), null, null, 'role.' || n);
        end if;
        roles := roles || coalesce(role, 0)::regrole;
    end loop;
    return roles;
end $$;
comment on function peergate.grantees is 'The roles of those names; public is PUBLIC.';

create procedure peergate.grant_peer(names text[], roles text[], nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    ids   bigint[] := peergate.peers_to_grant(names);
    given regrole[] := peergate.grantees(roles);
begin
    insert into peergate.peer_privileges (peer_id, grantee, grantor)
    select distinct i, r, session_user::regrole from unnest(ids) i, unnest(given) r
    on conflict do nothing;
    perform peergate.finish(nonce, 'GRANT');
end $$;
comment on procedure peergate.grant_peer is 'GRANT USAGE ON PEER.';

create procedure peergate.revoke_peer(names text[], roles text[], nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    ids   bigint[] := peergate.peers_to_grant(names);
    taken regrole[] := peergate.grantees(roles);
begin
    delete from peergate.peer_privileges v
    where v.peer_id = any (ids)
      and (v.grantee = any (taken) or v.grantee <> 0 and not exists (select from pg_roles g where g.oid = v.grantee));
    perform peergate.finish(nonce, 'REVOKE');
end $$;
comment on procedure peergate.revoke_peer is 'REVOKE USAGE ON PEER. What roles had that were dropped goes too.';

-- Procedures and functions are executable by everybody unless that is taken away.
revoke all on all routines in schema peergate from public;
