/** Killed, restarted or disturbed anywhere: visitors stay served, and the next run mends it. The tiny app stands for Strapi. */
import { readFile, rm, writeFile } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { startLoad } from '../example/load.mts'
import { nginxPid } from '../example/site.mts'
import { orphans, run } from '../scripts/lib/command.mts'
import { loadSite } from '../scripts/lib/settings.mts'
import {
  deployAnd,
  expectWhole,
  mustSucceed,
  resultOf,
  settingOf,
  tinySite,
  type TestSite,
} from './harness.mts'

let site: TestSite

beforeAll(async () => {
  site = await tinySite(18_020)
  await mustSucceed(site.run('deploy'))
})
afterAll(async () => {
  await site.remove()
})

/** Visitors from now until `end`. */
function visitors() {
  return startLoad({
    url: site.url,
    getsPerSecond: 40,
    postsPerSecond: 15,
    slowBodiesPerSecond: 1,
    slowBodyMs: 1500,
    slowAnswersPerSecond: 1,
    slowAnswerMs: 1500,
  })
}

describe('a deploy that is killed with -9', () => {
  const points: [string, number][] = [
    ['2/7', 0],
    ['4/7', 0],
    ['4/7', 150],
    ['5/7', 0],
    ['6/7', 0],
    ['7/7', 0],
  ]
  test.each(points)(
    'in step %s after %i ms: nobody notices, and the next run ends it well',
    async (stepNumber, delayMs) => {
      const load = visitors()
      const killed = await deployAnd(site, stepNumber, delayMs, (pid) => void process.kill(pid, 'SIGKILL'))
      expect(killed.code).toBe(null)
      const outcome = await mustSucceed(site.begin('deploy', []).outcome)
      const report = await load.stop()
      expect(report.lost).toEqual([])
      expect([...report.notStored, ...report.storedTwice]).toEqual([])
      // Two deploys, of which the first one may end at once.
      expect(report.sent).toBeGreaterThan(150)
      expect(report.releases.at(-1)?.release).toBe(resultOf(outcome).release)
      await expectWhole(site, resultOf(outcome).release)
    },
  )
})

describe('a build that does not get to its end', () => {
  let dockerfile: string
  beforeAll(async () => {
    dockerfile = (await settingOf(site, 'STRAPI_DOCKERFILE')) ?? ''
    const slow = join(site.folder, 'Dockerfile')
    await writeFile(
      slow,
      `${await readFile(dockerfile, 'utf8')}\nUSER root\nRUN echo started ${site.project} && sleep 600\n`,
    )
    await site.set({ STRAPI_DOCKERFILE: slow })
  })
  afterAll(() => site.set({ STRAPI_DOCKERFILE: dockerfile }))

  async function whileItBuilds(act: (pid: number) => void) {
    const log = join(dirname(site.envFile), '.state/build.log')
    await rm(log, { force: true })
    return await deployAnd(site, '1/7', 0, async (pid) => {
      const said = () => readFile(log, 'utf8').catch(() => '')
      await expect.poll(said, { timeout: 60_000 }).toMatch(/^#\d+ [\d.]+ started/m)
      act(pid)
    })
  }

  test('because of Ctrl-C is ended with the deploy', async () => {
    const outcome = await whileItBuilds((pid) => process.kill(pid, 'SIGINT'))
    expect(outcome.code).toBe(130)
    expect(await orphans(site.project)).toEqual([])
  })

  test('because of kill -9 is ended by the next run', async () => {
    await whileItBuilds((pid) => process.kill(pid, 'SIGKILL'))
    expect((await orphans(site.project)).length).toBeGreaterThan(0)
    await site.set({ STRAPI_DOCKERFILE: dockerfile })
    const outcome = await mustSucceed(site.begin('deploy', []).outcome)
    expect(outcome.stdout).toContain('left commands behind')
    await expectWhole(site, resultOf(outcome).release)
  })
})

describe('a deploy that is disturbed', () => {
  test('by nginx reloaded while visitors move: goes through without a loss', async () => {
    const load = visitors()
    const outcome = await deployAnd(site, '4/7', 200, async () => {
      await run((await loadSite(site.envFile)).nginx.command.concat('-s', 'reload'))
    })
    const report = await load.stop()
    expect(outcome.code).toBe(0)
    // A reload closes idle connections; what visitors lose by that is nginx's, not the deploy's.
    expect(report.lost.filter((loss) => !/ECONNRESET|socket hang up|closed/.test(loss.why))).toEqual([])
    await expectWhole(site, resultOf(outcome).release)
  })

  test('by nginx restarted while visitors move: the same end state, after a second run if need be', async () => {
    const disturbed = await deployAnd(site, '4/7', 100, async () => {
      const { command } = (await loadSite(site.envFile)).nginx
      const pid = await nginxPid(site)
      process.kill(pid ?? 0, 'SIGTERM')
      while ((await nginxPid(site)) !== undefined) await sleep(20)
      await run(command)
    })
    expect([0, 1, 3]).toContain(disturbed.code)
    const outcome = await mustSucceed(site.begin('deploy', []).outcome)
    await expectWhole(site, resultOf(outcome).release)
  })

  test('by slave killed while it is being waited for: master is not touched', async () => {
    const before = await site.containerId('strapi-master')
    await site.behave({ bootMs: 4000 })
    const load = visitors()
    const outcome = await deployAnd(
      site,
      '3/7',
      1000,
      async () => void (await run(['docker', 'kill', `${site.project}-strapi-slave`])),
    )
    const report = await load.stop()
    await site.behave({})
    expect(outcome.code).toBe(1)
    expect(report.lost).toEqual([])
    expect(await site.containerId('strapi-master')).toBe(before)
  })

  test('by slave killed while it serves: the engine brings it back, or the next run mends it', async () => {
    await site.behave({ bootMs: 3000 })
    const disturbed = await deployAnd(
      site,
      '6/7',
      300,
      async () => void (await run(['docker', 'kill', `${site.project}-strapi-slave`])),
    )
    await site.behave({})
    expect([0, 3]).toContain(disturbed.code)
    const outcome = await mustSucceed(site.begin('deploy', []).outcome)
    await expectWhole(site, resultOf(outcome).release)
  })
})
