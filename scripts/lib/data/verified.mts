/** Which sets were read back, when, and with what result. */
import { join } from 'node:path'
import { readText } from '../envfile.mts'
import { makeStateDir, parseTorn, writeSynced } from '../history.mts'
import { explain, warn } from '../report.mts'
import type { Site } from '../settings.mts'

export interface Verified {
  at: string
  set: string
  /** Whether its dump was restored, too. */
  deep: boolean
  /** What was wrong, one sentence each; empty when all was right. */
  wrong: string[]
}

export async function readVerified(site: Site): Promise<Verified[]> {
  const text = (await readText(file(site))) ?? ''
  return text.split('\n').flatMap((line) => parseTorn<Verified>(line))
}

/** A set is right or wrong, whether this can be written down or not; the next `verify` does it then. */
export async function rememberVerified(site: Site, entry: Omit<Verified, 'at'>): Promise<void> {
  const line = JSON.stringify({ at: new Date().toISOString(), ...entry })
  try {
    await makeStateDir(site)
    await writeSynced(file(site), 'a', `\n${line}\n`)
  } catch (error) {
    warn(`what was seen of ${entry.set} could not be written down: ${explain(error)}`)
  }
}

/** What a backup has read back. */
export async function rememberProven(site: Site, set: string): Promise<void> {
  await rememberVerified(site, { set, deep: false, wrong: [] })
}

function file(site: Site): string {
  return join(site.stateDir, 'verified.jsonl')
}
