/** What earlier deploys did: one JSON object a line, appended and synced. Saves time; is never believed against what is seen. */
import { chown, mkdir, open, stat } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { readText } from './envfile.mts'
import type { Figures } from './proof.mts'
import { refuseInDryRun } from './report.mts'
import type { Schema } from './schema.mts'
import type { Site } from './settings.mts'

export interface Entry {
  at: string
  release: string
  /** `done` and `found` make a release good; `found` was serving before we knew it. */
  result: 'done' | 'found' | 'failed' | 'degraded' | 'interrupted'
  seconds?: number
  figures?: Figures | undefined
  why?: string
}

export async function readHistory(site: Site): Promise<Entry[]> {
  const text = (await readText(historyFile(site))) ?? ''
  return text.split('\n').flatMap((line) => parseTorn<Entry>(line))
}

/** Appends an entry, and keeps the schema that this release runs on. */
export async function remember(site: Site, entry: Omit<Entry, 'at'>, schema?: Schema): Promise<void> {
  await makeStateDir(site)
  if (schema) await writeSynced(schemaFile(site, entry.release), 'w', JSON.stringify(schema))
  const line = JSON.stringify({ at: new Date().toISOString(), ...entry })
  // A line that a power cut left torn must not swallow this one.
  await writeSynced(historyFile(site), 'a', `\n${line}\n`)
}

/** Schema that a release ran on, if it was ever recorded. */
export async function recordedSchema(site: Site, release: string): Promise<Schema | undefined> {
  const text = (await readText(schemaFile(site, release))) ?? ''
  return parseTorn<Schema>(text)[0]
}

/** Good releases that led to the newest one, oldest first. To go back to one leaves those that came after it. */
export function trail(history: Entry[]): string[] {
  return history.filter(isGood).reduce<string[]>((past, { release }) => {
    const at = past.indexOf(release)
    return [...(at === -1 ? past : past.slice(0, at)), release]
  }, [])
}

/** All good releases, each once, the likeliest target of a rollback last: first those that were left, then the trail. */
export function goodReleases(history: Entry[]): string[] {
  const current = trail(history)
  const releases = history.filter(isGood).map((entry) => entry.release)
  const left = releases.filter((release) => !current.includes(release))
  return [...new Set(left), ...current]
}

function isGood({ result }: Entry): boolean {
  return result === 'done' || result === 'found'
}

/** What the text holds, or nothing when a power cut has torn it; the entries around it are whole. */
export function parseTorn<T>(text: string): T[] {
  if (!text.trim()) return []
  try {
    return [JSON.parse(text) as T]
  } catch (error) {
    if (error instanceof SyntaxError) return []
    throw error
  }
}

/** The folder of what is remembered. It belongs to whoever has the settings, also when root is the first who needs it. */
export async function makeStateDir(site: Site): Promise<void> {
  await mkdir(site.stateDir, { recursive: true, mode: 0o700 })
  if (process.getuid?.() !== 0) return
  const { uid, gid } = await stat(dirname(site.stateDir))
  await chown(site.stateDir, uid, gid)
}

/** Appends or replaces; it survives a power cut. A new file belongs to the owner of its folder. */
export async function writeSynced(path: string, flags: 'a' | 'w', text: string): Promise<void> {
  refuseInDryRun(`write ${path}`)
  const file = await open(path, flags, 0o600)
  try {
    if (process.getuid?.() === 0) {
      const { uid, gid } = await stat(dirname(path))
      await file.chown(uid, gid)
    }
    await file.writeFile(text)
    await file.sync()
  } finally {
    await file.close()
  }
}

function historyFile(site: Site): string {
  return join(site.stateDir, 'deploys.jsonl')
}

function schemaFile(site: Site, release: string): string {
  return join(site.stateDir, `schema-${release}.json`)
}
