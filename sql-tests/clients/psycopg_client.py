"""psycopg 3, the libpq driver of Python: blocking, asyncio, pipelines, COPY, server-side cursors, binary."""

import asyncio
import threading

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from common import LARGE_ROWS, LARGE_SUM, LARGE_TEXT, Backend, expect


def peers(connection):
    """The peers beside the two that are always there."""
    query = "select name from peers where name not in ('source', 'target') order by name"
    return [name for (name,) in connection.execute(query)]


def encryption(connection):
    assert connection.pgconn.ssl_in_use
    # The password's proof is bound to the certificate, which the gateway and the server share.
    with psycopg.connect(channel_binding="require") as bound:
        expect(bound.execute("select 1").fetchone(), (1,))


def plain_sql(connection):
    row = connection.execute("select %s::int, %s::text, %s::jsonb, null", (1, "é🐘", Jsonb({"a": [1]}))).fetchone()
    expect(row, (1, "é🐘", {"a": [1]}, None))
    # A statement that is used often becomes a named one on the server.
    for i in range(20):
        expect(connection.execute("select %s::int * 2", (i,)).fetchone(), (i * 2,))
    named = connection.execute("select count(*) from pg_prepared_statements where not from_sql").fetchone()[0]
    assert named >= 1, "psycopg prepared nothing"


def transactions(connection):
    try:
        with connection.transaction():
            connection.execute("create table t_rolled_back (a int)")
            connection.execute("create peer rolled_back from postgres with (host = 'h', user = 'u', validate = false)")
            connection.execute("create mirror rolled_back from source to rolled_back for table orders")
            expect(peers(connection), ["rolled_back"])
            raise psycopg.Rollback
    finally:
        expect(peers(connection), [])
        expect(connection.execute("select to_regclass('t_rolled_back')").fetchone(), (None,))
    # A savepoint takes back only what came after it.
    with connection.transaction():
        connection.execute("create peer kept from postgres with (host = 'h', user = 'u', validate = false)")
        with connection.transaction(force_rollback=True):
            connection.execute("drop peer kept")
            expect(peers(connection), [])
    expect(peers(connection), ["kept"])


def parameters(connection):
    """Option values as bind parameters, as text and in binary."""
    made = connection.execute(
        "create peer bound from postgres with (host = %s, port = %s, user = %s, password = %s, validate = %s)",
        ("db.example", 6543, "u'", "geheim", False),
    )
    expect(made.statusmessage, "CREATE PEER")
    options = connection.execute("select options from peers where name = 'bound'").fetchone()[0]
    expect(options, {"host": "db.example", "port": "6543", "user": "u'"})
    connection.execute(
        "create peer bound_binary from postgres with (host = %b, user = %b, validate = %b)", ("db2", "u", False))
    options = connection.execute("select options from peers where name = 'bound_binary'").fetchone()[0]
    expect(options, {"host": "db2", "user": "u"})
    shown = connection.execute("show peers")
    expect([column.name for column in shown.description][:2], ["name", "type"])
    expect([row[0] for row in shown], ["bound", "bound_binary", "kept", "source", "target"])
    for name in ("bound", "bound_binary"):
        connection.execute(sql.SQL("drop peer {}").format(sql.Identifier(name)))


def failure(connection, statement, *parameters):
    try:
        connection.execute(statement, *parameters)
    except psycopg.Error as error:
        return error
    raise AssertionError(f"{statement} did not fail")


def errors(connection):
    error = failure(connection, "select 'é', nope from pg_class")
    expect((error.sqlstate, error.diag.statement_position), ("42703", "13"))
    statement = "create peer x from postgres with (hosst = 'h', user = 'u', validate = false)"
    error = failure(connection, statement)
    expect((error.sqlstate, error.diag.statement_position), ("HV00D", str(statement.index("hosst") + 1)))
    assert "host" in error.diag.message_hint
    error = failure(connection, "create peer x frm postgres", ())
    expect((error.sqlstate, error.diag.statement_position), ("42601", "15"))
    # One string is one transaction: what came before the error is gone.
    error = failure(connection, "create table gone (a int); drop peer kept; drop peer no_such_peer")
    expect((error.sqlstate, error.diag.statement_position), ("42704", "54"))
    expect(connection.execute("select to_regclass('gone')").fetchone(), (None,))
    expect(peers(connection), ["kept"])


def cancel(connection):
    for statement in ("select pg_sleep(600)", "wait for mirror unfinished"):
        backend = Backend(connection.info.backend_pid)
        canceler = threading.Thread(target=lambda: (backend.wait_until_active(), connection.cancel_safe()))
        canceler.start()
        expect(failure(connection, statement).sqlstate, "57014")
        canceler.join()
    expect(connection.execute("select 1").fetchone(), (1,))


def large_result(connection):
    for binary in (False, True):
        total = length = 0
        for i, text in connection.cursor(binary=binary).execute(
                "select i, repeat(md5(i::text), 3) from generate_series(1, %s) i", (LARGE_ROWS,)):
            total += i
            length += len(text)
        expect((total, length), (LARGE_SUM, LARGE_TEXT))
    # Row by row, as it comes.
    cursor = connection.cursor()
    expect(sum(i for (i,) in cursor.stream("select generate_series(1, %s)", (LARGE_ROWS,))), LARGE_SUM)


def server_side_cursors(connection):
    with connection.transaction():
        with connection.cursor("named", scrollable=True) as cursor:
            cursor.itersize = 1000
            cursor.execute("select generate_series(1, %s)", (20_000,))
            expect(sum(i for (i,) in cursor), 20_000 * 20_001 // 2)
            cursor.scroll(10, mode="absolute")
            expect(cursor.fetchone(), (11,))
        with connection.cursor("held", binary=True) as cursor:
            cursor.execute("select name from peers order by name")
            expect(cursor.fetchall(), [("kept",), ("source",), ("target",)])


def copy(connection):
    connection.execute("create temp table copied (i int, s text)")
    with connection.cursor().copy("copy copied from stdin") as copying:
        for i in range(LARGE_ROWS):
            copying.write_row((i + 1, f"row\t{i}\n\\"))
    expect(connection.execute("select count(*), sum(i) from copied").fetchone(), (LARGE_ROWS, LARGE_SUM))
    with connection.cursor().copy("copy copied to stdout (format binary)") as copying:
        copying.set_types(["int4", "text"])
        expect(sum(row[0] for row in copying.rows()), LARGE_SUM)
    with connection.cursor().copy("copy copied to stdout") as copying:
        rows = sum(bytes(block).count(b"\n") for block in copying)
    expect(rows, LARGE_ROWS)
    # Given up by the client, and refused by the server.
    try:
        with connection.cursor().copy("copy copied from stdin") as copying:
            copying.write_row((1, "x"))
            raise RuntimeError("changed my mind")
    except RuntimeError:
        pass
    try:
        with connection.cursor().copy("copy copied from stdin") as copying:
            copying.write("no number\tx\n")
        raise AssertionError("a bad row was taken")
    except psycopg.errors.InvalidTextRepresentation:
        pass
    expect(connection.execute("select count(*) from copied").fetchone(), (LARGE_ROWS,))


def pipelines(connection):
    with connection.pipeline():
        cursors = [connection.execute("select %s::int", (i,)) for i in range(500)]
        made = connection.execute(
            "create peer piped from postgres with (host = %s, user = 'u', validate = false)", ("h",))
        seen = connection.execute("select count(*) from peers where name = %s", ("piped",))
        dropped = connection.execute("drop peer piped")
    expect([cursor.fetchone()[0] for cursor in cursors], list(range(500)))
    expect((made.statusmessage, seen.fetchone(), dropped.statusmessage), ("CREATE PEER", (1,), "DROP PEER"))
    # What follows an error is skipped, up to the next Sync; without BEGIN, all before it since the last Sync is undone.
    try:
        with connection.pipeline() as pipeline:
            first = connection.execute("create peer undone from postgres with (host = 'h', user = 'u', validate = false)")
            failing = connection.execute("create peer failing from postgres with (hosst = 'h', user = 'u', validate = false)")
            skipped = connection.execute("drop peer kept")
            pipeline.sync()
        raise AssertionError("the pipeline did not fail")
    except psycopg.Error as error:
        expect(error.sqlstate, "HV00D")
    expect(peers(connection), ["kept"])


def notifications(connection):
    connection.execute("listen news")
    with psycopg.connect(autocommit=True) as other:
        other.execute("select pg_notify('news', 'é')")
    for notification in connection.notifies(timeout=30, stop_after=1):
        expect((notification.channel, notification.payload), ("news", "é"))
        break
    else:
        raise AssertionError("no notification came")


def two_phase_commit(connection):
    connection.execute("create table two_phase (a int)")
    connection.autocommit = False
    connection.tpc_begin("peergate-psycopg")
    connection.execute("insert into two_phase values (1)")
    connection.tpc_prepare()
    connection.tpc_commit()
    connection.autocommit = True
    expect(connection.execute("select a from two_phase").fetchall(), [(1,)])


async def asynchronous():
    async with await psycopg.AsyncConnection.connect(autocommit=True) as connection:
        row = await (await connection.execute("select %s::int", (7,))).fetchone()
        expect(row, (7,))
        async with connection.pipeline():
            cursors = [await connection.execute("select %b::int8", (i,)) for i in range(100)]
        expect([(await cursor.fetchone())[0] for cursor in cursors], list(range(100)))
        async with connection.transaction(force_rollback=True):
            await connection.execute(
                "create peer rolled_back from postgres with (host = %s, user = 'u', validate = false)", ("h",))
        expect(await (await connection.execute("select name from peers where name = 'rolled_back'")).fetchall(), [])
        async with connection.cursor().copy("copy (select generate_series(1, 10000)) to stdout") as copying:
            expect(sum([int(row[0]) async for row in copying.rows()]), 10_000 * 10_001 // 2)
        for statement in ("select pg_sleep(600)", "wait for mirror unfinished"):
            backend = Backend(connection.info.backend_pid)
            waiting = asyncio.create_task(connection.execute(statement))
            await asyncio.to_thread(backend.wait_until_active)
            await connection.cancel_safe()
            try:
                await waiting
                raise AssertionError(f"{statement} was not canceled")
            except psycopg.errors.QueryCanceled:
                pass
        expect(await (await connection.execute("select 1")).fetchone(), (1,))


def main():
    with psycopg.connect(autocommit=True) as connection:
        encryption(connection)
        plain_sql(connection)
        transactions(connection)
        parameters(connection)
        errors(connection)
        large_result(connection)
        server_side_cursors(connection)
        copy(connection)
        pipelines(connection)
        notifications(connection)
        two_phase_commit(connection)
        cancel(connection)
    asyncio.run(asynchronous())


main()
