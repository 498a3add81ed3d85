-- ALTER ALERT changes what it names; plain DML does the same; an alert goes with its mirror or peer.
-- log: could not connect to peer
create peer shop from postgres with (user = 'u', validate = false);
create peer dwh from postgres with (user = 'u', validate = false);
create mirror orders from shop to dwh for all tables;
create alert a on mirror orders when lag_seconds > 60 notify notify with (repeat_interval = 0);
alter alert a set (repeat_interval = '2h', notify_recovery = false);
alter alert a reset (repeat_interval);
select options from alerts;
alter alert a reset (repeat_intervall);
alter alert a set (repeat_intervall = 1);
alter alert a on all mirrors;
alter alert a when state = 'blocked' notify notify (channel = ops), slack (url = 'https://h/geheim');
alter alert a on peer shop;
alter alert a on peer shop when unreachable_seconds > 5;
alter alert a notify webhook;
show alerts;
alter alert a disable;
alter alert a disable;
show alerts;
alter alert a enable;
alter alert a rename to b;
create alert c on mirror orders when errors > 0 notify notify;
alter alert b rename to c;
comment on alert b is 'wakes the one on call';
comment on alert c is 'x';
comment on alert c is null;
select name, comment from alerts order by name;
-- Plain DML.
\set SHOW_CONTEXT never
insert into alerts (name, on_kind, on_name, conditions, channels) values ('d', 'mirror', 'orders', '[{"metric": "lag_bytes", "op": ">", "value": "1MB", "for": 90}]', '[{"channel": "notify"}]');
insert into alerts (name, conditions, channels) values ('d', '[{"metric": "errors", "op": ">", "value": 0}]', '[{"channel": "notify"}]');
insert into alerts (name, conditions, channels) values ('e', '[]', '[{"channel": "notify"}]');
insert into alerts (name, conditions, channels) values ('e', '[{"metric": "errors", "op": ">", "value": 0}]', '{}');
insert into alerts (name, conditions, channels) values ('e', '[{"metric": "errors", "op": ">", "value": 0}]', '[{"channel": "slack", "options": {"url": "https://h/geheim"}}]');
update alerts set enabled = false, options = '{"repeat_interval": "60"}', comment = 'by hand', name = 'f' where name = 'd';
update alerts set on_name = null, conditions = '[{"metric": "state", "op": "!=", "value": "running"}]' where name = 'f';
update alerts set owner = 'x';
update alerts set enabled = null;
select name, on_kind, on_name, conditions, channels, options, enabled, comment from alerts where name = 'f';
delete from alerts where name = 'f';
truncate alert_definitions;
-- What it is on.
alter mirror orders rename to sales;
show alerts;
drop mirror sales;
select name from alerts;
drop peer shop;
select name from alerts;
