-- Why:   EXECUTE on a peer. The gateway runs the text on the peer and passes the rows on, but whether that may be now, in which
--        transaction and for whom is PostgreSQL's to say: in the statement's place the catalog gets a COPY FROM STDIN, waits in it until
--        the peer has answered, and fails in it when the peer failed. The one row of copy data that it gets is checked here.
-- Locks: none (new objects).        Undo: drop schema peergate_public cascade; drop the functions and triggers of this file.

-- What every role may touch, whatever it may do in schema peergate.
create schema peergate_public;
comment on schema peergate_public is 'Peergate: what the gateway''s rewritten statements use on behalf of any role.';
grant usage on schema peergate_public to public;

-- The role is not among the columns that may be named: it is always the one that runs the statement.
create table peergate_public.execution (
    peer  text not null,
    nonce text not null,
    role  text not null default current_user
);
comment on table  peergate_public.execution       is 'Where EXECUTE on a peer asks for permission. Always empty: its trigger keeps no row.';
comment on column peergate_public.execution.peer  is 'The peer''s name, in hexadecimal.';
comment on column peergate_public.execution.nonce is 'The session''s secret, so that nobody else''s notice is taken for a permission.';
comment on column peergate_public.execution.role  is 'Who asks.';
grant insert (peer, nonce) on peergate_public.execution to public;

create function peergate.peer_version(peer_id bigint) returns text language sql stable
security definer set search_path = pg_catalog, peergate as $$
    select md5(peergate.peer_document(peer_version.peer_id)::text)
$$;
comment on function peergate.peer_version is 'Another value when a peer''s options or secrets have changed: then sessions that are kept on it are opened anew.';

create function peergate.permit_execution() returns trigger language plpgsql
security definer set search_path = pg_catalog, peergate as $$
declare
    wanted text := convert_from(decode(new.peer, 'hex'), 'UTF8');
    peer   record;
begin
    select p.id, p.owner, peergate.is_uncommitted(p.xmin) as uncommitted into peer from peergate.peers p where p.name = wanted;
    if not found then
        perform peergate.fail('42704', format('peer "%s" does not exist', wanted), null, null, 'name');
    end if;
    if not peergate.may_use_peer(new.role, peer.id) then
        perform peergate.fail('42501', format('permission denied for peer "%s"', wanted), null,
            format('Role "%s" or a superuser can GRANT USAGE ON PEER "%s".', peer.owner, wanted), 'name');
    end if;
    if peer.uncommitted then
        perform peergate.fail('55000', format('peer "%s" was created or changed by this transaction', wanted),
            'A session on a peer cannot see what is not committed.', 'Commit first.', 'name');
    end if;
    if exists (select from pg_prepared_statements s where s.name = wanted and s.from_sql) then
        perform peergate.fail('42P05', format('"%s" is both a peer and a prepared statement', wanted), null,
            format('DEALLOCATE "%s", or write the prepared statement''s argument as an expression: (''…''::text).', wanted), 'name');
    end if;
    raise info using errcode = 'PGT02', message = format('%s:%s %s', new.nonce,
        (select s.setting from pg_settings s where s.name = 'statement_timeout'), peergate.peer_version(peer.id));
    return null;
end $$;
comment on function peergate.permit_execution is 'Lets an EXECUTE on a peer go on, or refuses it in the client''s own transaction.';

create trigger permit_execution before insert on peergate_public.execution
    for each row execute function peergate.permit_execution();

-- Gateways look for the names of peers in texts, and hear at once of new ones.
create function peergate.notify_gateways() returns trigger language plpgsql as $$
begin
    perform pg_notify('peergate', 'peers');
    return null;
end $$;
comment on function peergate.notify_gateways is 'Tells the gateways that the peers have changed when the transaction commits.';

create trigger notify_gateways after insert or update or delete on peergate.peers
    for each statement execute function peergate.notify_gateways();

-- Procedures and functions are executable by everybody unless that is taken away.
revoke all on all routines in schema peergate from public;
