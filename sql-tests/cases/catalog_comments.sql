-- Every relation, column and routine of the catalog explains itself, and is where it is promised to be.
show search_path;
select c.relname, c.relkind from pg_class c
where c.relnamespace = 'peergate'::regnamespace and c.relkind in ('r', 'v', 'm', 'f', 'p') and obj_description(c.oid, 'pg_class') is null;
select c.relname, a.attname from pg_class c join pg_attribute a on a.attrelid = c.oid
where c.relnamespace = 'peergate'::regnamespace and c.relkind in ('r', 'v', 'm', 'f', 'p')
  and a.attnum > 0 and not a.attisdropped and col_description(c.oid, a.attnum) is null;
select p.oid::regprocedure from pg_proc p where p.pronamespace = 'peergate'::regnamespace and obj_description(p.oid, 'pg_proc') is null;
select name from unnest(array['peers', 'mirrors', 'mirror_tables', 'mirror_status', 'tasks', 'task_log', 'mirror_events', 'nodes', 'settings']) name
where to_regclass(name) is null;
select id, name, type from peers;
select name, state from mirrors;
