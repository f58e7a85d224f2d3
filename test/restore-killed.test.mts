/** A restore or undo that is killed, or brings what cannot serve: the next run mends it. */
import { existsSync } from 'node:fs'
import { mkdir, readdir, rename, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { run } from '../scripts/lib/command.mts'
import { incoming } from '../scripts/lib/data/databases.mts'
import { setFolder } from '../scripts/lib/data/sets.mts'
import { ownFolder } from '../scripts/lib/data/untar.mts'
import { type Site } from '../scripts/lib/settings.mts'
import { mustSucceed, resultOf, type Event, type TestSite } from './harness.mts'
import { isSaid, siteToRestore, type State } from './sites.mts'

const { begin, sql, makeSet, state, spoil, killed, expectServed, expectNothingHalfMade } =
  siteToRestore(18_380)
let own: TestSite
let site: Site
let set = ''
let saved: State

beforeAll(async () => {
  ;({ own, site, set, saved } = await begin())
})
afterAll(() => own.remove())

/** Whatever the test before did to it. */
beforeEach(async () => {
  await expect.poll(async () => (await own.observe()).master.status, { timeout: 90_000 }).toBe('healthy')
  await expectServed()
})

describe('a restore that Strapi cannot serve', () => {
  let bad = ''
  beforeAll(async () => {
    await sql('ALTER TABLE admin_users RENAME TO lost')
    bad = await makeSet()
    await sql('ALTER TABLE lost RENAME TO admin_users')
  })
  afterAll(() => own.set({ HEALTH_TIMEOUT: '180' }))

  test('is taken back by itself', async () => {
    const current = await state()
    await rm(join(site.folders.uploads, 'picture_1.png'))
    const outcome = await own.run('data', 'restore', bad, '--yes')
    expect(outcome.code).toBe(1)
    expect(outcome.stderr).toContain('it was taken back: visitors are served as before')
    const { ['picture_1.png']: lost, ...uploads } = current.uploads
    expect(lost).toBeDefined()
    expect(await state()).toEqual({ ...current, uploads })
    await expectServed()
    await expectNothingHalfMade()
  })

  const moments: [string, (event: Event) => boolean, number][] = [
    ['the swap is through', ({ event, step }) => event === 'step-done' && step === '5/6', 0],
    ['visitors are waited for', ({ event, step }) => event === 'step' && step === '6/6', 3000],
    ['it swaps back', isSaid('swapping the databases'), 0],
    ['it takes uploads out', isSaid('taking out the uploads'), 0],
  ]
  test.each(moments)('is taken back by the next run when it is killed while %s', async (_, at, delayMs) => {
    // No longer are visitors waited for.
    await own.set({ HEALTH_TIMEOUT: '8' })
    const spoilt = await spoil()
    await killed(['restore', bad, '--yes'], at, delayMs)
    await mustSucceed(own.run('data', 'backup', '--only', 'config'))
    expect(await state()).toEqual(spoilt)
    await expectServed()
    await expectNothingHalfMade()
  })
})

describe('killed with -9', () => {
  const begins = (step: string) => (one: Event) => one.event === 'step' && one.step === step
  const ends = (step: string) => (one: Event) => one.event === 'step-done' && one.step === step
  const when = { begins, ends }

  /** A killed one may just have come to its end. */
  async function undoUnlessDone(): Promise<void> {
    const kept = join(site.folders.uploads, ownFolder)
    const ids = (await readdir(kept)).toSorted()
    const isDone = existsSync(join(kept, ids.at(-1) ?? '', 'plan.undone'))
    await mustSucceed(own.run('data', ...(isDone ? ['backup', '--only', 'config'] : ['undo', '--yes'])))
  }

  test.each([
    ['1/6', 'begins', 0],
    ['2/6', 'begins', 0],
    ['2/6', 'begins', 600],
    ['3/6', 'begins', 60],
    ['3/6', 'begins', 150],
    ['3/6', 'ends', 0],
    ['4/6', 'ends', 0],
    ['5/6', 'begins', 60],
    ['5/6', 'ends', 0],
    ['6/6', 'begins', 50],
  ] as const)(
    'when %s %s (+ %i ms), a restore leaves the old or the new state',
    async (step, moment, delayMs) => {
      // Much to unpack.
      if (step === '3/6') await run(['sh', '-c', 'rm picture_*'], { cwd: site.folders.uploads })
      const spoilt = await spoil()
      await killed(['restore', set, '--yes'], when[moment](step), delayMs)
      // Whichever command comes next.
      await mustSucceed(own.run('data', 'backup', '--only', 'config'))
      await expectNothingHalfMade()
      await expectServed()
      const now = await state()
      if (now.rows.pings !== saved.rows.pings) return expect(now).toEqual(spoilt)
      expect(now).toEqual(saved)
      await mustSucceed(own.run('data', 'undo', '--yes'))
      expect(await state()).toEqual(spoilt)
      await expectServed()
    },
  )

  const pointsOfUndo = [
    ['Take back restore', 0],
    ['putting replaced and surplus uploads back', 0],
    ['swapping the databases', 0],
    ['swapping the databases', 160],
    ['taking out the uploads that it had brought', 0],
  ] as const

  test.each(pointsOfUndo.slice(3, 4))(
    'at "%s" (+ %i ms), an undo of the database alone is finished by the next one, which takes back no other',
    async (point, delayMs) => {
      const spoilt = await spoil()
      await mustSucceed(own.run('data', 'restore', set, '--only', 'database', '--yes'))
      await sql('DELETE FROM pings')
      await mustSucceed(own.run('data', 'restore', set, '--only', 'database', '--yes'))
      await killed(['undo', '--yes'], isSaid(point), delayMs)
      await undoUnlessDone()
      expect(await sql('SELECT count(*) FROM pings')).toBe('0')
      await mustSucceed(own.run('data', 'undo', '--yes'))
      expect(await state()).toEqual(spoilt)
      await expectNothingHalfMade()
    },
  )

  test('before its swap, an undo whose database was dropped since ends with the uploads, and blocks nothing', async () => {
    const spoilt = await spoil()
    const restored = resultOf(await mustSucceed(own.begin('data', ['restore', set, '--yes']).outcome))
    const id = String(restored.restore)
    // As if it had been killed as soon as it was decided.
    const plan = join(site.folders.uploads, ownFolder, id, 'plan')
    await rename(`${plan}.done`, `${plan}.undoing`)
    await sql(`DROP DATABASE strapi_blue_green_replaced_${id}`, 'postgres')
    const { stdout } = await mustSucceed(own.run('data', 'backup', '--only', 'config'))
    expect(stdout).toContain('only the uploads are taken back')
    expect(await state()).toEqual({ ...saved, uploads: spoilt.uploads })
    await mustSucceed(own.run('data', 'restore', set, '--yes'))
    expect(await state()).toEqual(saved)
  })

  test('before its swap, it is what undo means, not the restore before it', async () => {
    const spoilt = await spoil()
    await mustSucceed(own.run('data', 'restore', set, '--yes'))
    await killed(['restore', set, '--yes'], ends('3/6'))
    // As cron does meanwhile.
    await mustSucceed(own.run('data', 'backup', '--only', 'config'))
    const { stdout } = await mustSucceed(own.run('data', 'undo', '--yes'))
    expect(stdout).toMatch(/Done: restore \S+ is taken back/)
    expect(await state()).toEqual(saved)
    await mustSucceed(own.run('data', 'undo', '--yes'))
    expect(await state()).toEqual(spoilt)
  })

  test('and kept from being mended by a file that cannot be moved, it stops no backup, but another restore', async () => {
    const spoilt = await spoil()
    await killed(['restore', set, '--yes'], ends('4/6'))
    const file = join(site.folders.uploads, 'picture_3.png')
    // What something is mounted on cannot be replaced.
    await run(['mount', '--bind', file, file])
    try {
      const { stdout } = await mustSucceed(own.run('data', 'backup', '--only', 'config'))
      expect(stdout).toContain('cannot be mended yet')
      for (const command of [['undo', '--yes'], ['restore', set, '--yes'], ['prune']]) {
        const outcome = await own.run('data', ...command)
        expect(outcome.code).toBe(1)
        expect(outcome.stderr).toContain('could not be mended yet; nothing was changed')
      }
    } finally {
      await run(['umount', file])
    }
    await mustSucceed(own.run('data', 'backup', '--only', 'config'))
    expect(await state()).toEqual(spoilt)
    await expectNothingHalfMade()
  })

  test('while what it had unpacked cannot be removed, all else is mended', async () => {
    const id = '20200101_000000'
    const busy = join(site.folders.uploads, ownFolder, id, 'new')
    await mkdir(busy, { recursive: true })
    await run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', busy])
    await sql(`CREATE DATABASE ${incoming}`, 'postgres')
    const moved = join(site.folders.uploads, ownFolder, `removing-${id}`)
    try {
      const { stdout } = await mustSucceed(own.run('data', 'backup', '--only', 'config'))
      expect(stdout).toContain(`what restore ${id} had unpacked cannot be removed yet`)
      expect(stdout).toContain('a half-restored database: removed')
    } finally {
      await run(['umount', join(moved, 'new')])
    }
    // The set that the tests restore is not the newest of this day.
    await rename(setFolder(site, set), join(own.folder, 'aside'))
    await mustSucceed(own.run('data', 'prune'))
    await rename(join(own.folder, 'aside'), setFolder(site, set))
    expect(existsSync(moved)).toBe(false)
    await expectNothingHalfMade()
  })

  test.each(pointsOfUndo)(
    'at "%s" (+ %i ms), an undo is finished by the next one',
    async (point, delayMs) => {
      const spoilt = await spoil()
      await mustSucceed(own.run('data', 'restore', set, '--yes'))
      await killed(['undo', '--yes'], isSaid(point), delayMs)
      await undoUnlessDone()
      expect(await state()).toEqual(spoilt)
      await expectServed()
      await expectNothingHalfMade()
    },
  )
})
