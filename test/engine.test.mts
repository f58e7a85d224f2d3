/** The container engine restarts under a deploy or a migration. The tiny app stands for Strapi. */
import { readFile } from 'node:fs/promises'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import * as engine from '../scripts/lib/engine.mts'
import { startEngine } from '../scripts/lib/install.mts'
import { deployAnd, expectWhole, mustSucceed, resultOf, tinySite, type TestSite } from './harness.mts'
import {
  expectLegacy,
  expectMigrated,
  killAt,
  sumsOf,
  tinyLegacy,
  untilAnswered,
  type LegacyTest,
} from './legacy.mts'

describe('the engine', () => {
  let site: TestSite
  beforeAll(async () => {
    site = await tinySite(18_060)
    await mustSucceed(site.run('deploy'))
  })
  afterAll(async () => {
    await site.remove()
  })

  test.each(['3/7', '6/7'])(
    'restarted in step %s of a deploy: what can be served is served, and the next run mends it',
    async (stepNumber) => {
      const disturbed = await deployAnd(site, stepNumber, 200, restartEngine)
      expect([0, 1, 3]).toContain(disturbed.code)
      const outcome = await mustSucceed(site.begin('deploy', []).outcome)
      await expectWhole(site, resultOf(outcome).release)
    },
  )

  test('gone with the host in step 4 of a deploy: one release alone comes back', async () => {
    await deployAnd(site, '4/7', 1200, async (pid) => {
      process.kill(pid, 'SIGKILL')
      await restartEngine()
    })
    const { master, slave } = await site.observe()
    const running = [master, slave].filter((slot) => slot.status !== 'stopped' && slot.status !== 'absent')
    expect(new Set(running.map((slot) => slot.release)).size).toBe(1)
    const outcome = await mustSucceed(site.begin('deploy', []).outcome)
    await expectWhole(site, resultOf(outcome).release)
  })
})

describe('a migration, in the middle of its switch', () => {
  let legacy: LegacyTest
  beforeAll(async () => {
    legacy = await tinyLegacy(18_480)
  })
  afterAll(async () => {
    await legacy.remove()
  })

  test('does not begin while the engine is down, and says so', async () => {
    const before = await sumsOf(legacy.folder)
    await stopEngine()
    const { code, stderr } = await legacy.migrate('--yes')
    await startEngine()
    expect([code, stderr]).toEqual([2, expect.stringContaining('running engine is missing')])
    expect(await sumsOf(legacy.folder)).toEqual(before)
    await untilAnswered(legacy, 60_000)
  })

  test('is taken back, or ended, by the next command when the engine restarts', async () => {
    const rows = await legacy.sql('SELECT count(*) FROM things')
    const restarts: Promise<void>[] = []
    const argv = ['--from', legacy.folder, '--yes']
    const { outcome } = legacy.site.begin('migrate', argv, ({ message }) => {
      if (message === 'moving database, Redis and uploads over') restarts.push(sleep(100).then(restartEngine))
    })
    const { code, stdout } = await outcome
    await Promise.all(restarts)
    // Back by itself, or a person is told.
    if (code === 1) await expectLegacy(legacy)
    else expect(code, stdout).toBe(3)
    await mustSucceed(legacy.migrate('--rollback', '--yes'))
    await expectLegacy(legacy)
    expect(await legacy.sql('SELECT count(*) FROM things')).toBe(rows)
  })

  test('goes on after the host was switched off', async () => {
    await killAt(legacy, ['--yes'], 'starting strapi-master', 200)
    await restartEngine()
    await mustSucceed(legacy.migrate('--yes'))
    await expectMigrated(legacy)
  })
})

/** As a crash of the engine: containers die with it, and it starts again. */
async function restartEngine(): Promise<void> {
  await stopEngine()
  await startEngine()
}

async function stopEngine(): Promise<void> {
  const pid = Number(await readFile('/var/run/docker.pid', 'utf8'))
  process.kill(pid, 'SIGTERM')
  while ((await engine.version().catch(() => undefined)) !== undefined) await sleep(50)
  while (await isAlive(pid)) await sleep(50)
}

async function isAlive(pid: number): Promise<boolean> {
  return await readFile(`/proc/${pid}/comm`).then(
    () => true,
    () => false,
  )
}
