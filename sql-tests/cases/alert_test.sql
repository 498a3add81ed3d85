-- TEST ALERT tries the channels; WAIT FOR ALERT says what came of it, and SHOW ALERT all that was told.
-- log: could not connect to peer
-- log: alert not delivered
create peer shop from postgres with (host = '127.0.0.1', port = 1, user = 'u', validate = false);
create peer dwh from postgres with (host = '127.0.0.1', port = 1, user = 'u', validate = false);
create mirror orders from shop to dwh for all tables;
create alert a on mirror orders when state = 'paused' notify notify;
test alert a;
wait for alert a timeout '50 s';
create alert b on mirror orders when errors > 100000 notify notify, webhook (url = 'http://127.0.0.1:1/geheim');
test alert b;
wait for alert b timeout '50 s';
begin;
test alert b;
wait for alert b;
rollback;
begin isolation level serializable;
wait for alert b;
rollback;
alter alert b disable;
test alert b;
-- It fires, and is over: told once each.
pause mirror orders;
do $$ begin while not exists (select from alert_events where kind = 'fired') loop perform pg_sleep(0.1); end loop; end $$;
wait for alert a timeout '50 s';
do $$ begin while exists (select from alert_deliveries where state = 'pending') loop perform pg_sleep(0.1); end loop; end $$;
show alerts;
show alert b \g (format=unaligned tuples_only) | sed 's/^[^|]*|/AT|/'
drop mirror orders;
select kind, alert, subject, condition, value, message, incident_id = min(id) filter (where kind = 'fired') over () as same from alert_events where alert = 'a' order by id;
select e.kind, d.kind as channel, d.state, d.attempt from alert_events e join alert_deliveries d on d.event_id = e.id where e.alert = 'a' order by d.id;
