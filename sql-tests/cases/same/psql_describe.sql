-- psql's describe commands show of ordinary objects what they show on Postgres itself.
create schema garden;
create type garden.colour as enum ('red', 'green');
create table garden.bed (id int generated always as identity primary key, name text not null check (name <> ''), area numeric(8, 2) default 1.5);
create table garden.plant (bed int references garden.bed on delete cascade, colour garden.colour, planted date) partition by range (planted);
create table garden.plant_2024 partition of garden.plant for values from ('2024-01-01') to ('2025-01-01');
create index on garden.plant (colour);
create view garden.red as select * from garden.plant where colour = 'red';
create function garden.area(bed int) returns numeric language sql stable as 'select area from garden.bed where id = bed';
comment on table garden.bed is 'Where things grow.';
\dn garden
\dt garden.*
\d garden.bed
\d+ garden.plant
\dv garden.*
\d garden.red
\dT garden.*
\df garden.*
\di garden.*
\ds garden.*
\dd garden.*
\d nothing
