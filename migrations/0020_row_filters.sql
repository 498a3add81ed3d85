-- Row filters, and ALTER MIRROR … ALTER TABLE.

comment on column peergate.mirror_definitions.selection is 'Which tables: {"all": true}, {"schemas": [{"from", "to"}]} or {"tables": [{"from": {"schema", "name"}, "to": {…}, "columns", "exclude", "where"}]}, with "except" for the first two.';

create procedure peergate.alter_mirror_table(mirror_name text, item jsonb, nonce text default null)
language plpgsql security definer set search_path = pg_catalog, peergate as $$
declare
    mirror  peergate.mirror_definitions := peergate.find_mirror(mirror_name, false);
    named   text := peergate.table_text(item -> 'from');
    present jsonb;
begin
    perform peergate.check_alterable(mirror);
    if not mirror.selection ? 'tables' then
        perform peergate.fail('0A000', format('mirror "%s" takes whole tables by their own names', mirror.name),
            'It is one of all tables, or of schemas.', 'Create a mirror FOR TABLE for this one.', 'table.1');
    end if;
    select t into present from jsonb_array_elements(mirror.selection -> 'tables') t where t -> 'from' = item -> 'from';
    if present is null then
        perform peergate.fail('42P01', format('table "%s" is not part of mirror "%s"', named, mirror.name), null,
            peergate.suggestion(item -> 'from' ->> 'name', (select array_agg(t -> 'from' ->> 'name') from jsonb_array_elements(mirror.selection -> 'tables') t)),
            'table.1');
    end if;
    if present = item then
        raise notice using errcode = '42710', message = format('table "%s" of mirror "%s" is that already, skipping', named, mirror.name);
    else
        if present -> 'to' <> item -> 'to' then
            perform peergate.fail('0A000', format('table "%s" goes to "%s", and that cannot be changed', named, peergate.table_text(present -> 'to')), null,
                'Drop it from the mirror, wait for that, and add it again.', 'table.1');
        end if;
        update peergate.mirror_definitions d
        set selection = jsonb_set(d.selection, '{tables}', (select jsonb_agg(case when t = present then item else t end order by t_ordinality)
                                                            from jsonb_array_elements(d.selection -> 'tables') with ordinality x(t, t_ordinality)))
        where d.id = mirror.id;
        perform peergate.start_table_task('resync_mirror', mirror, jsonb_build_array(item -> 'from'), 'changes and resyncs a table of');
    end if;
    perform peergate.finish(nonce, 'ALTER MIRROR');
end $$;
comment on procedure peergate.alter_mirror_table is 'ALTER MIRROR … ALTER TABLE: the table is copied again, as it is to be from now on.';
