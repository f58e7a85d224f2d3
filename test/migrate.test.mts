/** From the legacy set-up to the new one and back: what is there comes along, whatever interrupts it. The tiny app stands for Strapi. */
import { mkdir, readdir, readFile, rename, rm, stat, symlink, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { once } from 'node:events'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest'
import { startLoad } from '../example/load.mts'
import { run } from '../scripts/lib/command.mts'
import { startServices } from '../scripts/lib/actions.mts'
import { compose } from '../scripts/lib/compose.mts'
import * as engine from '../scripts/lib/engine.mts'
import { readEnv, readText } from '../scripts/lib/envfile.mts'
import { legacyCompose } from '../example/legacy.mts'
import { loadSite } from '../scripts/lib/settings.mts'
import { isAnswered, sumsOf, tinyLegacy, untilAnswered, worldOf, type LegacyTest } from './legacy.mts'
import { mustSucceed, resultOf } from './harness.mts'

let legacy: LegacyTest

beforeAll(async () => {
  legacy = await tinyLegacy(18_400)
})
afterAll(async () => {
  await legacy.remove()
})

const statusOf = async () =>
  resultOf(await legacy.site.begin('migrate', ['--status', '--from', legacy.folder]).outcome)

/** Answers as before, and alone. */
async function expectLegacy(): Promise<void> {
  expect((await statusOf()).state).toBe('legacy')
  expect(await isAnswered(legacy.own.url)).toBe(true)
  const found = await engine.composeContainers()
  const of = (project: string) =>
    found.filter((one) => one.Config.Labels['com.docker.compose.project'] === project)
  expect(of(legacy.project).map((one) => [one.State.Status, one.HostConfig.RestartPolicy.Name])).toEqual(
    Array.from({ length: 3 }, () => ['running', 'always']),
  )
  expect(of(legacy.own.project).filter((one) => one.State.Status === 'running')).toEqual([])
  expect(await readText(join(legacy.folder, 'docker-compose.yml'))).toContain('services:')
  expect(await readdir(join(legacy.own.folder, 'nginx/conf.d'))).toEqual(['legacy.conf'])
}

async function expectMigrated(): Promise<void> {
  expect((await statusOf()).state).toBe('served')
  expect(await isAnswered(legacy.own.url)).toBe(true)
  const { master } = await legacy.site.observe()
  expect(master.status).toBe('healthy')
  expect(await readdir(join(legacy.own.folder, 'nginx/conf.d'))).toEqual(['bob.strapi-pro.com.conf'])
}

describe('before anything is changed', () => {
  test('a dry run says what it would do, and changes not one file, container, volume or image', async () => {
    const before = await worldOf(legacy)
    const { stdout } = await mustSucceed(legacy.migrate('--dry-run'))
    expect(await worldOf(legacy)).toEqual(before)
    for (const part of [
      `project ${legacy.project}`,
      'PostgreSQL 17',
      'legacy.conf',
      'REDIS_PASSWORD: (empty) -> ********',
      'would build',
    ])
      expect(stdout).toContain(part)
    const password = (await readFile(join((await volumeFolder()) ?? '', 'redis_password.txt'), 'utf8')).trim()
    expect(stdout).not.toContain(password)
  })

  async function volumeFolder(): Promise<string | undefined> {
    return await engine.volumeFolder(`${legacy.project}_redis-data`)
  }

  /** What is made wrong, and how it is made right again. */
  const wrong: [string, RegExp, () => Promise<() => Promise<unknown>>, string[]?][] = [
    [
      'no terminal and no --yes',
      /needs an answer, and there is no terminal/,
      async () => async () => undefined,
      [],
    ],
    [
      'a folder without a compose file',
      /holds no compose file/,
      async () => async () => undefined,
      ['--yes', '--from', '/usr'],
    ],
    [
      'an older PostgreSQL in the new set-up',
      /data is of PostgreSQL 17, which postgres:15-alpine cannot read/,
      async () => {
        const { POSTGRES_IMAGE = '' } = (await readEnv(legacy.own.envFile)) ?? {}
        await legacy.site.set({ POSTGRES_IMAGE: 'postgres:15-alpine' })
        return () => legacy.site.set({ POSTGRES_IMAGE })
      },
    ],
    [
      'an upload that is no file',
      /link\.jpg is no plain file/,
      async () => {
        await symlink('/etc/passwd', join(legacy.uploads, 'link.jpg'))
        return () => rm(join(legacy.uploads, 'link.jpg'))
      },
    ],
    [
      'no password of Redis',
      /the password of .* is neither in/,
      async () => {
        const file = join((await volumeFolder()) ?? '', 'redis_password.txt')
        const env = join(legacy.source, '.env')
        const text = (await readText(env)) ?? ''
        await rename(file, `${file}.away`)
        await writeFile(env, text.replace(/^REDIS_PASSWORD=.*$/m, ''))
        return async () => {
          await rename(`${file}.away`, file)
          await writeFile(env, text)
        }
      },
    ],
    [
      'a port that a stranger holds',
      /port 127\.0\.0\.1:18403 \(SLAVE_PORT\) is taken/,
      async () => {
        const server = createServer().listen(18_403, '127.0.0.1')
        await once(server, 'listening')
        return async () => server.close()
      },
    ],
    [
      'an uploads folder that holds something else',
      /is not empty, and what is in it was not put there by this migration/,
      async () => {
        await mkdir(join(legacy.own.folder, 'uploads'))
        await writeFile(join(legacy.own.folder, 'uploads/mine.txt'), 'mine')
        return () => rm(join(legacy.own.folder, 'uploads'), { recursive: true })
      },
    ],
    [
      'too little room',
      /the migration needs about .* are free on the disk of/,
      async () => {
        const folder = join(legacy.own.folder, 'small')
        await mkdir(folder)
        await run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', folder])
        const { BACKUP_DIR = '' } = (await readEnv(legacy.own.envFile)) ?? {}
        await legacy.site.set({ BACKUP_DIR: join(folder, 'backups') })
        return async () => {
          await legacy.site.set({ BACKUP_DIR })
          await run(['umount', folder])
          await rm(folder, { recursive: true })
        }
      },
    ],
    [
      'one Compose project for both',
      /both set-ups would be the Compose project/,
      async () => {
        await legacy.site.set({ COMPOSE_PROJECT_NAME: legacy.project })
        return () => legacy.site.set({ COMPOSE_PROJECT_NAME: legacy.own.project })
      },
    ],
    [
      'a Strapi that does not run',
      /-strapi does not run/,
      async () => {
        await legacyCompose(legacy, 'stop', 'strapi')
        return async () => {
          await legacyCompose(legacy, 'start', 'strapi')
          await untilAnswered(legacy, 60_000)
        }
      },
    ],
  ]
  test.each(wrong)(
    '%s: one clear message, nothing changed',
    async (_, message, makeWrong, options = ['--yes']) => {
      const makeRight = await makeWrong()
      try {
        const before = await worldOf(legacy)
        const outcome = await legacy.migrate(...options)
        expect(outcome.code).toBe(2)
        expect(outcome.stderr).toMatch(message)
        expect(await worldOf(legacy)).toEqual(before)
      } finally {
        await makeRight()
      }
    },
  )

  test('everything that is wrong is said at once', async () => {
    await legacy.site.set({ POSTGRES_IMAGE: 'postgres:15-alpine' })
    await symlink('/etc/passwd', join(legacy.uploads, 'link.jpg'))
    const { stderr } = await legacy.migrate('--yes')
    await rm(join(legacy.uploads, 'link.jpg'))
    await legacy.site.set({
      POSTGRES_IMAGE: (await readEnv(join(legacy.folder, '.env')))?.POSTGRES_IMAGE ?? '',
    })
    expect(stderr).toMatch(/which postgres:15-alpine cannot read[^]*is no plain file/)
  })
})

describe('a migration', () => {
  let rows: string
  let sums: Record<string, string>
  const allRows = 'SELECT id, name FROM things ORDER BY id'

  test('takes everything along, and visitors miss no more than a start', async () => {
    rows = await legacy.sql(allRows)
    sums = await sumsOf(legacy.uploads)
    await setJob('7')
    const load = startLoad({
      url: legacy.own.url,
      host: 'bob.strapi-pro.com',
      getsPerSecond: 20,
      postsPerSecond: 0,
    })
    const outcome = await mustSucceed(legacy.migrate('--yes'))
    const report = await load.stop()
    console.log(`outage seen from outside: ${report.longestGapMs} ms`)
    expect(report.sent).toBeGreaterThan(100)
    // The tiny app starts in a moment; what is left is PostgreSQL, Redis and the engine.
    expect(report.longestGapMs).toBeLessThan(20_000)
    for (const line of outcome.stdout.split('\n')) expect(line).not.toMatch(/\[ \]/)
    const secrets = Object.entries((await readEnv(join(legacy.source, '.env'))) ?? {})
    for (const [, value] of secrets.filter(([key]) => /PASSWORD|SECRET|KEY|SALT/.test(key)))
      expect(outcome.stdout + outcome.stderr).not.toContain(value)
    expect(outcome.stdout.match(/\[x\]/g)).toHaveLength(7)
    await expectMigrated()
    expect(await legacy.sql(allRows, true)).toBe(rows)
    expect(without(await sumsOf(join(legacy.own.folder, 'uploads')))).toEqual(sums)
    expect(without(await sumsOf(legacy.uploads))).toEqual(sums)
    const { uid, gid } = await stat(join(legacy.own.folder, 'uploads/empty.bin'))
    expect([uid, gid]).toEqual([1000, 1000])
    expect(await job()).toBe('7')
  })

  test('keeps comments, values and secrets, and shows none of them', async () => {
    const text = (await readText(join(legacy.own.folder, 'strapi/.env'))) ?? ''
    const [theirs, ours] = [
      await readEnv(join(legacy.source, '.env')),
      await readEnv(join(legacy.own.folder, 'strapi/.env')),
    ]
    expect(text).toContain('# Of the legacy application.')
    expect(ours).toEqual({ ...theirs })
    const docker = await readEnv(legacy.own.envFile)
    expect(docker).toMatchObject({
      REDIS_PASSWORD: theirs?.REDIS_PASSWORD,
      LIVEKIT_EXTERNAL_IP: '192.0.2.1',
      SERVER_NAME: 'bob.strapi-pro.com',
    })
    expect((await stat(legacy.own.envFile)).mode & 0o077).toBe(0)
  })

  test('has the legacy set-up out of service, and kept', async () => {
    const names = (await engine.composeContainers())
      .filter((one) => one.Config.Labels['com.docker.compose.project'] === legacy.project)
      .map((one) => [one.Name, one.State.Status, one.HostConfig.RestartPolicy.Name])
    expect(names.toSorted(([one = ''], [other = '']) => one.localeCompare(other))).toEqual(
      ['postgresql', 'redis', 'strapi'].map((name) => [`/legacy-${legacy.prefix}${name}`, 'exited', 'no']),
    )
    // Nobody starts a second PostgreSQL on the same data by habit.
    await expect(legacyCompose(legacy, 'up', '--detach')).rejects.toThrow(/no configuration file/)
    const outcome = await legacy.site.run('deploy')
    expect(outcome.code, outcome.stderr).toBe(0)
  })

  test('goes back: rows and uploads made since stay, and a set has them, too', async () => {
    await legacy.sql(`INSERT INTO things (name) VALUES ('made since')`, true)
    await writeFile(join(legacy.own.folder, 'uploads/since.jpg'), 'since')
    const outcome = await mustSucceed(legacy.migrate('--rollback', '--yes'))
    expect(outcome.stdout).toMatch(/1 rows more in public\.things; 1 uploads are new/)
    await expectLegacy()
    expect(await legacy.sql(`SELECT count(*) FROM things WHERE name = 'made since'`)).toBe('1')
    expect(await readFile(join(legacy.uploads, 'since.jpg'), 'utf8')).toBe('since')
    const { since, ...before } = renamed(await sumsOf(legacy.uploads), 'since.jpg', 'since')
    expect(since).toBeDefined()
    expect(without(before)).toEqual(sums)
    const { stdout } = await mustSucceed(legacy.site.run('data', 'list'))
    expect(stdout.trim().split('\n').length).toBeGreaterThanOrEqual(2)
  })

  test('goes by dump and restore where the database is to be in another folder; back, what came since is left in a set', async () => {
    await legacy.site.set({ POSTGRES_VOLUME: join(legacy.own.folder, 'postgresql') })
    rows = await legacy.sql(allRows)
    await mustSucceed(legacy.migrate('--yes'))
    await expectMigrated()
    expect(await legacy.sql(allRows, true)).toBe(rows)
    expect(await readText(join(legacy.folder, '../data/postgresql/PG_VERSION'))).toMatch(/^17/)
    await legacy.sql(`INSERT INTO things (name) VALUES ('left behind')`, true)
    const outcome = await mustSucceed(legacy.migrate('--rollback', '--yes'))
    expect(outcome.stdout).toMatch(/1 rows more in public\.things.*left behind, in a backup set/)
    await expectLegacy()
    expect(await legacy.sql(allRows)).toBe(rows)
  })

  test('to an image that does not start brings the legacy site back by itself', async () => {
    await mustSucceed(legacy.migrate('--until', 'settings'))
    await legacy.site.behave({ exitAtOnce: true })
    const outcome = await legacy.migrate('--yes')
    expect(outcome.code).toBe(1)
    expect(outcome.stderr).toMatch(
      /the legacy set-up serves again with all its data[^]*exits, as its behaviour\.json wants/,
    )
    await expectLegacy()
    expect(await legacy.sql(allRows)).toBe(rows)
    await legacy.site.behave({})
  })

  test.each(['look', 'backup', 'settings', 'uploads', 'build', 'switch'])(
    'that stops after %s goes back to exactly what was',
    async (step) => {
      const { stdout } = await mustSucceed(legacy.migrate('--until', step, '--yes'))
      expect(stdout).not.toContain('8/8')
      await mustSucceed(legacy.migrate('--rollback', '--yes'))
      await expectLegacy()
      expect(await legacy.sql(allRows)).toBe(rows)
    },
  )

  function renamed(all: Record<string, string>, from: string, to: string): Record<string, string> {
    const { [from]: value = '', ...others } = all
    return { ...others, [to]: value }
  }
})

/** What it says when it is killed, and so many milliseconds later. */
const points: [string, number][] = [
  ['archiving the uploads', 50],
  ['dumping database.dump', 100],
  ['Write the settings of the new set-up', 5],
  ['Copy the uploads', 10],
  ['Build the new images', 300],
  ['Build the new images', 2500],
  ['stopping the legacy Strapi', 50],
  ['moving database, Redis and uploads over', 100],
  ['moving database, Redis and uploads over', 900],
  ['starting strapi-master', 100],
  ['nginx: the new site in place of the legacy one', 60],
  ['Check list', 100],
]
/** Two in the outage, each from the beginning. */
const alone = points.slice(8, 10)

describe('killed with -9', () => {
  let rows: string
  const things = 'SELECT id, name FROM things ORDER BY id'

  beforeAll(async () => {
    await mustSucceed(legacy.migrate('--rollback', '--yes'))
    // On the same data: the harder way.
    await legacy.site.set({ POSTGRES_VOLUME: '/var/www/bob/data/postgresql' })
    rows = await legacy.sql(things)
  })
  afterEach(async () => {
    await mustSucceed(legacy.migrate('--rollback', '--yes'))
    await expectLegacy()
    expect(await legacy.sql(things)).toBe(rows)
  })

  test('at all points one after the other, the same command comes to the same end', async () => {
    await rm(join(legacy.own.folder, 'strapi'), { recursive: true, force: true })
    await writeFile(join(legacy.uploads, `new ${Date.now()}.jpg`), 'not copied yet')
    for (const [message, delayMs] of points) await killAt(['--yes'], message, delayMs)
    await mustSucceed(legacy.migrate('--yes'))
    await expectMigrated()
    expect(await legacy.sql(things, true)).toBe(rows)
    expect(without(await sumsOf(join(legacy.own.folder, 'uploads')))).toEqual(
      without(await sumsOf(legacy.uploads)),
    )
  })

  test.each(alone)(
    'at "%s", %i ms later: the same command comes to the same end',
    async (message, delayMs) => {
      await killAt(['--yes'], message, delayMs)
      await mustSucceed(legacy.migrate('--yes'))
      await expectMigrated()
      expect(await legacy.sql(things, true)).toBe(rows)
    },
  )

  test('in the middle of the switch: the way back is there at once, and no deploy starts what has no data yet', async () => {
    await killAt(['--yes'], 'moving database, Redis and uploads over', 400)
    await expect(startServices(await loadSite(legacy.own.envFile))).rejects.toThrow(
      /in the middle of its switch/,
    )
  })

  test('on the way back, again and again: the same command brings it back', async () => {
    await mustSucceed(legacy.migrate('--yes'))
    const behaviour = join(legacy.source, 'behaviour.json')
    await writeFile(behaviour, '{ "bootMs": 4000 }')
    for (const message of [
      'stopping the new set-up',
      'starting the legacy set-up',
      'waiting for the legacy Strapi',
    ])
      await killAt(['--rollback', '--yes'], message, 500)
    await writeFile(behaviour, '{}')
  })

  test.each(['Restore the dump beside the live database', 'Swap the databases'])(
    'where the database goes by dump and restore, at "%s": the way back is there',
    async (message) => {
      await legacy.site.set({ POSTGRES_VOLUME: join(legacy.own.folder, 'postgresql') })
      await mustSucceed(legacy.migrate('--until', 'build'))
      await killAt(['--yes'], message, 100)
    },
  )

  test('where the database goes by dump and restore: the same command comes to the same end', async () => {
    await killAt(['--yes'], 'Restore the dump beside the live database', 100)
    await mustSucceed(legacy.migrate('--yes'))
    await expectMigrated()
    expect(await legacy.sql(things, true)).toBe(rows)
  })

  async function killAt(options: string[], message: string, delayMs: number): Promise<void> {
    const acted: Promise<void>[] = []
    const { outcome } = legacy.site.begin(
      'migrate',
      ['--from', legacy.folder, ...options],
      (event, child) => {
        if (event.message.startsWith(message) && acted.length === 0)
          acted.push(sleep(delayMs).then(() => void child.kill('SIGKILL')))
      },
    )
    const { code, stdout } = await outcome
    expect([code, acted.length], `killed at "${message}"\n${stdout}`).toEqual([null, 1])
    await Promise.all(acted)
  }
})

describe('once the new Strapi has been started', () => {
  beforeAll(() => legacy.site.set({ POSTGRES_VOLUME: '/var/www/bob/data/postgresql' }))

  test('Ctrl-C while it boots brings the legacy site back', async () => {
    await mustSucceed(legacy.migrate('--until', 'settings'))
    await legacy.site.behave({ bootMs: 10_000 })
    const { outcome } = legacy.site.begin('migrate', ['--from', legacy.folder, '--yes'], (event, child) => {
      if (event.message === 'starting strapi-master') setTimeout(() => child.kill('SIGINT'), 1500)
    })
    expect((await outcome).code).toBe(130)
    await expectLegacy()
    await legacy.site.behave({})
  })

  test('what it has taken since is never touched by the same command again, whatever has stopped', async () => {
    await mustSucceed(legacy.migrate('--yes'))
    await legacy.sql(`INSERT INTO things (name) VALUES ('only here')`, true)
    await writeFile(join(legacy.own.folder, 'uploads/only here.jpg'), 'only here')
    await legacy.sql('DELETE FROM files WHERE id = 3', true)
    for (const command of ['stop', 'down']) {
      await run(compose(await loadSite(legacy.own.envFile), '--profile', '*', command))
      expect((await statusOf()).state).toBe('down')
      await mustSucceed(legacy.migrate())
      await expectMigrated()
      expect(await legacy.sql(`SELECT count(*) FROM things WHERE name = 'only here'`, true)).toBe('1')
      expect(await readFile(join(legacy.own.folder, 'uploads/only here.jpg'), 'utf8')).toBe('only here')
    }
  })

  test('no deploy starts a second PostgreSQL on data that is in use, by whatever name', async () => {
    await mustSucceed(legacy.migrate('--rollback', '--yes'))
    const link = join(legacy.own.folder, 'linked')
    await symlink(join(legacy.folder, '../data/postgresql'), link)
    await legacy.site.set({ POSTGRES_VOLUME: link })
    await expect(startServices(await loadSite(legacy.own.envFile))).rejects.toThrow(
      /a second PostgreSQL there/,
    )
    // The migration sees that it is the legacy folder, and keeps away from it until the switch.
    const { stdout } = await mustSucceed(legacy.migrate('--until', 'build'))
    expect(stdout).toMatch(/takes the data over as it is/)
    expect((await readEnv(legacy.own.envFile))?.POSTGRES_VOLUME).toMatch(/-migrated$/)
  })
})

test('for good: containers go, data stays, and there is no way back any more', async () => {
  await mustSucceed(legacy.migrate('--yes'))
  await mustSucceed(legacy.migrate('--finalize', '--yes'))
  const found = await engine.composeContainers()
  expect(found.filter((one) => one.Config.Labels['com.docker.compose.project'] === legacy.project)).toEqual(
    [],
  )
  expect(await isAnswered(legacy.own.url)).toBe(true)
  const outcome = await legacy.migrate('--rollback', '--yes')
  expect(outcome.code).toBe(2)
  expect(outcome.stderr).toMatch(/for good/)
})

/** The tiny app's own table goes on all the time. */
function without(sums: Record<string, string>): Record<string, string> {
  return Object.fromEntries(Object.entries(sums).filter(([name]) => name !== '.pings'))
}

/** A job of Bull's, more or less. */
async function setJob(value: string): Promise<void> {
  const { REDIS_PASSWORD = '' } = (await readEnv(join(legacy.source, '.env'))) ?? {}
  const redis = [
    'docker',
    'exec',
    '--env=REDISCLI_AUTH',
    `${legacy.prefix}redis`,
    'redis-cli',
    'set',
    'bull:job',
    value,
  ]
  await run(redis, { env: { REDISCLI_AUTH: REDIS_PASSWORD } })
}

async function job(): Promise<string> {
  const [redis] = await engine.serviceContainers(legacy.own.project, 'redis')
  return (await run(['docker', 'exec', redis?.Id ?? '', 'redis-cli', 'get', 'bull:job'])).trim()
}
