"""Alembic: migrations with our statements in them go up and down, and one that fails leaves nothing."""

import os
import tempfile
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from common import expect

ENV = """
import sqlalchemy
from alembic import context

engine = sqlalchemy.create_engine("postgresql+psycopg://")
with engine.connect() as connection:
    # All migrations of one command in one transaction, as is Alembic's default on Postgres.
    context.configure(connection=connection, compare_type=True)
    with context.begin_transaction():
        context.run_migrations()
"""

FIRST = """
import sqlalchemy as sa
from alembic import op

revision, down_revision = "first", None

def upgrade():
    op.create_table("orders", sa.Column("id", sa.BigInteger, primary_key=True), sa.Column("note", sa.Text))
    op.execute("create peer shop from postgres with (host = 'h', user = 'u', password = 'geheim', validate = false)")
    op.execute("create mirror orders from shop to target for table orders")

def downgrade():
    op.execute("drop mirror orders")
    op.execute("drop peer shop")
    op.drop_table("orders")
"""

SECOND = """
import sqlalchemy as sa
from alembic import op

revision, down_revision = "second", "first"

def upgrade():
    op.add_column("orders", sa.Column("amount", sa.Numeric))
    op.execute("create peer half from postgres with (host = 'h', user = 'u', validate = false)")
    op.execute("create peer shop from postgres with (host = 'h', user = 'u', validate = false)")

def downgrade():
    pass
"""

STATE = """
select (select string_agg(version_num, ' ') from alembic_version),
       (select string_agg(column_name, ' ' order by ordinal_position) from information_schema.columns
         where table_name = 'orders'),
       (select string_agg(name, ' ' order by name) from peers),
       (select string_agg(name, ' ' order by name) from mirrors)
"""


def main():
    engine = sa.create_engine("postgresql+psycopg://")

    def state():
        with engine.connect() as connection:
            return tuple(connection.execute(sa.text(STATE)).one())

    with tempfile.TemporaryDirectory() as folder:
        versions = Path(folder, "versions")
        versions.mkdir()
        Path(folder, "env.py").write_text(ENV)
        Path(versions, "first.py").write_text(FIRST)
        config = Config()
        config.set_main_option("script_location", folder)
        config.set_main_option("path_separator", "os")
        config.print_stdout = lambda *_: None

        command.upgrade(config, "head")
        expect(state(), ("first", "id note", "shop source target", "orders unfinished"))

        Path(versions, "second.py").write_text(SECOND)
        try:
            command.upgrade(config, "head")
            raise AssertionError("a migration that cannot be was made")
        except sa.exc.ProgrammingError as error:
            expect((error.orig.sqlstate, error.orig.diag.statement_position), ("42710", "13"))
        expect(state(), ("first", "id note", "shop source target", "orders unfinished"))

        command.downgrade(config, "base")
        expect(state(), (None, None, "source target", "unfinished"))


main()
