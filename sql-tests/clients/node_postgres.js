// node-postgres: simple and extended protocol, named statements, cursors, COPY by pg-copy-streams, pools.
'use strict'

const assert = require('node:assert/strict')
const { execFile } = require('node:child_process')
const { once } = require('node:events')
const { readFileSync } = require('node:fs')
const { Readable, Writable } = require('node:stream')
const { pipeline } = require('node:stream/promises')
const { promisify } = require('node:util')

const { Client, Pool, Query } = require('pg')
const Cursor = require('pg-cursor')
const { from: copyFrom, to: copyTo } = require('pg-copy-streams')

const LARGE_ROWS = 200_000
const LARGE_SUM = (LARGE_ROWS * (LARGE_ROWS + 1)) / 2
const DEADLINE_MS = 60_000

// The rest of where the catalog is comes from the environment.
const place = { ssl: { ca: readFileSync(process.env.PGSSLROOTCERT) }, enableChannelBinding: true }

// What psql prints of a query, on the server itself.
async function direct(query) {
  const options = ['-X', '-A', '-t', '-v', 'ON_ERROR_STOP=1', '-p', process.env.DIRECT_PORT, '-c', query]
  const { stdout } = await promisify(execFile)('psql', options, { timeout: DEADLINE_MS })
  return stdout.trim()
}

// The peers beside the two that are always there.
async function peers(client) {
  const query = "select name from peers where name not in ('source', 'target') order by name"
  return (await client.query(query)).rows.map((row) => row.name)
}

async function plainSql(client) {
  const { rows } = await client.query('select $1::int as a, $2::text as b, $3::jsonb as c, null as d', [
    1,
    'é🐘',
    { x: [1] },
  ])
  assert.deepEqual(rows, [{ a: 1, b: 'é🐘', c: { x: [1] }, d: null }])
  for (let i = 0; i < 10; i++) {
    const named = { name: 'double', text: 'select $1::int * 2 as n', values: [i] }
    assert.equal((await client.query(named)).rows[0].n, i * 2)
  }
  assert.equal((await client.query('select count(*)::int as n from pg_prepared_statements')).rows[0].n, 1)
  const several = await client.query('create table several (a int); insert into several values (1), (2); table several')
  assert.deepEqual(several.map((result) => result.command), ['CREATE', 'INSERT', 'SELECT'])
}

async function transactions(client) {
  await client.query('begin')
  await client.query('create table t_rolled_back (a int)')
  await client.query("create peer rolled_back from postgres with (host = 'h', user = 'u', validate = false)")
  await client.query('create mirror rolled_back from source to rolled_back for table orders')
  assert.deepEqual(await peers(client), ['rolled_back'])
  await client.query('rollback')
  assert.deepEqual(await peers(client), [])
  assert.equal((await client.query("select to_regclass('t_rolled_back') as t")).rows[0].t, null)

  await client.query('begin')
  await client.query("create peer kept from postgres with (host = 'h', user = 'u', validate = false)")
  await client.query('savepoint s')
  await client.query('drop peer kept')
  await client.query('rollback to savepoint s')
  await client.query('commit')
  assert.deepEqual(await peers(client), ['kept'])
}

async function parameters(client) {
  const text = 'create peer bound from postgres with (host = $1, port = $2, user = $3, password = $4, validate = $5)'
  const made = await client.query(text, ['db.example', 6543, "u'", 'geheim', false])
  assert.equal(made.command, 'CREATE')
  const { rows } = await client.query("select options from peers where name = 'bound'")
  assert.deepEqual(rows[0].options, { host: 'db.example', port: '6543', user: "u'" })
  // Named, and with its values in binary.
  const named = {
    name: 'peer',
    text: 'create peer in_binary from postgres with (host = $1, user = $2, validate = false)',
    values: [Buffer.from('db2'), Buffer.from('u')],
  }
  await client.query(named)
  assert.deepEqual(await peers(client), ['bound', 'in_binary', 'kept'])
  await client.query('drop peer bound, in_binary')
  const shown = await client.query('show peers')
  assert.deepEqual(shown.rows.map((row) => row.name), ['kept', 'source', 'target'])
}

async function fails(client, statement, values, code, position) {
  await assert.rejects(client.query(statement, values), (error) => {
    assert.deepEqual([error.code, error.position], [code, position === undefined ? undefined : String(position)])
    return true
  })
}

async function errors(client) {
  const unknown = "create peer x from postgres with (hosst = 'h', user = 'u', validate = false)"
  for (const values of [undefined, []]) {
    await fails(client, "select 'é', nope from pg_class", values, '42703', 13)
    await fails(client, unknown, values, 'HV00D', unknown.indexOf('hosst') + 1)
    await fails(client, 'create peer x frm postgres', values, '42601', 15)
    await fails(client, 'drop peer kept, no_such_peer', values, '42704', 17)
  }
  await fails(client, 'create table gone (a int); drop peer kept; drop peer no_such_peer', undefined, '42704', 54)
  assert.equal((await client.query("select to_regclass('gone') as t")).rows[0].t, null)
  assert.deepEqual(await peers(client), ['kept'])
}

// Asks again until the session runs something that will not end by itself.
async function waitUntilActive(pid) {
  const running = `select count(*) from pg_stat_activity where pid = ${pid} and state = 'active'
    and wait_event_type is not null and wait_event <> 'ClientRead'`
  const deadline = Date.now() + DEADLINE_MS
  while ((await direct(running)) !== '1') {
    assert.ok(Date.now() < deadline, 'the statement did not begin')
  }
}

async function cancel(client) {
  for (const statement of ['select pg_sleep(600)', 'wait for mirror unfinished']) {
    const query = new Query(statement)
    const failed = once(query, 'error')
    client.query(query)
    await waitUntilActive(client.processID)
    // The driver's own request, on a connection of its own.
    const canceler = new Client(place)
    const closed = once(canceler.connection, 'end')
    canceler.cancel(client, query)
    const [error] = await failed
    assert.equal(error.code, '57014')
    // Until the server closes it, it may signal once more, and what comes next would be canceled.
    await closed
  }
  assert.equal((await client.query('select 1 as one')).rows[0].one, 1)
}

async function largeResult(client) {
  const text = 'select i, repeat(md5(i::text), 3) as s from generate_series(1, $1::int) i'
  const { rows } = await client.query(text, [LARGE_ROWS])
  assert.equal(rows.reduce((sum, row) => sum + row.i, 0), LARGE_SUM)
  assert.equal(rows.reduce((sum, row) => sum + row.s.length, 0), LARGE_ROWS * 96)
  // A portal that is read 1000 rows at a time.
  const cursor = client.query(new Cursor(text, [20_000]))
  let total = 0
  for (let part = await cursor.read(1000); part.length > 0; part = await cursor.read(1000)) {
    assert.ok(part.length <= 1000)
    total += part.reduce((sum, row) => sum + row.i, 0)
  }
  await cursor.close()
  assert.equal(total, (20_000 * 20_001) / 2)
}

async function copy(client) {
  await client.query('create temp table copied (i int, s text)')
  function* lines() {
    for (let i = 1; i <= LARGE_ROWS; i++) yield `${i}\trow\\t${i}\n`
  }
  await pipeline(Readable.from(lines()), client.query(copyFrom('copy copied from stdin')))
  const { rows } = await client.query('select count(*)::int as n, sum(i)::float8 as total from copied')
  assert.deepEqual(rows[0], { n: LARGE_ROWS, total: LARGE_SUM })
  let count = 0
  const counter = new Writable({
    write(chunk, _, done) {
      for (const byte of chunk) if (byte === 10) count++
      done()
    },
  })
  await pipeline(client.query(copyTo('copy copied to stdout')), counter)
  assert.equal(count, LARGE_ROWS)
  await assert.rejects(
    pipeline(Readable.from(['no number\tx\n']), client.query(copyFrom('copy copied from stdin'))),
    { code: '22P02' },
  )
}

async function notifications(client) {
  await client.query('listen news')
  const came = once(client, 'notification')
  const other = new Client(place)
  await other.connect()
  await other.query("select pg_notify('news', 'é')")
  await other.end()
  const [message] = await came
  assert.deepEqual([message.channel, message.payload], ['news', 'é'])
}

async function pool() {
  const pool = new Pool({ ...place, max: 5 })
  const results = await Promise.all(Array.from({ length: 200 }, (_, i) => pool.query('select $1::int as n', [i])))
  assert.deepEqual(results.map((result) => result.rows[0].n), Array.from({ length: 200 }, (_, i) => i))
  await pool.end()
}

async function main() {
  const client = new Client(place)
  await client.connect()
  for (const step of [
    plainSql,
    transactions,
    parameters,
    errors,
    cancel,
    largeResult,
    copy,
    notifications,
  ]) {
    await step(client)
  }
  await client.end()
  await pool()
}

main().catch((error) => {
  console.error(error)
  process.exit(1)
})
