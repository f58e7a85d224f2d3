/** PostgreSQL and Redis as docker/ builds them: who gets in, what survives, what they refuse, and where no password shows. */
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { mkdir, mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { connect } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setImmediate as nextTurn, setTimeout as sleep } from 'node:timers/promises'
import { afterAll, beforeAll, describe, expect, inject, onTestFinished, test, vi } from 'vitest'
import { ask, run } from '../scripts/lib/command.mts'
import { compose } from '../scripts/lib/compose.mts'
import * as engine from '../scripts/lib/engine.mts'
import { loadSite, type Site } from '../scripts/lib/settings.mts'
import { tinySite, type TestSite } from './harness.mts'

type Service = 'postgresql' | 'redis'

let own: TestSite
let site: Site
/** Every command line of this host while the services started for the first time. */
let seenAtStart: Set<string>
/** Holds data folders for single containers. */
let folder: string

beforeAll(async () => {
  own = await tinySite(18_200)
  site = await loadSite(own.envFile)
  folder = await mkdtemp(join(tmpdir(), `${own.project}-data-`))
  const start = run(compose(site, 'up', '--detach', '--wait', 'postgresql', 'redis'), { timeoutMs: 300_000 })
  seenAtStart = await commandLinesDuring(start)
})
afterAll(async () => {
  const made =
    (await ask(['docker', 'ps', '--all', '--quiet', '--filter', `name=^${own.project}-alone`])) ?? ''
  for (const id of made.split('\n').filter(Boolean)) await run(['docker', 'rm', '--force', '--volumes', id])
  await rm(folder, { recursive: true, force: true })
  await own.remove()
})

/** A command in a service's container, as an operator types it. */
async function inside(service: Service, ...argv: string[]): Promise<string> {
  return (await run(compose(site, 'exec', '-T', service, ...argv))).trim()
}

/** The seed's own command line. */
const asBob = (sql: string): Promise<string> =>
  inside('postgresql', 'psql', '-U', 'BoB', '-d', 'BoB', '--tuples-only', '--no-align', '-c', sql)

async function asSuperuser(sql: string, database = 'BoB'): Promise<string> {
  const psql = ['psql', '--tuples-only', '--no-align', '--dbname', database, '--command', sql]
  return (await run(['docker', 'exec', '--user', 'postgres', await idOf('postgresql'), ...psql])).trim()
}

/** The seed's own command line. */
const redis = (...argv: string[]): Promise<string> =>
  inside('redis', 'redis-cli', '-a', site.values.REDIS_PASSWORD ?? '', '--no-auth-warning', '-e', ...argv)

async function idOf(service: Service): Promise<string> {
  const all = await engine.serviceContainers(site.project, service)
  // What a test runs of the same image has the service's labels as well, but not this one.
  const found = all.find((one) => one.Config.Labels['com.docker.compose.oneoff'] === 'False')
  if (!found) throw new Error(`${service} has no container`)
  return found.Id
}

async function inspect(container: string, format: string): Promise<string> {
  return (await run(['docker', 'inspect', '--format', format, container])).trim()
}

/** Until a question is answered, and rightly: a service that was just started refuses at first. */
async function answers(question: () => Promise<string>, answer: string): Promise<void> {
  await vi.waitFor(async () => expect(await question()).toBe(answer), { timeout: 60_000, interval: 250 })
}

/** A crash: no signal is handled, and the engine does not count it as an operator's stop. */
async function crash(container: string): Promise<void> {
  process.kill(Number(await inspect(container, '{{.State.Pid}}')), 'SIGKILL')
}

/** Output of a container, both streams. */
async function logOf(container: string): Promise<string> {
  const lines: string[] = []
  await run(['docker', 'logs', container], { onLine: (line) => lines.push(line) })
  return lines.join('\n')
}

/** What `docker run` of an image says and exits with, its environment by name only. */
async function exitOf(
  image: string,
  options: string[],
  env: Record<string, string>,
): Promise<{ code: number; lines: string[] }> {
  const lines: string[] = []
  const names = Object.keys(env).flatMap((name) => ['--env', name])
  const argv = ['docker', 'run', '--rm', '--init', ...names, ...options, image]
  const failure = await run(argv, { env, onLine: (line) => lines.push(line) }).then(
    () => '',
    (error: unknown) => String(error),
  )
  return { code: Number(/exit code (\d+)/.exec(failure)?.[1] ?? 0), lines }
}

/** At one go: some live for a few milliseconds. */
function commandLines(): string[] {
  const processes = readdirSync('/proc').filter((name) => /^\d+$/.test(name))
  const read = (pid: string) => {
    try {
      return readFileSync(`/proc/${pid}/cmdline`, 'utf8')
    } catch {
      return ''
    }
  }
  return processes.map((pid) => read(pid).replaceAll('\0', ' ').trim())
}

async function commandLinesDuring(action: Promise<unknown>): Promise<Set<string>> {
  const seen = new Set<string>()
  const over = action.then(() => true)
  do {
    for (const line of commandLines()) seen.add(line)
  } while (!(await Promise.race([over, sleep(2, false)])))
  return seen
}

/** Names, owners, modes and contents below a folder. */
async function snapshot(path: string): Promise<string[]> {
  const names = ['.', ...(await readdir(path, { recursive: true }))]
  const lines = names.map(async (name) => {
    const found = await stat(join(path, name))
    const content = found.isFile() ? await readFile(join(path, name), 'utf8') : ''
    return [name, found.uid, found.gid, found.mode, content].join(' ')
  })
  return (await Promise.all(lines)).toSorted()
}

describe('PostgreSQL, inside its container', () => {
  test("answers the seed's psql command without a password", async () => {
    expect(await asBob('SELECT current_user, current_database()')).toBe('BoB|BoB')
  })

  test('has a superuser for who may run docker', async () => {
    expect(await asSuperuser("SELECT current_user, current_setting('is_superuser')")).toBe('postgres|on')
  })

  test('gives BoB its own database and nothing above it', async () => {
    const rights = 'rolsuper, rolcreatedb, rolcreaterole, rolreplication, rolbypassrls'
    expect(await asSuperuser(`SELECT ${rights} FROM pg_roles WHERE rolname = 'BoB'`)).toBe('f|f|f|f|f')
    expect(
      await asBob('SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = current_database()'),
    ).toBe('BoB')
    expect(await asBob('CREATE SCHEMA mine; DROP SCHEMA mine')).toContain('DROP SCHEMA')
    await expect(asBob('CREATE DATABASE other')).rejects.toThrow('permission denied to create database')
  })

  test('sorts as French does, in UTF-8', async () => {
    const locale = "coalesce(row->>'datlocale', row->>'daticulocale')"
    const database = 'SELECT to_jsonb(d) AS row FROM pg_database d WHERE datname = current_database()'
    expect(await asBob(`SELECT row->>'datlocprovider', ${locale} FROM (${database}) AS found`)).toBe(
      'i|fr-FR',
    )
    expect(await asBob('SHOW server_encoding')).toBe('UTF8')
    const words = "VALUES ('zèbre'), ('été'), ('Eau'), ('eau'), ('Étage')"
    expect(await asBob(`SELECT string_agg(word, ' ' ORDER BY word) FROM (${words}) AS words (word)`)).toBe(
      'eau Eau Étage été zèbre',
    )
  })

  test('writes dumps to BACKUP_DIR/.incoming', async () => {
    await asBob('CREATE TABLE backed_up AS SELECT 7 AS number')
    await asSuperuser("COPY backed_up TO '/backup/rows'")
    const dump = ['pg_dump', '--format=custom', '--file=/backup/dump', 'BoB']
    await run(['docker', 'exec', '--user', 'postgres', await idOf('postgresql'), ...dump])
    const incoming = join(site.folders.backups, '.incoming')
    expect(await readFile(join(incoming, 'rows'), 'utf8')).toBe('7\n')
    expect(await readFile(join(incoming, 'dump'), 'latin1')).toMatch(/^PGDMP/)
    const server = await stat(site.folders.postgres)
    expect((await stat(incoming)).uid).toBe(server.uid)
  })
})

describe('PostgreSQL, from the network', () => {
  /** Another container of the network. No password in `password` means none is sent. */
  async function overNetwork(user: string, password?: string): Promise<string> {
    const env: Record<string, string> = password === undefined ? {} : { PGPASSWORD: password }
    const image = inject('baseImages').POSTGRES_IMAGE ?? 'postgres:16-alpine'
    const names = Object.keys(env).flatMap((name) => ['--env', name])
    const question = ['--no-password', '--tuples-only', '--no-align', '--command', 'SELECT current_user']
    const psql = ['psql', '--host=postgresql', `--username=${user}`, '--dbname=BoB', ...question]
    const argv = [
      'docker',
      'run',
      '--rm',
      '--network',
      site.values.NETWORK_NAME ?? '',
      ...names,
      image,
      ...psql,
    ]
    return (await run(argv, { env })).trim()
  }

  test('lets BoB in with the right password', async () => {
    expect(await overNetwork('BoB', site.values.POSTGRES_PASSWORD)).toBe('BoB')
  })

  test.each([
    {
      who: 'BoB with a wrong password',
      user: 'BoB',
      password: 'wrong',
      says: 'password authentication failed',
    },
    { who: 'BoB without a password', user: 'BoB', password: undefined, says: 'no password supplied' },
    { who: 'the superuser', user: 'postgres', password: 'any', says: 'pg_hba.conf rejects connection' },
  ])('refuses $who', async ({ user, password, says }) => {
    await expect(overNetwork(user, password)).rejects.toThrow(says)
  })

  test('refuses an address outside the network before it asks for a password', async () => {
    const address = await inspect(
      await idOf('postgresql'),
      `{{(index .NetworkSettings.Networks "${site.values.NETWORK_NAME}").IPAddress}}`,
    )
    // The engine rewrites the host's addresses in its networks, except with this option.
    const other = `${own.project}-other`
    const unchanged = ['--opt', 'com.docker.network.bridge.enable_ip_masquerade=false']
    await run(['docker', 'network', 'create', ...unchanged, other])
    onTestFinished(() => run(['docker', 'network', 'rm', other]).then(() => undefined))
    const elsewhere = await inspect(other, '{{(index .IPAM.Config 0).Gateway}}')
    // R asks for a password (10: SASL), E is an error.
    expect(await firstAnswer(address)).toMatch(/^R.{7}\n/s)
    expect(await firstAnswer(address, elsewhere)).toMatch(/^E/)
    expect(await firstAnswer(address, elsewhere)).toContain(`no pg_hba.conf entry for host "${elsewhere}"`)
  })

  /** What the server answers to "I am BoB". https://www.postgresql.org/docs/current/protocol-message-formats.html */
  function firstAnswer(host: string, localAddress?: string): Promise<string> {
    const names = Buffer.from('user\0BoB\0database\0BoB\0\0')
    const head = Buffer.alloc(8)
    head.writeInt32BE(8 + names.length)
    head.writeInt32BE(196_608, 4)
    return new Promise((resolve, reject) => {
      const socket = connect({ host, port: 5432, ...(localAddress ? { localAddress } : {}) })
      socket.setTimeout(10_000, () =>
        socket.destroy(new Error(`${host} does not answer ${localAddress ?? ''}`)),
      )
      socket.on('connect', () => socket.write(Buffer.concat([head, names])))
      socket.on('data', (data) => {
        resolve(data.toString('latin1'))
        socket.destroy()
      })
      socket.on('error', reject)
    })
  }
})

describe('PostgreSQL over time', () => {
  test('keeps its rows through a restart, a stop that exits with 0, and a crash', async () => {
    const kept = () => asBob('SELECT number FROM kept')
    const id = await idOf('postgresql')
    await asBob('CREATE TABLE kept AS SELECT 42 AS number')
    await run(compose(site, 'restart', 'postgresql'))
    await answers(kept, '42')
    await run(compose(site, 'stop', 'postgresql'))
    expect(await inspect(id, '{{.State.Status}} {{.State.ExitCode}}')).toBe('exited 0')
    await run(compose(site, 'start', 'postgresql'))
    await answers(kept, '42')
    expect(await logOf(id)).not.toContain('not properly shut down')

    await crash(id)
    await answers(kept, '42')
    expect(await logOf(id)).toContain('not properly shut down')
  })

  // What is in PGDATA when it is killed: initdb runs, the server that makes BoB runs, the cluster is moved.
  test.each([
    { moment: 'initdb runs', appears: '.initialising/PG_VERSION' },
    { moment: 'its user is made', appears: '.initialising/postmaster.pid' },
    { moment: 'the cluster moves to its place', appears: '.initialised' },
  ])('ends its first start when it is killed while $moment', async ({ appears }) => {
    const env = { POSTGRES_USER: 'BoB', POSTGRES_DB: 'BoB', POSTGRES_PASSWORD: 'of this test alone' }
    const names = Object.keys(env).flatMap((key) => ['--env', key])
    const image = `${own.project}-postgresql`
    const killed = async () => {
      const data = await mkdtemp(join(folder, 'killed-'))
      const name = `${own.project}-alone-${data.slice(-6)}`
      const volume = ['--volume', `${data}:/var/lib/postgresql/data`]
      await run(['docker', 'run', '--detach', '--init', '--name', name, ...names, ...volume, image], { env })
      const pid = Number(await inspect(name, '{{.State.Pid}}'))
      const deadline = Date.now() + 60_000
      while (!existsSync(join(data, appears)) && Date.now() < deadline) await nextTurn()
      process.kill(pid, 'SIGKILL')
      expect(await run(['docker', 'wait', name])).toBe('137\n')
      return { data, name, left: await readdir(data) }
    }
    let { data, name, left } = await killed()
    // The kill came late: the last of these moments is a short one.
    for (let again = 0; again < 2 && left.includes('PG_VERSION'); again++)
      ({ data, name, left } = await killed())
    expect(left).toContain(appears.split('/')[0])
    expect(left).not.toContain('PG_VERSION')

    await run(['docker', 'start', name])
    const psql = ['psql', '--host=127.0.0.1', '--username=BoB', '--dbname=BoB', '--tuples-only', '--no-align']
    const login = ['docker', 'exec', '--env', 'PGPASSWORD', name, ...psql, '--command', 'SELECT current_user']
    await answers(() => run(login, { env: { PGPASSWORD: env.POSTGRES_PASSWORD } }), 'BoB\n')
    expect((await readdir(data)).filter((entry) => entry.startsWith('.'))).toEqual([])
    expect(await run(['docker', 'logs', name])).not.toContain(env.POSTGRES_PASSWORD)
    await run(['docker', 'rm', '--force', name])
  })

  const refusals = [
    {
      what: 'data of another major version',
      files: { PG_VERSION: '9\n', 'base/1': 'rows' },
      env: { POSTGRES_PASSWORD: 'some password' },
      says: /^postgresql: the data is of PostgreSQL 9, this image is PostgreSQL \d+\. .*POSTGRES_IMAGE/,
    },
    {
      what: 'no password to start with',
      files: {},
      env: { POSTGRES_PASSWORD: '' },
      says: /^postgresql: POSTGRES_PASSWORD is not set\. Set it in docker\/\.env\.$/,
    },
    {
      what: 'a folder with something else in it',
      files: { 'holiday.jpg': 'sea' },
      env: { POSTGRES_PASSWORD: 'some password' },
      says: /^postgresql: \S+ is not empty and holds no PG_VERSION\. .*POSTGRES_VOLUME/,
    },
  ]
  test.each(refusals)('refuses $what in one line and touches nothing', async ({ files, env, says }) => {
    const data = await mkdtemp(join(folder, 'refused-'))
    for (const [name, text] of Object.entries(files)) {
      await mkdir(join(data, name, '..'), { recursive: true })
      await writeFile(join(data, name), text)
    }
    const before = await snapshot(data)
    const volume = ['--volume', `${data}:/var/lib/postgresql/data`]
    const settings = { POSTGRES_USER: 'BoB', POSTGRES_DB: 'BoB', ...env }
    const { code, lines } = await exitOf(`${own.project}-postgresql`, volume, settings)
    expect(code).toBe(1)
    expect(lines).toEqual([expect.stringMatching(says)])
    expect(await snapshot(data)).toEqual(before)
  })
})

describe('health', () => {
  /** What the last five probes found, oldest first. */
  async function probes(service: Service): Promise<{ isGood: boolean; seconds: number }[]> {
    interface Probe {
      Start: string
      End: string
      ExitCode: number
    }
    const log = JSON.parse(await inspect(await idOf(service), '{{json .State.Health.Log}}')) as Probe[]
    return log.map(({ Start, End, ExitCode }) => ({
      isGood: ExitCode === 0,
      seconds: (Date.parse(End) - Date.parse(Start)) / 1000,
    }))
  }

  test.concurrent.each(['postgresql', 'redis'] as const)(
    'of %s is asked at once after a start and after a failure, and eight seconds later when it was good',
    async (service) => {
      const last = async () => (await probes(service)).slice(-2)
      const quick = (isGood: boolean) => ({ isGood, seconds: expect.toSatisfy((one: number) => one < 7) })
      const late = (isGood: boolean) => ({ isGood, seconds: expect.toSatisfy((one: number) => one >= 8) })
      const become = async (expected: unknown[]) =>
        await vi.waitFor(async () => expect(await last()).toEqual(expected), {
          timeout: 60_000,
          interval: 250,
        })
      await run(['docker', 'restart', await idOf(service)])
      await become([quick(true), late(true)])
      const init = await inspect(await idOf(service), '{{.State.Pid}}')
      const server = Number((await run(['pgrep', '--parent', init])).trim().split('\n')[0])
      process.kill(server, 'SIGSTOP')
      try {
        await become([late(false), quick(false)])
      } finally {
        process.kill(server, 'SIGCONT')
      }
      await become([quick(true), late(true)])
    },
  )
})

describe('Redis', () => {
  test("answers the seed's redis-cli command", async () => {
    expect(await redis('set', 'greeting', 'bonjour')).toBe('OK')
    expect(await redis('get', 'greeting')).toBe('bonjour')
  })

  test('refuses who has no password or a wrong one', async () => {
    const image = inject('baseImages').REDIS_IMAGE ?? 'redis:7-alpine'
    const network = ['docker', 'run', '--rm', '--network', site.values.NETWORK_NAME ?? '']
    const ping = (env: Record<string, string>) =>
      run([...network, '--env', 'REDISCLI_AUTH', image, 'redis-cli', '-e', '-h', 'redis', 'ping'], { env })
    expect(await ping({ REDISCLI_AUTH: site.values.REDIS_PASSWORD ?? '' })).toBe('PONG\n')
    await expect(ping({ REDISCLI_AUTH: 'wrong' })).rejects.toThrow('NOAUTH')
    await expect(ping({ REDISCLI_AUTH: '' })).rejects.toThrow('NOAUTH')
  })

  test('does not start without a password, and says so in one line', async () => {
    const { code, lines } = await exitOf(`${own.project}-redis`, [], { REDIS_PASSWORD: '' })
    expect(code).toBe(1)
    expect(lines).toEqual([
      expect.stringMatching(/^redis: REDIS_PASSWORD is not set\. Set it in docker\/\.env /),
    ])
  })

  test.each([
    'flushall',
    'flushdb',
    'config get maxmemory',
    'config set appendonly no',
    'acl setuser default +@all',
  ])('refuses %s', async (command) => {
    await redis('set', 'job', 'waiting')
    await expect(redis(...command.split(' '))).rejects.toThrow('NOPERM')
    expect(await redis('get', 'job')).toBe('waiting')
  })

  test('has 256 MB, evicts only what may expire, and writes a log', async () => {
    expect(await redis('info', 'memory')).toMatch(/^maxmemory:268435456\s+/m)
    expect(await redis('info', 'memory')).toMatch(/^maxmemory_policy:volatile-lru\s+/m)
    expect(await redis('info', 'persistence')).toMatch(/^aof_enabled:1\s+/m)
  })

  test('keeps a value through a restart and a crash', async () => {
    await redis('set', 'restarted', 'kept')
    await run(compose(site, 'restart', 'redis'))
    await answers(() => redis('get', 'restarted'), 'kept')

    await redis('set', 'crashed', 'kept as well')
    // At most one second of writes is lost.
    await sleep(1200)
    await crash(await idOf('redis'))
    await answers(() => redis('get', 'crashed'), 'kept as well')
    expect(await redis('get', 'restarted')).toBe('kept')
  })

  test('never evicts a job, however much the cache holds', async () => {
    await redis('set', 'bull:job', 'waiting')
    const fill = `for i = 1, 300 do redis.call('set', 'cache:' .. i, string.rep('x', 1048576), 'ex', 600) end`
    await redis('eval', fill, '0')
    expect(await redis('info', 'stats')).toMatch(/^evicted_keys:[1-9]/m)
    expect(await redis('get', 'bull:job')).toBe('waiting')
  })
})

describe('both passwords', () => {
  const secrets = () => [site.values.POSTGRES_PASSWORD ?? '', site.values.REDIS_PASSWORD ?? '']
  const showsSecret = (line: string) => secrets().some((secret) => line.includes(secret))

  test('are in the environment of their containers, so that a search would find them', async () => {
    expect(secrets().every((secret) => secret.length > 30)).toBe(true)
    expect(await inspect(await idOf('postgresql'), '{{json .Config.Env}}')).toContain(secrets()[0])
    expect(await inspect(await idOf('redis'), '{{json .Config.Env}}')).toContain(secrets()[1])
  })

  test('were in no command line of this host during the first start', async () => {
    const all = [...seenAtStart]
    for (const command of ['initdb', 'psql', 'redis-server', 'docker compose'])
      expect(all.join('\n')).toContain(command)
    expect(all.filter(showsSecret)).toEqual([])
  })

  test('are in no process list now', async () => {
    const tops = await Promise.all(
      (['postgresql', 'redis'] as const).map(async (service) =>
        run(['docker', 'top', await idOf(service), '-ef']),
      ),
    )
    const all = [...commandLines(), ...tops]
    for (const command of ['postgres: checkpointer', 'redis-server'])
      expect(all.join('\n')).toContain(command)
    expect(all.filter(showsSecret)).toEqual([])
  })

  test.each(['postgresql', 'redis'] as const)('are in no log and no health check of %s', async (service) => {
    const id = await idOf(service)
    const health = await inspect(id, '{{json .Config.Healthcheck}}{{json .State.Health}}')
    expect(health).toContain('"ExitCode":0')
    const log = await logOf(id)
    expect(log).toMatch(/ready to accept connections/i)
    expect([health, ...log.split('\n')].filter(showsSecret)).toEqual([])
  })
})
