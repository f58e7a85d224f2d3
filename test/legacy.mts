/** A legacy site for the tests: running, filled, with a helper for what visitors and operators see of it. */
import { createHash, randomBytes } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { mkdtemp, readdir, readFile, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { expect, inject } from 'vitest'
import {
  legacyCompose,
  removeLegacySite,
  startNginx,
  writeLegacySite,
  type LegacySite,
} from '../example/legacy.mts'
import { ask, run } from '../scripts/lib/command.mts'
import * as engine from '../scripts/lib/engine.mts'
import { setValues } from '../scripts/lib/envfile.mts'
import { getUrl } from '../scripts/lib/http.mts'
import { projectRoot } from '../scripts/lib/settings.mts'
import { resultOf, testSite, type Outcome, type TestSite } from './harness.mts'

export interface LegacyTest extends LegacySite {
  /** The new set-up. */
  site: TestSite
  migrate(...options: string[]): Promise<Outcome>
  /** In the legacy database or, with `isNew`, in the new one. */
  sql(text: string, isNew?: boolean): Promise<string>
  remove(): Promise<void>
}

/**
 * With the tiny app in Strapi's place. Its tables are those that a migration looks at.
 * @param settings of the new set-up
 * @param theirs in the legacy docker/.env
 */
export async function tinyLegacy(
  port: number,
  settings: Record<string, string> = {},
  theirs: Record<string, string> = {},
): Promise<LegacyTest> {
  const legacy = await newLegacy(port, join(projectRoot, 'test/tiny'), {
    STRAPI_DOCKERFILE: join(projectRoot, 'test/tiny/Dockerfile'),
    HEALTH_INTERVAL: '0.2',
    HEALTH_TIMEOUT: '15',
    ...settings,
  })
  const env = join(legacy.folder, '.env')
  await writeFile(env, setValues(await readFile(env, 'utf8'), theirs), { mode: 0o600 })
  const scripts = { build: 'true', start: 'node server.mjs' }
  await writeFile(
    join(legacy.source, 'package.json'),
    JSON.stringify({ name: 'tiny', version: '1.0.0', private: true, scripts }),
  )
  try {
    await start(legacy)
    await legacy.sql(`CREATE TABLE dated (id serial PRIMARY KEY, created_at timestamp, updated_at timestamp);
      INSERT INTO dated (created_at, updated_at) SELECT '2026-01-01', '2026-01-01' FROM generate_series(1, 3);
      CREATE TABLE things (id serial PRIMARY KEY, name text);
      INSERT INTO things (name) SELECT 'thing ' || n FROM generate_series(1, 500) AS n;
      CREATE TABLE strapi_api_tokens (id serial PRIMARY KEY, name text, description text, type text, access_key text,
        expires_at timestamp, created_at timestamp, updated_at timestamp);
      CREATE TABLE files (id serial PRIMARY KEY, url text, provider text, formats jsonb);
      CREATE TABLE strapi_database_schema (id serial PRIMARY KEY, hash text, schema json);
      INSERT INTO strapi_database_schema (hash, schema) VALUES ('of the legacy one', '{ "tables": [] }')`)
    await fillUploads(legacy, oddNames(20))
  } catch (error) {
    await legacy.remove()
    throw error
  }
  return legacy
}

export async function newLegacy(
  port: number,
  application: string,
  settings: Record<string, string>,
): Promise<LegacyTest> {
  const project = `bob-test-${port}-${randomBytes(2).toString('hex')}`
  const folder = await mkdtemp(join(tmpdir(), `${project}-`))
  const legacy = await writeLegacySite({
    folder,
    project,
    port,
    application,
    settings: { ...inject('baseImages'), ...settings },
  })
  const site = testSite(legacy.own)
  return {
    ...legacy,
    site,
    migrate: (...options) => site.run('migrate', '--from', legacy.folder, ...options),
    async sql(text, isNew = false) {
      const id = await postgresqlOf(isNew ? legacy.own.project : legacy.project)
      const psql = [
        'psql',
        '--no-psqlrc',
        '--quiet',
        '--tuples-only',
        '--no-align',
        '--username=BoB',
        '--dbname=BoB',
      ]
      return (await run(['docker', 'exec', '--user=postgres', id, ...psql, '--command', text])).trim()
    },
    remove: () => removeLegacySite(legacy),
  }
}

async function postgresqlOf(project: string): Promise<string> {
  const found = (await engine.composeContainers()).find(
    ({ Config: { Labels } }) =>
      Labels['com.docker.compose.project'] === project &&
      /^(postgresql|db)$/.test(Labels['com.docker.compose.service'] ?? ''),
  )
  return found?.Id ?? ''
}

export async function start(legacy: LegacySite): Promise<void> {
  await legacyCompose(legacy, 'up', '--detach', '--build')
  await untilPostgresql(legacy, 120_000)
  await startNginx(legacy)
  await untilAnswered(legacy, 600_000)
}

/** Over TCP: a first start has a server of its own, on the socket alone. The tiny app does not wait for it. */
async function untilPostgresql({ project }: LegacySite, patienceMs: number): Promise<void> {
  const deadline = Date.now() + patienceMs
  const isReady = ['docker', 'exec', await postgresqlOf(project), 'pg_isready', '--host=127.0.0.1']
  while ((await ask(isReady)) === undefined) {
    if (Date.now() > deadline) throw new Error(`PostgreSQL of ${project} is not ready`)
    await sleep(200)
  }
}

/** Through nginx, as a visitor. */
export async function untilAnswered({ own }: LegacySite, patienceMs: number): Promise<void> {
  const deadline = Date.now() + patienceMs
  while (!(await isAnswered(own.url))) {
    if (Date.now() > deadline) throw new Error(`${own.url} does not answer`)
    await sleep(200)
  }
}

export async function isAnswered(url: string): Promise<boolean> {
  return await getUrl(`${url}/_health`, { headers: { host: 'bob.strapi-pro.com' } }).then(
    ({ status }) => status === 204,
    () => false,
  )
}

export function oddNames(count: number): string[] {
  const odd = [
    'with spaces.jpg',
    'accents éàü.png',
    `${'x'.repeat(196)}.jpg`,
    'empty.bin',
    "quote's & more.pdf",
    '日本.jpg',
  ]
  return [...odd, ...Array.from({ length: count - odd.length }, (_, at) => `picture_${at}.jpg`)]
}

export async function writeUploads(legacy: LegacyTest, names: string[], bytes: number): Promise<void> {
  for (const name of names)
    await writeFile(join(legacy.uploads, name), name === 'empty.bin' ? '' : randomBytes(bytes))
}

/** Files of the legacy site, each with a row that refers to it. */
async function fillUploads(legacy: LegacyTest, names: string[]): Promise<void> {
  await writeUploads(legacy, names, 20_000)
  const rows = names.map((name) => `('/uploads/${name.replaceAll("'", "''")}', 'local')`)
  await legacy.sql(`INSERT INTO files (url, provider) VALUES ${rows.join(', ')}`)
}

/** SHA-256 of all files below a folder, and when they were changed in tenths of a second, by name. */
export async function sumsOf(folder: string, leftOut?: RegExp): Promise<Record<string, string>> {
  const names = (await readdir(folder, { recursive: true, withFileTypes: true }))
    .filter((entry) => entry.isFile())
    .map((entry) => join(entry.parentPath, entry.name))
    // The tiny app's own table goes on all the time.
    .filter((path) => !/\.strapi-blue-green|\/\.pings$/.test(path) && !leftOut?.test(path))
    .toSorted()
  const sums: Record<string, string> = {}
  for (const path of names) {
    const hash = createHash('sha256')
    for await (const part of createReadStream(path)) hash.update(part as Buffer)
    sums[path.slice(folder.length + 1)] =
      `${hash.digest('hex')} ${Math.floor((await stat(path)).mtimeMs / 100)}`
  }
  return sums
}

/** What `--status` says of it. */
export async function stateOf(legacy: LegacyTest): Promise<unknown> {
  return resultOf(await legacy.site.begin('migrate', ['--status', '--from', legacy.folder]).outcome).state
}

/** It answers as before, and alone. */
export async function expectLegacy(legacy: LegacyTest): Promise<void> {
  expect(await stateOf(legacy)).toBe('legacy')
  expect(await isAnswered(legacy.own.url)).toBe(true)
  const found = await engine.composeContainers()
  const of = (project: string) =>
    found.filter((one) => one.Config.Labels['com.docker.compose.project'] === project)
  for (const { Name, State, HostConfig } of of(legacy.project))
    expect([Name, State.Status, HostConfig.RestartPolicy.Name]).toEqual([
      Name,
      'running',
      expect.stringMatching(/^(always|unless-stopped)$/),
    ])
  expect(of(legacy.own.project).filter((one) => one.State.Status === 'running')).toEqual([])
  expect((await readdir(legacy.folder)).filter((name) => name.endsWith('.migrated'))).toEqual([])
  expect(await readdir(join(legacy.own.folder, 'nginx/conf.d'))).toEqual(['legacy.conf'])
}

export async function expectMigrated(legacy: LegacyTest): Promise<void> {
  expect(await stateOf(legacy)).toBe('served')
  expect(await isAnswered(legacy.own.url)).toBe(true)
  const { master } = await legacy.site.observe()
  expect(master.status).toBe('healthy')
  expect(await readdir(join(legacy.own.folder, 'nginx/conf.d'))).toEqual(['bob.strapi-pro.com.conf'])
}

/** kill -9, so many milliseconds after it has said this. */
export async function killAt(
  legacy: LegacyTest,
  options: string[],
  message: string,
  delayMs: number,
): Promise<Outcome> {
  const acted: Promise<void>[] = []
  const argv = ['--from', legacy.folder, ...options]
  const { outcome } = legacy.site.begin('migrate', argv, (event, child) => {
    if (event.message.startsWith(message) && acted.length === 0)
      acted.push(sleep(delayMs).then(() => void child.kill('SIGKILL')))
  })
  const ended = await outcome
  const { code, stdout } = ended
  expect([code, acted.length], `killed at "${message}"\n${stdout}`).toEqual([null, 1])
  await Promise.all(acted)
  return ended
}

/** Everything of both set-ups that a run could have changed. */
export async function worldOf({ own, project }: LegacySite): Promise<unknown> {
  const list = async (...rest: string[]) => (await run(['docker', ...rest])).split('\n').toSorted()
  const containers = (await engine.composeContainers()).filter((one) =>
    [project, own.project].includes(one.Config.Labels['com.docker.compose.project'] ?? ''),
  )
  // PostgreSQL and Redis write as they like; nginx logs.
  const files = Object.entries(await sumsOf(own.folder, /\/data\/postgresql\/|nginx\/.*\.log/))
  return {
    files,
    containers: containers.map((one) => [
      one.Id,
      one.Name,
      one.State.Status,
      one.State.StartedAt,
      one.HostConfig.RestartPolicy.Name,
    ]),
    volumes: (await list('volume', 'ls', '--quiet')).filter((name) => name.startsWith(own.project)),
    images: (await list('image', 'ls', '--format', '{{.Repository}}:{{.Tag}}')).filter((name) =>
      name.startsWith(own.project),
    ),
    networks: (await list('network', 'ls', '--format', '{{.Name}}')).filter((name) =>
      name.startsWith(own.project),
    ),
  }
}
