/** Copies the uploads to their own folder, again and again until nothing differs. The source is only read. */
import { createHash } from 'node:crypto'
import { constants, createReadStream, existsSync, lstatSync, statSync, type Stats } from 'node:fs'
import {
  chmod,
  chown,
  copyFile,
  mkdir,
  readdir,
  readFile,
  rename,
  rm,
  rmdir,
  utimes,
  writeFile,
} from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { run } from '../command.mts'
import { filesBelow } from '../data/uploads.mts'
import { ownFolder, unsafeName } from '../data/untar.mts'
import { releaseTime } from '../releases.mts'
import { refuseInDryRun } from '../report.mts'

/** Files that are copied and not yet known to be right. A target that has it was begun by us. */
const staging = `${ownFolder}/migration`

export interface Copied {
  files: number
  copied: number
  removed: number
  bytes: number
}

/** What would stand in the way of a copy, as far as it can be seen without one. */
export async function uploadProblems(from: string, to: string): Promise<string[]> {
  const problems: string[] = []
  try {
    for await (const name of filesBelow(from)) {
      const reason = unsafeName(name) ?? kindProblem(join(from, name))
      if (reason) problems.push(`${join(from, name)} ${reason}`)
    }
  } catch (error) {
    problems.push(
      `the uploads in ${from} cannot be read: ${error instanceof Error ? error.message : String(error)}`,
    )
  }
  const there = await readdir(to).catch(() => [])
  if (there.length > 0 && (await begunFrom(to)) !== from)
    problems.push(`${to} is not empty, and what is in it was not put there by this migration`)
  return problems
}

function kindProblem(path: string): string | undefined {
  const found = lstatSync(path, { throwIfNoEntry: false })
  // Node puts this sign where a name is not UTF-8, and then does not find it.
  if (found === undefined && path.includes('\u{fffd}')) return 'has a name that is not UTF-8'
  if (found?.isFile() && found.mtimeMs < 0)
    return 'is of a time before 1970, which a copy cannot have: touch it'
  return found === undefined || found.isFile()
    ? undefined
    : found.isDirectory()
      ? 'cannot be read'
      : 'is no plain file'
}

/** What a copy that has begun is of. */
async function begunFrom(to: string): Promise<string | undefined> {
  return await readFile(join(to, staging, 'source'), 'utf8').catch(() => undefined)
}

/**
 * One pass: what is new or differs in size or time is copied, compared by its SHA-256 and renamed into place; what is gone at the
 * source goes. Killed at any moment, the next pass goes on.
 * @param owner of the copies
 * @param options `keepsNewer`: what is newer there stays
 * @throws Error when a copy differs from a source that did not change
 */
export async function copyUploads(
  from: string,
  to: string,
  owner: { uid: number; gid: number },
  options: { removesOthers: boolean; keepsNewer?: boolean; progress?: Copied; signal?: AbortSignal },
): Promise<Copied> {
  refuseInDryRun(`copy to ${to}`)
  const done = options.progress ?? newProgress()
  await makeFolder(join(to, staging), owner)
  // Also where somebody has made it by hand.
  await chown(to, owner.uid, owner.gid)
  await writeFile(join(to, staging, 'source'), from)
  const seen = new Set<string>()
  for await (const name of filesBelow(from)) {
    options.signal?.throwIfAborted()
    const source = statSync(join(from, name), { throwIfNoEntry: false })
    if (!source?.isFile()) continue
    seen.add(name)
    done.files += 1
    const copy = statSync(join(to, name), { throwIfNoEntry: false })
    if (isSame(source, copy) || (options.keepsNewer && copy && copy.mtimeMs > source.mtimeMs)) continue
    if (await copyOne(join(from, name), join(to, name), join(to, staging), owner)) {
      done.copied += 1
      done.bytes += source.size
    }
  }
  if (options.removesOthers) done.removed = await removeOthers(to, seen)
  // What counts as copied must outlive a power cut.
  if (done.copied > 0) await run(['sync', '--file-system', to], { timeoutMs: 3_600_000 })
  return done
}

export function newProgress(): Copied {
  return { files: 0, copied: 0, removed: 0, bytes: 0 }
}

/** Names that differ in size or time, or are on one side only. */
export async function differingUploads(from: string, to: string): Promise<string[]> {
  const names = new Set<string>()
  for (const [one, other] of [
    [from, to],
    [to, from],
  ] as const) {
    for await (const name of filesBelow(one)) {
      const found = statSync(join(one, name), { throwIfNoEntry: false })
      if (found && !isSame(found, statSync(join(other, name), { throwIfNoEntry: false }))) names.add(name)
    }
  }
  return [...names]
}

/**
 * What only the copy has, or has otherwise, out of the way of the next pass.
 * @returns the folder that keeps it, or undefined when there was nothing
 */
export async function keepOwn(from: string, to: string): Promise<string | undefined> {
  refuseInDryRun(`move files of ${to}`)
  const names = (await differingUploads(from, to)).filter((name) => existsSync(join(to, name)))
  if (names.length === 0) return undefined
  const kept = join(to, ownFolder, `unsaved-${releaseTime(new Date())}`, 'replaced')
  for (const name of names) {
    await mkdir(dirname(join(kept, name)), { recursive: true })
    await rename(join(to, name), join(kept, name))
  }
  return kept
}

/** The mark of a begun copy goes once nothing will be copied any more. */
export async function endCopy(to: string): Promise<void> {
  await rm(join(to, staging), { recursive: true, force: true })
  await rmdir(join(to, ownFolder)).catch(() => undefined)
}

/** Times on disk are finer than what utimes can set. */
function isSame(source: Stats, copy: Stats | undefined): boolean {
  return copy?.isFile() === true && copy.size === source.size && Math.abs(copy.mtimeMs - source.mtimeMs) < 1
}

/** @returns whether it was there to be copied */
async function copyOne(
  source: string,
  target: string,
  stagingFolder: string,
  owner: { uid: number; gid: number },
): Promise<boolean> {
  const temporary = join(stagingFolder, 'copy')
  for (let tries = 0; ; tries += 1) {
    const before = statSync(source, { throwIfNoEntry: false })
    if (!before) return false
    await rm(temporary, { force: true })
    // Never a link: Strapi writes new bytes into an old file.
    await copyFile(source, temporary, constants.COPYFILE_FICLONE)
    const [sum, copySum] = [await sha256(source), await sha256(temporary)]
    const after = statSync(source, { throwIfNoEntry: false })
    const isSteady = after !== undefined && after.size === before.size && after.mtimeMs === before.mtimeMs
    if (isSteady && sum === copySum) {
      await chown(temporary, owner.uid, owner.gid)
      // nginx reads it, where a Strapi that was root did.
      await chmod(temporary, (before.mode & 0o777) | 0o444)
      await utimes(temporary, before.atimeMs / 1000, before.mtimeMs / 1000)
      await makeFolder(dirname(target), owner)
      await rename(temporary, target)
      return true
    }
    if (isSteady) throw new Error(`the copy of ${source} does not have its bytes`)
    // Written to all the time: the pass after Strapi has stopped gets it.
    if (tries === 3) return false
  }
}

async function sha256(path: string): Promise<string> {
  const hash = createHash('sha256')
  for await (const part of createReadStream(path)) hash.update(part as Buffer)
  return hash.digest('hex')
}

async function removeOthers(to: string, seen: Set<string>): Promise<number> {
  let removed = 0
  for await (const name of filesBelow(to)) {
    if (seen.has(name)) continue
    await rm(join(to, name), { force: true })
    removed += 1
  }
  return removed
}

async function makeFolder(path: string, owner: { uid: number; gid: number }): Promise<void> {
  const first = await mkdir(path, { recursive: true, mode: 0o755 })
  if (first === undefined) return
  for (let at = path; at.length >= first.length; at = dirname(at)) await chown(at, owner.uid, owner.gid)
}
