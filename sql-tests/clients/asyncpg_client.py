"""asyncpg, which speaks the extended protocol only, in binary, and asks for answers by Flush instead of Sync."""

import asyncio
import io

import asyncpg

from common import LARGE_ROWS, LARGE_SUM, LARGE_TEXT, Backend, expect


async def peers(connection):
    """The peers beside the two that are always there."""
    rows = await connection.fetch("select name from peers where name not in ('source', 'target') order by name")
    return [row["name"] for row in rows]


async def plain_sql(connection):
    row = await connection.fetchrow("select $1::int8 as a, $2::text as b, $3::int[] as c, null as d", 1, "é🐘", [1, None])
    expect(dict(row), {"a": 1, "b": "é🐘", "c": [1, None], "d": None})
    # A composite type: the driver asks the catalogs for its fields.
    await connection.execute("create type pair as (a int, b text)")
    expect(tuple(await connection.fetchval("select row(1, 'x')::pair")), (1, "x"))
    statement = await connection.prepare("select i from generate_series(1, $1) i")
    expect([column.name for column in statement.get_attributes()], ["i"])
    for n in (1, 5, 3):
        expect(len(await statement.fetch(n)), n)
    # Several statements in a string, without parameters: the simple protocol.
    expect(await connection.execute("create table several (a int); insert into several values (1), (2)"), "INSERT 0 2")
    await connection.executemany("insert into several values ($1)", [(i,) for i in range(1000)])
    expect(await connection.fetchval("select count(*) from several"), 1002)


async def transactions(connection):
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("create table t_rolled_back (a int)")
    await connection.execute("create peer rolled_back from postgres with (host = 'h', user = 'u', validate = false)")
    await connection.execute("create mirror rolled_back from source to rolled_back for table orders")
    expect(await peers(connection), ["rolled_back"])
    await transaction.rollback()
    expect(await peers(connection), [])
    expect(await connection.fetchval("select to_regclass('t_rolled_back')"), None)
    async with connection.transaction():
        await connection.execute("create peer kept from postgres with (host = 'h', user = 'u', validate = false)")
        savepoint = connection.transaction()
        await savepoint.start()
        await connection.execute("drop peer kept")
        await savepoint.rollback()
    expect(await peers(connection), ["kept"])


async def parameters(connection):
    statement = await connection.prepare(
        "create peer bound from postgres with (host = $1, port = $2, user = $3, password = $4, validate = $5)")
    expect(len(statement.get_parameters()), 5)
    await statement.fetch("db.example", "6543", "u'", "geheim", "false")
    expect(statement.get_statusmsg(), "CREATE PEER")
    expect(await connection.fetchval("select options->>'port' from peers where name = 'bound'"), "6543")
    expect([row["name"] for row in await connection.fetch("show peers")], ["bound", "kept", "source", "target"])
    expect(await connection.execute("drop peer bound"), "DROP PEER")


async def failure(connection, statement, *arguments):
    try:
        await connection.fetch(statement, *arguments)
    except asyncpg.PostgresError as error:
        return error.sqlstate, error.position
    raise AssertionError(f"{statement} did not fail")


async def errors(connection):
    expect(await failure(connection, "select 'é', nope from pg_class"), ("42703", "13"))
    statement = "create peer x from postgres with (hosst = $1, user = 'u', validate = false)"
    expect(await failure(connection, statement, "h"), ("HV00D", str(statement.index("hosst") + 1)))
    expect(await failure(connection, "drop peer kept, no_such_peer"), ("42704", "17"))
    expect(await failure(connection, "create peer x frm postgres"), ("42601", "15"))
    expect(await peers(connection), ["kept"])


async def cancel(connection):
    for statement in ("select pg_sleep(600)", "wait for mirror unfinished"):
        backend = Backend(connection.get_server_pid())
        waiting = asyncio.create_task(connection.fetch(statement))
        await asyncio.to_thread(backend.wait_until_active)
        # The driver cancels the statement when its task is canceled, and by its own timeout.
        waiting.cancel()
        try:
            await waiting
            raise AssertionError(f"{statement} was not canceled")
        except asyncio.CancelledError:
            pass
        try:
            await connection.fetch(statement, timeout=0.2)
            raise AssertionError(f"{statement} did not time out")
        except asyncio.TimeoutError:
            pass
        expect(await connection.fetchval("select 1"), 1)


async def large_result(connection):
    rows = await connection.fetch("select i, repeat(md5(i::text), 3) as s from generate_series(1, $1) i", LARGE_ROWS)
    expect((sum(row["i"] for row in rows), sum(len(row["s"]) for row in rows)), (LARGE_SUM, LARGE_TEXT))
    async with connection.transaction():
        # A portal that is read 1000 rows at a time.
        total = 0
        async for row in connection.cursor("select generate_series(1, $1) as i", 20_000, prefetch=1000):
            total += row["i"]
        expect(total, 20_000 * 20_001 // 2)


async def copy(connection):
    await connection.execute("create temp table copied (i int, s text)")
    records = [(i + 1, f"row\t{i}\n\\") for i in range(LARGE_ROWS)]
    expect(await connection.copy_records_to_table("copied", records=records), f"COPY {LARGE_ROWS}")
    expect(await connection.fetchval("select sum(i) from copied"), LARGE_SUM)
    text = io.BytesIO()
    await connection.copy_from_query("select i, s from copied where i <= $1", 1000, output=text)
    expect(text.getvalue().count(b"\n"), 1000)
    text.seek(0)
    expect(await connection.copy_to_table("copied", source=text), "COPY 1000")
    try:
        await connection.copy_to_table("copied", source=io.BytesIO(b"no number\tx\n"))
        raise AssertionError("a bad row was taken")
    except asyncpg.InvalidTextRepresentationError:
        pass


async def notifications(connection):
    came = asyncio.get_running_loop().create_future()
    await connection.add_listener("news", lambda *arguments: came.set_result(arguments[2:]))
    other = await asyncpg.connect()
    await other.execute("select pg_notify('news', 'é')")
    await other.close()
    # Nothing is sent meanwhile: it comes to an idle session.
    expect(await asyncio.wait_for(came, 30), ("news", "é"))


async def pool():
    async with asyncpg.create_pool(min_size=2, max_size=5) as connections:
        results = await asyncio.gather(*(connections.fetchval("select $1::int", i) for i in range(200)))
        expect(results, list(range(200)))


async def main():
    connection = await asyncpg.connect()
    await plain_sql(connection)
    await transactions(connection)
    await parameters(connection)
    await errors(connection)
    await cancel(connection)
    await large_result(connection)
    await copy(connection)
    await notifications(connection)
    await connection.close()
    await pool()


asyncio.run(main())
