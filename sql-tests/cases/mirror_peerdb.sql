-- A script for PeerDB, as it is; and what it does not do in silence here.
\c :shop
create table a (id int primary key, c int, d int, note text); insert into a values (1, 2, 3, 'one'), (2, 3, 4, 'two');
create table test (id int primary key); insert into test values (1);
\c :gate
\set QUIET off
CREATE PEER source FROM POSTGRES WITH (host = :'peer_host', port = :'peer_port', user = 'postgres', password = 'postgres', database = 'shop');
CREATE PEER target FROM POSTGRES WITH (host = :'peer_host', port = :'peer_port', user = 'postgres', password = 'postgres', database = 'dwh');
CREATE PEER IF NOT EXISTS target FROM POSTGRES WITH (host = :'peer_host', port = :'peer_port', user = 'postgres', password = 'postgres', database = 'dwh');
CREATE MIRROR test_mirror FROM source TO target WITH TABLE MAPPING (public.test:public.test) WITH (do_initial_copy = true);
CREATE MIRROR m FROM source TO target WITH TABLE MAPPING ({from: public.a, to: public.b, key: id, exclude: [c, d]}) WITH (
    do_initial_copy = true, max_batch_size = 10000, sync_interval = 5, system = 'PG', snapshot_max_parallel_workers = 2,
    snapshot_num_tables_in_parallel = 4, snapshot_num_rows_per_partition = 50000, snapshot_staging_path = '');
WAIT FOR MIRROR m;
WAIT FOR MIRROR test_mirror;
EXECUTE source($$SELECT count(*) FROM public.test$$);
EXECUTE target($$SELECT * FROM public.b ORDER BY id$$);
SELECT * FROM source.public.test;
PAUSE MIRROR test_mirror;
RESUME MIRROR test_mirror;
RESUME MIRROR IF EXISTS other;
CREATE MIRROR n FROM source TO target WITH TABLE MAPPING (public.test:public.t2) WITH (do_initial_copy = true, max_batch_sizes = 1);
CREATE MIRROR n FROM source TO target WITH TABLE MAPPING (public.test:public.t2) WITH (system = 'X');
CREATE MIRROR n FROM source TO target WITH TABLE MAPPING (public.test:public.t2) WITH (script = 'mine');
DROP PEER source;
DROP MIRROR test_mirror;
DROP MIRROR m;
DROP PEER source;
DROP MIRROR IF EXISTS m;
