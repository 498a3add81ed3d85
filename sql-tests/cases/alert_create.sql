-- CREATE ALERT says who is told of what; a repetition changes nothing, OR REPLACE does, and secrets are never seen.
-- log: could not connect to peer
create peer shop from postgres with (user = 'u', validate = false);
create peer dwh from postgres with (user = 'u', validate = false);
create mirror orders from shop to dwh for all tables;
create alert lag on mirror orders when lag_seconds > 60 for '5 minutes' or lag_bytes >= '1GB' notify
    slack (url = 'https://hooks.slack.example/geheim'),
    webhook (url 'https://ops.example/h?token=geheim', authorization = 'Bearer geheim', timeout_seconds = 5),
    email (host = 'smtp.example', user = 'pg', password = 'geheim', from = 'pg@example.com', to = 'a@example.com, B <b@example.com>')
    with (repeat_interval = '1 hour');
create alert gone on all peers when unreachable_seconds > interval '1 minute' notify notify;
create alert "Wal" on peer shop when SLOT_WAL_BYTES > 10737418240 or unreachable_seconds != 0 notify notify (channel = 'ops'), slack (url_env = 'SLACK');
create alert state on all mirrors when state = blocked for interval '10' or state = 'resync_required' or errors > 3 or conflicts > 0 notify notify () with (notify_recovery = false);
show alerts;
\x
select on_kind, on_name, conditions, channels, options, enabled, firing, undelivered, owner from alerts where name = 'lag';
\x
select (select count(*) from alert_secrets) as sealed, (select string_agg(a::text, '') from alerts a) || (select string_agg(s::text, '') from alert_secrets s) ~ 'geheim' as seen;
-- The same again.
create alert if not exists gone on all peers when unreachable_seconds > interval '1 minute' notify notify;
create alert if not exists gone on all peers when unreachable_seconds > 90 notify notify;
create alert if not exists gone on all mirrors when lag_seconds > 60 notify slack (url = 'https://hooks.slack.example/geheim');
create alert gone on all peers when unreachable_seconds > 60 notify notify;
create or replace alert gone on all peers when unreachable_seconds > 90 notify notify;
create or replace alert gone on all peers when unreachable_seconds > 90 notify notify;
create or replace alert new on all peers when unreachable_seconds > 90 notify notify;
select name, conditions from alerts where name in ('gone', 'new') order by name;
-- A secret that is left out stays where it goes to the same place.
create temp table before as select option, sealed from alert_secrets;
create or replace alert lag on mirror orders when lag_seconds > 30 notify
    slack, webhook (timeout_seconds = 6),
    email (host = 'smtp.example', user = 'pg', from = 'pg@example.com', to = 'c@example.com');
select count(*) from alert_secrets natural join before;
create or replace alert lag on mirror orders when lag_seconds > 30 notify
    slack, webhook, email (host = 'smtp.evil', user = 'pg', from = 'pg@example.com', to = 'c@example.com');
create or replace alert lag on mirror orders when lag_seconds > 30 notify webhook (url = 'https://other.example/geheim');
select string_agg(option, ' ') as sealed from alert_secrets join alerts on id = alert_id where name = 'lag';
-- In a transaction, and nothing is left of it.
begin;
create alert t on all peers when unreachable_seconds > 90 notify notify;
drop alert lag, gone;
rollback;
select count(*) from alerts;
