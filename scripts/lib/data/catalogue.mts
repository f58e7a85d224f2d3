/** What is known of the sets: what each says of itself, what was last seen of it, which one is the latest. */
import { exitCodes, Problem, warn } from '../report.mts'
import { asRoot, scriptCommand, type Site } from '../settings.mts'
import { Damage, readManifest, uploadLines, type Manifest, type Part } from './manifest.mts'
import { listSets, setFolder } from './sets.mts'
import { readVerified, type Verified } from './verified.mts'

export interface Catalogue {
  sets: { name: string; manifest: Manifest; last: Verified | undefined }[]
  unreadable: { name: string; why: string }[]
}

/** Every set with what it says of itself and what was last seen of it, oldest first. @throws Problem when this user may not read all */
export async function lookAtSets(site: Site): Promise<Catalogue> {
  const { closed, ...catalogue } = await lookAtOpenSets(site)
  const [first] = closed
  if (!first) return catalogue
  throw new Problem(
    exitCodes.failed,
    `the sets in ${site.folders.backups} cannot all be read`,
    `Who made them can, or root: ${asRoot(scriptCommand('data', site.envFile, 'list'))}`,
    first.error,
  )
}

/** The same, with those that this user may not read by name: that says nothing of them. */
export async function lookAtOpenSets(
  site: Site,
): Promise<Catalogue & { closed: { name: string; error: Error }[] }> {
  const verified = await readVerified(site)
  const sets: Catalogue['sets'] = []
  const unreadable: Catalogue['unreadable'] = []
  const closed: { name: string; error: Error }[] = []
  for (const name of await listSets(site)) {
    const manifest = await readManifest(setFolder(site, name)).catch((error: Error) => error)
    if (manifest instanceof Damage) unreadable.push({ name, why: manifest.message })
    else if (manifest instanceof Error && isClosed(manifest)) closed.push({ name, error: manifest })
    else if (manifest instanceof Error) throw manifest
    else sets.push({ name, manifest, last: lastWord(verified.filter((one) => one.set === name)) })
  }
  return { sets, unreadable, closed }
}

/** A dump that could not be restored is not made right by sums that are, nor is one that could be made doubtful. */
export function lastWord(looks: Verified[]): Verified | undefined {
  const last = looks.at(-1)
  return last?.wrong.length === 0 ? (looks.findLast(({ deep }) => deep) ?? last) : last
}

function isClosed(error: Error): boolean {
  return ['EACCES', 'EPERM'].includes((error as NodeJS.ErrnoException).code ?? '')
}

/** The newest set, when it does not even say what it holds. */
export function newestUnreadable({ sets, unreadable }: Catalogue): string | undefined {
  const last = unreadable.at(-1)?.name
  return last !== undefined && last > (sets.at(-1)?.name ?? '') ? last : undefined
}

/** @param parts that the latest one should have; where no set has them all, it is the newest of any */
export async function findSet(
  site: Site,
  typed: string | undefined,
  parts: readonly Part[],
): Promise<string> {
  const set = typed ?? 'latest'
  const names = await listSets(site)
  const name = set === 'latest' ? await latestSet(site, names, parts) : names.find((one) => one === set)
  if (name !== undefined) return name
  throw new Problem(
    exitCodes.usage,
    `there is no set ${set} in ${site.folders.backups}`,
    `See: ${scriptCommand('data', site.envFile, 'list')}`,
  )
}

async function latestSet(site: Site, names: string[], parts: readonly Part[]): Promise<string | undefined> {
  const catalogue = await lookAtSets(site)
  // It is not passed over: whoever asks for it has to hear of it.
  const unreadable = newestUnreadable(catalogue)
  if (unreadable !== undefined) return unreadable
  const { sets } = catalogue
  const past = sets.filter(({ manifest }) => new Date(manifest.createdAt) <= new Date())
  if (past.length < sets.length)
    warn('a set is from the future, and not taken for the latest: look at the clock')
  const whole = past.findLast(({ manifest }) => parts.every((part) => manifest.parts.includes(part)))
  return whole?.name ?? past.at(-1)?.name ?? names.at(-1)
}

/** Bytes of all files of a set. */
export function bytesOf({ files }: Manifest): number {
  return Object.values(files).reduce((total, { sizeBytes }) => total + sizeBytes, 0)
}

/** The newest set that holds each of these uploads; those that no set holds are not in it. */
export async function setsWithUploads(site: Site, names: string[]): Promise<Map<string, string>> {
  const found = new Map<string, string>()
  const sought = new Set(names)
  const { sets } = await lookAtSets(site)
  for (const { name: set } of sets.filter(({ manifest }) => manifest.uploads).toReversed()) {
    if (sought.size === 0) break
    try {
      for await (const { name } of uploadLines(setFolder(site, set)))
        if (sought.delete(name)) found.set(name, set)
    } catch {
      // Of a damaged one nobody would take a file.
    }
  }
  return found
}
