/**
 * The uploads of a set take the place of the live ones, file by file, and can go back. Nothing is deleted: what leaves the
 * uploads folder goes to folders inside it (renames need one disk) that nobody but root can enter.
 *
 * How far an exchange has come is the name of its plan: planned, done, undoing, undone. Every step may be repeated.
 */
import { closeSync, fchownSync, fchmodSync, futimesSync, openSync, writeSync } from 'node:fs'
import { chown, link, lstat, mkdir, readdir, readFile, rename, rm } from 'node:fs/promises'
import { createHash } from 'node:crypto'
import { dirname, join } from 'node:path'
import { run } from '../command.mts'
import { syncFolder } from '../envfile.mts'
import { strapiUid } from '../folders.mts'
import { writeSynced } from '../history.mts'
import type { Site } from '../settings.mts'
import { sumOf, uploadLines, type FileSum } from './manifest.mts'
import { ownFolder, readArchive, unsafeName, type ArchivedFile, type Sink } from './untar.mts'
import { filesBelow } from './uploads.mts'

export interface Plan {
  /** What the set has and the folder has not. */
  added: Map<string, FileSum>
  /** What the folder has with other bytes. */
  changed: Map<string, FileSum>
  /** What only the folder has. */
  surplus: string[]
  /** What is as in the set already, with what tells whether it still is. */
  same: Map<string, FileSum & { look: string }>
}

export type Stage = 'staging' | (typeof stages)[number]

export interface Exchange {
  id: string
  stage: Stage
}

interface PlanLine {
  name: string
  do: 'add' | 'change' | 'remove'
  /** Size and time of what takes its place. */
  look?: string | undefined
}

const stages = ['planned', 'done', 'undoing', 'undone'] as const
const planName = (at: Exclude<Stage, 'staging'>) => `plan.${at}`

/**
 * Compares, and changes nothing.
 * @param missing sentences of the manifest; what the set should have and has not stays as it is
 * @throws Error when the set's list holds a name that no set may hold
 */
export async function planExchange(site: Site, setFolder: string, missing: string[]): Promise<Plan> {
  const wanted = new Map<string, FileSum>()
  for await (const { name, sizeBytes, sha256 } of uploadLines(setFolder)) {
    const unsafe = unsafeName(name)
    if (unsafe) throw new Error(`uploads.jsonl: ${JSON.stringify(name)} ${unsafe}`)
    wanted.set(name, { sizeBytes, sha256 })
  }
  const plan: Plan = { added: new Map(wanted), changed: new Map(), surplus: [], same: new Map() }
  const top = site.folders.uploads
  for await (const name of filesBelow(top)) {
    const sum = wanted.get(name)
    const found = await lstat(join(top, name)).catch(() => undefined)
    if (!found) continue
    if (sum) {
      plan.added.delete(name)
      const isSame =
        found.isFile() && found.size === sum.sizeBytes && (await sumOf(join(top, name))).sha256 === sum.sha256
      if (isSame) plan.same.set(name, { ...sum, look: lookOf(found) })
      else plan.changed.set(name, sum)
    } else if (
      found.isFile() &&
      unsafeName(name) === undefined &&
      !missing.some((sentence) => sentence.startsWith(`uploads/${name} `))
    )
      plan.surplus.push(name)
  }
  return plan
}

/** Bytes that the plan needs beside the live files. */
export function bytesOf({ added, changed }: Plan): number {
  return [...added.values(), ...changed.values()].reduce((total, { sizeBytes }) => total + sizeBytes, 0)
}

/** Unpacks what the plan needs beside the live files. Afterwards the exchange is planned. */
export async function stage(
  site: Site,
  exchange: { id: string; withDatabase: boolean },
  plan: Plan,
  tarPath: string,
): Promise<void> {
  const folder = folderOf(site, exchange.id)
  // Anybody may see that there is one, nobody but root what is in it.
  await mkdir(folder, { recursive: true, mode: 0o755 })
  for (const name of ['incoming', 'replaced', 'undone']) await mkdir(join(folder, name), { mode: 0o700 })
  const looks = await unpackAll(folder, new Map([...plan.added, ...plan.changed]), tarPath)
  const lines: PlanLine[] = [
    ...[...plan.added.keys()].map((name) => ({ name, do: 'add' as const, look: looks.get(name) })),
    ...[...plan.changed.keys()].map((name) => ({ name, do: 'change' as const, look: looks.get(name) })),
    ...plan.surplus.map((name) => ({ name, do: 'remove' as const })),
  ]
  const text = [{ withDatabase: exchange.withDatabase }, ...lines].map((line) => JSON.stringify(line))
  await run(['sync', '--file-system', folder])
  await writePlan(folder, `${text.join('\n')}\n`)
}

/** The old plan or the new one, never half of one. */
async function writePlan(folder: string, text: string): Promise<void> {
  await writeSynced(join(folder, 'plan'), 'w', text)
  await rename(join(folder, 'plan'), join(folder, planName('planned')))
  await syncFolder(folder)
}

/**
 * After the swap: what was the same when the plan was made, and has been replaced or deleted since, comes back as well.
 * @returns how many files
 */
export async function stageLate(site: Site, id: string, plan: Plan, tarPath: string): Promise<number> {
  const late = new Map<string, FileSum>()
  for (const [name, { look, ...sum }] of plan.same) {
    const found = await lstat(join(site.folders.uploads, name)).catch(() => undefined)
    if (!found || lookOf(found) !== look) late.set(name, sum)
  }
  if (late.size === 0) return 0
  const folder = folderOf(site, id)
  const looks = await unpackAll(folder, late, tarPath)
  const lines = [...late.keys()].map((name): PlanLine => ({ name, do: 'change', look: looks.get(name) }))
  const text = lines.map((line) => `${JSON.stringify(line)}\n`).join('')
  await writePlan(folder, `${await planText(site, id)}${text}`)
  return late.size
}

/** @returns the look of each file @throws Error when one is not what the list says */
async function unpackAll(
  folder: string,
  needed: Map<string, FileSum>,
  tarPath: string,
): Promise<Map<string, string>> {
  const folders = new Set(['.', ...[...needed.keys()].map(dirname)])
  for (const one of folders) await mkdir(join(folder, 'incoming', one), { recursive: true })
  const right = new Map<string, string>()
  await readArchive(tarPath, (file) => {
    const sum = needed.get(file.name)
    const onEnd = (sha256: string) => {
      if (sha256 === sum?.sha256)
        right.set(file.name, lookOf({ size: file.sizeBytes, mtimeMs: file.mtimeMs }))
    }
    return sum && unpack(join(folder, 'incoming', file.name), file, onEnd)
  })
  const wrong = [...needed.keys()].filter((name) => !right.has(name))
  if (wrong.length > 0)
    throw new Error(`uploads.tar does not hold what uploads.jsonl says: ${wrong.slice(0, 5).join(', ')}`)
  return right
}

function lookOf({ size, mtimeMs }: { size: number; mtimeMs: number }): string {
  return `${size} ${Math.round(mtimeMs)}`
}

/** A later version of the same name overwrites an earlier one, as `tar` does. */
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
  for (const line of await readPlan(site, id)) {
    if (line.do !== 'remove') await replace(site, line.name, id, 'incoming', 'replaced')
  }
}

/** Surplus files leave. What was uploaded since the plan stays. */
export async function takeSurplus(site: Site, id: string): Promise<void> {
  for (const line of await readPlan(site, id)) {
    if (line.do === 'remove') await takeAway(site, line.name, id, 'replaced')
  }
  await proceed(site, id, 'done')
}

/** What the exchange had taken away comes back. */
export async function putBack(site: Site, id: string): Promise<void> {
  await proceed(site, id, 'undoing')
  for (const line of await readPlan(site, id)) await replace(site, line.name, id, 'replaced', 'undone')
}

/** What the exchange had brought leaves, unless it never got to its place. */
export async function takeAdded(site: Site, id: string): Promise<void> {
  for (const line of await readPlan(site, id)) {
    const wasPut = !(await exists(join(folderOf(site, id), 'incoming', line.name)))
    if (line.do === 'add' && wasPut) await takeAway(site, line.name, id, 'undone')
  }
  await proceed(site, id, 'undone')
}

/** Before a restore that was killed is taken back, maybe hours later: what was replaced again since stays as it is now. */
export async function keepWhatIsNewer(site: Site, id: string): Promise<void> {
  for (const { name, look } of await readPlan(site, id)) {
    const folder = folderOf(site, id)
    const before = join(folder, 'replaced', name)
    const wasPut = look !== undefined && !(await exists(join(folder, 'incoming', name)))
    const found = await lstat(join(site.folders.uploads, name)).catch(() => undefined)
    if (!wasPut || !found || lookOf(found) === look) continue
    if (!(await exists(before))) continue
    await mkdir(dirname(join(folder, 'undone', name)), { recursive: true })
    await rename(before, join(folder, 'undone', name))
  }
}

/** All exchanges that left a folder, oldest first. */
export async function readExchanges(site: Site): Promise<Exchange[]> {
  const names = await readdir(join(site.folders.uploads, ownFolder)).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return []
    throw error
  })
  const ids = names.filter((name) => /^\d{8}_\d{6}$/.test(name)).toSorted()
  return await Promise.all(ids.map(async (id) => ({ id, stage: await stageOf(site, id) })))
}

/** Those that a killed run left under way. */
export async function pendingExchanges(site: Site): Promise<Exchange[]> {
  return (await readExchanges(site)).filter(({ stage: at }) => at !== 'done' && at !== 'undone')
}

/** Whether the database was restored with it: then its swap decides which way an interrupted one goes. */
export async function isWithDatabase(site: Site, id: string): Promise<boolean> {
  return (await planText(site, id)).startsWith('{"withDatabase":true}')
}

/** Removes what an exchange keeps. */
export async function removeExchange(site: Site, id: string): Promise<void> {
  await rm(folderOf(site, id), { recursive: true, force: true })
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
  await link(live, kept).catch((error: NodeJS.ErrnoException) => {
    if (error.code !== 'ENOENT' && error.code !== 'EEXIST') throw error
  })
  await rename(source, live)
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

/** Gives the plan the name of the stage that was reached. */
async function proceed(site: Site, id: string, to: Exclude<Stage, 'staging'>): Promise<void> {
  const from = await stageOf(site, id)
  if (from === to || from === 'staging') return
  const folder = folderOf(site, id)
  await rename(join(folder, planName(from)), join(folder, planName(to)))
  await syncFolder(folder)
}

async function stageOf(site: Site, id: string): Promise<Stage> {
  const names = await readdir(folderOf(site, id))
  return stages.find((one) => names.includes(planName(one))) ?? 'staging'
}

async function planText(site: Site, id: string): Promise<string> {
  const at = await stageOf(site, id)
  return at === 'staging' ? '' : await readFile(join(folderOf(site, id), planName(at)), 'utf8')
}

async function readPlan(site: Site, id: string): Promise<PlanLine[]> {
  const [, ...lines] = (await planText(site, id)).trimEnd().split('\n')
  return lines.map((line) => JSON.parse(line) as PlanLine)
}

async function exists(path: string): Promise<boolean> {
  return (await lstat(path).catch(() => undefined)) !== undefined
}

function folderOf(site: Site, id: string): string {
  return join(site.folders.uploads, ownFolder, id)
}
