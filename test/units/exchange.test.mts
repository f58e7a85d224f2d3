import { mkdir, readdir, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { beforeEach, expect, test } from 'vitest'
import * as exchange from '../../scripts/lib/data/exchange.mts'
import { uploadLines } from '../../scripts/lib/data/manifest.mts'
import * as plans from '../../scripts/lib/data/plan.mts'
import { ownFolder } from '../../scripts/lib/data/untar.mts'
import { archiveUploads, filesBelow } from '../../scripts/lib/data/uploads.mts'
import type { Site } from '../../scripts/lib/settings.mts'
import { newFolder } from './site.mts'

const id = '20261125_120000'
let site: Site
let set = ''

/** The live files, by name. */
async function live(): Promise<Record<string, string>> {
  const found: Record<string, string> = {}
  for await (const name of filesBelow(site.folders.uploads))
    found[name] = await readFile(join(site.folders.uploads, name), 'utf8')
  return found
}

async function put(files: Record<string, string>): Promise<void> {
  for (const [name, text] of Object.entries(files)) await writeFile(join(site.folders.uploads, name), text)
}

async function plan(missing: string[] = []): Promise<plans.Plan> {
  return await plans.planExchange(site, uploadLines(set), (name) => missing.includes(name))
}

async function stage(planned: plans.Plan): Promise<void> {
  await exchange.begin(site, { id, withDatabase: false }, planned, join(set, 'uploads.tar'))
}

/** The set holds a, b, c and d; live are a, another b, c and the newer e. */
beforeEach(async () => {
  const folder = await newFolder()
  site = { folders: { uploads: join(folder, 'uploads') } } as Site
  set = join(folder, 'set')
  await mkdir(site.folders.uploads)
  await mkdir(set)
  await put({ a: 'a', b: 'b', c: 'c', d: 'd' })
  await using archive = archiveUploads(
    site.folders.uploads,
    join(set, 'uploads.tar'),
    join(set, 'uploads.jsonl'),
  )
  await archive.pass()
  await archive.close([])
  await put({ b: 'other b', e: 'e' })
  await rm(join(site.folders.uploads, 'd'))
})

test('an exchange brings the files of the set, and goes back', async () => {
  const before = await live()
  const planned = await plan()
  expect([
    [...planned.added.keys()],
    [...planned.changed.keys()],
    planned.surplus,
    planned.same.size,
  ]).toEqual([['d'], ['b'], ['e'], 2])
  await stage(planned)
  await exchange.putIncoming(site, id)
  await exchange.takeSurplus(site, id)
  expect(await live()).toEqual({ a: 'a', b: 'b', c: 'c', d: 'd' })
  await exchange.putBack(site, id)
  await exchange.takeAdded(site, id)
  expect(await live()).toEqual(before)
  expect(await plans.readExchanges(site)).toEqual([{ id, stage: 'undone' }])
})

test('what an editor replaced or deleted between the plan and the swap comes back, too', async () => {
  const planned = await plan()
  await stage(planned)
  await exchange.putIncoming(site, id)
  await put({ a: 'replaced meanwhile' })
  await rm(join(site.folders.uploads, 'c'))
  const tar = join(set, 'uploads.tar')
  await exchange.putLate(site, id, planned, tar)
  expect(await live()).toEqual({ a: 'a', b: 'b', c: 'c', d: 'd', e: 'e' })
  await put({ a: 'replaced again', b: 'replaced, too', c: 'uploaded again' })
  await exchange.putLate(site, id, planned, tar)
  // Nothing is late any more: the archive is not even opened.
  await exchange.putLate(site, id, planned, join(set, 'gone.tar'))
  await exchange.takeSurplus(site, id)
  expect(await live()).toEqual({ a: 'a', b: 'b', c: 'c', d: 'd' })
  await exchange.putBack(site, id)
  await exchange.takeAdded(site, id)
  expect(await live()).toEqual({ a: 'replaced again', b: 'replaced, too', c: 'uploaded again', e: 'e' })
  const earlier = join(site.folders.uploads, ownFolder, id, 'earlier')
  const texts = ['1', '2'].map((number) => readFile(join(earlier, number), 'utf8'))
  expect((await Promise.all(texts)).toSorted()).toEqual(['other b', 'replaced meanwhile'])
})

test('a killed one that is taken back hours later leaves what editors did since, and loses nothing', async () => {
  await stage(await plan())
  await exchange.putIncoming(site, id)
  await put({ b: 'newest b' })
  await exchange.keepWhatIsNewer(site, id)
  await exchange.putBack(site, id)
  await exchange.takeAdded(site, id)
  expect(await live()).toEqual({ a: 'a', b: 'newest b', c: 'c', e: 'e' })
  const kept = join(site.folders.uploads, ownFolder, id, 'undone')
  expect((await readdir(kept)).toSorted()).toEqual(['b', 'd'])
  expect(await readFile(join(kept, 'b'), 'utf8')).toBe('other b')
})

test('an added file that an editor has replaced since stays when the exchange is taken back', async () => {
  await stage(await plan())
  await exchange.putIncoming(site, id)
  await exchange.takeSurplus(site, id)
  await put({ d: 'newest d' })
  await exchange.putBack(site, id)
  await exchange.takeAdded(site, id)
  expect(await live()).toEqual({ a: 'a', b: 'other b', c: 'c', d: 'newest d', e: 'e' })
})

test('what came late, and was written down but not unpacked when the run was killed, comes with the next one', async () => {
  const planned = await plan()
  await stage(planned)
  await put({ a: 'replaced meanwhile' })
  await rm(join(site.folders.uploads, 'c'))
  const gone = join(set, 'gone.tar')
  await expect(exchange.putLate(site, id, planned, gone)).rejects.toThrow('ENOENT')
  // A part of it was.
  await writeFile(join(site.folders.uploads, ownFolder, id, 'unpacking'), '')
  await exchange.putIncoming(site, id)
  expect((await live()).a).toBe('replaced meanwhile')
  // Between the two runs an editor has put another one there.
  await put({ c: 'newest c' })
  await exchange.resumeLate(site, id, set)
  await exchange.putIncoming(site, id)
  await exchange.takeSurplus(site, id)
  expect(await live()).toEqual({ a: 'a', b: 'b', c: 'newest c', d: 'd' })
})

test('one of the database alone is written down without files', async () => {
  const before = await live()
  await exchange.begin(site, { id, withDatabase: true }, undefined, join(set, 'uploads.tar'))
  expect(await plans.pendingExchanges(site)).toEqual([{ id, stage: 'planned' }])
  expect(await plans.scopeOf(site, id)).toEqual({ withDatabase: true, withUploads: false })
  await exchange.takeSurplus(site, id)
  await exchange.putBack(site, id)
  await exchange.takeAdded(site, id)
  expect(await plans.readExchanges(site)).toEqual([{ id, stage: 'undone' }])
  expect(await live()).toEqual(before)
})

test('one that is taken back gives an editor back what came late', async () => {
  const planned = await plan()
  await stage(planned)
  await exchange.putIncoming(site, id)
  await put({ a: 'replaced meanwhile' })
  await exchange.putLate(site, id, planned, join(set, 'uploads.tar'))
  await exchange.keepWhatIsNewer(site, id)
  await exchange.putBack(site, id)
  await exchange.takeAdded(site, id)
  expect(await live()).toEqual({ a: 'replaced meanwhile', b: 'other b', c: 'c', e: 'e' })
})

test('one whose removal was killed is gone, and its rest goes with the next one', async () => {
  await stage(await plan())
  await plans.removeExchange(site, id)
  expect(await readdir(join(site.folders.uploads, ownFolder))).toEqual([])
  await mkdir(join(site.folders.uploads, ownFolder, `removing-${id}`))
  expect(await plans.readExchanges(site)).toEqual([])
  await plans.endRemovals(site)
  expect(await readdir(join(site.folders.uploads, ownFolder))).toEqual([])
})

test('what the set does not have stays, and is named, when it cannot be moved', async () => {
  await stage(await plan())
  await exchange.putIncoming(site, id)
  const replaced = join(site.folders.uploads, ownFolder, id, 'replaced')
  await rename(replaced, `${replaced}.aside`)
  await writeFile(replaced, 'no folder')
  await exchange.takeSurplus(site, id)
  expect(await live()).toEqual({ a: 'a', b: 'b', c: 'c', d: 'd', e: 'e' })
  expect(await plans.readExchanges(site)).toEqual([{ id, stage: 'done' }])
})

test('a folder where the set has a file, or the other way round, is refused before anything is touched', async () => {
  await mkdir(join(site.folders.uploads, 'd'))
  await expect(plan()).rejects.toThrow('uploads/d is a folder')
  await rm(join(site.folders.uploads, 'd'), { recursive: true })
  await writeFile(
    join(set, 'uploads.jsonl'),
    `${JSON.stringify({ name: 'e/inner', sizeBytes: 1, sha256: 'x' })}\n`,
  )
  await expect(plan()).rejects.toThrow('uploads/e is no folder')
})

test('one that never put its files takes nothing away', async () => {
  await stage(await plan())
  await put({ d: 'somebody else’s' })
  await exchange.putBack(site, id)
  await exchange.takeAdded(site, id)
  expect((await live()).d).toBe('somebody else’s')
})

test('what the set names as missing stays as it is', async () => {
  const { surplus, changed } = await plan(['e', 'b'])
  expect([surplus, changed.size]).toEqual([[], 0])
})

test('every step may be repeated', async () => {
  const before = await live()
  await stage(await plan())
  for (let times = 0; times < 2; times += 1) await exchange.putIncoming(site, id)
  for (let times = 0; times < 2; times += 1) await exchange.takeSurplus(site, id)
  expect(await live()).toEqual({ a: 'a', b: 'b', c: 'c', d: 'd' })
  for (let times = 0; times < 2; times += 1) await exchange.putBack(site, id)
  for (let times = 0; times < 2; times += 1) await exchange.takeAdded(site, id)
  expect(await live()).toEqual(before)
})
