-- Why:   a peer is a named external database. Options are plain columns and jsonb that anybody may read who may read the
--        catalog; secrets are sealed by the gateway and kept apart, so that no query and no dump shows them.
-- Locks: none (new objects).        Undo: drop table peergate.peer_secrets, peergate.peers.

create table peergate.peers (
    id         bigint generated always as identity primary key,
    name       text not null constraint peers_name_key unique
                    constraint peers_name_check check (name <> '' and octet_length(name) <= 63),
    type       text not null default 'postgres' constraint peers_type_check check (type in ('postgres')),
    options    jsonb not null default '{}',
    owner      text not null default session_user,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now()
);
comment on table  peergate.peers            is 'The external databases that mirrors read from and write to. Written by: CREATE PEER, DROP PEER and plain DML.';
comment on column peergate.peers.id         is 'Identifies the peer for ever, whatever its name becomes.';
comment on column peergate.peers.name       is 'The peer''s name, unique, at most 63 bytes.';
comment on column peergate.peers.type       is 'The kind of database: postgres.';
comment on column peergate.peers.options    is 'Connection options by name, as peergate.settings lists them for scope peer; never a secret.';
comment on column peergate.peers.owner      is 'Role that created the peer.';
comment on column peergate.peers.created_at is 'When the peer was created.';
comment on column peergate.peers.updated_at is 'When the peer''s name or options last changed.';

create table peergate.peer_secrets (
    peer_id bigint not null references peergate.peers (id) on delete cascade,
    option  text not null,
    sealed  text not null constraint peer_secrets_sealed_check check (sealed ~ '^v1\.[0-9a-f]{8}\.[A-Za-z0-9+/=_-]+$'),
    key_id  text generated always as (split_part(sealed, '.', 2)) stored,
    primary key (peer_id, option)
);
comment on table  peergate.peer_secrets         is 'Sealed secrets of peers. Not readable by ordinary roles, and of no use without the key. Written by: CREATE PEER, peergate rotate-key.';
comment on column peergate.peer_secrets.peer_id is 'The peer.';
comment on column peergate.peer_secrets.option  is 'The option whose value is sealed, such as password.';
comment on column peergate.peer_secrets.sealed  is 'Version, key id and ciphertext (XChaCha20-Poly1305), bound to the host and port that the secret may be sent to.';
comment on column peergate.peer_secrets.key_id  is 'The key that seals it: the first 8 hexadecimal digits of the key''s SHA-256.';

create function peergate.check_peer() returns trigger language plpgsql security definer set search_path = pg_catalog, peergate as $$
begin
    if new.name in ('peergate', 'peergate_admin') or exists (select from pg_namespace where nspname = new.name) then
        perform peergate.fail('42P06', format('peer name "%s" is the name of a schema', new.name),
            'A peer''s tables are found under its name.', 'Choose another name.', 'name');
    end if;
    new.options := peergate.check_options('peer', new.options);
    if not new.options ? 'user' then
        perform peergate.fail('42601', format('peer "%s" needs the option "user"', new.name), null,
            'Add user = ''…'' to the options.', 'options');
    end if;
    new.updated_at := now();
    return new;
end $$;
comment on function peergate.check_peer is 'Holds plain DML on peers to the rules of CREATE PEER.';

create trigger check_peer before insert or update of name, type, options on peergate.peers
    for each row execute function peergate.check_peer();

create function peergate.refuse_truncate() returns trigger language plpgsql as $$
begin
    perform peergate.fail('0A000', format('cannot truncate %s', tg_table_name),
        'What was made on the peers would be left behind.', 'Use DELETE or DROP.');
end $$;
comment on function peergate.refuse_truncate is 'TRUNCATE would skip the row triggers that keep DELETE as safe as DROP.';

create trigger refuse_truncate before truncate on peergate.peers
    for each statement execute function peergate.refuse_truncate();

create function peergate.notify_engine() returns trigger language plpgsql as $$
begin
    perform pg_notify('peergate', '');
    return null;
end $$;
comment on function peergate.notify_engine is 'Wakes the engines when the transaction commits. A lost notification costs seconds: they also poll.';

create trigger notify_engine after update on peergate.peers
    for each statement execute function peergate.notify_engine();

-- validation is what the gateway found when it connected: NULL when it did not try, {} when all is well, else
-- {"message": …, "detail": …, "hint": …, "sqlstate": …}. It is looked at after everything that needs no connection.
create procedure peergate.create_peer(peer_name text, peer_type text, options jsonb default '{}', secrets jsonb default '{}',
    if_not_exists boolean default false, validation jsonb default null, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    existing peergate.peers;
    checked  jsonb;
    id       bigint;
begin
    if lower(peer_type) <> 'postgres' then
        perform peergate.fail('0A000', format('peer type "%s" is not supported', peer_type), 'Supported types are: POSTGRES.',
            peergate.suggestion(peer_type, array['postgres']), 'type');
    end if;
    select p.* into existing from peergate.peers p where p.name = peer_name;
    if found then
        if not if_not_exists then
            perform peergate.fail('42710', format('peer "%s" already exists', peer_name), null, null, 'name');
        end if;
        raise notice using errcode = '42710', message = format('peer "%s" already exists, skipping', peer_name);
        checked := peergate.check_options('peer', options) - 'validate';
        if checked is distinct from existing.options then
            raise notice 'the existing peer "%" has different options, which were not changed', peer_name;
        end if;
    else
        if validation ? 'message' and validation ->> 'stage' = 'options' then
            perform peergate.fail(validation ->> 'sqlstate', validation ->> 'message', validation ->> 'detail', validation ->> 'hint', validation ->> 'at');
        end if;
        insert into peergate.peers (name, type, options, owner)
        values (peer_name, 'postgres', options - 'validate', session_user)
        on conflict (name) do nothing
        returning peers.id into id;
        if id is null then
            perform peergate.fail('42710', format('peer "%s" already exists', peer_name), null, null, 'name');
        end if;
        perform peergate.check_options('peer', options);
        insert into peergate.peer_secrets (peer_id, option, sealed)
        select id, s.key, s.value from jsonb_each_text(secrets) s;
        if validation ? 'message' then
            perform peergate.fail(validation ->> 'sqlstate', validation ->> 'message', validation ->> 'detail', validation ->> 'hint',
                coalesce(validation ->> 'at', 'name'));
        end if;
    end if;
    perform peergate.finish(nonce, 'CREATE PEER');
end $$;
comment on procedure peergate.create_peer is 'CREATE PEER. secrets are sealed values by option name; validation is what the gateway found when it connected.';
