"""SQLAlchemy on psycopg: reflection of schemas, its core, and our statements among its own."""

import datetime
import decimal
import os
import warnings

import sqlalchemy as sa

from common import LARGE_ROWS, LARGE_SUM, expect

SCHEMA = """
create schema shop;
create type shop.mood as enum ('sad', 'happy');
create table shop.customers (
    id bigint generated always as identity primary key,
    name varchar(40) not null unique,
    mood shop.mood default 'happy',
    tags text[],
    born date,
    check (length(name) > 1));
comment on table shop.customers is 'who buys';
create table shop.orders (
    id uuid primary key default gen_random_uuid(),
    customer_id bigint not null references shop.customers on delete cascade,
    amount numeric(12, 2) not null,
    details jsonb,
    at timestamptz not null default now(),
    doubled numeric generated always as (amount * 2) stored);
create index orders_at on shop.orders (at desc) include (amount) where amount > 10;
create view shop.totals as select customer_id, sum(amount) as total from shop.orders group by 1;
"""


def reflected(engine, schema):
    """All that the inspector knows of a schema."""
    inspector = sa.inspect(engine)
    found = {"tables": inspector.get_table_names(schema), "views": inspector.get_view_names(schema),
             "enums": inspector.get_enums(schema)}
    for name in found["tables"] + found["views"]:
        found[name] = {
            "columns": [{**column, "type": repr(column["type"])} for column in inspector.get_columns(name, schema)],
            "keys": inspector.get_pk_constraint(name, schema) if name in found["tables"] else None,
            "foreign": inspector.get_foreign_keys(name, schema),
            "indexes": inspector.get_indexes(name, schema),
            "unique": inspector.get_unique_constraints(name, schema),
            "checks": inspector.get_check_constraints(name, schema),
            "comment": inspector.get_table_comment(name, schema),
        }
    return found


def main():
    gate = sa.create_engine("postgresql+psycopg://")
    straight = sa.create_engine("postgresql+psycopg://", connect_args={"port": os.environ["DIRECT_PORT"]})
    # SQLAlchemy has no such type, with or without a gateway.
    warnings.filterwarnings("ignore", "Did not recognize type 'pg_lsn'")
    with gate.begin() as connection:
        connection.exec_driver_sql(SCHEMA)

    # The same through the gateway as directly, of a schema of ours and of the catalog's own.
    for schema in ("shop", "peergate"):
        found = reflected(gate, schema)
        assert found["tables"], f"no tables in {schema}"
        expect(found, reflected(straight, schema))
    metadata = sa.MetaData()
    metadata.reflect(gate, schema="shop", views=True)
    customers, orders = metadata.tables["shop.customers"], metadata.tables["shop.orders"]
    expect([key.column.table for key in orders.foreign_keys], [customers])

    with gate.begin() as connection:
        key = connection.execute(
            customers.insert().values(name="Zoë", tags=["a", "b"], born=datetime.date(2000, 1, 2))
            .returning(customers.c.id)).scalar_one()
        # Many rows go as one statement with many values.
        connection.execute(orders.insert(), [
            {"customer_id": key, "amount": decimal.Decimal(i) / 4, "details": {"i": i}} for i in range(2000)])
    with gate.connect() as connection:
        joined = sa.select(customers.c.name, sa.func.count(), sa.func.sum(orders.c.doubled)).join(orders).group_by(
            customers.c.name)
        expect(connection.execute(joined).one(), ("Zoë", 2000, decimal.Decimal(1999 * 2000) / 4))
        series = sa.text("select generate_series(1, :n) as i").bindparams(n=LARGE_ROWS)
        # With a cursor on the server, as stream_results asks for.
        rows = connection.execution_options(stream_results=True).execute(series)
        expect(sum(row.i for row in rows), LARGE_SUM)

    # Our statements, rolled back and committed.
    create = sa.text("create peer kept from postgres with (host = :host, user = 'u', validate = false)")
    count = sa.text("select count(*) from peers where name = 'kept'")
    with gate.connect() as connection:
        connection.execute(create, {"host": "h"})
        expect(connection.execute(count).scalar(), 1)
        connection.rollback()
        expect(connection.execute(count).scalar(), 0)
        connection.execute(create, {"host": "h"})
        connection.commit()
        expect(connection.execute(count).scalar(), 1)

    # An error of ours is the database's error to SQLAlchemy, and its connection stays good.
    with gate.connect() as connection:
        try:
            connection.execute(create, {"host": "h"})
            raise AssertionError("a peer was made twice")
        except sa.exc.ProgrammingError as error:
            expect((error.orig.sqlstate, error.orig.diag.statement_position), ("42710", "13"))
            assert not error.connection_invalidated
        connection.rollback()
        expect(connection.execute(sa.select(1)).scalar(), 1)


main()
