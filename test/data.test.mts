/** Backups of a running Strapi: one state, read back, and nothing half-made whatever happens. */
import { execFileSync } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { closeSync, existsSync, openSync, readdirSync, writeSync } from 'node:fs'
import {
  chmod,
  cp,
  mkdir,
  readdir,
  readFile,
  rename,
  rm,
  stat,
  symlink,
  truncate,
  unlink,
  writeFile,
} from 'node:fs/promises'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterAll, beforeAll, beforeEach, describe, expect, test, vi } from 'vitest'
import { orphans, run } from '../scripts/lib/command.mts'
import { query } from '../scripts/lib/compose.mts'
import * as engine from '../scripts/lib/engine.mts'
import { healthyPostgresql, makeBackup } from '../scripts/lib/data/backup.mts'
import { readManifest, uploadLines, writeManifest, wrongSums } from '../scripts/lib/data/manifest.mts'
import { backupSession } from '../scripts/lib/data/postgresql.mts'
import { listSets, setFolder } from '../scripts/lib/data/sets.mts'
import { folderBytes } from '../scripts/lib/data/uploads.mts'
import { rememberProven } from '../scripts/lib/data/verified.mts'
import { loadSite, type Site } from '../scripts/lib/settings.mts'
import {
  damages,
  expectUnseen,
  mustSucceed,
  resultOf,
  secretsOf,
  settingOf,
  strapiSite,
  type TestSite,
} from './harness.mts'

let own: TestSite
let site: Site
const pictures = new Map<string, Buffer>()
const filesOfSet = [
  'RECOVERY.md',
  'SHA256SUMS',
  'config.tar',
  'database.dump',
  'manifest.json',
  'roles.sql',
  'uploads.jsonl',
  'uploads.tar',
]

beforeAll(async () => {
  own = await strapiSite(18_300)
  await mustSucceed(own.run('deploy'))
  site = await loadSite(own.envFile)
  for (let number = 0; number < 200; number += 1) await addPicture(`picture_${number}.png`)
  await sql("INSERT INTO pings (token) SELECT 'token-' || n FROM generate_series(1, 500) AS n")
})
afterAll(() => own.remove())

async function sql(text: string): Promise<string> {
  const [postgresql] = await engine.serviceContainers(own.project, 'postgresql')
  return (await run(query(postgresql?.Id ?? '', site.database.name, text))).trim()
}

/** As Strapi does: the file first, then its row, which also names a smaller format. */
async function addPicture(name: string): Promise<void> {
  for (const one of [name, `small_${name}`]) {
    const content = randomBytes(20_000)
    pictures.set(one, content)
    await writeFile(join(site.folders.uploads, one), content)
  }
  const formats = JSON.stringify({ small: { url: `/uploads/small_${name}` } })
  await sql(
    `INSERT INTO files (name, hash, mime, size, url, provider, formats) VALUES ('${name}', '${name}', 'image/png', 20, '/uploads/${name}', 'local', '${formats}')`,
  )
}

async function makeSet(...options: string[]): Promise<string> {
  return String(resultOf(await mustSucceed(own.begin('data', ['backup', ...options]).outcome)).set)
}

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

/** Nothing but finished sets and the empty incoming folder is there, and no session is left in PostgreSQL. */
async function expectNothingHalfMade(): Promise<void> {
  const entries = await readdir(site.folders.backups)
  const sets = await listSets(site)
  expect(entries.filter((name) => name !== '.incoming').toSorted()).toEqual(sets.toSorted())
  expect(await readdir(join(site.folders.backups, '.incoming'))).toEqual([])
  expect(await sql(`SELECT count(*) FROM pg_stat_activity WHERE application_name = '${backupSession}'`)).toBe(
    '0',
  )
  expect(await orphans(own.project)).toEqual([])
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
    const editors = (async () => {
      for (let number = 0; !stopping.signal.aborted; number += 1) {
        await addPicture(`live_${number}.png`)
        // Replaced: new bytes under the old name, then its row.
        if (number % 3 === 1) {
          const name = `live_${number - 1}.png`
          await writeFile(join(site.folders.uploads, name), randomBytes(25_000))
          await sql(`UPDATE files SET size = 25 WHERE name = '${name}'`)
        }
        // Gone for good: the files first, then the row, as Strapi does.
        if (number % 3 === 2 && number >= gone) {
          const name = `live_${number - gone}.png`
          for (const one of [name, `small_${name}`]) {
            going.add(one)
            await unlink(join(site.folders.uploads, one))
          }
          await sql(`DELETE FROM files WHERE name = '${name}'`)
        }
        // The backups are to be seen at work, not the commands of this.
        await sleep(100)
      }
    })()
    try {
      for (let times = 0; times < 30; times += 1) {
        const { name, manifest } = await makeBackup(site, ['database', 'uploads'])
        await rememberProven(site, name)
        const missing = manifest.uploads?.missing ?? []
        for (const one of missing) expect([...going]).toContain(one)
        if (missing.length === 0) whole += 1
        expect(manifest.uploads?.files).toBeGreaterThan(400)
        replaced += await expectComplete(setFolder(site, name), missing)
      }
      expect(whole).toBeGreaterThan(20)
      expect(replaced).toBeGreaterThan(0)
    } finally {
      stopping.abort()
      await editors
    }
  })

  test('says nothing with --quiet when all is well', async () => {
    const { stdout, stderr } = await mustSucceed(own.run('data', '--quiet'))
    expect([stdout, stderr]).toEqual(['', ''])
  })

  test('does not run beside another one, and says who runs', async () => {
    const began = Promise.withResolvers<void>()
    const first = own.begin('data', ['backup'], () => began.resolve())
    await began.promise
    const second = await own.run('data')
    expect(second.code).toBe(4)
    expect(second.stderr).toContain(`process ${first.child.pid}`)
    expect((await first.outcome).code).toBe(0)
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
    const locking = `DO $$ BEGIN WHILE NOT EXISTS (SELECT FROM pg_locks WHERE relation = 'pings'::regclass)
      LOOP PERFORM pg_sleep(0.005); END LOOP; END $$; LOCK TABLE pings IN ACCESS EXCLUSIVE MODE; SELECT pg_sleep(5)`
    const { outcome } = own.begin('data', ['backup'], ({ message }, child) => {
      if (message === 'taking a snapshot of the database') void sql(locking).catch(() => undefined)
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
      writeSync(file, 'X', 600)
      closeSync(file)
    })
    const { code, events } = await outcome
    expect(code).toBe(1)
    expect(String(events.at(-1)?.error)).toMatch(/reads back differently: uploads\.tar/)
    expect(await listSets(site)).toEqual(before)
    await expectNothingHalfMade()
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

describe('a set that was damaged', () => {
  let good = ''
  const bad = '20990101-000000'
  beforeAll(async () => {
    good = await makeSet()
  })

  async function verifyDamaged(
    damage: (folder: string) => Promise<unknown>,
    ...options: string[]
  ): Promise<string> {
    const folder = setFolder(site, bad)
    await cp(setFolder(site, good), folder, { recursive: true })
    await run(['chmod', '-R', 'u+w', folder])
    try {
      await damage(folder)
      const outcome = await own.run('data', 'verify', bad, ...options)
      expect(outcome.code, outcome.stdout).toBe(1)
      return outcome.stderr
    } finally {
      await rm(folder, { recursive: true, force: true })
    }
  }

  test('is told from one that was not', async () => {
    expect((await mustSucceed(own.run('data', 'verify', good))).stdout).toContain('can be read to its end')
    expect((await mustSucceed(own.run('data', 'list'))).stdout).toMatch(
      new RegExp(`^${good} .* read and right on \\d{4}-\\d{2}-\\d{2}$`, 'm'),
    )
  })

  test('of which the dump is restored and compared with --deep, beside the live database', async () => {
    const { stdout } = await mustSucceed(own.run('data', 'verify', good, '--deep'))
    expect(stdout).toContain('restored and compared')
    expect((await mustSucceed(own.run('data', 'list'))).stdout).toMatch(
      new RegExp(`^${good} .* restored and right on`, 'm'),
    )
    expect(await sql('SELECT count(*) FROM pg_database WHERE NOT datistemplate')).toBe('2')
  })

  test('so that all its sums are right is found with --deep when the rows are other ones', async () => {
    const said = await verifyDamaged(async (folder) => {
      const manifest = await readManifest(folder)
      const rows = { ...manifest.database?.rows, 'public.pings': 501, 'public.none': 1 }
      const database = manifest.database && { ...manifest.database, rows }
      await writeManifest(folder, { ...manifest, database })
    }, '--deep')
    expect(said).toContain('public.pings has 500 rows instead of 501')
    expect(said).toContain('public.none has no rows instead of 1')
    expect(await sql('SELECT count(*) FROM pg_database WHERE NOT datistemplate')).toBe('2')
  })

  test.each(filesOfSet)('in %s is found: a bit flipped, cut, longer, deleted, swapped', async (file) => {
    const other = filesOfSet[(filesOfSet.indexOf(file) + 1) % filesOfSet.length] ?? ''
    for (const damage of damages(file, other)) await verifyDamaged(damage)
  })

  test('is told from one of an empty uploads folder', async () => {
    const empty = join(own.folder, 'empty')
    await mkdir(empty)
    await own.set({ UPLOADS_VOLUME: empty })
    // Rows refer to pictures that this folder does not have.
    const outcome = await own.begin('data', ['backup', '--only', 'uploads']).outcome
    await own.set({ UPLOADS_VOLUME: site.folders.uploads })
    expect(outcome.code).toBe(3)
    await mustSucceed(own.run('data', 'verify', String(resultOf(outcome).set)))
    await mustSucceed(own.run('data'))
  })

  test('is found when a file is added', async () => {
    const said = await verifyDamaged(async (folder) => {
      await writeFile(join(folder, 'more.txt'), '')
      await chmod(join(folder, 'more.txt'), 0o400)
    })
    expect(said).toContain('more.txt does not belong to the set')
  })

  test('in its schema alone is found with --deep', async () => {
    const said = await verifyDamaged(async (folder) => {
      const manifest = await readManifest(folder)
      const { format = 0, digests = {} } = manifest.database?.structure ?? {}
      const structure = { format, digests: { ...digests, 'public.pings': 'other' } }
      const database = manifest.database && { ...manifest.database, structure }
      await writeManifest(folder, { ...manifest, database })
    }, '--deep')
    expect(said).toContain('public.pings has other columns, indexes or constraints')
  })
})

describe('verify --deep', () => {
  let good = ''
  beforeAll(async () => {
    good = await makeSet()
  })

  test.each([
    ['restoring the dump', 0],
    ['restoring the dump', 300],
    ['comparing it', 0],
  ])('killed at "%s" (+ %i ms) leaves nothing that the next run does not remove', async (point, delayMs) => {
    const { outcome } = own.begin('data', ['verify', good, '--deep'], ({ message }, child) => {
      if (message.startsWith(point)) setTimeout(() => child.kill('SIGKILL'), delayMs)
    })
    expect((await outcome).code).toBe(null)
    await mustSucceed(own.run('data', 'backup', '--only', 'config'))
    expect(await sql('SELECT count(*) FROM pg_database WHERE NOT datistemplate')).toBe('2')
    await mustSucceed(own.run('data', 'verify', good, '--deep'))
    await expectNothingHalfMade()
  })

  test('is in the way of no deploy', async () => {
    let deployed: ReturnType<TestSite['run']> | undefined
    const { outcome } = own.begin('data', ['verify', good, '--deep'], ({ message }) => {
      if (message.startsWith('restoring the dump')) deployed = own.run('deploy')
    })
    await mustSucceed(outcome)
    const { code, stderr } = (await deployed) ?? {}
    expect(code, stderr).toBe(0)
  })

  test('that fills the disk of PostgreSQL gives up, and does not blame the set', async () => {
    await sql(`CREATE TABLE ballast AS SELECT n, md5(n::text) || repeat(md5(random()::text), 20) AS text
      FROM generate_series(1, 150000) AS n`)
    const large = await makeSet('--only', 'database')
    await sql('DROP TABLE ballast')
    const small = join(own.folder, 'small')
    await mkdir(small)
    await run(['mount', '-t', 'tmpfs', '-o', 'size=3g', 'tmpfs', small])
    try {
      await own.set({ POSTGRES_VOLUME: small })
      const { outcome } = own.begin('data', ['verify', large, '--deep'], ({ message }) => {
        if (message.startsWith('restoring the dump'))
          execFileSync('fallocate', ['-l', '2700M', join(small, 'full')])
      })
      const { code, events } = await outcome
      expect(code).toBe(1)
      expect(String(events.at(-1)?.error)).toContain('is almost full, so this gave up')
    } finally {
      await own.set({ POSTGRES_VOLUME: site.folders.postgres })
      await run(['umount', small])
      await rm(small, { recursive: true })
    }
    expect(await sql('SELECT count(*) FROM pg_database WHERE NOT datistemplate')).toBe('2')
    expect((await mustSucceed(own.run('data', 'list'))).stdout).not.toContain('DAMAGED')
    // Much larger than the others: prune would be alarmed.
    await rm(setFolder(site, large), { recursive: true })
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

describe('the latest set', () => {
  test('is not one from the future, nor one that lacks a part', async () => {
    const whole = await makeSet()
    await makeSet('--only', 'database')
    const future = setFolder(site, '20990101-000000')
    await cp(setFolder(site, whole), future, { recursive: true })
    await run(['chmod', '-R', 'u+w', future])
    await writeManifest(future, { ...(await readManifest(future)), createdAt: '2099-01-01T00:00:00.000Z' })
    const outcome = await own.begin('data', ['verify']).outcome
    await rm(future, { recursive: true })
    expect(resultOf(outcome).set).toBe(whole)
    expect(outcome.events.some(({ message }) => message.includes('from the future'))).toBe(true)
  })
})

describe('a newest set that does not even say what it holds', () => {
  test('is what latest means, so that it is found; prune removes nothing', async () => {
    const name = await makeSet('--only', 'config')
    const folder = setFolder(site, name)
    await run(['chmod', '-R', 'u+w', folder])
    await truncate(join(folder, 'manifest.json'), 20)
    const before = await listSets(site)
    const verified = await own.run('data', 'verify')
    const pruned = await own.run('data', 'prune')
    await rm(folder, { recursive: true })
    expect(verified.code).toBe(1)
    expect(verified.stderr).toContain(`${name} is damaged`)
    expect(pruned.code).toBe(3)
    expect(pruned.stderr).toContain(`the newest set, ${name}, is damaged: nothing goes`)
    expect((await listSets(site)).length).toBe(before.length - 1)
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

describe('a set as one file', () => {
  const file = () => join(own.folder, 'exported.tar')
  beforeEach(() => rm(file(), { force: true }))

  test('is for its owner alone, is what tar unpacks, and comes back whole', async () => {
    const name = await makeSet()
    await mustSucceed(own.run('data', 'export', name, file()))
    expect((await stat(file())).mode & 0o777).toBe(0o600)
    expect((await own.run('data', 'export', name, file())).code).toBe(2)
    const twice = await own.run('data', 'import', file())
    expect(twice.code).toBe(2)
    expect(twice.stderr).toContain(`${name} is in`)

    await rename(setFolder(site, name), join(own.folder, 'moved'))
    await mustSucceed(own.run('data', 'import', file()))
    await run(['diff', '-r', setFolder(site, name), join(own.folder, 'moved')])
    await mustSucceed(own.run('data', 'verify', name))
    await rm(join(own.folder, 'moved'), { recursive: true })
    await run(['tar', '-xf', file(), '-C', own.folder])
    await run(['sha256sum', '--check', '--strict', 'SHA256SUMS'], { cwd: join(own.folder, name) })
    await rm(join(own.folder, name), { recursive: true })
  })

  test('that does not fit on the disk leaves nothing behind, whichever way it goes', async () => {
    const name = await makeSet()
    const bytes = await folderBytes(setFolder(site, name))
    const small = join(own.folder, 'small')
    await mkdir(small)
    const mount = (size: number) => run(['mount', '-t', 'tmpfs', '-o', `size=${size}`, 'tmpfs', small])
    await mount(Math.ceil(bytes / 2))
    try {
      const refused = await own.run('data', 'export', name, join(small, 'exported.tar'))
      expect([refused.code, refused.stderr]).toEqual([1, expect.stringContaining('the file needs about')])
      // Room for the files, and none for what tar puts between them.
      await run(['umount', small])
      await mount((Math.floor(bytes / 4096) + 1) * 4096)
      const exported = await own.run('data', 'export', name, join(small, 'exported.tar'))
      expect(exported.code).toBe(1)
      expect(exported.stderr).toContain('no space left on device')
      expect(await readdir(small)).toEqual([])
      await mustSucceed(own.run('data', 'export', name, file()))
      await mkdir(join(small, '.incoming'))
      await own.set({ BACKUP_DIR: small })
      const imported = await own.run('data', 'import', file())
      expect(imported.code).toBe(1)
      expect(imported.stderr).toContain('the set needs about')
      expect(await readdir(small)).toEqual(['.incoming'])
      // Room for its bytes, and not for all of its files.
      await run(['umount', small])
      await run(['mount', '-t', 'tmpfs', '-o', 'nr_inodes=6', 'tmpfs', small])
      await mkdir(join(small, '.incoming'))
      const halfTaken = await own.run('data', 'import', file())
      expect(halfTaken.code).toBe(1)
      expect(halfTaken.stderr).toContain('no space left on device')
      expect(await readdir(small)).toEqual(['.incoming'])
    } finally {
      await own.set({ BACKUP_DIR: site.folders.backups })
      await run(['umount', small])
      await rm(small, { recursive: true })
    }
  })

  test('is not taken when it was cut, changed or made by somebody else', async () => {
    const name = await makeSet('--only', 'config')
    await mustSucceed(own.run('data', 'export', name, file()))
    await rm(setFolder(site, name), { recursive: true })
    const content = await readFile(file())
    const before = await readdir(site.folders.backups)
    const other = Buffer.from(content)
    const at = content.indexOf('SERVER_NAME')
    other[at] = 0x58
    await run(['tar', '-cf', join(own.folder, 'foreign.tar'), '-C', own.folder, 'strapi/package.json'])
    for (const bad of [content.subarray(0, 5000), other, await readFile(join(own.folder, 'foreign.tar'))]) {
      await writeFile(file(), bad)
      const outcome = await own.run('data', 'import', file())
      expect(outcome.code).toBe(1)
      expect(outcome.stderr).toContain('holds no set that can be taken')
      expect(await readdir(site.folders.backups)).toEqual(before)
    }
  })
})

describe('a hostile file', () => {
  test.each([
    ['an absolute path', () => ['--transform=s#^x$#/etc/bob-outside#', '--absolute-names', 'x']],
    [
      'a way out',
      (name: string) => [`--transform=s#^x$#${name}/../../bob-outside#`, '--absolute-names', 'x'],
    ],
    ['a name with two lines', (name: string) => [`--transform=s#^x$#${name}/two\\nlines#`, 'x']],
    ['a link', (name: string) => [`--transform=s#^link$#${name}/manifest.json#`, 'link']],
    ['a device', (name: string) => [`--transform=s#^device$#${name}/manifest.json#`, 'device']],
    ['a stranger', (name: string) => [`--transform=s#^x$#${name}/x#`, 'x']],
  ])('with %s is not imported, and nothing is written elsewhere', async (_, options) => {
    const folder = join(own.folder, 'hostile')
    await mkdir(folder)
    await writeFile(join(folder, 'x'), 'hostile')
    await symlink('/etc/passwd', join(folder, 'link'))
    await run(['mknod', join(folder, 'device'), 'c', '1', '3'])
    const file = join(own.folder, 'hostile.tar')
    await run(['tar', '-cf', file, '-C', folder, ...options('20250101-000000')])
    const before = await readdir(site.folders.backups)
    const outcome = await own.run('data', 'import', file)
    await rm(folder, { recursive: true })
    expect([outcome.code, outcome.stderr]).toEqual([
      1,
      expect.stringContaining('holds no set that can be taken'),
    ])
    expect(await readdir(site.folders.backups)).toEqual(before)
    for (const path of [
      '/etc/bob-outside',
      join(own.folder, 'bob-outside'),
      join(site.folders.backups, 'bob-outside'),
    ])
      expect(existsSync(path), path).toBe(false)
  })
})

describe('old sets', () => {
  test('are named with the reason by a dry run, which removes none', async () => {
    const before = await listSets(site)
    const { stdout } = await mustSucceed(own.run('data', 'prune', '--dry-run'))
    expect(stdout).toMatch(/^\d{8}-\d{6}\S* goes: no day, week or month needs it$/m)
    expect(stdout).toMatch(/^\d{8}-\d{6}\S* stays: daily: the newest of/m)
    expect(await listSets(site)).toEqual(before)
  })

  test('do not go while the newest one is damaged', async () => {
    const before = await listSets(site)
    const folder = setFolder(site, before.at(-1) ?? '')
    await run(['chmod', '-R', 'u+w', folder])
    const text = await readFile(join(folder, 'RECOVERY.md'), 'utf8')
    await writeFile(join(folder, 'RECOVERY.md'), `${text}more`)
    expect((await own.run('data', 'verify')).code).toBe(1)
    const outcome = await own.run('data', 'prune')
    expect(outcome.code).toBe(3)
    expect(outcome.stderr).toContain('is damaged: nothing goes')
    expect(await listSets(site)).toEqual(before)
    await writeFile(join(folder, 'RECOVERY.md'), text)
    await mustSucceed(own.run('data', 'verify'))
  })

  test('go, also when the run that removes them is killed; what is not ours stays', async () => {
    const alien = join(site.folders.backups, 'my-notes')
    await mkdir(alien)
    const before = await listSets(site)
    const points: [string, number][] = [
      ['verdict', 0],
      ['verdict', 2],
      ['verdict', 5],
      ['removed', 0],
    ]
    for (const [point, delayMs] of points) {
      const { outcome } = own.begin('data', ['prune'], ({ event, keep, message }, child) => {
        if (point === 'verdict' ? event === point && keep === false : message.startsWith(point))
          setTimeout(() => child.kill('SIGKILL'), delayMs)
      })
      expect((await outcome).code, point).toBe(null)
      for (const name of await listSets(site)) expect(await wrongSums(setFolder(site, name))).toEqual([])
    }
    const { events } = await mustSucceed(own.begin('data', ['prune']).outcome)
    const after = await listSets(site)
    expect(before.length).toBeGreaterThan(10)
    const needed = events.filter(({ reason }) => String(reason).startsWith('daily'))
    // The newest of each kind: everything, without configuration, and each part alone.
    expect(needed.length).toBe(5)
    const staying = events.filter(({ event, keep }) => event === 'verdict' && keep === true)
    expect(after).toEqual(staying.map((verdict) => verdict.set))
    expect(after.at(-1)).toBe(before.at(-1))
    expect((await readdir(alien)).length).toBe(0)
    await rm(alien, { recursive: true })
    await expectNothingHalfMade()
  })
})

describe('a schedule', () => {
  const folder = () => join(own.folder, 'cron.d')

  test('is a cron file that works with nothing in the environment, and was tried at once', async () => {
    await mkdir(folder())
    await own.set({ CRON_DIR: folder() })
    const before = await listSets(site)
    await mustSucceed(own.run('data', 'schedule', '--at', '15 2 * * 1-5'))
    expect(before).not.toContain((await listSets(site)).at(-1))
    const [name = ''] = await readdir(folder())
    expect(name).toMatch(/^[\w-]+$/)
    const text = await readFile(join(folder(), name), 'utf8')
    const jobs = text.split('\n').filter((line) => / root /.test(line))
    expect(jobs[0]).toMatch(/^15 2 \* \* 1-5 root /)
    expect(jobs.length).toBe(2)
    for (const job of jobs) {
      const command = job.replace(/^(\S+ ){5}root /, '').replaceAll(String.raw`\%`, '%')
      const path = /^PATH=.*$/m.exec(text)?.[0] ?? ''
      const said = await run(['env', '-i', path, '/bin/sh', '-c', `umask 077; cd /; ${command}`])
      expect(said).toBe('')
    }
    await mustSucceed(own.run('data', 'schedule', '--remove'))
    expect(await readdir(folder())).toEqual([])
  })

  test('that cannot be says what to do', async () => {
    const wrong = await own.run('data', 'schedule', '--at', 'tomorrow')
    expect(wrong.code).toBe(2)
    await own.set({ CRON_DIR: join(own.folder, 'nowhere') })
    const outcome = await own.run('data', 'schedule')
    expect(outcome.code).toBe(2)
    expect(outcome.stderr).toContain('apt-get install cron')
  })
})

describe('whoever watches', () => {
  const pings: { path: string; body: string }[] = []
  const server = createServer((request, response) => {
    let body = ''
    request.on('data', (part: Buffer) => (body += part.toString()))
    request.on('end', () => {
      pings.push({ path: request.url ?? '', body })
      response.end()
    })
  })
  beforeAll(async () => {
    server.listen(0, '127.0.0.1')
    await once(server, 'listening')
    const { port } = server.address() as AddressInfo
    await own.set({ BACKUP_PING_URL: `http://127.0.0.1:${port}/uuid` })
  })
  beforeEach(() => pings.splice(0))
  afterAll(async () => {
    await own.set({ BACKUP_PING_URL: '', KEEP_DAILY: '7' })
    server.close()
  })

  test('is told that a backup began and went well', async () => {
    await mustSucceed(own.run('data', '--quiet'))
    expect(pings.map(({ path }) => path)).toEqual(['/uuid/start', '/uuid'])
    expect(pings[1]?.body).toContain('read back and right')
  })

  test('is told why it failed, also when settings are wrong', async () => {
    await own.set({ KEEP_DAILY: 'many' })
    expect((await own.run('data')).code).toBe(2)
    expect(pings.map(({ path }) => path)).toEqual(['/uuid/start', '/uuid/fail'])
    expect(pings[1]?.body).toContain('KEEP_DAILY is not a number')
    pings.splice(0)
    expect((await own.run('data', 'prune')).code).toBe(2)
    expect(pings.map(({ path }) => path)).toEqual(['/uuid/fail'])
    await own.set({ KEEP_DAILY: '7' })
  })

  test('changes nothing by not being there', async () => {
    await own.set({ BACKUP_PING_URL: 'http://127.0.0.1:9/secret-uuid' })
    const { stdout, stderr } = await mustSucceed(own.run('data'))
    expect(stdout).toContain('BACKUP_PING_URL did not answer')
    expect(stdout + stderr).not.toContain('secret-uuid')
  })
})
