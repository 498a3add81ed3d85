-- One round of load on the odd tables; the demo repeats it. Each transaction is seen on the target as a whole or not at all.
begin;
insert into odd.value (words, number, moment, day, numbers, grid, document, bytes, mood, share, place, weather)
select words || E' \\ "again"\n', number, moment, day, numbers, grid, jsonb_build_object('was', document), bytes, mood, share, place, weather
from odd.value order by random() limit 3;
insert into odd.journal (line) values ('first'), (null), (E'a\ttab');
commit;
update odd.value set number = case when number between 0 and 1000 then number + 0.01 else number end, mood = 'sad', numbers = numbers || null
where id in (select id from odd.value order by random() limit 5);
update odd.value set words = null, document = null, place = null where id in (select id from odd.value where id > 7 order by random() limit 1);
-- The big value stays as it is; now and then it changes too.
update odd.article set views = views + 1, title = 'article ' || id || ', seen ' || views + 1 where id in (select id from odd.article order by random() limit 2);
update odd.article set body = reverse(body), views = views + 1 where views % 40 = 39;
begin;
-- Keys change, also in a circle within one transaction.
update odd."Mixed ""Case"" Täble" set "select" = -"select" where "Key" in ('k1', 'k2', 'k3');
update odd."Mixed ""Case"" Täble" set "Key" = 'x' || "Key" where "select" = 10;
update odd."Mixed ""Case"" Täble" set "Key" = substr("Key", 2) where "Key" = 'xk10';
delete from odd."Mixed ""Case"" Täble" where "Key" = 'passing';
insert into odd."Mixed ""Case"" Täble" values ('passing', 0, null);
commit;
update odd.wide set c150 = coalesce(c150, 0) + 1, c2 = id where id % 20 = (random() * 19)::int;
begin;
do $$ begin if (select count(*) from odd.basket) > 400 then truncate odd.basket; end if; end $$;
insert into odd.basket (item) select 'item ' || n from generate_series(1, 5) n;
delete from odd.basket where id in (select id from odd.basket order by random() limit 3);
savepoint doubt;
delete from odd.basket;
rollback to savepoint doubt;
commit;
-- What is rolled back is never seen.
begin;
insert into odd.journal (line) values ('never');
update odd.article set views = -1;
rollback;
delete from odd.value where id > 40 and id in (select id from odd.value order by random() limit 2);
