/** Backups of a running Strapi: one state, read back, and nothing half-made whatever happens. */
import { randomBytes } from 'node:crypto'
import { closeSync, openSync, readdirSync, writeSync } from 'node:fs'
import { mkdir, readdir, readFile, rm, stat, unlink, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest'
import { run } from '../scripts/lib/command.mts'
import { query } from '../scripts/lib/compose.mts'
import * as engine from '../scripts/lib/engine.mts'
import { healthyPostgresql, makeBackup } from '../scripts/lib/data/backup.mts'
import { readManifest, uploadLines, wrongSums } from '../scripts/lib/data/manifest.mts'
import { backupSession, psql } from '../scripts/lib/data/postgresql.mts'
import { listSets, setFolder } from '../scripts/lib/data/sets.mts'
import { startSession } from '../scripts/lib/data/snapshot.mts'
import { folderBytes } from '../scripts/lib/data/uploads.mts'
import { rememberProven } from '../scripts/lib/data/verified.mts'
import { type Site } from '../scripts/lib/settings.mts'
import {
  deployAnd,
  expectUnseen,
  mustSucceed,
  resultOf,
  secretsOf,
  settingOf,
  type TestSite,
} from './harness.mts'
import { filesOfSet, siteWithPictures } from './sites.mts'

const { begin, pictures, sql, makeSet, writePicture, expectNothingHalfMade } = siteWithPictures(18_300)
let own: TestSite
let site: Site

beforeAll(async () => {
  ;({ own, site } = await begin())
})
afterAll(() => own.remove())

/** Each file that a row of the dump refers to is in the list, with the bytes that its row tells of. @returns how many were replaced */
async function expectComplete(folder: string, missing: string[]): Promise<number> {
  const [postgresql] = await engine.serviceContainers(own.project, 'postgresql')
  const restore = `docker exec -i -u postgres ${postgresql?.Id} pg_restore --data-only --table=files --file=- < database.dump`
  const text = await run(['sh', '-c', restore], { cwd: folder })
  const [, header = '', data = ''] =
    /^COPY public.files \((.*)\) FROM stdin;\n([^]*?)\n\\\.$/m.exec(text) ?? []
  const columns = header.split(', ')
  const rows = data.split('\n').map((line) => line.split('\t'))
  const sizes = new Map<string, number>()
  for await (const { name, sizeBytes } of uploadLines(folder)) sizes.set(name, sizeBytes)
  expect(rows.length).toBeGreaterThan(200)
  for (const row of rows) {
    const cell = (column: string) => row[columns.indexOf(column)] ?? ''
    const { small } = JSON.parse(cell('formats')) as { small: { url: string } }
    const names = [cell('url'), small.url].map((url) => url.replace('/uploads/', ''))
    for (const name of names.filter((one) => !missing.includes(one)))
      expect([...sizes.keys()], name).toContain(name)
    if (Number(cell('size')) === 25 && !missing.includes(names[0] ?? ''))
      expect(sizes.get(names[0] ?? '')).toBe(25_000)
  }
  return rows.filter((row) => Number(row[columns.indexOf('size')]) === 25).length
}

describe('a backup', () => {
  test('is one set that standard tools can check and read, for its owner alone', async () => {
    const outcome = await mustSucceed(own.run('data'))
    expect(outcome.stdout).toMatch(/Done: \S+, [\d.]+ MB, read back and right/)
    const name = (await listSets(site)).at(-1) ?? ''
    const folder = setFolder(site, name)
    expect((await readdir(folder)).toSorted()).toEqual(filesOfSet.toSorted())
    expect((await stat(folder)).mode & 0o777).toBe(0o500)
    for (const file of await readdir(folder))
      expect((await stat(join(folder, file))).mode & 0o777).toBe(0o400)
    await run(['sha256sum', '--check', '--strict', 'SHA256SUMS'], { cwd: folder })

    const manifest = await readManifest(folder)
    expect(manifest).toMatchObject({ missing: [], parts: ['database', 'uploads', 'config'] })
    expect(manifest.release).toBe(await settingOf(own, 'STRAPI_VERSION'))
    expect(manifest.database?.rows).toMatchObject({ 'public.pings': 500, 'public.files': 200 })
    expect(manifest.versions).toMatchObject({ strapi: '5.54.0', postgresql: expect.stringMatching(/^1\d\./) })

    const unpacked = join(own.folder, 'unpacked')
    await mkdir(unpacked)
    await run(['tar', '-xf', join(folder, 'uploads.tar'), '-C', unpacked])
    for (const [file, content] of pictures) {
      expect((await readFile(join(unpacked, file))).equals(content), file).toBe(true)
    }
    const config = await run(['tar', '-tf', join(folder, 'config.tar')])
    for (const file of ['docker/.env', 'strapi/.env', 'docker/docker-compose.yml', 'nginx/127.0.0.1.conf'])
      expect(config.split('\n')).toContain(file)
    await expectNothingHalfMade()
  })

  test('can be restored by hand, row by row', async () => {
    const folder = setFolder(site, await makeSet())
    const [postgresql] = await engine.serviceContainers(own.project, 'postgresql')
    const id = postgresql?.Id ?? ''
    await sql(`CREATE DATABASE "by-hand" OWNER "${site.database.user}" TEMPLATE template0`)
    const restore = `docker exec -i -u postgres ${id} pg_restore --exit-on-error -d by-hand < database.dump`
    await run(['sh', '-c', restore], { cwd: folder })
    const digest = "SELECT count(*), md5(string_agg(p::text, ',' ORDER BY id)) FROM pings AS p"
    expect((await run(query(id, 'by-hand', digest))).trim()).toBe(await sql(digest))
    await sql('DROP DATABASE "by-hand"')
  })

  test('holds only what is asked for', async () => {
    const outcome = await mustSucceed(own.begin('data', ['backup', '--only', 'config']).outcome)
    const manifest = await readManifest(setFolder(site, String(resultOf(outcome).set)))
    expect(manifest.parts).toEqual(['config'])
    expect(Object.keys(manifest.files).toSorted()).toEqual(['RECOVERY.md', 'config.tar'])
  })

  test('names what rows refer to and the disk does not have, and ends with exit code 3', async () => {
    const lost = join(site.folders.uploads, 'small_picture_7.png')
    const content = await readFile(lost)
    await unlink(lost)
    const outcome = await own.run('data')
    await writeFile(lost, content)
    expect(outcome.code).toBe(3)
    expect(outcome.stderr).toMatch(/uploads\/small_picture_7\.png is not there; [\d-]+ still has it/)
    expect(outcome.stderr).toMatch(
      /Put one back, as root: tar -xf .*uploads\.tar -C \S+ small_picture_7\.png && chown 1000:1000 .*small_picture_7\.png/,
    )
    expect((await mustSucceed(own.run('data', 'list'))).stdout).toMatch(/1 MISSING$/m)
  })

  test('has every file that its own state refers to while pictures come and go', async () => {
    const stopping = new AbortController()
    let replaced = 0
    let whole = 0
    // What has no file any more may still have its row, in the snapshot, too: that is what a backup has to name.
    const going = new Set<string>()
    // So many pictures later: what came and went between two passes, nobody could have.
    const gone = 14
    const session = startSession(psql((await healthyPostgresql(site)) ?? '', site.database.name, 'editors'))
    const editors = (async () => {
      for (let number = 0; !stopping.signal.aborted; number += 1) {
        await session.ask(`${await writePicture(`live_${number}.png`)};`)
        // Replaced: new bytes under the old name, then its row.
        if (number % 3 === 1) {
          const name = `live_${number - 1}.png`
          await writeFile(join(site.folders.uploads, name), randomBytes(25_000))
          await session.ask(`UPDATE files SET size = 25 WHERE name = '${name}';`)
        }
        // Gone for good: the files first, then the row, as Strapi does.
        if (number % 3 === 2 && number >= gone) {
          const name = `live_${number - gone}.png`
          for (const one of [name, `small_${name}`]) {
            going.add(one)
            await unlink(join(site.folders.uploads, one))
          }
          await session.ask(`DELETE FROM files WHERE name = '${name}';`)
        }
        await sleep(300)
      }
    })()
    try {
      for (let times = 0; times < 12; times += 1) {
        const { name, manifest } = await makeBackup(site, ['database', 'uploads'])
        await rememberProven(site, name)
        const missing = manifest.uploads?.missing ?? []
        for (const one of missing) expect([...going]).toContain(one)
        if (missing.length === 0) whole += 1
        expect(manifest.uploads?.files).toBeGreaterThan(400)
        replaced += await expectComplete(setFolder(site, name), missing)
      }
      expect(whole).toBeGreaterThan(7)
      expect(replaced).toBeGreaterThan(0)
    } finally {
      stopping.abort()
      await editors
      await session.end()
    }
  })

  test('says nothing with --quiet when all is well', async () => {
    const { stdout, stderr } = await mustSucceed(own.run('data', '--quiet'))
    expect([stdout, stderr]).toEqual(['', ''])
  })

  test('does not run beside another one, and says who runs', async () => {
    const began = Promise.withResolvers<void>()
    // It has to wait for that.
    const locked = sql('BEGIN; LOCK TABLE pings IN ACCESS EXCLUSIVE MODE; SELECT pg_sleep(4)')
    const holding =
      "SELECT count(*) FROM pg_locks WHERE relation = 'pings'::regclass AND mode LIKE 'AccessEx%' AND granted"
    await expect.poll(() => sql(holding), { timeout: 20_000 }).toBe('1')
    const first = own.begin('data', ['backup'], () => began.resolve())
    await began.promise
    const second = await own.run('data')
    expect(second.code).toBe(4)
    expect(second.stderr).toContain(`process ${first.child.pid}`)
    expect((await first.outcome).code).toBe(0)
    await locked
  })

  test('shows no secret in its output, in the list of processes, in files that others may read', async () => {
    const secrets = await secretsOf(own)
    expect(secrets.length).toBeGreaterThan(5)
    await expectUnseen(own, secrets, () => mustSucceed(own.run('data')))
  })

  test('gets a name of its own when the clock went back, and is the latest', async () => {
    const last = await makeSet()
    vi.useFakeTimers({
      toFake: ['Date'],
      now: new Date((await readManifest(setFolder(site, last))).createdAt),
    })
    try {
      const { name } = await makeBackup(site, ['config'])
      expect(name).toBe(`${last}-2`)
      vi.setSystemTime(Date.now() - 3_600_000)
      const earlier = await makeBackup(site, ['config'])
      expect(earlier.name < last).toBe(true)
      expect(await wrongSums(setFolder(site, earlier.name))).toEqual([])
    } finally {
      vi.useRealTimers()
    }
  })
})

/** A session that runs statements as soon as the snapshot of a backup has counted pings, and before pg_dump locks it. */
async function behindSnapshot(statements: string): Promise<{ ended: Promise<string> }> {
  const ended = sql(`DO $$ BEGIN LOOP
      PERFORM pg_stat_clear_snapshot();
      EXIT WHEN EXISTS (SELECT FROM pg_locks JOIN pg_stat_activity USING (pid)
        WHERE relation = 'pings'::regclass AND application_name = '${backupSession}');
      PERFORM pg_sleep(0.005);
    END LOOP; END $$; ${statements}`)
  ended.catch(() => undefined)
  const waiting = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'DO $$ BEGIN LOOP%'"
  await expect.poll(() => sql(waiting), { timeout: 20_000 }).toBe('1')
  return { ended }
}

describe('a backup that cannot be made', () => {
  test.each([
    ['archiving the uploads', 0],
    ['taking a snapshot of the database', 0],
    ['taking a snapshot of the database', 150],
    ['archiving the uploads that have changed meanwhile', 0],
    ['dumping database.dump', 0],
    ['dumping database.dump', 150],
    ['dumping roles.sql', 0],
    ['archiving the configuration', 0],
    ['reading everything back', 0],
    ['making it the set', 0],
    ['making it the set', 10],
  ])(
    'because it is killed with -9 while %s (+ %i ms) leaves no set, and the next run makes one',
    async (point, delayMs) => {
      const before = await listSets(site)
      let wasReached = false
      const { outcome } = own.begin('data', ['backup'], ({ message }, child) => {
        if (!message.startsWith(point) || wasReached) return
        wasReached = true
        setTimeout(() => child.kill('SIGKILL'), delayMs)
      })
      const wasKilled = (await outcome).code === null
      expect(wasReached).toBe(true)
      const mayBeThere = /^(reading|making)/.test(point)
      if (!mayBeThere) expect(wasKilled).toBe(true)
      // Just behind the last step it may be there, and then it is whole.
      const added = (await listSets(site)).filter((name) => !before.includes(name))
      if (!mayBeThere) expect(added).toEqual([])
      for (const name of added) expect(await wrongSums(setFolder(site, name))).toEqual([])
      await makeSet('--only', 'database')
      await expectNothingHalfMade()
    },
  )

  test('because it is killed while pg_dump runs has that ended by the next run', async () => {
    // As soon as the snapshot has counted, it waits for the lock, and pg_dump behind it.
    await behindSnapshot('LOCK TABLE pings IN ACCESS EXCLUSIVE MODE; SELECT pg_sleep(5)')
    const { outcome } = own.begin('data', ['backup'], ({ message }, child) => {
      if (message === 'dumping database.dump') setTimeout(() => child.kill('SIGKILL'), 1500)
    })
    expect((await outcome).code).toBe(null)
    const dumping =
      "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LOCK TABLE%' AND application_name LIKE '%backup'"
    expect(await sql(dumping)).toBe('1')
    await makeSet('--only', 'database')
    expect(await sql(dumping)).toBe('0')
    await expectNothingHalfMade()
  })

  test.each([
    [
      'because the disk is too small writes nothing and says what is needed',
      0.5,
      /a backup needs about [\d.]+ MB/,
    ],
    // Enough for the files as such, not for what the archive puts between them.
    ['because the disk fills leaves nothing half-made and says so', 1.01, /the disk of \S+ is full/],
  ])('%s', async (_, share, says) => {
    const small = join(own.folder, 'small')
    await mkdir(small)
    const kilobytes = Math.ceil(((await folderBytes(site.folders.uploads)) * share) / 1024)
    await run(['mount', '-t', 'tmpfs', '-o', `size=${kilobytes}k`, 'tmpfs', small])
    try {
      await mkdir(join(small, '.incoming'))
      await own.set({ BACKUP_DIR: small })
      const outcome = await own.run('data', 'backup', '--only', 'uploads')
      expect(outcome.code).toBe(1)
      expect(outcome.stderr).toMatch(says)
      expect(await readdir(small)).toEqual(['.incoming'])
    } finally {
      await own.set({ BACKUP_DIR: site.folders.backups })
      await run(['umount', small])
      await rm(small, { recursive: true })
    }
  })

  test('because the disk fills under pg_dump, inside its container, leaves nothing half-made', async () => {
    const incoming = join(site.folders.backups, '.incoming')
    const before = await listSets(site)
    const [postgresql] = await engine.serviceContainers(own.project, 'postgresql')
    const restart = async () => {
      await run(['docker', 'restart', postgresql?.Id ?? ''])
      await expect.poll(() => healthyPostgresql(site), { timeout: 60_000 }).toBeDefined()
    }
    await run(['mount', '-t', 'tmpfs', '-o', 'size=16k', 'tmpfs', incoming])
    try {
      await restart()
      const outcome = await own.run('data')
      expect(outcome.code).toBe(1)
      expect(outcome.stderr).toMatch(/the disk of \S+ is full/)
      expect(await listSets(site)).toEqual(before)
      await expectNothingHalfMade()
    } finally {
      await run(['umount', incoming])
      await restart()
    }
    await makeSet()
  })

  test('because the disk gives back something else than was written leaves nothing, and says so', async () => {
    const before = await listSets(site)
    const { outcome } = own.begin('data', ['backup'], ({ message }) => {
      // By now the archive of the uploads is closed, and its sum known.
      if (message !== 'dumping roles.sql') return
      const [partial = ''] = readdirSync(site.folders.backups).filter((name) => name.startsWith('.partial-'))
      const file = openSync(join(site.folders.backups, partial, 'uploads.tar'), 'r+')
      // Longer than what a random picture may hold there anyway.
      writeSync(file, 'X'.repeat(8), 600)
      closeSync(file)
    })
    const { code, events } = await outcome
    expect(code).toBe(1)
    expect(String(events.at(-1)?.error)).toMatch(/reads back differently: uploads\.tar/)
    expect(await listSets(site)).toEqual(before)
    await expectNothingHalfMade()
  })

  test('because somebody changes a table is given up on Ctrl-C, and keeps nobody waiting', async () => {
    const before = await listSets(site)
    const locked = sql('BEGIN; LOCK TABLE pings IN ACCESS EXCLUSIVE MODE; SELECT pg_sleep(20)')
    locked.catch(() => undefined)
    const sleeping = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(20)'"
    await expect.poll(() => sql(sleeping), { timeout: 20_000 }).not.toBe('0')
    const { outcome } = own.begin('data', ['backup'], ({ message }, child) => {
      if (message === 'taking a snapshot of the database') setTimeout(() => child.kill('SIGINT'), 1500)
    })
    expect((await outcome).code).toBe(130)
    const isWaiting =
      "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(20)%' AND pid <> pg_backend_pid()"
    expect(await sql(isWaiting)).toBe('1')
    expect(await listSets(site)).toEqual(before)
    await sql(
      "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(20)%' AND pid <> pg_backend_pid()",
    )
    await expect(locked).rejects.toThrow()
    await makeSet('--only', 'database')
    await expectNothingHalfMade()
  })

  test('because somebody is about to change a table gives way before visitors wait for long', async () => {
    const before = await listSets(site)
    const { ended } = await behindSnapshot('ALTER TABLE pings ADD COLUMN IF NOT EXISTS note text')
    const { code, events } = await own.begin('data', ['backup']).outcome
    expect(code).toBe(1)
    expect(String(events.at(-1)?.error)).toContain('somebody changes a table just now')
    await ended
    expect(await listSets(site)).toEqual(before)
    await sql('ALTER TABLE pings DROP COLUMN note')
    await makeSet('--only', 'database')
    await expectNothingHalfMade()
  })

  test('because a deploy was killed while another release boots says so; the deploy comes first', async () => {
    await deployAnd(own, '3/7', 0, (pid) => void process.kill(pid, 'SIGKILL'))
    for (const command of [['backup'], ['restore', '--yes'], ['undo', '--yes']]) {
      const { code, stderr } = await own.run('data', ...command)
      expect([code, stderr]).toEqual([
        1,
        expect.stringMatching(/a deploy was interrupted: .*\n*[^]*End it first: .*deploy\.mts/),
      ])
    }
    // Once it has booted, nothing changes the schema any more.
    await expect
      .poll(async () => (await own.observe()).slave.status, { timeout: 90_000, interval: 500 })
      .toBe('healthy')
    await mustSucceed(own.run('data', 'backup', '--only', 'database'))
    await mustSucceed(own.run('deploy'))
  })

  test('because of Ctrl-C leaves nothing half-made, exit code 130', async () => {
    const before = await listSets(site)
    const { outcome } = own.begin('data', ['backup'], ({ message }, child) => {
      if (message === 'taking a snapshot of the database') child.kill('SIGINT')
    })
    expect((await outcome).code).toBe(130)
    expect(await listSets(site)).toEqual(before)
    await expectNothingHalfMade()
  })

  test('because there is no folder for it says how to make one', async () => {
    await own.set({ BACKUP_DIR: join(own.folder, 'nowhere') })
    const outcome = await own.run('data')
    await own.set({ BACKUP_DIR: site.folders.backups })
    expect(outcome.code).toBe(2)
    expect(outcome.stderr).toContain('scripts/setup.mts')
  })

  test('because PostgreSQL is stopped says so and writes nothing; its configuration can still be saved', async () => {
    const [postgresql] = await engine.serviceContainers(own.project, 'postgresql')
    const before = await listSets(site)
    await run(['docker', 'stop', postgresql?.Id ?? ''])
    try {
      const outcome = await own.run('data')
      expect(outcome.code).toBe(1)
      expect(outcome.stderr).toContain('PostgreSQL does not run')
      expect(await listSets(site)).toEqual(before)
      await mustSucceed(own.run('data', 'backup', '--only', 'config'))
    } finally {
      await run(['docker', 'start', postgresql?.Id ?? ''])
    }
  })

  test('because it is a dry run says what it would do, as all other commands do, and changes nothing', async () => {
    const name = await makeSet()
    const file = join(own.folder, 'dry.tar')
    await mustSucceed(own.run('data', 'export', name, file))
    const commands: [string[], RegExp][] = [
      [[], /would write database, uploads, config to a set in .*, and read it back/],
      [['list'], new RegExp(name)],
      [['verify'], /would read \S+ to its end/],
      [['verify', '--deep'], /would read \S+ to its end, restore its dump for a look/],
      [['restore'], /Nothing was changed/],
      [['prune'], /stays: /],
      [['export', name, join(own.folder, 'again.tar')], /would write \S+ to \S+again\.tar/],
      [['import', file], /would take a set from /],
      [['schedule'], /would /],
      [['schedule', '--remove'], /./],
    ]
    const before = await everything()
    for (const [command, says] of commands) {
      const { stdout } = await mustSucceed(own.run('data', ...command, '--dry-run'))
      expect(stdout, command.join(' ')).toMatch(says)
    }
    expect(await everything()).toEqual(before)
    await unlink(file)
  })

  /** Files with size and time of change, but for what PostgreSQL and nginx write all the time; databases. */
  async function everything(): Promise<unknown> {
    const files = await run(['find', own.folder, '-printf', '%P %m %s %T@ %C@\\n'])
    const still = files.split('\n').filter((line) => !/^(postgresql|nginx|traffic)(\/| )/.test(line))
    return [still.toSorted(), await sql('SELECT datname FROM pg_database ORDER BY 1')]
  }

  test.each([
    [['backup', '--only', 'photos'], '--only does not know "photos"'],
    [['burn'], 'unexpected: burn'],
    [['verify', '20200101-000000'], 'there is no set 20200101-000000'],
    [['--fast'], 'Unknown option'],
  ])('because it is asked for with %j is refused', async (options, says) => {
    const outcome = await own.run('data', ...options)
    expect(outcome.code).toBe(2)
    expect(outcome.stderr).toContain(says)
  })
})

describe('a deploy', () => {
  test('backs the database up first; a backup meanwhile is refused, or waits', async () => {
    const before = await listSets(site)
    const meanwhile: ReturnType<TestSite['run']>[] = []
    const { outcome } = own.begin('deploy', [], ({ event, step }) => {
      if (event === 'step' && step === '3/7') meanwhile.push(own.run('data'), own.run('data', '--wait', '2m'))
    })
    const deployed = resultOf(await mustSucceed(outcome))
    const [refused, waited] = await Promise.all(meanwhile)
    expect(refused?.code).toBe(4)
    expect(refused?.stderr).toContain('another run is in progress: "deploy')
    expect(waited?.code, waited?.stderr).toBe(0)
    const added = (await listSets(site)).filter((name) => !before.includes(name))
    expect(added.length).toBe(2)
    expect(added[0]).toBe(deployed.backup)
    expect((await readManifest(setFolder(site, added[0] ?? ''))).parts).toEqual(['database'])
  })

  test('does not go on when that fails', async () => {
    const small = join(own.folder, 'small')
    await mkdir(join(small, '.incoming'), { recursive: true })
    await run(['mount', '-t', 'tmpfs', '-o', 'size=4k', 'tmpfs', small])
    await mkdir(join(small, '.incoming'))
    await own.set({ BACKUP_DIR: small })
    const before = await own.observe()
    const outcome = await own.run('deploy')
    await own.set({ BACKUP_DIR: site.folders.backups })
    await run(['umount', small])
    await rm(small, { recursive: true })
    expect(outcome.code).toBe(1)
    expect(outcome.stderr).toContain('the database could not be backed up, so nothing was deployed')
    expect((await own.observe()).master).toEqual(before.master)
  })
})

describe('a backup folder', () => {
  test('that another site uses, too, is refused before anything is taken for remains', async () => {
    const [postgresql] = await engine.serviceContainers(own.project, 'postgresql')
    const name = `${own.project}-stranger`
    const mount = `${join(site.folders.backups, '.incoming')}:/backup`
    await run([
      'docker',
      'run',
      '--detach',
      '--rm',
      '--label=com.docker.compose.project=another',
      '--name',
      name,
      '--volume',
      mount,
      '--entrypoint=sleep',
      postgresql?.Image ?? '',
      '600',
    ])
    await mkdir(join(site.folders.backups, '.partial-20990101-000000'))
    try {
      const outcome = await own.run('data')
      expect([outcome.code, outcome.stderr]).toEqual([2, expect.stringContaining(`${name}, of another site`)])
      expect(await readdir(site.folders.backups)).toContain('.partial-20990101-000000')
    } finally {
      await run(['docker', 'rm', '--force', name])
    }
    await mustSucceed(own.run('data', 'backup', '--only', 'config'))
    await expectNothingHalfMade()
  })
})

describe('a full disk of what is remembered', () => {
  test('costs the memory of it, not the backup', async () => {
    const before = await listSets(site)
    await run(['mount', '-t', 'tmpfs', '-o', 'size=4k,nr_inodes=1', 'tmpfs', site.stateDir])
    try {
      const { stdout } = await mustSucceed(own.run('data', 'backup', '--only', 'config'))
      expect(stdout).toContain('could not be written down')
    } finally {
      await run(['umount', site.stateDir])
    }
    const [name = ''] = (await listSets(site)).filter((one) => !before.includes(one))
    await mustSucceed(own.run('data', 'verify', name))
    await expectNothingHalfMade()
  })
})
