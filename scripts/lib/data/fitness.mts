/** Does a set belong on this site? Decided from what is known of both; nothing is asked or changed here. */
import type { Manifest, Part } from './manifest.mts'

/** What `--accept` takes: one word for each thing that a restore refuses. */
export const acceptable = [
  'damaged',
  'incomplete',
  'newer-postgresql',
  'other-secrets',
  'other-schema',
] as const
export type Acceptable = (typeof acceptable)[number]

export interface Obstacle {
  accept: Acceptable
  sentence: string
}

export interface Circumstances {
  parts: Part[]
  /** What the sums say is wrong with the set. */
  wrong: string[]
  /** Undefined when it is not known yet. */
  serverVersion: string | undefined
  /** As in the manifest, of this site; undefined when the site has no settings of its application. */
  secrets: string | undefined
  /** Of the release that runs; undefined when none does, or nothing is known of it. */
  schemaHash: string | undefined
  /** Whether some release runs, or comes back by itself. */
  isRunning: boolean
  runningRelease: string | undefined
  /** Whether the image of the set's release is still here. */
  hasRelease: boolean
}

/** Sentences one below the other; of very many only the first. */
export function listed(sentences: string[]): string {
  const lines = sentences.slice(0, 20).map((line) => `\n  - ${line}`)
  if (sentences.length > 20) lines.push(`\n  and ${sentences.length - 20} more`)
  return lines.join('')
}

/** Everything that speaks against it, at once. */
export function obstacles(manifest: Manifest, site: Circumstances): Obstacle[] {
  const found: Obstacle[] = site.wrong.map((sentence) => ({ accept: 'damaged', sentence }))
  if (site.parts.includes('uploads'))
    found.push(
      ...manifest.missing
        .filter((sentence) => /^uploads\b/.test(sentence))
        .map((sentence): Obstacle => ({ accept: 'incomplete', sentence })),
    )
  const hasDatabase = site.parts.includes('database')
  const from = manifest.versions.postgresql
  const here = site.serverVersion
  if (hasDatabase && from && here && Number.parseInt(from) > Number.parseInt(here))
    found.push({
      accept: 'newer-postgresql',
      sentence: `it was dumped from PostgreSQL ${from}, and here it is ${here}`,
    })
  if (hasDatabase && site.secrets !== undefined && manifest.secrets !== site.secrets)
    found.push({
      accept: 'other-secrets',
      sentence: `the secrets in strapi/.env were other ones (${manifest.secrets ? 'its config.tar has them' : 'none are known'}): API tokens and sessions of the set would not be valid`,
    })
  if (hasDatabase && site.schemaHash !== undefined && manifest.schemaHash !== site.schemaHash)
    found.push({
      accept: 'other-schema',
      sentence: `its database schema is that of release ${manifest.release ?? 'unknown'}, and ${site.runningRelease ?? 'another one'} runs; ${site.hasRelease ? 'it would have to be deployed right afterwards' : 'its image is not here any more: build that version first'}`,
    })
  // Started by hand, and its database is lost: nobody knows what it expects.
  const isOther = manifest.release === undefined || manifest.release !== site.runningRelease
  if (hasDatabase && site.isRunning && site.schemaHash === undefined && isOther)
    found.push({
      accept: 'other-schema',
      sentence: `which database schema ${site.runningRelease ?? 'the release that runs'} expects is not known, and the set is of release ${manifest.release ?? 'unknown'}: booted on it, it may drop what it does not know`,
    })
  return found
}
