/** Deploys of a real Strapi under load: the good one, those that fail, the way back. */
import { existsSync } from 'node:fs'
import { readFile, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterAll, afterEach, beforeAll, describe, expect, test, vi } from 'vitest'
import { startLoad, type Load, type LoadOptions, type LoadReport } from '../example/load.mts'
import { run } from '../scripts/lib/command.mts'
import { query } from '../scripts/lib/compose.mts'
import * as engine from '../scripts/lib/engine.mts'
import { getUrl } from '../scripts/lib/http.mts'
import type { Figures } from '../scripts/lib/proof.mts'
import { composeCommand, loadSite, projectRoot, type SlotName } from '../scripts/lib/settings.mts'
import {
  containers,
  mustSucceed,
  resultOf,
  settingOf,
  strapiSite,
  type Outcome,
  type TestSite,
} from './harness.mts'

vi.setConfig({ testTimeout: 600_000 }) // most of it is building changed source

let site: TestSite
let load: Load | undefined

beforeAll(async () => {
  site = await strapiSite(18_100)
  await mustSucceed(site.run('deploy'))
})
afterEach(async () => {
  await load?.stop()
  load = undefined
})
afterAll(async () => {
  await site.remove()
})

// A slow machine with two cores answers just so many; with more of them, `npm run bench:deploy` measures.
const light = { getsPerSecond: 30, postsPerSecond: 12, slowBodiesPerSecond: 1, slowBodyMs: 6000 }
const heavy = { ...light, slowBodyMs: 8000, slowAnswersPerSecond: 1, uploadsPerSecond: 0.25 }

/** What visitors got from a second before `action` until a second after it. */
async function visitorsDuring<T>(
  options: Partial<LoadOptions>,
  action: () => Promise<T>,
): Promise<[LoadReport, T]> {
  load = startLoad({ url: site.url, ...light, ...options })
  await sleep(1000)
  const result = await action()
  await sleep(1000)
  return [await load.stop(), result]
}

/**
 * A deploy with visitors from the end of its build on. Beside them a build takes three times as long; that it loses none of
 * them is seen in the good deploy.
 */
async function deployWithVisitors(): Promise<[LoadReport, Outcome]> {
  const { outcome } = site.begin('deploy', [], ({ event, step }) => {
    if (event === 'step-done' && step === '1/7') load = startLoad({ url: site.url, ...light })
  })
  const ended = await outcome
  await sleep(3000)
  if (!load) throw new Error(`the build did not end\n${ended.stdout}\n${ended.stderr}`)
  return [await load.stop(), ended]
}

function expectNobodyLost(report: LoadReport, leastSent: number): void {
  const { lost, notStored, storedTwice } = report
  expect({ lost: lost.slice(0, 5), notStored, storedTwice }).toEqual({
    lost: [],
    notStored: [],
    storedTwice: [],
  })
  expect(report.sent).toBeGreaterThan(leastSent)
  expect(report.kinds['slow body']?.ok).toBeGreaterThan(0)
}

/** One line of the test run's output. */
function show(title: string, report: LoadReport): void {
  const slowestMs = Math.max(...['GET', 'GET fresh'].map((kind) => report.kinds[kind]?.slowestMs ?? 0))
  const figures = `${report.lost.length} of ${report.sent} requests lost, ${report.storedTwice.length} of ${report.tokens} POSTs executed twice`
  console.log(`${title}: ${figures}, slowest GET ${slowestMs} ms, longest gap ${report.longestGapMs} ms`)
}

async function expectMasterServesAlone(release: unknown): Promise<void> {
  const { master, slave, flag, pinned } = await site.observe()
  expect({ master: master.status, release: master.release, slave: slave.status, flag, pinned }).toEqual({
    master: 'healthy',
    release,
    slave: 'stopped',
    flag: 'strapi-master',
    pinned: release,
  })
  expect((await getUrl(`${site.url}/api/pings`)).headers['x-release']).toBe(release)
}

/** A Compose command as an operator types it. */
async function operator(rest: string): Promise<void> {
  await run(composeCommand(await loadSite(site.envFile), rest).split(' '), { cwd: projectRoot })
}

async function edit(file: string, from: string, to: string): Promise<void> {
  const text = await readFile(join(site.source, file), 'utf8')
  expect(text).toContain(from)
  await writeFile(join(site.source, file), text.replace(from, to))
}

async function sql(text: string): Promise<string> {
  const [postgresql] = await engine.serviceContainers(site.project, 'postgresql')
  const { database } = await loadSite(site.envFile)
  return (await run(query(postgresql?.Id ?? '', database.name, text))).trim()
}

async function hasColumn(name: string): Promise<boolean> {
  const found = await sql(
    `SELECT count(*) FROM information_schema.columns WHERE table_name = 'pings' AND column_name = '${name}'`,
  )
  return found === '1'
}

/** Times of a slot's [CRON] lines. */
async function cronTimes(slot: SlotName): Promise<string[]> {
  const lines: string[] = []
  const { slots } = await loadSite(site.envFile)
  await run(['docker', 'logs', '--timestamps', slots[slot].container], {
    onLine: (line) => lines.push(line),
  })
  expect(lines.length).toBeGreaterThan(0)
  return lines.filter((line) => line.includes('[CRON]')).map((line) => line.slice(0, line.indexOf(' ')))
}

describe('a good deploy', () => {
  test('loses no request and runs none twice, whatever visitors are at', async () => {
    const before = await settingOf(site, 'STRAPI_VERSION')
    const [report, outcome] = await visitorsDuring(heavy, () => site.begin('deploy', []).outcome)
    await mustSucceed(Promise.resolve(outcome))
    show('A good deploy', report)

    expectNobodyLost(report, 400)
    for (const kind of ['GET', 'GET fresh', 'POST', 'POST fresh', 'slow body', 'slow answer', 'upload']) {
      expect(report.kinds[kind]?.ok, kind).toBeGreaterThan(5)
    }
    expect(await sql('SELECT count(*), count(DISTINCT token) FROM pings')).toBe(
      `${report.tokens}|${report.tokens}`,
    )

    const { release, figures } = resultOf(outcome) as { release?: string; figures?: Figures }
    expect(report.releases.map((one) => one.release)).toEqual([before, release])
    expect(report.releases.every((one) => one.answers > 200)).toBe(true)
    expect(figures).toMatchObject({ failed: 0, applicationErrors: 0, probesFailed: 0 })
    // It counts from step 4 on; the load was there before.
    expect(figures?.requests).toBeGreaterThan(report.sent / 4)
    expect(figures?.requests).toBeLessThan(report.sent * 1.1)
    expect(figures?.probes).toBeGreaterThan(50)
    await expectMasterServesAlone(release)
  })

  test('leaves nothing to do for docker compose up -d', async () => {
    const before = await containers(site)
    await operator('up -d')
    expect(await containers(site)).toEqual(before)
    await expectMasterServesAlone(await settingOf(site, 'STRAPI_VERSION'))
  })
})

describe('a release that changes the schema', () => {
  const schema = 'src/api/ping/content-types/ping/schema.json'
  const bootstrap = '  bootstrap({ strapi }: { strapi: Core.Strapi }) {\n'
  const fault = "    if (existsSync('public/uploads/.broken')) throw new Error('broken on purpose')\n"
  let marker: string
  beforeAll(async () => {
    marker = join((await loadSite(site.envFile)).folders.uploads, '.broken')
  })

  test('and does not boot leaves master alone and says both', async () => {
    const [before, release] = [
      await site.containerId('strapi-master'),
      await settingOf(site, 'STRAPI_VERSION'),
    ]
    await edit(schema, '"token": {', '"note": { "type": "string" },\n    "token": {')
    await edit('src/index.ts', 'import', "import { existsSync } from 'node:fs'\nimport")
    await edit('src/index.ts', bootstrap, bootstrap + fault)
    await edit('config/cron-tasks.ts', '*/10 * * * * *', '* * * * * *') // every second
    await writeFile(marker, '')
    const [report, outcome] = await deployWithVisitors()
    show('A release that does not boot', report)

    expectNobodyLost(report, 150)
    expect(outcome.code).toBe(1)
    const { error, advice } = resultOf(outcome)
    expect(error).toContain('master was not touched')
    expect(error).toContain('broken on purpose')
    expect(advice).toContain('changed the database schema while it booted')
    expect(await hasColumn('note')).toBe(true)
    expect(await site.containerId('strapi-master')).toBe(before)
    await expectMasterServesAlone(release)
  })

  test('and boots goes live, killed on its way, and nobody notices; crons run on master only, also while both are up', async () => {
    await rm(marker)
    const flag = join((await loadSite(site.envFile)).folders.traffic, 'slave')
    const [report, outcome] = await visitorsDuring({}, async () => {
      const first = site.begin('deploy', [], (event, child) => {
        if (event.event !== 'step' || event.step !== '4/7') return
        const watch = setInterval(() => {
          if (!existsSync(flag)) return
          clearInterval(watch)
          child.kill('SIGKILL')
        }, 5)
      })
      expect((await first.outcome).code).toBe(null)
      expect(await site.observe()).toMatchObject({ flag: 'strapi-slave', slave: { status: 'healthy' } })
      return await site.begin('deploy', []).outcome
    })
    await mustSucceed(Promise.resolve(outcome))
    show('A killed deploy and the next one', report)
    expectNobodyLost(report, 400)
    await expectMasterServesAlone(resultOf(outcome).release)

    const slave = await engine.container((await loadSite(site.envFile)).slots['strapi-slave'].container)
    const { StartedAt: from = '', FinishedAt: to = '' } = slave?.State ?? {}
    const besideSlave = (await cronTimes('strapi-master')).filter((at) => at > from && at < to)
    expect(besideSlave.length).toBeGreaterThan(1)
    expect(await cronTimes('strapi-slave')).toEqual([])
  })

  test('is rolled back only by somebody who accepts what that drops', async () => {
    const [before, live] = [await containers(site), await settingOf(site, 'STRAPI_VERSION')]
    const refused = await site.begin('deploy', ['--rollback']).outcome
    expect(refused.code).toBe(2)
    expect(resultOf(refused).error).toContain('column pings.note')
    expect(resultOf(refused).advice).toContain('--accept-schema-change')
    expect(await containers(site)).toEqual(before)
    expect(await hasColumn('note')).toBe(true)
    await expectMasterServesAlone(live)

    const [report, outcome] = await visitorsDuring(
      {},
      () => site.begin('deploy', ['--rollback', '--accept-schema-change']).outcome,
    )
    await mustSucceed(Promise.resolve(outcome))
    show('A rollback', report)
    expectNobodyLost(report, 150)
    const { release } = resultOf(outcome)
    expect(report.releases.map((one) => one.release)).toEqual([live, release])
    expect(await hasColumn('note')).toBe(false)
    await expectMasterServesAlone(release)
  })

  test('is left by a restore of what was before it: its own release is offered, deployed, and drops nothing', async () => {
    const before = (await settingOf(site, 'STRAPI_VERSION')) ?? ''
    const backup = await mustSucceed(site.begin('data', ['backup', '--only', 'database']).outcome)
    const set = String(resultOf(backup).set)
    await mustSucceed(site.run('deploy'))
    expect(await hasColumn('note')).toBe(true)

    const refused = await site.run('data', 'restore', set, '--yes')
    expect([refused.code, refused.stderr]).toEqual([1, expect.stringContaining('--accept other-schema')])
    expect(await hasColumn('note')).toBe(true)
    const { stdout } = await mustSucceed(
      site.run('data', 'restore', set, '--yes', '--accept', 'other-schema'),
    )
    expect(stdout).toMatch(new RegExp(`Now: .*deploy\\.mts .*--rollback ${before}`))
    expect(await hasColumn('note')).toBe(false)

    await mustSucceed(site.run('deploy', '--rollback', before))
    expect(await hasColumn('note')).toBe(false)
    await expectMasterServesAlone(before)
    const master = await engine.container(`${site.project}-strapi-master`)
    expect(master?.HostConfig.RestartPolicy.Name).toBe('unless-stopped')
  })
})

test('a restore and its undo are hardly seen by visitors who read the database 50 times a second', async () => {
  await mustSucceed(site.run('data', 'backup', '--only', 'database'))
  const during = async () => {
    await mustSucceed(site.run('data', 'restore', '--only', 'database', '--yes'))
    await sleep(500)
    await mustSucceed(site.run('data', 'undo', '--yes'))
  }
  const gapsMs: number[] = []
  // A shared machine may stand still for a second by itself.
  for (let attempt = 0; attempt < 3 && gapsMs.every((gapMs) => gapMs >= 1500); attempt++) {
    const [report] = await visitorsDuring(
      { getsPerSecond: 50, postsPerSecond: 0, slowBodiesPerSecond: 0 },
      during,
    )
    const { ok, lost, longestGapMs } = report
    gapsMs.push(longestGapMs)
    expect(ok).toBeGreaterThan(200)
    // What was asking the database at the two moments of the swaps: at most one for each connection of Strapi's pool.
    expect(lost.length, JSON.stringify(lost.slice(0, 5))).toBeLessThanOrEqual(2 * 10)
    expect(lost.every(({ why }) => why.includes('500'))).toBe(true)
  }
  // On a busy machine; what it is on a quiet one, `npm run bench:data` says.
  expect(Math.min(...gapsMs)).toBeLessThan(1500)
})

describe('uploads', () => {
  test('are served by nginx, also while Strapi is away; hidden files are not', async () => {
    const picture = '<svg xmlns="http://www.w3.org/2000/svg"/>'
    const { folders } = await loadSite(site.envFile)
    await writeFile(join(folders.uploads, 'picture.svg'), picture)
    await writeFile(join(folders.uploads, '.hidden.svg'), picture)
    const expectServed = async () => {
      const answer = await getUrl(`${site.url}/uploads/picture.svg`)
      expect(answer).toMatchObject({
        status: 200,
        body: picture,
        headers: {
          'content-type': 'image/svg+xml',
          'x-content-type-options': 'nosniff',
          'content-security-policy': expect.stringMatching(/default-src 'none'.*sandbox/),
        },
      })
      expect(answer.headers['x-release']).toBe(undefined)
      expect((await getUrl(`${site.url}/uploads/.hidden.svg`)).status).toBe(404)
    }
    expect((await getUrl(`${site.url}/api/pings`)).status).toBe(200)
    await expectServed()

    await operator('stop strapi-master')
    expect((await site.observe()).slave.status).toBe('stopped')
    expect((await getUrl(`${site.url}/api/pings`)).status).toBe(502)
    await expectServed()
  })
})
