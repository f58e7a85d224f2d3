/**
 * The uploads of a set take the place of the live ones, file by file, and can go back. Nothing is deleted: what leaves goes to
 * the folder of the exchange. Every step may be repeated.
 */
import { closeSync, fchownSync, fchmodSync, futimesSync, openSync, renameSync, writeSync } from 'node:fs'
import { chown, link, lstat, mkdir, rename } from 'node:fs/promises'
import { createHash } from 'node:crypto'
import { dirname, join } from 'node:path'
import { run } from '../command.mts'
import { strapiUid } from '../folders.mts'
import { explain, warn } from '../report.mts'
import type { Site } from '../settings.mts'
import { uploadLines, type FileSum } from './manifest.mts'
import { sparing } from './room.mts'
import {
  addToPlan,
  folderOf,
  liveLook,
  lookOf,
  proceed,
  readPlan,
  writePlan,
  type Plan,
  type PlanLine,
  type Scope,
} from './plan.mts'
import { isDamage, readArchive, type ArchivedFile, type Sink } from './untar.mts'

/**
 * Unpacks what the plan needs beside the live files, and writes the plan down. Without one there is nothing to unpack.
 * @param isDamaged the archive may be: what cannot be read of it leaves the live files as they are
 */
export async function begin(
  site: Site,
  { id, ...scope }: { id: string } & Omit<Scope, 'withUploads'>,
  plan: Plan | undefined,
  tarPath: string,
  isDamaged = false,
): Promise<void> {
  const { uploads, postgres } = site.folders
  await sparing(uploads, postgres, (signal) =>
    stage(site, { id, ...scope }, plan, tarPath, isDamaged, signal),
  )
}

async function stage(
  site: Site,
  { id, ...scope }: { id: string } & Omit<Scope, 'withUploads'>,
  plan: Plan | undefined,
  tarPath: string,
  isDamaged: boolean,
  signal: AbortSignal,
): Promise<void> {
  const folder = folderOf(site, id)
  // Anybody may see that there is one, nobody but root what is in it.
  await mkdir(folder, { recursive: true, mode: 0o755 })
  for (const name of ['incoming', 'replaced', 'undone']) await mkdir(join(folder, name), { mode: 0o700 })
  const lines = plan ? await unpackPlan(folder, plan, tarPath, isDamaged, signal) : []
  await writePlan(site, id, { ...scope, withUploads: plan !== undefined }, lines)
}

async function unpackPlan(
  folder: string,
  { added, changed, surplus, same }: Plan,
  tarPath: string,
  isDamaged: boolean,
  signal: AbortSignal,
): Promise<PlanLine[]> {
  const looks = await unpackAll(folder, new Map([...added, ...changed]), tarPath, isDamaged, signal)
  for (const names of [added, changed])
    for (const name of names.keys()) {
      if (looks.has(name)) continue
      warn(`${name} is damaged in the set: what is live stays`)
      names.delete(name)
    }
  const differing = new Map([...added, ...changed])
  // As soon as they are in their places. Editors may replace those, too.
  for (const [name, sum] of differing) same.set(name, { ...sum, look: looks.get(name) ?? '' })
  return [
    ...[...added.keys()].map((name) => ({ name, do: 'add' as const, look: looks.get(name) })),
    ...[...changed.keys()].map((name) => ({ name, do: 'change' as const, look: looks.get(name) })),
    ...surplus.map((name) => ({ name, do: 'remove' as const })),
  ]
}

/** A file that was as in the set, from the beginning or since it was put there, and has been replaced or deleted. */
interface Late {
  sum: FileSum
  /** What is there now. */
  look: string | undefined
}

/** Brings late ones back as well; to be called again as long as visitors may have replaced something. */
export async function putLate(site: Site, id: string, plan: Plan, tarPath: string): Promise<void> {
  const late = new Map<string, Late>()
  for (const [name, { look: before, ...sum }] of plan.same) {
    const look = await liveLook(site, name)
    if (look !== before) late.set(name, { sum, look })
  }
  if (late.size === 0) return
  // Before they are unpacked: killed in between, the next run knows of them.
  await addToPlan(
    site,
    id,
    [...late].map(([name, { look }]) => ({ name, do: 'late', look })),
  )
  const looks = await unpackLate(site, id, late, tarPath)
  for (const [name, look] of looks) {
    const sum = late.get(name)?.sum
    if (sum) plan.same.set(name, { ...sum, look })
  }
  await putIncoming(site, id)
}

/** The same after a kill: what is still as it was then. @throws Error when the set is not what it was */
export async function resumeLate(site: Site, id: string, setFolder: string): Promise<void> {
  const open = new Map<string, string | undefined>()
  for (const line of await readPlan(site, id)) {
    if (line.do === 'late') open.set(line.name, line.look)
    else open.delete(line.name)
  }
  for (const [name, look] of open) if ((await liveLook(site, name)) !== look) open.delete(name)
  if (open.size === 0) return
  const late = new Map<string, Late>()
  for await (const { name, ...sum } of uploadLines(setFolder))
    if (open.has(name)) late.set(name, { sum, look: open.get(name) })
  await unpackLate(site, id, late, join(setFolder, 'uploads.tar'))
}

async function unpackLate(
  site: Site,
  id: string,
  late: Map<string, Late>,
  tarPath: string,
): Promise<Map<string, string>> {
  const sums = new Map([...late].map(([name, { sum }]) => [name, sum]))
  const looks = await unpackAll(folderOf(site, id), sums, tarPath)
  await addToPlan(
    site,
    id,
    [...late].map(([name, { look }]) => ({
      name,
      do: look === undefined ? 'add' : 'change',
      look: looks.get(name),
    })),
  )
  return looks
}

/** @returns the look of each file, all on the disk @throws Error when one is not what the list says, unless damage is accepted */
async function unpackAll(
  folder: string,
  needed: Map<string, FileSum>,
  tarPath: string,
  isDamaged = false,
  signal?: AbortSignal,
): Promise<Map<string, string>> {
  const folders = new Set(['.', ...[...needed.keys()].map(dirname)])
  for (const one of folders) await mkdir(join(folder, 'incoming', one), { recursive: true })
  const right = new Map<string, string>()
  await readArchive(tarPath, (file) => {
    signal?.throwIfAborted()
    const sum = needed.get(file.name)
    // Under one name until it is whole: nothing else ever gets among the incoming files.
    const partial = join(folder, 'unpacking')
    const onEnd = (sha256: string) => {
      if (sha256 !== sum?.sha256) return
      renameSync(partial, join(folder, 'incoming', file.name))
      right.set(file.name, lookOf({ size: file.sizeBytes, mtimeMs: file.mtimeMs }))
    }
    return sum && unpack(partial, file, onEnd)
  }).catch((error: unknown) => {
    if (!isDamaged || !isDamage(error)) throw error
    warn(`uploads.tar cannot be read to its end: ${explain(error)}`)
  })
  const wrong = [...needed.keys()].filter((name) => !right.has(name))
  if (wrong.length > 0 && !isDamaged)
    throw new Error(`uploads.tar does not hold what uploads.jsonl says: ${wrong.slice(0, 5).join(', ')}`)
  await run(['sync', '--file-system', folder], { timeoutMs: 12 * 3_600_000 })
  return right
}

function unpack(path: string, file: ArchivedFile, onEnd: (sha256: string) => void): Sink {
  const target = openSync(path, 'w', 0o600)
  const hash = createHash('sha256')
  return {
    write(part) {
      hash.update(part)
      for (let written = 0; written < part.length;) written += writeSync(target, part, written)
    },
    end() {
      fchownSync(target, strapiUid, strapiUid)
      fchmodSync(target, file.mode)
      futimesSync(target, file.mtimeMs / 1000, file.mtimeMs / 1000)
      closeSync(target)
      onEnd(hash.digest('hex'))
    },
  }
}

/** New and changed files take their places; a name never has no file. */
export async function putIncoming(site: Site, id: string): Promise<void> {
  await forEach(await readPlan(site, id), async (line) => {
    if (line.do === 'add' || line.do === 'change') await replace(site, line.name, id, 'incoming', 'replaced')
  })
}

/** Surplus files leave. What was uploaded since the plan stays, and what cannot be moved. Then the exchange is done. */
export async function takeSurplus(site: Site, id: string): Promise<void> {
  for (const { name, do: what } of await readPlan(site, id)) {
    if (what !== 'remove') continue
    await takeAway(site, name, id, 'replaced').catch((error: unknown) =>
      warn(`${name}, which the set does not have, stays: ${explain(error)}`),
    )
  }
  await proceed(site, id, 'done')
}

/** What the exchange had taken away comes back. */
export async function putBack(site: Site, id: string): Promise<void> {
  await proceed(site, id, 'undoing')
  await forEach(await readPlan(site, id), ({ name }) => replace(site, name, id, 'replaced', 'undone'))
}

/** What the exchange had brought leaves, unless it never got to its place, or somebody has replaced it since. Then it is undone. */
export async function takeAdded(site: Site, id: string): Promise<void> {
  await forEach(await readPlan(site, id), async (line) => {
    if (line.do !== 'add' || !(await wasPut(site, id, line))) return
    if ((await liveLook(site, line.name)) === line.look) await takeAway(site, line.name, id, 'undone')
  })
  await proceed(site, id, 'undone')
}

/** One file that cannot be moved does not keep the others from it. @throws what the first of them threw, at the end */
async function forEach(lines: PlanLine[], action: (line: PlanLine) => Promise<void>): Promise<void> {
  const failures: unknown[] = []
  for (const line of lines) await action(line).catch((error: unknown) => failures.push(error))
  if (failures.length > 0) throw failures[0]
}

/** Before a restore that was killed is taken back, maybe hours later: what was replaced again since stays as it is now. */
export async function keepWhatIsNewer(site: Site, id: string): Promise<void> {
  for (const line of await readPlan(site, id)) {
    if ((line.do !== 'add' && line.do !== 'change') || !(await wasPut(site, id, line))) continue
    const before = join(folderOf(site, id), 'replaced', line.name)
    const now = await liveLook(site, line.name)
    if (now === undefined || now === line.look || !(await exists(before))) continue
    const kept = join(folderOf(site, id), 'undone', line.name)
    await mkdir(dirname(kept), { recursive: true })
    await rename(before, kept)
  }
}

async function wasPut(site: Site, id: string, { name }: PlanLine): Promise<boolean> {
  return !(await exists(join(folderOf(site, id), 'incoming', name)))
}

async function replace(
  site: Site,
  name: string,
  id: string,
  from: 'incoming' | 'replaced',
  to: 'replaced' | 'undone',
): Promise<void> {
  const live = join(site.folders.uploads, name)
  const source = join(folderOf(site, id), from, name)
  if (!(await exists(source))) return
  // The folder may have gone with its last file.
  await makeFolders(site, name)
  // A second name for the old bytes, so that the rename that replaces them leaves no moment without a file.
  const kept = join(folderOf(site, id), to, name)
  await mkdir(dirname(kept), { recursive: true })
  await keepEarlier(live, kept, join(folderOf(site, id), 'earlier'))
  await link(live, kept).catch((error: NodeJS.ErrnoException) => {
    if (error.code !== 'ENOENT' && error.code !== 'EEXIST') throw error
  })
  await rename(source, live)
}

/** What an editor replaced twice while it ran: the later version is what comes back, earlier ones stay in a folder of their own. */
async function keepEarlier(live: string, kept: string, earlier: string): Promise<void> {
  const [now, before] = await Promise.all([live, kept].map((path) => lstat(path).catch(() => undefined)))
  if (!now || !before || now.ino === before.ino) return
  await mkdir(earlier, { recursive: true, mode: 0o700 })
  let number = 1
  while (await exists(join(earlier, String(number)))) number += 1
  await rename(kept, join(earlier, String(number)))
}

async function takeAway(site: Site, name: string, id: string, to: 'replaced' | 'undone'): Promise<void> {
  const live = join(site.folders.uploads, name)
  const kept = join(folderOf(site, id), to, name)
  if ((await exists(kept)) || !(await exists(live))) return
  await mkdir(dirname(kept), { recursive: true })
  await rename(live, kept)
}

async function makeFolders(site: Site, name: string): Promise<void> {
  const parts = name.split('/').slice(0, -1)
  for (let depth = 1; depth <= parts.length; depth += 1) {
    const folder = join(site.folders.uploads, ...parts.slice(0, depth))
    if (await exists(folder)) continue
    await mkdir(folder, { mode: 0o755 })
    await chown(folder, strapiUid, strapiUid)
  }
}

async function exists(path: string): Promise<boolean> {
  return (await lstat(path).catch(() => undefined)) !== undefined
}
