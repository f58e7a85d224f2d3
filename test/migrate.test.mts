/** From the legacy set-up to the new one and back: what is there comes along. The tiny app stands for Strapi. */
import { existsSync, rmSync, writeFileSync } from 'node:fs'
import { copyFile, readdir, readFile, rename, rm, stat, utimes, writeFile } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { startLoad } from '../example/load.mts'
import { run } from '../scripts/lib/command.mts'
import { compose, query } from '../scripts/lib/compose.mts'
import * as engine from '../scripts/lib/engine.mts'
import { readEnv, readText } from '../scripts/lib/envfile.mts'
import { render } from '../scripts/lib/nginx.mts'
import { loadSite } from '../scripts/lib/settings.mts'
import { legacyCompose } from '../example/legacy.mts'
import {
  expectLegacy,
  expectMigrated,
  isAnswered,
  killAt,
  stateOf,
  sumsOf,
  tinyLegacy,
  worldOf,
  type LegacyTest,
} from './legacy.mts'
import { mustSucceed } from './harness.mts'

let legacy: LegacyTest

beforeAll(async () => {
  legacy = await tinyLegacy(18_400)
})
afterAll(async () => {
  await legacy.remove()
})

describe('a migration', () => {
  let rows: string
  let sums: Record<string, string>
  const allRows = 'SELECT id, name FROM things ORDER BY id'

  test('takes everything along, and visitors miss no more than a start', async () => {
    rows = await legacy.sql(allRows)
    await setJob('7')
    for (const name of ['replaced.jpg', 'deleted.jpg'])
      await writeFile(join(legacy.uploads, name), 'before the first pass')
    const editorsGoOn = () => {
      writeFileSync(join(legacy.uploads, 'replaced.jpg'), 'since the first pass')
      writeFileSync(join(legacy.uploads, 'added.jpg'), 'new')
      rmSync(join(legacy.uploads, 'deleted.jpg'))
    }
    const load = startLoad({
      url: legacy.own.url,
      host: 'bob.strapi-pro.com',
      getsPerSecond: 20,
      postsPerSecond: 0,
    })
    const startedAt = Date.now()
    let switchedAt = 0
    const outcome = await mustSucceed(
      legacy.site.begin('migrate', ['--from', legacy.folder, '--yes'], (event) => {
        if (event.event === 'step' && event.step === '5/8') editorsGoOn()
        if (event.message === 'stopping the legacy Strapi') switchedAt = Date.now() - startedAt
      }).outcome,
    )
    const report = await load.stop()
    sums = await sumsOf(legacy.uploads)
    expect(outcome.stdout).toContain('uploads that had changed meanwhile: 2 copied, 1 removed')
    console.log(`outage seen from outside: ${report.longestGapMs} ms, after ${switchedAt} ms without a loss`)
    expect(report.sent).toBeGreaterThan(100)
    expect(switchedAt).toBeGreaterThan(1000)
    expect(report.lost.filter(({ at }) => at < switchedAt)).toEqual([])
    // The tiny app starts in a moment; what is left is PostgreSQL, Redis and the engine.
    expect(report.longestGapMs).toBeLessThan(20_000)
    for (const line of outcome.stdout.split('\n')) expect(line).not.toMatch(/\[ \]/)
    const secrets = Object.entries((await readEnv(join(legacy.source, '.env'))) ?? {})
    for (const [, value] of secrets.filter(([key]) => /PASSWORD|SECRET|KEY|SALT/.test(key)))
      expect(outcome.stdout + outcome.stderr).not.toContain(value)
    expect(outcome.stdout.match(/\[x\]/g)).toHaveLength(7)
    await expectMigrated(legacy)
    expect(await legacy.sql(allRows, true)).toBe(rows)
    expect(await sumsOf(join(legacy.own.folder, 'uploads'))).toEqual(sums)
    expect(await sumsOf(legacy.uploads)).toEqual(sums)
    const { uid, gid } = await stat(join(legacy.own.folder, 'uploads/empty.bin'))
    expect([uid, gid]).toEqual([1000, 1000])
    expect(await job()).toBe('7')
  })

  test('has a set of the legacy site, with its configuration and how to put it back there', async () => {
    const [name = ''] = (await readdir(join(legacy.own.folder, 'backups'))).filter((one) => /^\d/.test(one))
    const folder = join(legacy.own.folder, 'backups', name)
    const config = (await run(['tar', '-tf', join(folder, 'config.tar')])).split('\n')
    for (const file of [
      'docker/.env',
      'docker/docker-compose.yml',
      'docker/redis/redis.conf',
      'docker/strapi/Dockerfile',
      'strapi/.env',
    ])
      expect(config).toContain(file)
    const steps = await readFile(join(folder, 'RECOVERY.md'), 'utf8')
    for (const part of [`docker stop ${legacy.prefix}strapi`, `${legacy.prefix}postgresql psql < roles.sql`])
      expect(steps).toContain(part)
    const file = join(legacy.folder, 'docker-compose.yml')
    expect(await readFile(`${file}.backup`, 'utf8')).toBe(await readFile(`${file}.migrated`, 'utf8'))
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
    const again = await mustSucceed(legacy.migrate('--yes'))
    expect(again.stdout).toMatch(/Migrated already, .* nothing was changed/)
    // A `git pull` in the legacy folder brings its file back: that says nothing of who serves.
    const file = join(legacy.folder, 'docker-compose.yml')
    await copyFile(`${file}.backup`, file)
    expect(await stateOf(legacy)).toBe('served')
    // And somebody starts it: Redis alone, which harms nobody here.
    const redis = `legacy-${legacy.prefix}redis`
    await run(['docker', 'start', redis])
    for (const options of [['--yes'], ['--rollback', '--yes']]) {
      const { code, stderr } = await legacy.migrate(...options)
      expect([code, stderr]).toEqual([3, expect.stringContaining(`docker stop ${redis}`)])
    }
    await run(['docker', 'stop', redis])
    await rm(file)
    // Nobody starts a second PostgreSQL on the same data by habit.
    await expect(legacyCompose(legacy, 'up', '--detach')).rejects.toThrow(/no configuration file/)
    const outcome = await legacy.site.run('deploy')
    expect(outcome.code, outcome.stderr).toBe(0)
  })

  test('says what a way back and an end for good would do, and changes nothing', async () => {
    const before = await worldOf(legacy)
    for (const option of ['--rollback', '--finalize'])
      expect((await mustSucceed(legacy.migrate(option, '--dry-run'))).stdout).toMatch(/Nothing was changed/)
    expect(await worldOf(legacy)).toEqual(before)
  })

  test('goes back: rows and uploads made since stay, and a set has them, too', async () => {
    await legacy.sql(`INSERT INTO things (name) VALUES ('made since')`, true)
    await writeFile(join(legacy.own.folder, 'uploads/since.jpg'), 'since')
    await mustSucceed(legacy.site.run('data', 'backup'))
    await legacy.sql('DELETE FROM things', true)
    await mustSucceed(legacy.site.run('data', 'restore', '--yes'))
    // As `docker network prune` does.
    await run(['docker', 'network', 'rm', `${legacy.own.project}-network`])
    const outcome = await mustSucceed(legacy.migrate('--rollback', '--yes'))
    expect(outcome.stdout).toMatch(/1 rows more in public\.things; 1 uploads are new/)
    await expectLegacy(legacy)
    // As Compose has made it, or it would not take it for its own.
    await legacyCompose(legacy, 'up', '--detach', '--no-recreate')
    expect(await legacy.sql(`SELECT count(*) FROM things WHERE name = 'made since'`)).toBe('1')
    expect(await readFile(join(legacy.uploads, 'since.jpg'), 'utf8')).toBe('since')
    const { since, ...before } = renamed(await sumsOf(legacy.uploads), 'since.jpg', 'since')
    expect(since).toBeDefined()
    expect(before).toEqual(sums)
    const { stdout } = await mustSucceed(legacy.site.run('data', 'list'))
    expect(stdout.trim().split('\n').length).toBeGreaterThanOrEqual(2)
  })

  test('does not go back to a Strapi that would drop what has come to the schema, unless that is said', async () => {
    await mustSucceed(legacy.migrate('--until', 'switch', '--yes'))
    await legacy.sql(`UPDATE strapi_database_schema SET hash = 'of the new one'`, true)
    const refused = await legacy.migrate('--rollback', '--yes')
    expect([refused.code, refused.stderr]).toEqual([2, expect.stringContaining('--accept-schema-change')])
    expect(await isAnswered(legacy.own.url)).toBe(true)
    const [postgresql] = await engine.serviceContainers(legacy.own.project, 'postgresql')
    await run(['docker', 'stop', postgresql?.Id ?? ''])
    const unseen = await legacy.migrate('--rollback', '--yes')
    expect([unseen.code, unseen.stderr]).toEqual([2, expect.stringContaining('PostgreSQL does not run')])
    await mustSucceed(legacy.migrate('--rollback', '--yes', '--accept-schema-change'))
    await expectLegacy(legacy)
  })

  test('goes by dump and restore where the database is to be in another folder; back, what came since is left in a set', async () => {
    await legacy.site.set({ POSTGRES_VOLUME: join(legacy.own.folder, 'postgresql') })
    rows = await legacy.sql(allRows)
    // nginx takes an upstream once: with this file, not the new site's.
    const rival = join(legacy.own.folder, 'nginx/conf.d/rival.conf')
    const [, upstream] = /upstream (\S+_slave) /.exec(await render(await loadSite(legacy.own.envFile))) ?? []
    const argv = ['--from', legacy.folder, '--yes']
    const failed = await legacy.site.begin('migrate', argv, ({ message }) => {
      if (message === 'starting strapi-master')
        writeFileSync(rival, `upstream ${upstream} { server 127.0.0.1:9; }`)
    }).outcome
    expect([failed.code, failed.stdout]).toEqual([3, expect.stringContaining('duplicate upstream')])
    expect(failed.stdout).toContain('visitors are served by the new set-up through the legacy nginx file')
    expect(await isAnswered(legacy.own.url)).toBe(true)
    await rm(rival)
    await mustSucceed(legacy.migrate('--yes'))
    await expectMigrated(legacy)
    expect(await legacy.sql(allRows, true)).toBe(rows)
    expect(await readText(join(legacy.folder, '../data/postgresql/PG_VERSION'))).toMatch(/^17/)
    await legacy.sql(
      `INSERT INTO things (name) VALUES ('left behind'); UPDATE dated SET updated_at = now() + interval '1 s' WHERE id = 1;
      DELETE FROM dated WHERE id = 2`,
      true,
    )
    const outcome = await mustSucceed(legacy.migrate('--rollback', '--yes'))
    expect(outcome.stdout).toMatch(
      /1 rows fewer in public\.dated, 1 changed in public\.dated, 1 rows more in public\.things.*left behind, in a backup set/,
    )
    await expectLegacy(legacy)
    expect(await legacy.sql(allRows)).toBe(rows)
  })

  test('back without a set, since PostgreSQL does not start: what only the new set-up had survives the next migration', async () => {
    await mustSucceed(legacy.migrate('--until', 'switch', '--yes'))
    await legacy.sql(`INSERT INTO things (name) VALUES ('in no set')`, true)
    await writeFile(join(legacy.own.folder, 'uploads/in no set.jpg'), 'in no set')
    const version = join(legacy.own.folder, 'postgresql/PG_VERSION')
    const [postgresql] = await engine.serviceContainers(legacy.own.project, 'postgresql')
    await run(['docker', 'stop', postgresql?.Id ?? ''])
    await rename(version, `${version}.away`)
    const { stdout } = await mustSucceed(legacy.migrate('--rollback', '--yes'))
    expect(stdout).toContain('there is no set')
    await expectLegacy(legacy)
    await rename(`${version}.away`, version)

    const again = await mustSucceed(legacy.migrate('--until', 'switch', '--yes'))
    const [, kept = ''] = /of the last time that this set-up served: (\S+)/.exec(again.stdout) ?? []
    expect(await readFile(join(kept, 'in no set.jpg'), 'utf8')).toBe('in no set')
    const [, database = ''] = /kept as the database (\S+)/.exec(again.stdout) ?? []
    const sql = `SELECT count(*) FROM things WHERE name = 'in no set'`
    const [server] = await engine.serviceContainers(legacy.own.project, 'postgresql')
    expect((await run(query(server?.Id ?? '', database, sql))).trim()).toBe('1')
    await mustSucceed(legacy.migrate('--rollback', '--yes'))
    await expectLegacy(legacy)
    await run(['rm', '--recursive', kept])
    await legacy.site.set({ POSTGRES_VOLUME: '/var/www/bob/data/postgresql' })
  })

  test('builds only what has changed since it was built, or is not there', async () => {
    const isBuiltBy = async () => {
      const { stdout } = await mustSucceed(legacy.migrate('--until', 'build'))
      return !/5\/8 [^\n]*\n +done already/.test(stdout)
    }
    const changes: [string, () => Promise<unknown>][] = [
      ['nothing was prepared', async () => undefined],
      ['the application', () => utimes(join(legacy.own.folder, 'strapi/server.mjs'), 1, 1)],
      ['a setting', () => legacy.site.set({ HEALTH_TIMEOUT: '16' })],
      ['the network', () => run(['docker', 'network', 'rm', networkOf()])],
      ['a container', () => run(['docker', 'rm', `${legacy.own.project}-redis-1`])],
      [
        'an image',
        () => run(['docker', 'tag', `${legacy.own.project}-redis`, `${legacy.own.project}-postgresql`]),
      ],
    ]
    // Nothing that runs keeps it.
    function networkOf(): string {
      return `${legacy.own.project}-network-blue-green`
    }
    for (const [what, change] of changes) {
      await change()
      expect([what, await isBuiltBy()]).toEqual([what, true])
    }
    expect(await isBuiltBy()).toBe(false)
  })

  test('copies the application again when the legacy one has changed, and keeps what was mended in the copy', async () => {
    const source = join(legacy.own.folder, 'strapi')
    await mustSucceed(legacy.migrate('--until', 'settings'))
    await writeFile(join(source, 'mended.txt'), 'by somebody')
    await writeFile(join(legacy.source, 'new.txt'), 'in the legacy one')
    const { stdout } = await mustSucceed(legacy.migrate('--until', 'settings'))
    const [, kept = ''] = /that is kept as (\S+)/.exec(stdout) ?? []
    expect(await readFile(join(kept, 'mended.txt'), 'utf8')).toBe('by somebody')
    expect(await readFile(join(source, 'new.txt'), 'utf8')).toBe('in the legacy one')
    // Killed while it copied: package.json comes last.
    await rm(join(source, 'package.json'))
    await writeFile(join(legacy.source, 'new.txt'), 'changed')
    await mustSucceed(legacy.migrate('--until', 'settings'))
    expect(await readFile(join(source, 'new.txt'), 'utf8')).toBe('changed')
    await rm(join(legacy.source, 'new.txt'))
    await mustSucceed(legacy.migrate('--until', 'settings'))
    expect(existsSync(join(source, 'new.txt'))).toBe(false)
    await run(['sh', '-c', 'rm -r "$0".edited-*', source])
  })

  test('says at once when somebody has started a second PostgreSQL on the data', async () => {
    const image = (await run(['docker', 'inspect', '--format={{.Image}}', `${legacy.prefix}redis`])).trim()
    await legacy.migrate('--rollback', '--yes')
    const labels = [`project=${legacy.own.project}`, 'service=postgresql', 'oneoff=False'].map(
      (label) => `--label=com.docker.compose.${label}`,
    )
    const data = join(legacy.folder, '../data/postgresql')
    const argv = [
      ...labels,
      '--network=none',
      `--volume=${data}:/data:ro`,
      '--entrypoint=sleep',
      image,
      '600',
    ]
    const id = (await run(['docker', 'run', '--detach', ...argv])).trim()
    const { code, stderr } = await legacy.migrate('--until', 'look')
    await run(['docker', 'rm', '--force', id])
    expect([code, stderr]).toEqual([3, expect.stringMatching(/two PostgreSQL run in .*[^]*docker stop/)])
  })

  test('is seen without its journal, and goes on and back without it', async () => {
    const journal = join(dirname(legacy.own.envFile), '.state/migration.jsonl')
    await rm(journal)
    await mustSucceed(legacy.migrate('--until', 'switch', '--yes'))
    await rm(journal)
    expect(await stateOf(legacy)).toBe('served')
    const outcome = await legacy.migrate('--yes')
    // What was counted before is the one thing that nobody can see any more.
    expect([outcome.code, outcome.stderr]).toEqual([3, expect.stringContaining('- all rows came along')])
    expect(outcome.stdout.match(/\[x\]/g)).toHaveLength(6)
    await expectMigrated(legacy)
    // Nor whether the new Strapi has served, once its containers are gone: what only that one has stays.
    const only = join(legacy.own.folder, 'uploads/only here.jpg')
    await writeFile(only, 'only here')
    await run(compose(await loadSite(legacy.own.envFile), '--profile', '*', 'down'))
    await rm(journal)
    expect(await stateOf(legacy)).toBe('switching')
    expect((await legacy.migrate('--yes')).code).toBe(3)
    await expectMigrated(legacy)
    expect(await readFile(only, 'utf8')).toBe('only here')
    await rm(journal)
    const refused = await legacy.migrate('--rollback', '--yes')
    expect([refused.code, refused.stderr]).toEqual([
      2,
      expect.stringContaining('the journal of the migration is gone'),
    ])
    await mustSucceed(legacy.migrate('--rollback', '--yes', '--accept-schema-change'))
    await expectLegacy(legacy)
    expect(await legacy.sql(allRows)).toBe(rows)
    expect(await readFile(join(legacy.uploads, 'only here.jpg'), 'utf8')).toBe('only here')
    await rm(join(legacy.uploads, 'only here.jpg'))
  })

  test('to an image that does not start brings the legacy site back by itself', async () => {
    await mustSucceed(legacy.migrate('--until', 'settings'))
    await legacy.site.behave({ exitAtOnce: true })
    const outcome = await legacy.migrate('--yes')
    expect(outcome.code).toBe(1)
    expect(outcome.stderr).toMatch(
      /the legacy set-up serves again with all its data[^]*exits, as its behaviour\.json wants/,
    )
    await expectLegacy(legacy)
    expect(await legacy.sql(allRows)).toBe(rows)
    await legacy.site.behave({})
  })

  // After the whole of it: above.
  test.each(['look', 'backup', 'settings', 'uploads', 'build', 'switch', 'nginx'])(
    'that stops after %s goes back to exactly what was',
    async (step) => {
      const before = await sumsOf(legacy.uploads)
      const { stdout } = await mustSucceed(legacy.migrate('--until', step, '--yes'))
      expect(stdout).not.toContain('8/8')
      const back = await mustSucceed(legacy.migrate('--rollback', '--yes'))
      // The copy of the uploads is not among it where it holds what nobody else has.
      expect(back.stdout).toMatch(/To be rid of it: (rm -r .*; )?docker image rm/)
      await expectLegacy(legacy)
      expect(await legacy.sql(allRows)).toBe(rows)
      expect(await sumsOf(legacy.uploads)).toEqual(before)
    },
  )

  function renamed(all: Record<string, string>, from: string, to: string): Record<string, string> {
    const { [from]: value = '', ...others } = all
    return { ...others, [to]: value }
  }
})

test('for good: containers go, data stays, and there is no way back any more', async () => {
  await mustSucceed(legacy.migrate('--yes'))
  await killAt(legacy, ['--finalize', '--yes'], 'removing the legacy containers', 0)
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
