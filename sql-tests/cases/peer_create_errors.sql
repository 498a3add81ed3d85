-- What CREATE PEER refuses, and where it points.
create peer;
create peer shop;
create peer shop frm postgres with (password = 'geheim');
create peer shop from postgres with (host);
create peer shop from postgres with (host = 'a', host = 'b');
create peer "" from postgres;
create peer shop from postgres with (password = 'geheim', hosst = 'h', user = 'u');
create peer shop from postgres with (user = 'u', sslmode = 'requir', validate = false);
create peer shop from postgres with (user = 'u', connect_timeout = 0, validate = false);
create peer shop from postgres with (host = 'h', validate = false);
create peer shop from postgres;
create peer shop from mysql with (user = 'u');
create peer public from postgres with (user = 'u', validate = false);
create peer shop from postgres with (uri = 'mysql://u:geheim@h/d');
create peer shop from postgres with (host = $1);
create peer shop from postgres with (host = '127.0.0.1', port = 1, user = 'u');
create or replace peer shop frm postgres with (password = 'geheim');
alter peer shop sett (password = 'geheim');
select 'é' as a \; create peer shop
  from postgres with (user = 'u', validate = maybe);
show peers;
