/** Deploys as visitors and operators see them: good ones, bad ones, and the way back. The tiny app stands for Strapi. */
import { readFile } from 'node:fs/promises'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest'
import { openSocket, startLoad, type Load, type LoadReport } from '../example/load.mts'
import { run } from '../scripts/lib/command.mts'
import { compose, query } from '../scripts/lib/compose.mts'
import { getUrl } from '../scripts/lib/http.mts'
import { loadSite } from '../scripts/lib/settings.mts'
import { setAlone } from '../scripts/lib/traffic.mts'
import { containers, mustSucceed, resultOf, settingOf, tinySite, type TestSite } from './harness.mts'

let site: TestSite
let load: Load | undefined

beforeAll(async () => {
  site = await tinySite(18_000)
})
afterEach(async () => {
  await load?.stop()
  load = undefined
  await site.behave({})
  await site.set({ DRAIN_TIMEOUT: '20', SMOKE_PATHS: '/admin/init' })
})
afterAll(async () => {
  await site.remove()
})

function visitors(): Load {
  load = startLoad({
    url: site.url,
    getsPerSecond: 50,
    postsPerSecond: 20,
    slowBodiesPerSecond: 1,
    slowBodyMs: 2000,
    slowAnswersPerSecond: 1,
    slowAnswerMs: 2000,
    uploadsPerSecond: 0.5,
  })
  return load
}

async function visited(): Promise<LoadReport> {
  // As long as it takes for enough of them to come, however fast the deploy was.
  await sleep(1500)
  const report = await load?.stop()
  load = undefined
  if (!report) throw new Error('no visitors came')
  return report
}

function expectNobodyLost(report: LoadReport): void {
  expect(report.lost).toEqual([])
  expect(report.notStored).toEqual([])
  expect(report.storedTwice).toEqual([])
  // A deploy that refuses at once takes two seconds.
  expect(report.sent).toBeGreaterThan(100)
}

async function up(...rest: string[]): Promise<void> {
  await run(compose(await loadSite(site.envFile), ...rest))
}

async function expectMasterServesAlone(release: unknown): Promise<void> {
  const { master, slave, flag, pinned } = await site.observe()
  expect({ master: master.status, release: master.release, slave: slave.status, flag, pinned }).toEqual({
    master: 'healthy',
    release,
    slave: expect.stringMatching(/absent|stopped/),
    flag: 'strapi-master',
    pinned: release,
  })
}

describe('a first deploy', () => {
  test('starts PostgreSQL, Redis and master, and no slave', async () => {
    const outcome = await mustSucceed(site.run('deploy', '--json'))
    expect(outcome.stdout).toContain('nothing runs')
    await expectMasterServesAlone(await settingOf(site, 'STRAPI_VERSION'))
    expect((await site.observe()).slave.status).toBe('absent')
    expect((await getUrl(`${site.url}/_health`)).status).toBe(204)
  })
})

describe('a good deploy', () => {
  test('loses no request, runs none twice, and proves it', async () => {
    visitors()
    const before = await settingOf(site, 'STRAPI_VERSION')
    const outcome = await mustSucceed(site.begin('deploy', []).outcome)
    const report = await visited()
    expectNobodyLost(report)
    const { release, figures } = resultOf(outcome)
    expect(report.releases.map((one) => one.release)).toEqual([before, release])
    expect(figures).toMatchObject({ failed: 0, probesFailed: 0 })
    expect((figures as { requests: number }).requests).toBeGreaterThan(100)
    await expectMasterServesAlone(release)
  })

  test('leaves nothing for "docker compose up -d" to change', async () => {
    const before = await containers(site)
    await up('up', '--detach')
    expect(await containers(site)).toEqual(before)
  })

  test('runs crons on master only, also while both are up', async () => {
    const logs: Record<string, string> = {}
    await mustSucceed(site.run('deploy'))
    for (const slot of ['strapi-master', 'strapi-slave'] as const) {
      await run(['docker', 'logs', `${site.project}-${slot}`], {
        onLine: (line) => (logs[slot] = `${logs[slot] ?? ''}${line}\n`),
      })
    }
    expect(logs['strapi-slave']).not.toContain('[CRON]')
    expect(logs['strapi-slave']).not.toBe('')
    await sleep(1500)
    await run(['docker', 'logs', `${site.project}-strapi-master`], {
      onLine: (line) => (logs.now = `${logs.now ?? ''}${line}\n`),
    })
    expect(logs.now).toContain('[CRON]')
  })

  test('ends a held WebSocket at the drain deadline, not before, and says so', async () => {
    await site.set({ DRAIN_TIMEOUT: '5' })
    const startedAt = Date.now()
    const socket = await openSocket(site.url)
    let movedAt = 0
    const outcome = await site.begin('deploy', [], (event) => {
      if (event.event === 'step' && event.step === '4/7') movedAt = Date.now()
    }).outcome
    const { atMs } = await socket.closed
    expect(outcome.code).toBe(0)
    expect(startedAt + atMs - movedAt).toBeGreaterThanOrEqual(4900)
    expect(resultOf(outcome).figures).toMatchObject({ webSocketsEnded: 1, failed: 0 })
  })

  test('waits for nobody when there are only idle keep-alive clients', async () => {
    await site.set({ DRAIN_TIMEOUT: '60' })
    const idle = startLoad({ url: site.url, getsPerSecond: 4, postsPerSecond: 1 })
    const outcome = await mustSucceed(site.begin('deploy', []).outcome)
    const report = await idle.stop()
    expect(report.lost).toEqual([])
    const seconds = outcome.events
      .filter((event) => event.event === 'step-done')
      .map((event) => [event.step, event.seconds])
    // Stopping a container takes about half a second of it; a wait for them would take all of DRAIN_TIMEOUT.
    expect(Number(Object.fromEntries(seconds)['4/7'])).toBeLessThan(20)
    expect(outcome.stdout).not.toContain('requests are left')
  })
})

describe('a release that is not fit for visitors', () => {
  const bad = [
    {
      why: 'never answers',
      behaviour: { neverHealthy: true },
      settings: { HEALTH_TIMEOUT: '4' },
      says: 'was not healthy after 4 s',
    },
    { why: 'exits at once', behaviour: { exitAtOnce: true }, settings: {}, says: 'exited' },
    {
      why: 'answers 500 on a smoke path',
      behaviour: { smokeStatus: 500 },
      settings: {},
      says: '/admin/init answered 500',
    },
  ]
  test.each(bad)(
    'never gets any when it $why: master is not touched',
    async ({ behaviour, settings, says }) => {
      const [before, release] = [
        await site.containerId('strapi-master'),
        await settingOf(site, 'STRAPI_VERSION'),
      ]
      await site.behave(behaviour)
      await site.set(settings)
      visitors()
      const outcome = await site.run('deploy')
      await site.set({ HEALTH_TIMEOUT: '20' })
      expectNobodyLost(await visited())
      expect(outcome.code).toBe(1)
      expect(outcome.stderr).toContain(says)
      expect(outcome.stderr).toContain('master was not touched')
      expect(await site.containerId('strapi-master')).toBe(before)
      await expectMasterServesAlone(release)
      expect((await site.observe()).slave.status).toBe('stopped')
    },
  )

  test('changes nothing for "docker compose up -d" either', async () => {
    const before = await containers(site)
    await up('up', '--detach')
    expect(await containers(site)).toEqual(before)
  })
})

describe('a master that breaks after slave has taken over', () => {
  test('is stopped, slave keeps serving, and the operator is told what to do', async () => {
    await site.behave({ neverHealthy: true, onlyOn: 'master' })
    await site.set({ HEALTH_TIMEOUT: '10' })
    visitors()
    const outcome = await site.run('deploy')
    await site.set({ HEALTH_TIMEOUT: '20' })
    expectNobodyLost(await visited())
    expect(outcome.code).toBe(3)
    expect(outcome.stderr).toContain('slave keeps serving')
    expect(outcome.stderr).toContain('npx zx scripts/deploy.mts')
    const { master, slave, flag, pinned } = await site.observe()
    expect([master.status, slave.status, flag]).toEqual(['stopped', 'healthy', 'strapi-slave'])
    expect(pinned).toBe(slave.release)
  })

  test('is named by --status with the command that mends it', async () => {
    const { stdout } = await mustSucceed(site.run('deploy', '--status'))
    expect(stdout).toMatch(/strapi-slave +RUNNING \+ HEALTHY/)
    expect(stdout).toContain('only slave serves')
    expect(stdout).toContain('npx zx scripts/deploy.mts')
  })

  test('may only be started by "docker compose up -d" on the release that slave serves', async () => {
    const { slave } = await site.observe()
    await up('up', '--detach')
    const after = await site.observe()
    expect(after.master.release).toBe(slave.release)
    expect(after.slave).toEqual(slave)
  })

  test('is mended by the next deploy, without a loss', async () => {
    visitors()
    const outcome = await mustSucceed(site.begin('deploy', []).outcome)
    expectNobodyLost(await visited())
    await expectMasterServesAlone(resultOf(outcome).release)
  })
})

describe('a release that falls under its first visitors', () => {
  test('and crashes loses them to the old one again, which was kept until then', async () => {
    const [before, release] = [
      await site.containerId('strapi-master'),
      await settingOf(site, 'STRAPI_VERSION'),
    ]
    await site.behave({ exitAfterMs: 10_000, onlyOn: 'slave' })
    await site.set({ DRAIN_TIMEOUT: '12' })
    // Keeps master from being stopped before the other one falls.
    const socket = await openSocket(site.url)
    visitors()
    const outcome = await site.run('deploy')
    const report = await visited()
    socket.close()
    expect(outcome.code).toBe(1)
    expect(outcome.stdout).toContain('visitors go back to strapi-master')
    // What was under way on it when it fell; a POST cannot be sent again.
    expect(report.sent).toBeGreaterThan(500)
    expect(report.lost.length).toBeLessThan(report.sent / 20)
    expect(await site.containerId('strapi-master')).toBe(before)
    await expectMasterServesAlone(release)
    expect((await site.observe()).alone).toBe(false)
  })

  test('or hangs, too', async () => {
    const release = await settingOf(site, 'STRAPI_VERSION')
    await site.set({ DRAIN_TIMEOUT: '30' })
    const socket = await openSocket(site.url)
    const running = site.begin('deploy', [], (event) => {
      if (event.event !== 'step' || event.step !== '4/7') return
      setTimeout(() => void run(['docker', 'pause', `${site.project}-strapi-slave`]), 2000)
    })
    const outcome = await running.outcome
    socket.close()
    expect(outcome.code).toBe(1)
    const { master, slave, flag, pinned, alone } = await site.observe()
    expect([master.status, master.release, slave.status, flag, pinned, alone]).toEqual([
      'healthy',
      release,
      'stopped',
      'strapi-master',
      release,
      false,
    ])
    expect((await getUrl(`${site.url}/_health`)).status).toBe(204)
  })
})

describe('nginx, while only master runs', () => {
  test('does not refuse everybody because a few answers were errors', async () => {
    await site.behave({ smokeStatus: 503 })
    await site.set({ SMOKE_PATHS: '/_health' })
    await mustSucceed(site.run('deploy'))
    visitors()
    // Three of them, and nginx takes master for dead.
    for (let sent = 0; sent < 30; sent += 1) {
      expect((await getUrl(`${site.url}/admin/init`)).status).toBeGreaterThanOrEqual(502)
      await sleep(100)
    }
    expectNobodyLost(await visited())
  })

  test('passes visitors on without a loss when master is stopped and slave runs', async () => {
    await up('--profile', 'blue-green', 'up', '--detach', '--wait', 'strapi-slave')
    const startedAt = Date.now()
    visitors()
    await sleep(1000)
    await up('stop', 'strapi-master')
    const stoppedMs = Date.now() - startedAt
    await sleep(5000)
    const report = await visited()
    // What was under way on master when it was stopped by hand is lost; what came afterwards is not.
    const later = report.lost.filter((loss) => loss.at > stoppedMs + 1000 && !/slow|upload/.test(loss.kind))
    expect(later).toEqual([])
    expect(report.sent).toBeGreaterThan(200)
    await up('start', 'strapi-master')
    await mustSucceed(site.run('deploy'))
  })
})

describe('a rollback', () => {
  test('brings the last good release back without a loss', async () => {
    // By itself, it is the first test.
    if ((await site.observe()).master.status === 'absent') await mustSucceed(site.run('deploy'))
    const first = await settingOf(site, 'STRAPI_VERSION')
    const second = resultOf(await mustSucceed(site.begin('deploy', []).outcome)).release
    expect(second).not.toBe(first)
    visitors()
    await mustSucceed(site.run('deploy', '--rollback'))
    const report = await visited()
    expectNobodyLost(report)
    expect(report.releases.at(-1)?.release).toBe(first)
    await expectMasterServesAlone(first)
  })

  test('that was interrupted is finished by the same command, on the same release', async () => {
    await site.behave({})
    const first = await settingOf(site, 'STRAPI_VERSION')
    await mustSucceed(site.run('deploy'))
    const interrupted = await site.begin('deploy', ['--rollback'], (event, child) => {
      if (event.event === 'step' && event.step === '5/7') child.kill('SIGINT')
    }).outcome
    expect(interrupted.code).toBe(130)
    expect(resultOf(interrupted).advice).toContain(`--rollback ${first}`)
    expect((await mustSucceed(site.run('deploy', '--status'))).stdout).toContain(
      `To end the rollback to ${first}`,
    )
    visitors()
    await mustSucceed(site.run('deploy', '--rollback'))
    expectNobodyLost(await visited())
    await expectMasterServesAlone(first)
  })

  test('is refused when nobody can see what the older release would drop', async () => {
    const before = await containers(site)
    const { database } = await loadSite(site.envFile)
    const allow = (word: boolean) => {
      const sql = `ALTER DATABASE "${database.name}" ALLOW_CONNECTIONS ${String(word)}`
      return run(query(`${site.project}-postgresql-1`, 'postgres', sql))
    }
    await allow(false)
    const outcome = await site.run('deploy', '--rollback')
    await allow(true)
    expect([outcome.code, outcome.stderr]).toEqual([2, expect.stringContaining('cannot be seen')])
    expect(await containers(site)).toEqual(before)
  })

  test('is refused before anything happens when the image is gone', async () => {
    const before = await containers(site)
    const outcome = await site.run('deploy', '--rollback', '20200101-000000')
    expect(outcome.code).toBe(2)
    expect(outcome.stderr).toContain('there is no image of release 20200101-000000')
    expect(await containers(site)).toEqual(before)
  })
})

describe('what else an operator does', () => {
  test('two deploys at once: one runs, the other is told who runs', async () => {
    const first = site.begin('deploy', [])
    await sleep(1500)
    const second = await site.run('deploy')
    expect(second.code).toBe(4)
    expect(second.stderr).toContain(`process ${first.child.pid}`)
    const third = site.run('deploy', '--wait', '2m')
    const dry = await mustSucceed(site.run('deploy', '--dry-run'))
    expect(dry.stdout).toContain('another run is in progress')
    expect(dry.stdout).not.toContain('left commands behind')
    expect((await first.outcome).code).toBe(0)
    expect((await third).code).toBe(0)
  })

  test('a dry run says the steps and changes nothing', async () => {
    const before = [await containers(site), await readFile(site.envFile, 'utf8')]
    const { stdout } = await mustSucceed(site.run('deploy', '--dry-run'))
    expect(stdout).toMatch(/2\/7.*Start slave[\s\S]*would send visitors to strapi-slave[\s\S]*7\/7/)
    expect([await containers(site), await readFile(site.envFile, 'utf8')]).toEqual(before)
  })

  test('an image built by hand is named, and does not slip in', async () => {
    const release = await settingOf(site, 'STRAPI_VERSION')
    const running = (await site.observe()).master.imageId
    await site.behave({ bootMs: 301 })
    await up('build', 'strapi-master')
    const outcome = await mustSucceed(site.run('deploy'))
    expect(outcome.stdout).toContain(`${site.project}-strapi:${release} was built by hand`)
    const image = await run([
      'docker',
      'image',
      'inspect',
      '--format',
      '{{.Id}}',
      `${site.project}-strapi:${release}`,
    ])
    expect(image.trim()).toBe(running)
  })

  test('--build-only builds a release and deploys nothing', async () => {
    const before = await containers(site)
    const { stdout } = await mustSucceed(site.run('deploy', '--build-only'))
    expect(stdout).toMatch(/Built bob-test-\S+-strapi:\d{8}-\d{6}/)
    expect(await containers(site)).toEqual(before)
  })

  test('Ctrl-C while slave boots: slave is stopped, master serves as before, exit 130', async () => {
    await site.behave({ bootMs: 5000 })
    const before = await site.containerId('strapi-master')
    visitors()
    const running = site.begin('deploy', [], (event, child) => {
      if (event.event === 'step' && event.step === '3/7') setTimeout(() => child.kill('SIGINT'), 500)
    })
    const outcome = await running.outcome
    expectNobodyLost(await visited())
    expect(outcome.code).toBe(130)
    expect(await site.containerId('strapi-master')).toBe(before)
    expect((await site.observe()).slave.status).toBe('stopped')
  })

  test('a slave that serves alone although nginx was kept from it by a killed run is mended', async () => {
    await up('--profile', 'blue-green', 'up', '--detach', '--wait', 'strapi-slave')
    await setAlone(await loadSite(site.envFile), true)
    await up('stop', 'strapi-master')
    const { stdout } = await mustSucceed(site.run('deploy', '--status'))
    expect(stdout).toContain('they are not served')
    await mustSucceed(site.run('deploy'))
    expect((await site.observe()).alone).toBe(false)
    await expectMasterServesAlone(await settingOf(site, 'STRAPI_VERSION'))
  })

  test('"docker compose down" stops everything, and the next deploy starts it again', async () => {
    await up('--profile', 'blue-green', 'down')
    expect(await containers(site)).toEqual([])
    await mustSucceed(site.run('deploy'))
    expect((await getUrl(`${site.url}/_health`)).status).toBe(204)
  })
})
