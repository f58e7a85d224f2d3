/** What the migration did, one JSON object a line, appended and synced. It saves time and knows figures; what is, is looked at. */
import { join } from 'node:path'
import { readText } from '../envfile.mts'
import { makeStateDir, parseTorn, writeSynced } from '../history.mts'
import type { Site } from '../settings.mts'

export interface Note {
  at: string
  /** Name of the set that was made before anything changed. */
  backup?: string
  /** Rows of each table when the legacy Strapi had stopped; null until then. */
  rows?: Record<string, number> | null
  /** When the legacy Strapi was told to stop, as an ISO time. */
  switchedAt?: string
  /** The new PostgreSQL had as many, before Strapi started. */
  areRowsSame?: boolean
  /** Milliseconds from the stop of the legacy Strapi until the new one was healthy. */
  outageMs?: number
  /** From the first stop of a legacy service until one of the two serves. */
  isSwitching?: boolean
  /** A way back that was begun, and the set that was made for it: none yet, or empty where there can be none. */
  back?: { set?: string } | null
  /** Its uploads are with the legacy ones. */
  areUploadsBack?: boolean
  /** The new database was left without a set: the next switch keeps it under another name. */
  isUnsaved?: boolean
  /** The list at the end was gone through. */
  isChecked?: boolean
  /** The new Strapi has been started: it may have taken something, also when its containers are gone. */
  hasServed?: boolean
  /** What the legacy application was like when it was copied; nothing when it was there before. */
  copied?: string
  /** What that copy was like. */
  copy?: string
  /** What images and containers were made from. */
  built?: string
  /** Folder of the legacy compose file, and services of it that stay as they are. */
  from?: string
  leave?: string[]
  /** Uploads that only the new set-up had may be in no set: the next copy keeps them under another name. */
  areUploadsUnsaved?: boolean
  /** Labels of the legacy networks, by their names: somebody may prune them. */
  networks?: Record<string, Record<string, string>>
  /** When it was in service: restart policies by service, and who owned its PGDATA ("70:70"). */
  policies?: Record<string, string>
  dataOwner?: string
  /** Hash of the schema that the legacy Strapi had made. */
  schemaHash?: string | undefined
  /** The set that the new database came from, where it does not share the data. */
  restoredSet?: string
  /** Ids of the containers that are removed for good, and what is left to be removed by hand. */
  final?: { containers: string[]; byHand: string } | null
}

export async function note(site: Site, entry: Omit<Note, 'at'>): Promise<void> {
  await makeStateDir(site)
  // A line that a power cut left torn must not swallow this one.
  await writeSynced(fileOf(site), 'a', `\n${JSON.stringify({ at: new Date().toISOString(), ...entry })}\n`)
}

/** Everything that was noted; the later one counts. */
export async function notes(site: Pick<Site, 'stateDir'>): Promise<Partial<Note>> {
  const lines = ((await readText(fileOf(site))) ?? '').split('\n')
  return Object.assign({}, ...lines.flatMap((line) => parseTorn<Note>(line))) as Partial<Note>
}

function fileOf(site: Pick<Site, 'stateDir'>): string {
  return join(site.stateDir, 'migration.jsonl')
}
