/** What a migration refuses: it says all of it at once, and nothing is changed. The tiny app stands for Strapi. */
import { mkdir, readFile, rename, rm, symlink, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { once } from 'node:events'
import { join } from 'node:path'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { legacyCompose } from '../example/legacy.mts'
import { run } from '../scripts/lib/command.mts'
import * as engine from '../scripts/lib/engine.mts'
import { readEnv, readText } from '../scripts/lib/envfile.mts'
import { mustSucceed } from './harness.mts'
import { tinyLegacy, untilAnswered, worldOf, type LegacyTest } from './legacy.mts'

let legacy: LegacyTest

beforeAll(async () => {
  legacy = await tinyLegacy(18_520)
})
afterAll(async () => {
  await legacy.remove()
})

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
    'expected outage: about 14 s, with 10 s for Strapi to start, since its log does not tell; ',
  ])
    expect(stdout).toContain(part)
  const password = (await readFile(join((await volumeFolder()) ?? '', 'redis_password.txt'), 'utf8')).trim()
  expect(stdout).not.toContain(password)
})

async function volumeFolder(): Promise<string | undefined> {
  return await engine.volumeFolder(`${legacy.project}_redis-data`)
}

test.each([
  ['no terminal and no --yes', /needs an answer, and there is no terminal/, []],
  ['a folder without a compose file', /holds no compose file/, ['--yes', '--from', '/usr']],
])('%s: one clear message, nothing changed', async (_, message, options) => {
  await expectRefused([message], options)
})

test('no password of Redis, a name of ours, a port that is taken: one clear message each, nothing changed', async () => {
  const link = join(legacy.uploads, 'link.jpg')
  const file = join((await volumeFolder()) ?? '', 'redis_password.txt')
  const env = join(legacy.source, '.env')
  const text = (await readText(env)) ?? ''
  const postgresql = `${legacy.prefix}postgresql`
  const server = createServer().listen(18_523, '127.0.0.1')
  await once(server, 'listening')
  await rename(file, `${file}.away`)
  await symlink('/etc/passwd', link)
  await writeFile(env, text.replace(/^REDIS_PASSWORD=.*$/m, ''))
  await run(['docker', 'rename', postgresql, `legacy-${postgresql}`])
  try {
    await expectRefused(
      [
        /the password of .* is neither in/,
        /the name of legacy-.*postgresql is one that this migration gives/,
        /port 127\.0\.0\.1:18523 \(SLAVE_PORT\) is taken/,
        /link\.jpg is no plain file/,
      ],
      ['--yes'],
    )
  } finally {
    await rm(link)
    await run(['docker', 'rename', `legacy-${postgresql}`, postgresql])
    await rename(`${file}.away`, file)
    await writeFile(env, text)
    server.close()
  }
})

/** What stands in the way, how it is said, and how it is taken away again. */
const obstacles: [RegExp, () => Promise<() => Promise<unknown>>][] = [
  [
    /data is of PostgreSQL 17, which postgres:15-alpine cannot read/,
    async () => {
      const { POSTGRES_IMAGE = '' } = (await readEnv(legacy.own.envFile)) ?? {}
      await legacy.site.set({ POSTGRES_IMAGE: 'postgres:15-alpine' })
      return () => legacy.site.set({ POSTGRES_IMAGE })
    },
  ],
  [
    /link\.jpg is no plain file/,
    async () => {
      await symlink('/etc/passwd', join(legacy.uploads, 'link.jpg'))
      return () => rm(join(legacy.uploads, 'link.jpg'))
    },
  ],
  [
    /port 127\.0\.0\.1:18523 \(SLAVE_PORT\) is taken/,
    async () => {
      const server = createServer().listen(18_523, '127.0.0.1')
      await once(server, 'listening')
      return async () => server.close()
    },
  ],
  [
    /is not empty, and what is in it was not put there by this migration/,
    async () => {
      await mkdir(join(legacy.own.folder, 'uploads'))
      await writeFile(join(legacy.own.folder, 'uploads/mine.txt'), 'mine')
      return () => rm(join(legacy.own.folder, 'uploads'), { recursive: true })
    },
  ],
  [
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
    /both set-ups would be the Compose project/,
    async () => {
      await legacy.site.set({ COMPOSE_PROJECT_NAME: legacy.project })
      return () => legacy.site.set({ COMPOSE_PROJECT_NAME: legacy.own.project })
    },
  ],
  [
    /-strapi does not run/,
    async () => {
      await legacyCompose(legacy, 'kill', 'strapi')
      return async () => {
        await legacyCompose(legacy, 'start', 'strapi')
        await untilAnswered(legacy, 60_000)
      }
    },
  ],
]
test('no folder of uploads: one clear message, nothing changed', async () => {
  await rename(legacy.uploads, `${legacy.uploads}.away`)
  try {
    await expectRefused([/the uploads in .* cannot be read: ENOENT/], ['--yes'])
  } finally {
    await rename(`${legacy.uploads}.away`, legacy.uploads)
  }
})

test('a way back does not take the containers of the legacy set-up for what was prepared', async () => {
  await legacy.site.set({ COMPOSE_PROJECT_NAME: legacy.project })
  const before = await worldOf(legacy)
  const { code, stderr } = await legacy.migrate('--rollback', '--yes')
  expect([code, stderr]).toEqual([2, expect.stringContaining('both would be the Compose project')])
  expect(await worldOf(legacy)).toEqual(before)
  await legacy.site.set({ COMPOSE_PROJECT_NAME: legacy.own.project })
})

test('all that stands in the way is said at once, a line each, and nothing is changed', async () => {
  const clearances: (() => Promise<unknown>)[] = []
  try {
    for (const [, build] of obstacles) clearances.push(await build())
    await expectRefused(
      obstacles.map(([message]) => message),
      ['--yes'],
    )
  } finally {
    for (const clear of clearances) await clear()
  }
})

async function expectRefused(messages: RegExp[], options: string[]): Promise<void> {
  const before = await worldOf(legacy)
  const { code, stderr } = await legacy.migrate(...options)
  expect(code).toBe(2)
  for (const message of messages)
    expect(
      stderr.split('\n').filter((line) => message.test(line)),
      stderr,
    ).toHaveLength(1)
  expect(await worldOf(legacy)).toEqual(before)
}

test('a second run while one is at work ends with 4', async () => {
  const own = join(legacy.folder, 'strapi/Dockerfile.backup')
  await writeFile(own, 'of somebody')
  const first = legacy.site.begin('migrate', ['--from', legacy.folder, '--until', 'backup'])
  await once(first.child.stdout ?? process.stdin, 'data')
  const second = await legacy.migrate('--until', 'backup')
  expect([second.code, second.stderr]).toEqual([4, expect.stringContaining('migrate')])
  const { stdout } = await mustSucceed(first.outcome)
  expect(stdout).toContain(`${own} was there before, is another one and stays`)
  expect(await readFile(own, 'utf8')).toBe('of somebody')
})
