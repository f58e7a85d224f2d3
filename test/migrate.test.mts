/** From the legacy set-up to the new one and back: what is there comes along, whatever interrupts it. The tiny app stands for Strapi. */
import { mkdir, readFile, rename, rm, stat, symlink, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { once } from 'node:events'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { startLoad } from '../example/load.mts'
import { run } from '../scripts/lib/command.mts'
import * as engine from '../scripts/lib/engine.mts'
import { readEnv, readText } from '../scripts/lib/envfile.mts'
import { legacyCompose } from '../example/legacy.mts'
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
}

async function expectMigrated(): Promise<void> {
  expect((await statusOf()).state).toBe('served')
  expect(await isAnswered(legacy.own.url)).toBe(true)
  const { master } = await legacy.site.observe()
  expect(master.status).toBe('healthy')
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
    const { stdout, stderr } = await legacy.migrate('--yes')
    for (const secret of Object.entries(theirs ?? {}).filter(([key]) => /PASSWORD|SECRET|KEY|SALT/.test(key)))
      expect(stdout + stderr).not.toContain(secret[1])
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

  test.each(['look', 'backup', 'settings', 'uploads', 'build'])(
    'that stops after %s has changed nothing for visitors, and goes back to exactly that',
    async (step) => {
      const { stdout } = await mustSucceed(legacy.migrate('--until', step))
      expect(stdout).not.toContain('6/8')
      expect(await isAnswered(legacy.own.url)).toBe(true)
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

/** Killed when it says this, so many milliseconds later. */
const kills: [string, string, number, string[]?][] = [
  ['in the backup', 'dumping database.dump', 100],
  ['while it writes settings', 'Write the settings of the new set-up', 50],
  ['while it builds', 'Build the new images, make the containers', 600],
  ['while the legacy Strapi stops', 'stopping the legacy Strapi', 50],
  ['while the databases change', 'moving database, Redis and uploads over', 100],
  ['while PostgreSQL starts', 'moving database, Redis and uploads over', 900],
  ['while Strapi starts', 'starting strapi-master', 100],
  ['at nginx', 'nginx: the new site in place of the legacy one', 60],
  ['in the list', 'Check list', 100],
]

describe('killed with -9', () => {
  let rows: string
  beforeAll(async () => {
    // On the same data: the harder way.
    await legacy.site.set({ POSTGRES_VOLUME: '/var/www/bob/data/postgresql' })
    await mustSucceed(legacy.migrate('--rollback', '--yes'))
    rows = await legacy.sql('SELECT id, name FROM things ORDER BY id')
  })

  test.each(kills)(
    '%s: the same command ends the same, and the way back is there',
    async (_, message, delayMs) => {
      await killAt(['--yes'], message, delayMs)
      await mustSucceed(legacy.migrate('--yes'))
      await expectMigrated()
      expect(await legacy.sql('SELECT id, name FROM things ORDER BY id', true)).toBe(rows)
      await mustSucceed(legacy.migrate('--rollback', '--yes'))
      await expectLegacy()
      expect(await legacy.sql('SELECT id, name FROM things ORDER BY id')).toBe(rows)
    },
  )

  test.each<[string, string, number]>([
    ['while the new set-up stops', 'Stop the new set-up, start the legacy one', 300],
    ['while the legacy one starts', 'Stop the new set-up, start the legacy one', 2000],
  ])('on the way back, %s: the same command brings it back', async (_, message, delayMs) => {
    await mustSucceed(legacy.migrate('--yes'))
    await killAt(['--rollback', '--yes'], message, delayMs)
    await mustSucceed(legacy.migrate('--rollback', '--yes'))
    await expectLegacy()
    expect(await legacy.sql('SELECT id, name FROM things ORDER BY id')).toBe(rows)
  })

  test('in the middle of the switch: the way back is there at once', async () => {
    await killAt(['--yes'], 'moving database, Redis and uploads over', 400)
    await mustSucceed(legacy.migrate('--rollback', '--yes'))
    await expectLegacy()
    expect(await legacy.sql('SELECT id, name FROM things ORDER BY id')).toBe(rows)
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
    expect((await outcome).code, 'it was killed before its end').toBe(null)
    await Promise.all(acted)
  }
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
