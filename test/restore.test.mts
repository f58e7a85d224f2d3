/** What was backed up comes back, row by row and byte by byte, while visitors are served; and it can be taken back. */
import { existsSync } from 'node:fs'
import { execFileSync } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { cp, mkdir, mkdtemp, readdir, readFile, rename, rm, stat, unlink, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { allowBooting, forbidBooting } from '../scripts/lib/booting.mts'
import { run } from '../scripts/lib/command.mts'
import { compose } from '../scripts/lib/compose.mts'
import * as engine from '../scripts/lib/engine.mts'
import { createArchive } from '../scripts/lib/data/archive.mts'
import { healthyPostgresql } from '../scripts/lib/data/backup.mts'
import { readManifest, sumOf, writeManifest, type Manifest } from '../scripts/lib/data/manifest.mts'
import { setFolder } from '../scripts/lib/data/sets.mts'
import { ownFolder } from '../scripts/lib/data/untar.mts'
import { projectRoot, type Site, type SlotName } from '../scripts/lib/settings.mts'
import { logIn, seePicture } from './admin.mts'
import { damage, damages, expectUnseen, mustSucceed, resultOf, secretsOf, type TestSite } from './harness.mts'
import { damagedTogether, siteToRestore, type State } from './sites.mts'

const {
  begin,
  postgresql,
  sql,
  makeSet,
  state,
  spoil,
  killed,
  expectServed,
  expectNothingHalfMade,
  dataFolder,
} = siteToRestore(18_340)
let own: TestSite
let site: Site
let apiToken = ''
let picture = { name: '', url: '' }
let firebase = ''
let set = ''
let saved: State

beforeAll(async () => {
  ;({ own, site, set, saved, apiToken, picture, firebase } = await begin())
})
afterAll(() => own.remove())

/** Whatever the test before did to it. */
beforeEach(async () => {
  await expect.poll(async () => (await own.observe()).master.status, { timeout: 90_000 }).toBe('healthy')
  await expectServed()
})

describe('a restore', () => {
  test('brings every row and every byte back while Strapi runs; undo takes that back', async () => {
    const spoilt = await spoil()
    const before = await own.observe()
    await expect(logIn(own.url)).rejects.toThrow()
    const { stdout } = await mustSucceed(own.run('data', 'restore', set, '--yes'))
    expect(stdout).toMatch(
      /uploads: 3 missing ones come back, 2 get the bytes of the set, 1 that it does not have/,
    )
    expect(stdout).toContain(`Done: ${set} is live`)
    expect(await state()).toEqual(saved)
    expect((await own.observe()).master.startedAt).toBe(before.master.startedAt)
    for (const name of ['picture_1.png', 'picture_2.png', 'folder', 'folder/inside.png'])
      expect((await stat(join(site.folders.uploads, name))).uid, name).toBe(1000)

    await logIn(own.url)
    const files = `${own.url}/api/upload/files`
    const answer = await fetch(files, { headers: { authorization: `Bearer ${apiToken}` } })
    expect([answer.status, (await fetch(files)).status]).toEqual([200, 403])
    expect(await seePicture(own.url, picture.url.split('/').at(-1) ?? '')).toBeGreaterThan(0)

    const dry = await mustSucceed(own.run('data', 'undo', '--dry-run'))
    expect(dry.stdout).toMatch(/would take back restore/)
    // Sessions have come since.
    expect((await state()).rows.pings).toBe(saved.rows.pings)
    await mustSucceed(own.run('data', 'undo', '--yes'))
    expect(await state()).toEqual(spoilt)
    await expectServed()
    await expectNothingHalfMade()
    const again = await own.run('data', 'undo', '--yes')
    expect(again.code).toBe(2)
    expect(again.stderr).toContain('no restore to take back')
  })

  test('and its undo show no secret', async () => {
    const secrets = await secretsOf(own)
    const spoilt = await spoil()
    await expectUnseen(own, secrets, () => mustSucceed(own.run('data', 'restore', set, '--yes')))
    expect(await state()).toEqual(saved)
    await expectUnseen(own, secrets, () => mustSucceed(own.run('data', 'undo', '--yes')))
    expect(await state()).toEqual(spoilt)
  })

  test('can be made by hand, with the commands of RECOVERY.md as they are printed', async () => {
    await spoil()
    const folder = setFolder(site, set)
    const blocks = (await readFile(join(folder, 'RECOVERY.md'), 'utf8')).matchAll(/^```sh\n([^]*?)^```$/gm)
    const home = await mkdtemp(join(tmpdir(), `${own.project}-home-`))
    const commands = [...blocks].map(([, text]) => text).join('')
    await run(['sh', '-ec', commands], { cwd: folder, timeoutMs: 300_000, env: { HOME: home } })
    expect(await readFile(join(home, 'config-of-the-set/docker/.env'), 'utf8')).toContain('POSTGRES_PASSWORD')
    await rm(home, { recursive: true })
    const now = await state()
    expect(now.uploads).toMatchObject(saved.uploads)
    expect(now.properties).toBe(saved.properties)
    // Strapi has booted on it, and written down that it has.
    const { strapi_core_store_settings: written, ...rows } = saved.rows
    expect(written).toBeDefined()
    expect(now.rows).toMatchObject(rows)
    await expect.poll(async () => (await own.observe()).master.status, { timeout: 90_000 }).toBe('healthy')
    await expectServed()
    await sql(`DROP DATABASE "${site.database.name}_old"`, 'postgres')
    // Surplus files stay then.
    await mustSucceed(own.run('data', 'restore', set, '--yes'))
    expect(await state()).toEqual(saved)
  })

  test('of uploads alone leaves the database as it is', async () => {
    const spoilt = await spoil()
    await mustSucceed(own.run('data', 'restore', set, '--only', 'uploads', '--yes'))
    expect(await state()).toEqual({ ...spoilt, uploads: saved.uploads })
    await mustSucceed(own.run('data', 'undo', '--yes'))
    expect(await state()).toEqual(spoilt)
  })

  test('works when the live database is gone', async () => {
    await sql(`DROP DATABASE "${site.database.name}" WITH (FORCE)`, 'postgres')
    await mustSucceed(own.run('data', 'restore', set, '--yes'))
    expect(await state()).toEqual(saved)
    await expectServed()
    await expectNothingHalfMade()
  })

  test('works when the live database is corrupt, so that nobody can connect to it', async () => {
    await mustSucceed(own.run('data', 'restore', set, '--yes'))
    const file = join(
      site.folders.postgres,
      await dataFolder(),
      await sql("SELECT pg_relation_filepath('pg_attribute')"),
    )
    const server = await postgresql()
    await run(['docker', 'stop', server])
    await writeFile(file, randomBytes((await stat(file)).size))
    await run(['docker', 'start', server])
    await expect.poll(() => healthyPostgresql(site), { timeout: 60_000 }).toBeDefined()
    await expect(sql('SELECT count(*) FROM pings')).rejects.toThrow(/invalid page|could not|FATAL|ERROR/)
    await mustSucceed(own.run('data', 'restore', set, '--yes'))
    expect(await state()).toEqual(saved)
    await expectServed()
    await expectNothingHalfMade()
    await mustSucceed(own.run('data', 'backup', '--only', 'database'))
  })

  test('of another schema keeps the old release from booting, until its own is deployed or it is undone', async () => {
    const policy = async () => {
      const found = await engine.container(`${own.project}-strapi-master`)
      return found?.HostConfig.RestartPolicy.Name
    }
    const other = '20200101-000000'
    await cp(setFolder(site, set), setFolder(site, other), { recursive: true })
    await run(['chmod', '-R', 'u+w', setFolder(site, other)])
    const manifest = await readManifest(setFolder(site, other))
    await writeManifest(setFolder(site, other), { ...manifest, schemaHash: 'other', release: undefined })
    const restore = ['restore', other, '--yes', '--accept', 'other-schema']
    expect(await policy()).toBe('unless-stopped')
    // Killed as soon as it is live, too.
    await killed(restore, ({ event, step }) => event === 'step-done' && step === '5/6')
    expect(await policy()).toBe('no')
    await mustSucceed(own.run('data', 'backup', '--only', 'config'))
    expect(await policy()).toBe('no')
    await sql("UPDATE strapi_database_schema SET hash = 'other'")
    expect((await mustSucceed(own.run('deploy', '--dry-run'))).stdout).toContain(
      'strapi-master stays off after a crash or a reboot',
    )
    await mustSucceed(own.run('data', 'undo', '--yes', '--accept', 'other-schema'))
    expect(await policy()).toBe('unless-stopped')
    await rm(setFolder(site, other), { recursive: true })
  })

  test('of another schema calls off a boot under way, and one of a release that crashes again and again', async () => {
    const image = (await engine.container(await postgresql()))?.Image ?? ''
    const pretend = async (slot: SlotName, ...does: string[]) => {
      const container = `${own.project}-pretends-${slot}`
      const options = ['--restart=unless-stopped', '--network=none', '--entrypoint=sh', '--health-cmd=false']
      await run(['docker', 'run', '--detach', `--name=${container}`, ...options, image, '-c', ...does])
      return { ...site.slots[slot], container }
    }
    const slots = {
      'strapi-master': await pretend('strapi-master', 'exit 1'),
      'strapi-slave': await pretend('strapi-slave', 'exec sleep 600'),
    }
    const states = () =>
      Promise.all(
        Object.values(slots).map(async ({ container }) => (await engine.container(container))?.State.Status),
      )
    try {
      await expect.poll(states, { timeout: 20_000 }).toEqual(['restarting', 'running'])
      const pretended = { ...site, slots }
      await forbidBooting(pretended, 'this')
      expect(await states()).toEqual(['exited', 'exited'])
      // Longer than the engine would have waited.
      await sleep(3000)
      expect(await states()).toEqual(['exited', 'exited'])
      // As an undo does. Stopped by somebody since, it stays so.
      await allowBooting(pretended, 'strapi-slave', 'another')
      expect(await states()).toEqual(['exited', 'exited'])
      await allowBooting(pretended, 'strapi-slave', 'this')
      expect(await states()).toEqual(['exited', 'running'])
      await run(['docker', 'stop', '--time=0', slots['strapi-slave'].container])
      await allowBooting(pretended, 'strapi-slave', 'this')
      expect(await states()).toEqual(['exited', 'exited'])
    } finally {
      for (const { container } of Object.values(slots)) await run(['docker', 'rm', '--force', container])
    }
  })

  test.each([
    ['is too small says what is needed', 'size=600k', /to restore it needs about/],
    // Enough for the bytes, not for so many files.
    ['fills leaves the uploads as they were', 'size=10m,nr_inodes=100', /no space left on device/],
  ])('of uploads onto a disk that %s', async (_, limits, says) => {
    const many = join(own.folder, 'many')
    await mkdir(many)
    for (let number = 0; number < 300; number += 1)
      await writeFile(join(many, `small_${number}.png`), randomBytes(1000))
    const small = join(own.folder, 'small')
    await mkdir(small)
    await run(['mount', '-t', 'tmpfs', '-o', limits, 'tmpfs', small])
    let name = 'none'
    try {
      await own.set({ UPLOADS_VOLUME: many })
      const outcome = await own.begin('data', ['backup', '--only', 'uploads']).outcome
      await own.set({ UPLOADS_VOLUME: small })
      await writeFile(join(small, 'live.png'), 'live')
      name = String(resultOf(outcome).set)
      const restored = await own.run('data', 'restore', name, '--yes', '--accept', 'incomplete')
      expect(restored.code).toBe(1)
      expect(restored.stderr).toMatch(says)
      expect(restored.stderr).toMatch(/nothing was changed|what is live is as before/)
      expect(await readdir(small).then((names) => names.filter((one) => one !== ownFolder))).toEqual([
        'live.png',
      ])
      expect(await readdir(join(small, ownFolder)).catch(() => [])).toEqual([])
    } finally {
      await own.set({ UPLOADS_VOLUME: site.folders.uploads })
      await run(['umount', small])
      await rm(small, { recursive: true })
      await rm(many, { recursive: true })
      // Much smaller than the others: prune would be alarmed.
      await rm(setFolder(site, name), { recursive: true, force: true })
    }
  })

  test('gives up while the disk of PostgreSQL still has room for its log', async () => {
    const current = await state()
    await sql(`CREATE TABLE ballast AS SELECT n, md5(n::text) || repeat(md5(random()::text), 20) AS text
      FROM generate_series(1, 150000) AS n`)
    const large = await makeSet('--only', 'database')
    await sql('DROP TABLE ballast')
    const small = join(own.folder, 'small')
    await mkdir(small)
    await run(['mount', '-t', 'tmpfs', '-o', 'size=1000m', 'tmpfs', small])
    try {
      await own.set({ POSTGRES_VOLUME: small })
      const { outcome } = own.begin('data', ['restore', large, '--yes'], ({ event, step }) => {
        if (event === 'step-done' && step === '1/6')
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
    expect(await state()).toEqual(current)
    await expectNothingHalfMade()
  })

  test('that meets a full disk of PostgreSQL leaves everything as it was, and works when there is room', async () => {
    const current = await state()
    await sql(`CREATE TABLE ballast AS SELECT n, md5(n::text) || repeat(md5(random()::text), 20) AS text
      FROM generate_series(1, 150000) AS n`)
    const large = await makeSet('--only', 'database')
    await sql('DROP TABLE ballast')
    const server = await postgresql()
    const { postgres } = site.folders
    await run(['docker', 'stop', server])
    await rename(postgres, `${postgres}.aside`)
    await mkdir(postgres)
    await run(['mount', '-t', 'tmpfs', '-o', 'size=2g', 'tmpfs', postgres])
    try {
      await run(['cp', '-a', `${postgres}.aside/.`, postgres])
      await run(['docker', 'start', server])
      await expect.poll(() => healthyPostgresql(site), { timeout: 60_000 }).toBeDefined()
      const full = join(postgres, 'full')
      const fill = `cat /dev/zero > ${full}; truncate --size=-2M ${full}`
      const { outcome } = own.begin('data', ['restore', large, '--yes'], ({ event, step }, child) => {
        if (event !== 'step' || step !== '2/6') return
        child.kill('SIGSTOP')
        execFileSync('sh', ['-c', fill], { stdio: 'ignore' })
        child.kill('SIGCONT')
      })
      const { code, events } = await outcome
      expect([1, 3]).toContain(code)
      expect(String(events.at(-1)?.error)).toMatch(
        /No space left on device|server closed the connection|is almost full/,
      )
      await rm(full)
      await expect.poll(() => healthyPostgresql(site), { timeout: 60_000 }).toBeDefined()
      expect(await state()).toEqual(current)
      await mustSucceed(own.run('data', 'restore', set, '--yes'))
      expect(await state()).toEqual(saved)
      await expectNothingHalfMade()
    } finally {
      await run(['docker', 'stop', server])
      await run(['umount', postgres])
      await rm(postgres, { recursive: true })
      await rename(`${postgres}.aside`, postgres)
      await run(['docker', 'start', server])
      await expect.poll(() => healthyPostgresql(site), { timeout: 60_000 }).toBeDefined()
    }
  })

  test('is the last one for undo also when the clock went backwards', async () => {
    const before = await state()
    const future = join(site.folders.uploads, ownFolder, '20990101_000000')
    await mkdir(future)
    await writeFile(join(future, 'plan.undone'), '{"withDatabase":false}\n')
    const spoilt = await spoil()
    const restored = resultOf(await mustSucceed(own.begin('data', ['restore', set, '--yes']).outcome))
    expect(restored.restore).toBe('20990101_000001')
    await mustSucceed(own.run('data', 'undo', '--yes'))
    expect(await state()).toEqual(spoilt)
    expect(spoilt).not.toEqual(before)
  })

  test('keeps what it replaced for RESTORE_KEEP_DAYS, then prune removes it', async () => {
    const ids = async () =>
      (await readdir(join(site.folders.uploads, ownFolder))).filter((id) => !id.startsWith('2099'))
    // The set that the tests restore is not the newest of this day.
    await rename(setFolder(site, set), join(own.folder, 'aside'))
    try {
      await mustSucceed(own.run('data', 'prune'))
      const before = await ids()
      expect(before.length).toBeGreaterThan(0)
      await own.set({ RESTORE_KEEP_DAYS: '0' })
      await sleep(1100)
      // While the newest set is damaged, what was replaced may be all that is good.
      const newest = setFolder(site, await makeSet('--only', 'config'))
      await run(['chmod', '-R', 'u+w', newest])
      await unlink(join(newest, 'config.tar'))
      expect((await own.run('data', 'verify')).code).toBe(1)
      const alarmed = await own.run('data', 'prune')
      expect([alarmed.code, alarmed.stderr]).toEqual([3, expect.stringContaining('is damaged: nothing goes')])
      expect(await ids()).toEqual(before)
      await rm(newest, { recursive: true })
      for (const point of ['dropped', 'removed what restore']) {
        const { outcome } = own.begin('data', ['prune'], ({ message }, child) => {
          if (message.startsWith(point)) child.kill('SIGKILL')
        })
        // The last ones to be removed are small.
        expect([null, 0], point).toContain((await outcome).code)
      }
      await mustSucceed(own.run('data', 'prune'))
    } finally {
      await own.set({ RESTORE_KEEP_DAYS: '7' })
      await rename(join(own.folder, 'aside'), setFolder(site, set))
    }
    expect(await ids()).toEqual([])
    expect(
      await sql("SELECT count(*) FROM pg_database WHERE datname ~ '(replaced|undone)_20[2-8]'", 'postgres'),
    ).toBe('0')
  })

  test('of a site that is switched off says that visitors are not served, and what to type', async () => {
    const slot = (await own.containerId('strapi-master')) ?? ''
    await run(['docker', 'stop', slot])
    const outcome = await own.run('data', 'restore', set, '--yes')
    await run(['docker', 'start', slot])
    expect(outcome.code).toBe(3)
    expect(outcome.stderr).toContain('visitors are not served, neither before nor now')
    expect(outcome.stderr).toMatch(/Now: .*deploy.mts/)
    expect(await state()).toEqual(saved)
  })

  test('asks first, and without a terminal wants --yes', async () => {
    const current = await state()
    const outcome = await own.run('data', 'restore', set)
    expect(outcome.code).toBe(2)
    expect(outcome.stderr).toContain('--yes')
    expect(await state()).toEqual(current)
  })

  test('says in a dry run what it would do', async () => {
    const current = await spoil()
    const { stdout } = await mustSucceed(own.run('data', 'restore', set, '--dry-run'))
    expect(stdout).toMatch(/3 missing ones come back, 2 get the bytes of the set/)
    expect(stdout).toMatch(/its [\d,]+ rows take the place of those of \S+ \([\d,]+\)/)
    expect(stdout).toMatch(/in the set:\n +- public\.\w+ has \d+ rows instead of \d+/)
    expect(stdout).toContain('Nothing was changed')
    expect(await state()).toEqual(current)
  })
})

describe('a set that does not fit', () => {
  let copy = ''
  beforeEach(async () => {
    copy = '20200101-000000'
    await rm(setFolder(site, copy), { recursive: true, force: true })
    await cp(setFolder(site, set), setFolder(site, copy), { recursive: true })
    await run(['chmod', '-R', 'u+w', setFolder(site, copy)])
  })

  async function refused(...options: string[]): Promise<string> {
    const current = await state()
    const outcome = await own.run('data', 'restore', copy, '--yes', ...options)
    expect(outcome.code, outcome.stdout).toBe(1)
    expect(outcome.stderr).toMatch(/nothing was changed|what is live is as before/)
    expect(await state()).toEqual(current)
    await expectNothingHalfMade()
    return outcome.stderr
  }

  async function change(fields: (manifest: Manifest) => Partial<Manifest>): Promise<void> {
    const manifest = await readManifest(setFolder(site, copy))
    await writeManifest(setFolder(site, copy), { ...manifest, ...fields(manifest) })
  }

  test.each(damages)(
    'because each of its files is damaged (%s) is refused before anything is touched',
    async (how) => {
      const current = await state()
      const folder = setFolder(site, copy)
      for (const names of damagedTogether) {
        await rm(folder, { recursive: true })
        await cp(setFolder(site, set), folder, { recursive: true })
        await run(['chmod', '-R', 'u+w', folder])
        await damage(folder, names, how)
        const outcome = await own.run('data', 'restore', copy, '--yes')
        expect(outcome.code, outcome.stdout).toBe(1)
        expect(outcome.stderr).toContain('nothing was changed')
        for (const name of names) expect(outcome.stderr).toContain(name)
      }
      expect(await state()).toEqual(current)
      await expectNothingHalfMade()
    },
  )

  test('because it is damaged gives all that can be read of it, when that is accepted', async () => {
    const spoilt = await spoil()
    await sql(
      'CREATE TABLE ballast AS SELECT n, md5(random()::text) AS text FROM generate_series(1, 100000) AS n',
    )
    await sql('CREATE INDEX ballast_n ON ballast (n)')
    const indexes = () => sql("SELECT count(*) FROM pg_indexes WHERE schemaname = 'public'")
    const indexed = await indexes()
    const broken = await makeSet()
    await sql('DROP TABLE ballast')
    const folder = setFolder(site, broken)
    await run(['chmod', '-R', 'u+w', folder])
    // In the middle of the largest table, and of a picture.
    const picture2 = await readFile(join(site.folders.uploads, 'picture_2.png'))
    for (const [name, middle] of [
      ['database.dump', (content: Buffer) => Math.floor(content.length / 2)],
      ['uploads.tar', (content: Buffer) => content.indexOf(picture2) + 100],
    ] as const) {
      const content = await readFile(join(folder, name))
      content.fill(0x58, middle(content), middle(content) + 100)
      await writeFile(join(folder, name), content)
    }
    await unlink(join(folder, 'roles.sql'))
    await mustSucceed(own.run('data', 'restore', set, '--yes'))
    expect((await own.run('data', 'restore', broken, '--yes')).stderr).toContain('--accept damaged')
    const { stdout } = await mustSucceed(own.run('data', 'restore', broken, '--yes', '--accept', 'damaged'))
    expect(stdout).toContain('picture_2.png is damaged in the set: what is live stays')
    const now = await state()
    expect(now.uploads).toEqual({ ...spoilt.uploads, 'picture_2.png': saved.uploads['picture_2.png'] })
    expect(await indexes()).toBe(indexed)
    const { ballast, ...rows } = now.rows
    expect(ballast).toBe('0 -')
    expect(rows).toEqual(spoilt.rows)
    await rm(folder, { recursive: true })
  })

  test('because a file was added to it is refused', async () => {
    await writeFile(join(setFolder(site, copy), 'more.txt'), '')
    expect(await refused()).toContain('more.txt does not belong to the set')
  })

  const misfits: [string, string, (manifest: Manifest) => Partial<Manifest>][] = [
    ['other-secrets', 'strapi/.env', () => ({ secrets: 'others' })],
    [
      'newer-postgresql',
      'PostgreSQL 99.1',
      ({ versions }) => ({ versions: { ...versions, postgresql: '99.1' } }),
    ],
    ['other-schema', 'would have to be deployed right afterwards', () => ({ schemaHash: 'other' })],
    ['incomplete', 'uploads/a.png is not there', () => ({ missing: ['uploads/a.png is not there'] })],
  ]
  test.each(misfits)('names --accept %s, and what it is', async (word, says, fields) => {
    await change(fields)
    const said = await refused()
    expect(said).toContain(says)
    expect(said.match(/--accept [\w-]+/g)).toEqual([`--accept ${word}`])
  })

  test('is accepted when all that is wrong with it is, and not when one thing is not', async () => {
    for (const [, , fields] of misfits) await change(fields)
    const words = misfits.map(([word]) => ['--accept', word])
    expect(await refused(...words.slice(1).flat())).toContain('--accept other-secrets')
    await mustSucceed(own.run('data', 'restore', copy, '--yes', ...words.flat()))
    expect(await state()).toEqual(saved)
    await mustSucceed(own.run('data', 'undo', '--yes'))
  })

  test('because it is of an unknown format is refused', async () => {
    await change(() => ({ format: 99 }))
    expect(await refused()).toContain('is of format 99')
  })

  test('because its dump holds other rows than its manifest is not made live', async () => {
    await change(({ database }) => ({
      database: database && { ...database, rows: { ...database.rows, 'public.pings': 501 } },
    }))
    expect(await refused()).toContain('public.pings has 500 rows instead of 501')
  })

  test.each([
    ['../outside.png', 'leads out of its folder'],
    ['/etc/outside.png', 'leads out of its folder'],
    [`${ownFolder}/plan`, 'has the name of a folder of this program'],
    ['two\nlines.png', 'has a control character in its name'],
  ])('because somebody wrote %j into its archive, with the right sums, is refused', async (name, says) => {
    const folder = setFolder(site, copy)
    const tar = join(folder, 'uploads.tar')
    await unlink(tar)
    let line = ''
    await using archive = createArchive(tar, (one) => (line = JSON.stringify(one)))
    await archive.addFile(join(folder, 'RECOVERY.md'), name)
    await archive.close()
    await writeFile(join(folder, 'uploads.jsonl'), `${line}\n`)
    const sums = {
      'uploads.tar': await sumOf(tar),
      'uploads.jsonl': await sumOf(join(folder, 'uploads.jsonl')),
    }
    await change(({ files }) => ({ files: { ...files, ...sums } }))
    expect(await refused()).toContain(says)
  })
})

describe('a lost server', () => {
  test('comes back on a bare one from a set, its application and three commands', async () => {
    await mustSucceed(own.run('data', 'restore', set, '--yes'))
    const file = join(own.folder, 'exported.tar')
    await mustSucceed(own.run('data', 'export', set, file))
    const lostSecrets = await secretsOf(own)

    await run(compose(site, '--profile', '*', 'down', '--volumes', '--timeout', '5'))
    // Elsewhere: the application, as from its repository, and the exported set. Here: nginx.
    const elsewhere = await mkdtemp(join(tmpdir(), `${own.project}-elsewhere-`))
    await rename(file, join(elsewhere, 'exported.tar'))
    await rm(join(site.source, '.env'))
    await cp(site.source, join(elsewhere, 'strapi'), { recursive: true })
    for (const name of await readdir(own.folder))
      if (name !== 'nginx') await rm(join(own.folder, name), { recursive: true })
    await rm(site.nginx.confFile)
    await rename(join(elsewhere, 'strapi'), site.source)
    await run(['tar', '-xf', join(elsewhere, 'exported.tar'), '-C', elsewhere])
    const folder = join(elsewhere, set)

    await writeFile(own.envFile, '')
    // Somebody else's secrets are there, and shall stay.
    const secrets = join(site.source, '.env')
    await writeFile(secrets, 'APP_KEYS=another,key\n')
    const newHost = ['restore', '--new-host', folder, '--yes']
    const refused = await own.run('data', ...newHost, '--keep-settings')
    expect(refused.code).toBe(2)
    expect(refused.stderr).toContain('--accept other-secrets')
    expect([await readFile(own.envFile, 'utf8'), await readFile(secrets, 'utf8')]).toEqual([
      '',
      'APP_KEYS=another,key\n',
    ])
    await rm(secrets)
    const dry = await mustSucceed(own.run('data', ...newHost, '--dry-run'))
    expect(dry.stdout).toContain('Nothing was changed')
    expect([await readFile(own.envFile, 'utf8'), existsSync(site.folders.backups)]).toEqual(['', false])
    // A disk that is too small for the set, and one that has no place for all of its files.
    await mkdir(site.folders.backups)
    for (const [size, says] of [
      ['size=1m', 'the set needs about'],
      ['nr_inodes=6', 'no space left on device'],
    ]) {
      await run(['mount', '-t', 'tmpfs', '-o', size ?? '', 'tmpfs', site.folders.backups])
      const full = await own.run('data', ...newHost)
      expect(full.code).not.toBe(0)
      expect(full.stderr).toContain(says)
      expect(
        await readdir(site.folders.backups).then((names) => names.filter((one) => one !== '.incoming')),
      ).toEqual([])
      await run(['umount', site.folders.backups])
    }
    for (const step of ['3/4', '2/6', '6/6'])
      await killed(newHost, (event) => event.event === 'step' && event.step === step, 300)
    const outcome = await expectUnseen(own, lostSecrets, () => mustSucceed(own.run('data', ...newHost)))
    expect(outcome.stdout).toMatch(/Now: .*setup.*\nThen: .*deploy.*\n.*schedule/)
    // Twice is as good as once.
    await mustSucceed(own.run('data', ...newHost))
    expect(await secretsOf(own)).toEqual(lostSecrets)
    expect(await readFile(firebase, 'utf8')).toBe('{"key":"of Firebase"}')
    const { mode, uid } = await stat(firebase)
    expect([mode & 0o777, uid]).toEqual([0o400, 1000])
    expect(await state()).toEqual(saved)
    await mustSucceed(own.run('setup'))
    await mustSucceed(own.run('deploy'))
    await logIn(own.url)
    await expectServed()
    expect((await fetch(`${own.url}${picture.url}`)).status).toBe(200)
    const live = await own.run('data', ...newHost)
    await rm(elsewhere, { recursive: true })
    expect(live.code).toBe(2)
    expect(live.stderr).toContain('runs the site already')
  })

  test('does not come back without its application, and nothing is written', async () => {
    const envFile = join(own.folder, 'empty.env')
    await writeFile(envFile, '')
    await rename(site.source, `${site.source}.away`)
    const argv = [
      join(projectRoot, 'scripts/data.mts'),
      '--env-file',
      envFile,
      'restore',
      '--new-host',
      setFolder(site, set),
    ]
    const failure = await run([process.execPath, ...argv, '--yes']).catch((error: Error) => error.message)
    await rename(`${site.source}.away`, site.source)
    expect(failure).toContain('exit code 2')
    expect(failure).toContain('the application is not in')
    expect(await readFile(envFile, 'utf8')).toBe('')
  })
})
