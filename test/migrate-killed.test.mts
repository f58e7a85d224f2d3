/** A migration that is interrupted, at whatever moment: the same command ends it, and the way back is there. */
import { execFileSync } from 'node:child_process'
import { copyFile, readFile, rm, symlink, writeFile } from 'node:fs/promises'
import { createServer, type Server } from 'node:net'
import { once } from 'node:events'
import { join } from 'node:path'
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest'
import { startServices } from '../scripts/lib/actions.mts'
import { run } from '../scripts/lib/command.mts'
import { compose } from '../scripts/lib/compose.mts'
import * as engine from '../scripts/lib/engine.mts'
import { readEnv } from '../scripts/lib/envfile.mts'
import { loadSite } from '../scripts/lib/settings.mts'
import {
  expectLegacy,
  expectMigrated,
  killAt,
  stateOf,
  sumsOf,
  tinyLegacy,
  untilAnswered,
  type LegacyTest,
} from './legacy.mts'
import { mustSucceed } from './harness.mts'

let legacy: LegacyTest

beforeAll(async () => {
  legacy = await tinyLegacy(18_440)
})
afterAll(async () => {
  await legacy.remove()
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
  ['moving database, Redis and uploads over', 200],
  ['starting strapi-master', 100],
  ['nginx: the new site in place of the legacy one', 60],
  ['Check list', 50],
]
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
    await expectLegacy(legacy)
    expect(await legacy.sql(things)).toBe(rows)
  })

  test('at all points one after the other, the same command comes to the same end', async () => {
    await rm(join(legacy.own.folder, 'strapi'), { recursive: true, force: true })
    await writeFile(join(legacy.uploads, `new ${Date.now()}.jpg`), 'not copied yet')
    const file = join(legacy.folder, 'docker-compose.yml')
    for (const [message, delayMs] of points) {
      await killAt(legacy, ['--yes'], message, delayMs)
      // As `git checkout .` does.
      if (delayMs === 200) await writeFile(file, 'services: {}\n')
    }
    await mustSucceed(legacy.migrate('--yes'))
    await expectMigrated(legacy)
    expect(await legacy.sql(things, true)).toBe(rows)
    expect(await sumsOf(join(legacy.own.folder, 'uploads'))).toEqual(await sumsOf(legacy.uploads))
    expect(await readFile(`${file}.migrated`, 'utf8')).toContain('postgresql')
    await run(['sh', '-c', 'rm "$0".put-back-*', file])
  })

  test('on the way back, and then forward again: nothing of it is left, and the next way back is whole', async () => {
    await mustSucceed(legacy.migrate('--yes'))
    await killAt(legacy, ['--rollback', '--yes'], 'starting the legacy set-up', 0)
    const legacyContainers = async () =>
      (await engine.composeContainers()).filter(
        (one) => one.Config.Labels['com.docker.compose.project'] === legacy.project,
      )
    // A moment later it would have given them that again.
    for (const { Id } of await legacyContainers())
      await run(['docker', 'update', '--restart', 'unless-stopped', Id])
    await mustSucceed(legacy.migrate('--yes'))
    await expectMigrated(legacy)
    // Else, after a reboot, two PostgreSQL would work on the same data.
    for (const { Name, HostConfig } of await legacyContainers())
      expect([Name, HostConfig.RestartPolicy.Name]).toEqual([Name, 'no'])
    for (const service of ['postgresql', 'redis', 'strapi-master'])
      for (const { HostConfig } of await engine.serviceContainers(legacy.own.project, service))
        expect([service, HostConfig.RestartPolicy.Name]).toEqual([service, 'unless-stopped'])
    await writeFile(join(legacy.own.folder, 'uploads/late.jpg'), 'late')
    const { stdout } = await mustSucceed(legacy.migrate('--rollback', '--yes'))
    expect(stdout).toMatch(/uploads:\n +- late\.jpg/)
    expect(stdout).toContain('read back and right')
    expect(await readFile(join(legacy.uploads, 'late.jpg'), 'utf8')).toBe('late')
    await rm(join(legacy.uploads, 'late.jpg'))
    await rm(join(legacy.own.folder, 'uploads/late.jpg'))
  })

  test('in the middle of the switch: the way back is there at once, and no deploy starts what has no data yet', async () => {
    await killAt(legacy, ['--yes'], 'moving database, Redis and uploads over', 150)
    await expect(startServices(await loadSite(legacy.own.envFile))).rejects.toThrow(
      /in the middle of its switch/,
    )
    // A `git pull` in the legacy folder does not put it into service.
    const file = join(legacy.folder, 'docker-compose.yml')
    await copyFile(`${file}.migrated`, file)
    expect(await stateOf(legacy)).toBe('switching')
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
      await killAt(legacy, ['--rollback', '--yes'], message, 500)
    await writeFile(behaviour, '{}')
  })

  test('where the database goes by dump and restore: the way back is there', async () => {
    await legacy.site.set({ POSTGRES_VOLUME: join(legacy.own.folder, 'postgresql') })
    await mustSucceed(legacy.migrate('--until', 'build'))
    await killAt(legacy, ['--yes'], 'Swap the databases', 100)
  })
})

describe('once the new Strapi has been started', () => {
  beforeAll(() => legacy.site.set({ POSTGRES_VOLUME: '/var/www/bob/data/postgresql' }))

  test.each([
    ['on the same data', () => '/var/www/bob/data/postgresql'],
    ['with a copy of the data', () => join(legacy.own.folder, 'postgresql')],
  ])('Ctrl-C while it boots %s brings the legacy site back', async (_, folder) => {
    await legacy.site.set({ POSTGRES_VOLUME: folder() })
    await mustSucceed(legacy.migrate('--until', 'settings'))
    await legacy.site.behave({ bootMs: 10_000 })
    const { outcome } = legacy.site.begin('migrate', ['--from', legacy.folder, '--yes'], (event, child) => {
      if (event.message === 'starting strapi-master') setTimeout(() => child.kill('SIGINT'), 1500)
    })
    const { code, stdout } = await outcome
    expect(code, stdout).toBe(130)
    await expectLegacy(legacy)
    await legacy.site.behave({})
    await legacy.site.set({ POSTGRES_VOLUME: '/var/www/bob/data/postgresql' })
  })

  test('a disk that turns read-only in the outage does not keep visitors from the legacy site; the way back is ended later', async () => {
    await mustSucceed(legacy.migrate('--until', 'build'))
    const state = join(legacy.own.folder, '.state')
    await run(['mount', '--bind', state, state])
    try {
      const { outcome } = legacy.site.begin('migrate', ['--from', legacy.folder, '--yes'], (event) => {
        if (event.message === 'moving database, Redis and uploads over')
          execFileSync('mount', ['-o', 'remount,bind,ro', state])
      })
      const { code, stdout } = await outcome
      expect([code, stdout]).toEqual([3, expect.stringContaining('EROFS')])
      expect(stdout).toContain('not wholly back')
      await untilAnswered(legacy, 30_000)
    } finally {
      await run(['umount', state])
    }
    await mustSucceed(legacy.migrate('--rollback', '--yes'))
    await expectLegacy(legacy)
  })

  test('where neither the new nor the legacy one can be started, a person is told; the way back waits', async () => {
    const stranger: Server = createServer()
    const port = Number(new URL(legacy.own.url).port) + 2
    const { outcome } = legacy.site.begin('migrate', ['--from', legacy.folder, '--yes'], (event) => {
      if (event.message === 'moving database, Redis and uploads over') stranger.listen(port, '127.0.0.1')
    })
    const { code, stdout } = await outcome
    expect(code, stdout).toBe(3)
    expect(stdout).toContain('not wholly back')
    expect(await stateOf(legacy)).not.toBe('legacy')
    stranger.close()
    await once(stranger, 'close')
    await mustSucceed(legacy.migrate('--rollback', '--yes'))
    await expectLegacy(legacy)
  })

  test('what it has taken since is never touched by the same command again, whatever has stopped', async () => {
    await mustSucceed(legacy.migrate('--yes'))
    await legacy.sql(`INSERT INTO things (name) VALUES ('only here')`, true)
    await writeFile(join(legacy.own.folder, 'uploads/only here.jpg'), 'only here')
    await legacy.sql('DELETE FROM files WHERE id = 3', true)
    for (const command of ['stop', 'down']) {
      await run(compose(await loadSite(legacy.own.envFile), '--profile', '*', command))
      expect(await stateOf(legacy)).toBe('down')
      await mustSucceed(legacy.migrate())
      await expectMigrated(legacy)
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
