-- COPY goes both ways, in its formats, with its errors, and leaves the session in order.
create table t (id int primary key, word text);
copy t from stdin;
1	one
2	\N
3	tab\there
\.
copy t from stdin (format csv, header);
id,word
4,"quoted, ""word"""
5,
\.
copy t to stdout;
copy (select word, id from t order by id desc) to stdout (format csv, header, force_quote *);
\copy t (id) from stdin
6
7
\.
\copy (select count(*) from t) to stdout
-- A row that breaks the key, and one that cannot be read.
copy t from stdin;
8	eight
1	again
\.
copy t from stdin;
x	y
\.
select count(*), max(id) from t;
begin;
copy t from stdin;
9	nine
\.
rollback;
-- Several statements in one query string, COPY among them.
select 1 as before \; copy t to stdout (format text, delimiter '|') \; select 2 as after;
