/** Sets that are there: looked at, damaged, carried elsewhere, removed when they are old, made every night. */
import { execFileSync } from 'node:child_process'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import {
  chmod,
  cp,
  link,
  mkdir,
  readdir,
  readFile,
  rename,
  rm,
  stat,
  symlink,
  truncate,
  writeFile,
} from 'node:fs/promises'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { run } from '../scripts/lib/command.mts'
import { parts, readManifest, writeManifest, wrongSums, type Part } from '../scripts/lib/data/manifest.mts'
import { makeBackup } from '../scripts/lib/data/backup.mts'
import { rememberProven } from '../scripts/lib/data/verified.mts'
import { listSets, setFolder } from '../scripts/lib/data/sets.mts'
import { folderBytes } from '../scripts/lib/data/uploads.mts'
import { type Site } from '../scripts/lib/settings.mts'
import { damage, damages, mustSucceed, resultOf, type TestSite } from './harness.mts'
import { damagedTogether, siteWithPictures } from './sites.mts'

const { begin, sql, makeSet, expectNothingHalfMade } = siteWithPictures(18_320)
let own: TestSite
let site: Site

beforeAll(async () => {
  ;({ own, site } = await begin())
})
afterAll(() => own.remove())

describe('a set that was damaged', () => {
  let good = ''
  const bad = '20990101-000000'
  beforeAll(async () => {
    good = await makeSet()
  })

  async function verifyDamaged(
    spoil: (folder: string) => Promise<unknown>,
    ...options: string[]
  ): Promise<string> {
    const folder = setFolder(site, bad)
    await cp(setFolder(site, good), folder, { recursive: true })
    await run(['chmod', '-R', 'u+w', folder])
    try {
      await spoil(folder)
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

  test.each(damages)('is found: %s, in each of its files', async (how) => {
    for (const names of damagedTogether) {
      const said = await verifyDamaged((folder) => damage(folder, names, how))
      for (const name of names) expect(said).toContain(name)
    }
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
    ['restoring the dump', 150],
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
    await run(['mount', '-t', 'tmpfs', '-o', 'size=1000m', 'tmpfs', small])
    try {
      await own.set({ POSTGRES_VOLUME: small })
      const { outcome } = own.begin('data', ['verify', large, '--deep'], ({ message }) => {
        if (message.startsWith('restoring the dump'))
          execFileSync('fallocate', ['-l', '600M', join(small, 'full')])
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

describe('a set as one file', () => {
  const file = () => join(own.folder, 'exported.tar')
  const partial = () => join(own.folder, '.exported.tar.partial')
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

  test('killed while it has two names is ended by the same command, and is no other set', async () => {
    const name = await makeSet('--only', 'config')
    const other = await makeSet('--only', 'config')
    await mustSucceed(own.run('data', 'export', name, file()))
    const content = await readFile(file())
    for (const [asked, code] of [
      [other, 2],
      [name, 0],
    ] as const) {
      await link(file(), partial())
      expect((await own.run('data', 'export', asked, file())).code).toBe(code)
      expect(existsSync(partial())).toBe(false)
    }
    // Of one that was killed earlier: what is there is not of it.
    await writeFile(partial(), 'of another one')
    expect((await own.run('data', 'export', name, file())).code).toBe(2)
    expect(await readFile(file())).toEqual(content)
    await rm(partial())
  })

  test('killed with -9 on its way is there or not, and the same command ends it', async () => {
    const name = await makeSet()
    const kill = async (argv: string[], delayMs: number) => {
      const { child, outcome } = own.begin('data', argv)
      setTimeout(() => child.kill('SIGKILL'), delayMs)
      await outcome
    }
    for (const delayMs of [350, 450, 550, 700]) {
      await rm(file(), { force: true })
      await kill(['export', name, file()], delayMs)
      if (!existsSync(file()) || existsSync(partial()))
        await mustSucceed(own.run('data', 'export', name, file()))
      await run(['tar', '-df', file(), '-C', site.folders.backups])
      expect((await readdir(own.folder)).filter((one) => one.endsWith('.partial'))).toEqual([])
    }
    for (const delayMs of [350, 450, 550, 700]) {
      await rm(setFolder(site, name), { recursive: true, force: true })
      await kill(['import', file()], delayMs)
      if (!existsSync(setFolder(site, name))) await mustSucceed(own.run('data', 'import', file()))
      expect(await wrongSums(setFolder(site, name))).toEqual([])
      await mustSucceed(own.run('data', 'backup', '--only', 'config'))
      await expectNothingHalfMade()
    }
  })

  test('brought by hand, with another owner and open to all, is read, restored for a look, and warned of', async () => {
    const name = await makeSet()
    const brought = setFolder(site, '20250101-000000')
    await cp(setFolder(site, name), brought, { recursive: true })
    await run(['chown', '-R', '1234:1234', brought])
    await run(['chmod', '-R', 'u+w,go+rX', brought])
    const { stdout } = await mustSucceed(own.run('data', 'verify', '20250101-000000', '--deep'))
    await rm(brought, { recursive: true })
    expect(stdout).toContain('its dump was restored and compared')
    expect(stdout).toContain(`chmod -R go= ${brought}`)
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
  // Two of each kind: one of them goes.
  const kinds: Part[][] = [['database', 'uploads'], ['database'], ['uploads'], ['config'], [...parts]]
  beforeAll(async () => {
    for (const kind of [...kinds, ...kinds]) {
      const { name } = await makeBackup(site, kind)
      await rememberProven(site, name)
    }
  })

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
    const [first = '', ...before] = await listSets(site)
    const within = join(setFolder(site, first), 'notes.txt')
    await writeFile(within, 'mine')
    // Also when midnight has come since the first of them.
    await own.set({ KEEP_DAILY: '1' })
    let newest = ''
    const points: [string, number][] = [
      ['verdict', 0],
      ['verdict', 2],
      ['verdict', 5],
      ['removed', 0],
    ]
    for (const [point, delayMs] of points) {
      // So that something is left to go, however many have gone before the kill comes.
      for (let made = 0; made < 4; made++) {
        newest = (await makeBackup(site, ['config'])).name
        await rememberProven(site, newest)
      }
      const { outcome } = own.begin('data', ['prune'], ({ event, keep, message }, child) => {
        if (point === 'verdict' ? event === point && keep === false : message.startsWith(point))
          setTimeout(() => child.kill('SIGKILL'), delayMs)
      })
      expect((await outcome).code, point).toBe(null)
      for (const name of (await listSets(site)).slice(1))
        expect(await wrongSums(setFolder(site, name))).toEqual([])
    }
    const { events } = await mustSucceed(own.begin('data', ['prune']).outcome)
    await own.set({ KEEP_DAILY: '7' })
    const [kept, ...after] = await listSets(site)
    expect(kept).toBe(first)
    await rm(within)
    expect(before.length).toBeGreaterThan(10)
    const needed = events.filter(({ reason }) => String(reason).startsWith('daily'))
    // The newest of each kind: everything, without configuration, and each part alone.
    expect(needed.length).toBe(5)
    const staying = events.filter(({ event, keep }) => event === 'verdict' && keep === true)
    expect(after).toEqual(staying.map((verdict) => verdict.set))
    expect(after.at(-1)).toBe(newest)
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
