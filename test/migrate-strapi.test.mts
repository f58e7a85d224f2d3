/** The migration with the real Strapi: logins, tokens, odd files, and what visitors miss beside the manual procedure. */
import { appendFile, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { startLoad } from '../example/load.mts'
import { run } from '../scripts/lib/command.mts'
import { compose } from '../scripts/lib/compose.mts'
import { readEnv } from '../scripts/lib/envfile.mts'
import { loadSite, projectRoot } from '../scripts/lib/settings.mts'
import { logIn, registerAdmin } from './admin.mts'
import { mustSucceed } from './harness.mts'
import {
  newLegacy,
  oddNames,
  start,
  sumsOf,
  untilAnswered,
  writeUploads,
  type LegacyTest,
} from './legacy.mts'

let legacy: LegacyTest
let token: string
let rows: string
let sums: Record<string, string>
const allRows = 'SELECT token FROM pings ORDER BY id'

beforeAll(async () => {
  legacy = await newLegacy(18_420, join(projectRoot, 'example/strapi'), {})
  await bringPackages(legacy)
  await start(legacy)
  const admin = await registerAdmin(strapi())
  token = await admin.createApiToken()
  await admin.upload('before.png', await readFile(join(projectRoot, 'example/strapi/favicon.png')))
  await legacy.sql(`INSERT INTO pings (document_id, token, created_at, updated_at, published_at)
    SELECT md5('d' || n), 'token ' || n, now(), now(), now() FROM generate_series(1, 500) AS n`)
  const names = oddNames(299)
  await writeUploads(legacy, names, 5000)
  await writeUploads(legacy, ['film.mp4'], 50_000_000)
  const files = [...names, 'film.mp4'].map((name, at) => {
    const url = `/uploads/${name.replaceAll("'", "''")}`
    return `(md5('f${at}'), 'file ${at}', '${url}', 'local', 'hash_${at}', 1, 'application/octet-stream', '/', now(), now(), now())`
  })
  await legacy.sql(`INSERT INTO files (document_id, name, url, provider, hash, size, mime, folder_path, created_at, updated_at, published_at)
    VALUES ${files.join(', ')}`)
  rows = await legacy.sql(allRows)
  sums = await sumsOf(legacy.uploads)
}, 1_200_000)
afterAll(async () => {
  await legacy.remove()
})

/** As a legacy site that has run for long: its packages are installed. Other tests have the layer built already. */
async function bringPackages({ own, source, project }: LegacyTest): Promise<void> {
  const { NODE_IMAGE } = (await readEnv(own.envFile)) ?? {}
  const image = `${project}-deps`
  const build = ['docker', 'build', '--target', 'deps', '--tag', image]
  if (NODE_IMAGE) build.push('--build-arg', `NODE_IMAGE=${NODE_IMAGE}`)
  build.push('--file', join(projectRoot, 'docker/strapi/Dockerfile'), source)
  await run(build, { timeoutMs: 1_200_000, env: { DOCKER_BUILDKIT: '1' } })
  const id = (await run(['docker', 'create', image])).trim()
  await run(['docker', 'cp', `${id}:/app/bob/node_modules`, source])
  await run(['docker', 'rm', id])
  await run(['docker', 'image', 'rm', image])
}

/** Past nginx, the same port before and after. */
function strapi(): string {
  return `http://127.0.0.1:${Number(new URL(legacy.own.url).port) + 2}`
}

async function expectAllThere(isNew: boolean): Promise<void> {
  expect(await legacy.sql(allRows, isNew)).toBe(rows)
  expect(await sumsOf(isNew ? join(legacy.own.folder, 'uploads') : legacy.uploads)).toEqual(sums)
  await logIn(strapi())
  const answer = await fetch(`${strapi()}/api/upload/files`, {
    headers: { authorization: `Bearer ${token}` },
  })
  expect(answer.status).toBe(200)
  expect(((await answer.json()) as unknown[]).length).toBeGreaterThanOrEqual(300)
}

let scripted: number

test('takes everything along under a light load: rows, bytes, logins, tokens; the list is all ticked', async () => {
  scripted = await outageOf(async () => {
    const { stdout } = await mustSucceed(legacy.migrate('--yes'))
    console.log(stdout)
    const log = await run(['docker', 'logs', `${legacy.own.project}-strapi-master`])
    const events = log.split('\n').filter((line) => !line.includes(': GET /'))
    expect(stdout.match(/\[x\]/g), events.join('\n')).toHaveLength(7)
  })
  await expectAllThere(true)
})

test('goes back to the legacy Strapi, which answers as before', async () => {
  await mustSucceed(legacy.migrate('--rollback', '--yes'))
  await expectAllThere(false)
})

test('killed while Strapi starts, the same command comes to the same end', async () => {
  const killed = legacy.site.begin('migrate', ['--from', legacy.folder, '--yes'], (event, child) => {
    if (event.message === 'starting strapi-master') void sleep(1000).then(() => child.kill('SIGKILL'))
  })
  expect((await killed.outcome).code).toBe(null)
  await mustSucceed(legacy.migrate('--yes'))
  await expectAllThere(true)
})

test('visitors miss less than by the manual procedure on the same machine', async () => {
  const bare = await startOfServices()
  const manual = await outageOf(byHand)
  const seconds = (ms: number) => `${(ms / 1000).toFixed(1)} s`
  console.log(
    `outage from outside: scripted ${seconds(scripted)}, by hand ${seconds(manual)}; PostgreSQL, Redis and one Strapi start in ${seconds(bare)}`,
  )
  expect(scripted).toBeLessThan(manual)
})

/** Longest time in which no visitor got an answer. */
async function outageOf(action: () => Promise<void>): Promise<number> {
  const getsPerSecond = 10
  const startedAt = Date.now()
  const load = startLoad({
    url: legacy.own.url,
    host: 'bob.strapi-pro.com',
    getsPerSecond,
    postsPerSecond: 0,
  })
  try {
    await action()
    await untilAnswered(legacy, 300_000)
    await sleep(1000)
  } catch (error) {
    await load.stop()
    throw error
  }
  const report = await load.stop()
  expect(report.sent).toBeGreaterThan(((Date.now() - startedAt) / 1000) * getsPerSecond * 0.5)
  return report.longestGapMs
}

/** The least that there is to wait for: all three stopped, then started one behind the other. */
async function startOfServices(): Promise<number> {
  const site = await loadSite(legacy.own.envFile)
  await run(compose(site, 'stop', 'strapi-master', 'redis', 'postgresql'))
  const startedAt = Date.now()
  await run(compose(site, 'up', '--detach', 'strapi-master'))
  await untilAnswered(legacy, 120_000)
  return Date.now() - startedAt
}

/** The chapter of the runbook that the script replaces, down, build, up, from a set-up that starts as fast as the new one. */
async function byHand(): Promise<void> {
  const site = await loadSite(legacy.own.envFile)
  // As if nothing had been built: the source has changed since.
  await appendFile(join(site.source, 'README.md'), '\n')
  await run(compose(site, 'down'))
  await run(compose(site, 'build', 'strapi-master'), { timeoutMs: 1_200_000, env: { DOCKER_BUILDKIT: '1' } })
  await run(compose(site, 'up', '--detach'), { timeoutMs: 300_000 })
}
