-- Every way to say which tables, as the catalog stores it.
create peer shop from postgres with (host = :'peer_host', port = :peer_port, user = 'postgres', database = 'shop');
create peer dwh from postgres with (host = :'peer_host', port = :peer_port, user = 'postgres', database = 'dwh');
begin;
create mirror a from shop to dwh for all tables;
create mirror b from shop to dwh for all tables except (t, s."T") with (mode = copy_only, batch_bytes_max = '64MB', sync_interval = 2);
create mirror c from shop to dwh for tables in schema public, sales to archive except (sales.log);
create mirror d from shop to dwh for table t, s.t (id, "Name") to u, "Odd.Schema"."Odd.Table" to x.y;
create mirror e from shop to dwh with table mapping (public.t:public.u, {from: v, to: w, exclude: [secret, "Other",]})
    with (do_initial_copy = true, max_batch_size = 1000, snapshot_max_parallel_workers = 2);
create mirror f from shop to dwh with schema mapping (public:copy, sales:sales);
create mirror if not exists f from shop to dwh with schema mapping (public:copy, sales:sales);
create mirror if not exists f from shop to dwh for all tables;
create mirror g from shop to dwh for table t except (secret) where (id > 10 and "Name" <> ')' -- not all
    ) to u, v (id) where (id % 2 = 0);
select name, jsonb_pretty(selection) as selection, options from mirrors order by name;
show mirrors;
show mirror d;
show tasks \g (format=unaligned tuples_only) | cut -d '|' -f 1-5
\set QUIET off
pause mirror a;
pause mirror a;
resume mirror if exists a;
pause mirror if exists nix;
drop mirror a, b keep target metadata;
drop mirror if exists a;
rollback;
