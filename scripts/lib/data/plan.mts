/**
 * What a restore does to the uploads, and how far it has come: a folder of its own for each restore, inside the uploads folder
 * (renames need one disk), that nobody but root can enter. A restore of the database alone has one, too: undo needs to know of it.
 *
 * The stage is the name of the plan: planned, done, undoing, undone; none while its files are still being unpacked.
 */
import { lstat, readdir, readFile, rename, rm, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { syncFolder } from '../envfile.mts'
import { writeSynced } from '../history.mts'
import { exitCodes, interrupted, Problem } from '../report.mts'
import { asRoot, scriptCommand, type Site } from '../settings.mts'
import { listed } from './fitness.mts'
import { sumOf, type FileSum, type UploadLine } from './manifest.mts'
import { ownFolder, unsafeName } from './untar.mts'
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

export interface Scope {
  /** Whether the database was restored with it: then its swap decides which way an interrupted one goes. */
  withDatabase: boolean
  withUploads: boolean
  /** Visitors were served before, so they have to be with what it brings: otherwise it is taken back. */
  mustServe?: boolean
}

export interface PlanLine {
  name: string
  /** `late` becomes one of the others as soon as its file is unpacked. */
  do: 'add' | 'change' | 'remove' | 'late'
  /** Size and time of what takes its place; of a late one, of what is there until then. */
  look?: string | undefined
}

export type Stage = 'staging' | (typeof stages)[number]

export interface Exchange {
  id: string
  stage: Stage
}

const stages = ['planned', 'done', 'undoing', 'undone'] as const
const planName = (at: Exclude<Stage, 'staging'>) => `plan.${at}`
const removing = 'removing-'

export function folderOf(site: Site, id: string): string {
  return join(site.folders.uploads, ownFolder, id)
}

/**
 * Compares, and changes nothing.
 * @param lines of the set: uploads.jsonl
 * @param isMissing tells of what the set has no version that belongs to its database: what is there stays as it is
 * @param progress counts the bytes that were read
 * @throws Problem when files of the set cannot take their places, or its list holds a name that no set may hold
 */
export async function planExchange(
  site: Site,
  lines: AsyncIterable<UploadLine> | Iterable<UploadLine>,
  isMissing: (name: string) => boolean,
  progress = { bytes: 0 },
): Promise<Plan> {
  const wanted = new Map<string, FileSum>()
  for await (const { name, sizeBytes, sha256 } of lines) {
    const unsafe = unsafeName(name)
    if (unsafe)
      throw new Problem(
        exitCodes.failed,
        `uploads.jsonl of the set: ${JSON.stringify(name)} ${unsafe}; what is live is as before`,
        'No backup of this project holds such a name: the set was made or changed by somebody else.',
      )
    wanted.set(name, { sizeBytes, sha256 })
  }
  const plan: Plan = { added: new Map(wanted), changed: new Map(), surplus: [], same: new Map() }
  const top = site.folders.uploads
  const { dev } = await lstat(top).catch((error: unknown) => {
    throw new Problem(
      exitCodes.failed,
      `there is no folder ${top} (UPLOADS_VOLUME); nothing was changed`,
      `Mount it, or make it: ${asRoot(scriptCommand('setup', site.envFile))}\nThe rest alone: ${scriptCommand('data', site.envFile, 'restore --only database')}`,
      error,
    )
  })
  const inTheWay: string[] = []
  for await (const name of filesBelow(top)) {
    const sum = wanted.get(name)
    const found = await lstat(join(top, name)).catch(() => undefined)
    if (!found) continue
    plan.added.delete(name)
    if (isMissing(name)) continue
    if (sum) {
      const isSame =
        found.isFile() && found.size === sum.sizeBytes && (await hasSum(join(top, name), sum, progress))
      if (isSame) plan.same.set(name, { ...sum, look: lookOf(found) })
      else if (found.dev !== dev) inTheWay.push(`${join(top, name)} is on another disk`)
      else plan.changed.set(name, sum)
    } else if (found.isFile() && found.dev === dev && unsafeName(name) === undefined) plan.surplus.push(name)
  }
  inTheWay.push(...(await obstaclesTo(top, [...plan.added.keys()])))
  if (inTheWay.length > 0)
    throw new Problem(
      exitCodes.failed,
      `files of the set cannot take their places; what is live is as before:${listed(inTheWay)}`,
      'Move it away, then run it again.',
    )
  return plan
}

/** What cannot be read, or has just gone, does not have it. */
async function hasSum(path: string, { sha256 }: FileSum, progress: { bytes: number }): Promise<boolean> {
  interrupted.throwIfAborted()
  return await sumOf(path, progress).then(
    (found) => found.sha256 === sha256,
    () => false,
  )
}

/** A file where the set has a folder, a folder where it has a file. */
async function obstaclesTo(top: string, names: string[]): Promise<string[]> {
  const folders = new Set(names.flatMap(parents))
  const obstacles: string[] = []
  for (const name of folders) {
    const found = await lstat(join(top, name)).catch(() => undefined)
    if (found && !found.isDirectory()) obstacles.push(`${join(top, name)} is no folder`)
  }
  for (const name of names) {
    const found = await lstat(join(top, name)).catch(() => undefined)
    if (found?.isDirectory()) obstacles.push(`${join(top, name)} is a folder`)
  }
  return obstacles
}

function parents(name: string): string[] {
  const parts = name.split('/').slice(0, -1)
  return parts.map((_, index) => parts.slice(0, index + 1).join('/'))
}

/** Bytes that the plan needs beside the live files, each file in whole blocks. */
export function bytesOf({ added, changed }: Plan): number {
  const blocks = (bytes: number) => Math.ceil(bytes / 4096) * 4096
  return [...added.values(), ...changed.values()].reduce(
    (total, { sizeBytes }) => total + blocks(sizeBytes),
    0,
  )
}

/** Tells whether a file is still the one that it was, without reading it. */
export function lookOf({ size, mtimeMs }: { size: number; mtimeMs: number }): string {
  return `${size} ${Math.round(mtimeMs)}`
}

/** Of a live file; undefined when there is none. */
export async function liveLook(site: Site, name: string): Promise<string | undefined> {
  const found = await lstat(join(site.folders.uploads, name)).catch(() => undefined)
  return found && lookOf(found)
}

/** From here on the exchange is planned. */
export async function writePlan(site: Site, id: string, scope: Scope, lines: PlanLine[]): Promise<void> {
  await replacePlan(site, id, linesOf([scope, ...lines]))
}

export async function addToPlan(site: Site, id: string, lines: PlanLine[]): Promise<void> {
  await replacePlan(site, id, `${await planText(site, id)}${linesOf(lines)}`)
}

export async function readPlan(site: Site, id: string): Promise<PlanLine[]> {
  const [, ...lines] = (await planText(site, id)).trimEnd().split('\n')
  return lines.map((line) => JSON.parse(line) as PlanLine)
}

export async function scopeOf(site: Site, id: string): Promise<Scope> {
  const [first] = (await planText(site, id)).split('\n')
  return { withDatabase: false, withUploads: true, ...(JSON.parse(first || '{}') as Partial<Scope>) }
}

/** Gives the plan the name of the stage that was reached. */
export async function proceed(site: Site, id: string, to: Exclude<Stage, 'staging'>): Promise<void> {
  const from = await stageOf(site, id)
  if (from === to || from === 'staging') return
  const folder = folderOf(site, id)
  await rename(join(folder, planName(from)), join(folder, planName(to)))
  await syncFolder(folder)
}

/** All exchanges that left a folder, oldest first. */
export async function readExchanges(site: Site): Promise<Exchange[]> {
  const ids = (await ownNames(site)).filter((name) => /^\d{8}_\d{6}$/.test(name)).toSorted()
  return await Promise.all(ids.map(async (id) => ({ id, stage: await stageOf(site, id) })))
}

/** Those that a killed run left under way. */
export async function pendingExchanges(site: Site): Promise<Exchange[]> {
  return (await readExchanges(site)).filter(({ stage }) => stage !== 'done' && stage !== 'undone')
}

/** When its last stage was reached; long ago where nothing is known of it. */
export async function endedAt(site: Site, id: string): Promise<Date> {
  const folder = folderOf(site, id)
  // A rename changes the folder, not the file.
  return await stat(folder).then(
    ({ mtime }) => mtime,
    () => new Date(0),
  )
}

/** Removes what an exchange keeps. It stops being one at once. */
export async function removeExchange(site: Site, id: string): Promise<void> {
  await rename(folderOf(site, id), folderOf(site, `${removing}${id}`))
  await endRemovals(site)
}

/** Also what a killed run did not come to. */
export async function endRemovals(site: Site): Promise<void> {
  for (const name of await ownNames(site)) {
    if (name.startsWith(removing)) await rm(folderOf(site, name), { recursive: true, force: true })
  }
}

async function ownNames(site: Site): Promise<string[]> {
  return await readdir(join(site.folders.uploads, ownFolder)).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return []
    throw error
  })
}

async function stageOf(site: Site, id: string): Promise<Stage> {
  const names = await readdir(folderOf(site, id))
  return stages.find((one) => names.includes(planName(one))) ?? 'staging'
}

async function planText(site: Site, id: string): Promise<string> {
  const stage = await stageOf(site, id)
  return stage === 'staging' ? '' : await readFile(join(folderOf(site, id), planName(stage)), 'utf8')
}

/** The old plan or the new one, never half of one. */
async function replacePlan(site: Site, id: string, text: string): Promise<void> {
  const folder = folderOf(site, id)
  await writeSynced(join(folder, 'plan'), 'w', text)
  await rename(join(folder, 'plan'), join(folder, planName('planned')))
  await syncFolder(folder)
}

function linesOf(values: object[]): string {
  return values.map((value) => `${JSON.stringify(value)}\n`).join('')
}
