/**
 * A legacy set-up of another form: other names, no docker/.env, no names of containers, PostgreSQL in a volume, a service more,
 * and LiveKit, for which a stand-in sleeps on its ports: it has no package.
 */
import { rename, rm, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { run } from '../scripts/lib/command.mts'
import * as engine from '../scripts/lib/engine.mts'
import { readEnv, readText, setValues } from '../scripts/lib/envfile.mts'
import { projectRoot } from '../scripts/lib/settings.mts'
import {
  expectLegacy,
  expectMigrated,
  isAnswered,
  killAt,
  newLegacy,
  start,
  sumsOf,
  writeUploads,
  type LegacyTest,
} from './legacy.mts'
import { mustSucceed, resultOf } from './harness.mts'

let legacy: LegacyTest
let sums: Record<string, string>
const allRows = 'SELECT id, name FROM things ORDER BY id'

beforeAll(async () => {
  legacy = await newLegacy(18_460, join(projectRoot, 'test/tiny'), {
    STRAPI_DOCKERFILE: join(projectRoot, 'test/tiny/Dockerfile'),
    HEALTH_INTERVAL: '0.2',
    HEALTH_TIMEOUT: '15',
  })
  await writeFile(
    join(legacy.source, 'package.json'),
    JSON.stringify({ name: 'tiny', private: true, scripts: { build: 'true', start: 'node server.mjs' } }),
  )
  await writeFile(join(legacy.source, 'package-lock.json'), '{}')
  const values = (await readEnv(join(legacy.folder, '.env'))) ?? {}
  await writeFile(join(legacy.folder, 'docker-compose.yaml'), composeFile(values))
  await rm(join(legacy.folder, 'docker-compose.yml'))
  await rename(join(legacy.folder, '.env'), join(legacy.folder, 'env.old'))
  const env = join(legacy.source, '.env')
  const text = setValues((await readText(env)) ?? '', { DATABASE_HOST: 'db', REDIS_HOST: 'cache-redis' })
  await writeFile(env, text.replace(/^ENCRYPTION_KEY=.*\n/m, ''))
  await run([
    'sh',
    '-c',
    // As with calls under way: it takes all the time that it is given to end.
    `printf 'FROM %s\\nENTRYPOINT ["sh", "-c", "trap : TERM; while :; do sleep 3600; done"]\\n' "$0" | docker build --quiet --tag "$1" -`,
    values.REDIS_IMAGE ?? '',
    liveKitStandIn(),
  ])
  await legacy.site.set({ LIVEKIT_IMAGE: liveKitStandIn() })
  // As the first Compose named them: project_service_1.
  process.env.COMPOSE_COMPATIBILITY = '1'
  await start(legacy)
  delete process.env.COMPOSE_COMPATIBILITY
  await legacy.sql(`CREATE TABLE things (id serial PRIMARY KEY, name text);
    INSERT INTO things (name) SELECT 'thing ' || n FROM generate_series(1, 50) AS n;
    CREATE TABLE strapi_api_tokens (id serial PRIMARY KEY, name text, description text, type text, access_key text,
      expires_at timestamp, created_at timestamp, updated_at timestamp)`)
  await writeUploads(legacy, ['one.jpg', 'empty.bin'], 1000)
  sums = await sumsOf(legacy.uploads)
})
afterAll(async () => {
  await legacy.remove()
  await run(['docker', 'image', 'rm', liveKitStandIn()])
})

function liveKitStandIn(): string {
  return `${legacy.project}-livekit-standin`
}

function composeFile(values: Record<string, string>): string {
  const build = (context: string, image: string) =>
    `    build: { context: ./${context}, args: { ${image}: '${values[image] ?? ''}' } }\n    restart: unless-stopped`
  return `name: ${legacy.project}
services:
  app-strapi:
${build('strapi', 'NODE_IMAGE')}
    environment: { HOST: 0.0.0.0, PORT: '8080' }
    volumes: ['${legacy.source}:/app/bob']
    ports: ['127.0.0.1:${values.STRAPI_PORT}:8080']
  db:
${build('postgresql', 'POSTGRES_IMAGE')}
    environment: { POSTGRES_USER: BoB, POSTGRES_PASSWORD: ${values.POSTGRES_PASSWORD}, POSTGRES_DB: BoB, PGDATA: /var/lib/postgresql/data/pgdata }
    volumes: ['db-data:/var/lib/postgresql/data']
  cache-redis:
${build('redis', 'REDIS_IMAGE')}
    volumes: ['redis-data:/data', '${legacy.source}:/app/bob']
  livekit:
    image: ${liveKitStandIn()}
    init: true
    restart: unless-stopped
    ports: ['7880:7880']
  mail:
    image: ${values.REDIS_IMAGE}
    restart: unless-stopped
volumes: { db-data: {}, redis-data: {} }
`
}

test('a service that is not known stops it; with --leave it stays as it is', async () => {
  const refused = await legacy.migrate('--yes')
  expect([refused.code, refused.stderr]).toEqual([
    2,
    expect.stringMatching(/service mail is not known[^]*--leave mail/),
  ])
  const early = await legacy.migrate('--leave', 'mail', '--finalize', '--yes')
  expect([early.code, early.stderr]).toEqual([2, expect.stringContaining('does not serve alone')])
  const rows = await legacy.sql(allRows)
  // Killed while LiveKit of the legacy set-up is still ending.
  const { stdout } = await killAt(legacy, ['--leave', 'mail', '--yes'], 'starting strapi-master', 100)
  expect(stdout).toContain('the data is in a volume of the engine')
  await mustSucceed(legacy.migrate('--leave', 'mail', '--yes'))
  await expectMigrated(legacy)
  expect(await legacy.sql(allRows, true)).toBe(rows)
  expect(await sumsOf(join(legacy.own.folder, 'uploads'))).toEqual(sums)
  expect(await states()).toEqual({
    'app-strapi': 'exited',
    'cache-redis': 'exited',
    db: 'exited',
    livekit: 'exited',
    mail: 'running',
  })
  expect(await liveKitOf(legacy.own.project)).toBe('running')
})

test('a secret that the legacy application does not have is made, for the new one alone', async () => {
  const key = async (source: string) => (await readEnv(join(source, '.env')))?.ENCRYPTION_KEY
  expect(await key(legacy.source)).toBe(undefined)
  expect(await key(legacy.own.source)).toMatch(/^\S{32,}$/)
})

test('and back, when somebody has taken a port of LiveKit: visitors are served, and the same command ends it', async () => {
  const taken = createServer()
  // As soon as it is free.
  taken.on('error', () => setTimeout(() => taken.listen(7880), 5))
  const argv = ['--from', legacy.folder, '--rollback', '--yes']
  const back = await legacy.site.begin('migrate', argv, ({ message }) => {
    if (message === 'LiveKit, too') taken.listen(7880)
  }).outcome
  await new Promise((resolve) => taken.close(resolve))
  expect([back.code, resultOf(back).error]).toEqual([3, expect.stringMatching(/not wholly back[^]*7880/)])
  expect(await isAnswered(legacy.own.url)).toBe(true)
  expect(await states()).toMatchObject({ 'app-strapi': 'running', livekit: 'exited' })

  const { stdout } = await mustSucceed(legacy.migrate('--rollback', '--yes'))
  expect(stdout).toContain(`To be rid of it: rm -r ${join(legacy.own.folder, 'uploads')}; docker image rm`)
  await expectLegacy(legacy)
  expect(new Set(Object.values(await states()))).toEqual(new Set(['running']))
  expect(await liveKitOf(legacy.own.project)).toBe(undefined)
})

async function liveKitOf(project: string): Promise<string | undefined> {
  const [found] = await engine.serviceContainers(project, 'livekit')
  return found?.State.Status
}

async function states(): Promise<Record<string, string>> {
  const format = '{{.Label "com.docker.compose.service"}} {{.State}}'
  const filter = `label=com.docker.compose.project=${legacy.project}`
  const lines = await run(['docker', 'ps', '--all', '--filter', filter, '--format', format])
  return Object.fromEntries(
    lines
      .trim()
      .split('\n')
      .map((line) => line.split(' ') as [string, string]),
  )
}
