/** Reads an archive that may have been made by anybody: what we never write is refused before it is taken. */
import { createHash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { readFile, stat } from 'node:fs/promises'
import { Parser, type ReadEntry } from 'tar'
import { interrupted } from '../report.mts'
import { emptyArchive } from './archive.mts'
import type { UploadLine } from './manifest.mts'

export interface ArchivedFile {
  name: string
  sizeBytes: number
  mode: number
  mtimeMs: number
}

/** Gets the bytes of one file. */
export interface Sink {
  write(part: Buffer): void
  end(): void
}

/** Where the restore keeps its own files inside the uploads folder; never part of a set. */
export const ownFolder = '.strapi-blue-green'

/** Why a name may not be in a set, or undefined. No upload of Strapi has such a name. */
export function unsafeName(name: string): string | undefined {
  if (/\p{Cc}/u.test(name)) return 'has a control character in its name'
  const parts = name.split('/')
  if (parts.some((part) => part === '' || part === '.' || part === '..')) return 'leads out of its folder'
  return parts[0] === ownFolder ? 'has the name of a folder of this program' : undefined
}

/** Whether reading failed for what is in the archive: not for a full disk, nor for an interruption. */
export function isDamage(error: unknown): boolean {
  const { code = 'TAR' } = error as { code?: string }
  return !interrupted.aborted && code.startsWith('TAR')
}

/** What can be read of an archive, with its sums: for one whose list is lost. A name that is there twice counts in its last version. */
export async function readLines(path: string): Promise<UploadLine[]> {
  const lines: UploadLine[] = []
  await readArchive(path, ({ name, sizeBytes }) => {
    const hash = createHash('sha256')
    return {
      write: (part) => hash.update(part),
      end: () => lines.push({ name, sizeBytes, sha256: hash.digest('hex') }),
    }
  }).catch((error: unknown) => {
    if (!isDamage(error)) throw error
  })
  return lines
}

/**
 * Reads an archive to its end. Plain files only; together they are not larger than the archive, so that nothing unpacks to
 * more than what was verified.
 * @param take gets each file; without an answer its bytes are skipped
 * @throws Error at the first thing that is not right
 */
export async function readArchive(
  path: string,
  take: (file: ArchivedFile) => Sink | undefined,
): Promise<void> {
  const { size: archiveBytes } = await stat(path)
  // The parser takes an archive without a file for none.
  if (archiveBytes === emptyArchive.length && (await readFile(path)).equals(emptyArchive)) return
  const parser = new Parser({ strict: true })
  const failures: unknown[] = []
  let totalBytes = 0

  function receive(entry: ReadEntry): void {
    if (entry.type !== 'File' && entry.type !== 'OldFile')
      throw new Error(`${JSON.stringify(entry.path)} is no plain file (${entry.type})`)
    const unsafe = unsafeName(entry.path)
    if (unsafe) throw new Error(`${JSON.stringify(entry.path)} ${unsafe}`)
    totalBytes += entry.size
    if (totalBytes > archiveBytes) throw new Error('it unpacks to more than it is')
    const sink = take({
      name: entry.path,
      sizeBytes: entry.size,
      mode: (entry.mode ?? 0o644) & 0o777,
      mtimeMs: entry.mtime?.getTime() ?? 0,
    })
    if (!sink) {
      entry.resume()
      return
    }
    entry.on('data', (part: Buffer) => collect(() => sink.write(part)))
    entry.on('end', () => collect(() => sink.end()))
  }

  /** What throws in a listener would end the process. */
  function collect(action: () => void): void {
    try {
      if (failures.length === 0) action()
    } catch (error) {
      failures.push(error)
    }
  }

  parser.on('entry', (entry: ReadEntry) => {
    collect(() => receive(entry))
    // Also what was refused has to flow, or the parser never ends.
    if (failures.length > 0) entry.resume()
  })
  // What the parser itself would pass over.
  parser.on('ignoredEntry', (entry: ReadEntry) =>
    failures.push(new Error(`${JSON.stringify(entry.path)} is no plain file (${entry.type})`)),
  )
  const failed = new Promise<void>((resolve) => {
    parser.on('error', (error: unknown) => {
      failures.push(error)
      resolve()
    })
  })
  const ended = new Promise<void>((resolve) => parser.on('end', resolve))
  // Every sink takes its bytes at once, so nothing waits in between.
  for await (const part of createReadStream(path, { highWaterMark: 1 << 20 })) {
    interrupted.throwIfAborted()
    parser.write(part as Buffer)
    if (failures.length > 0) throw failures[0]
  }
  parser.end()
  await Promise.race([ended, failed])
  if (failures.length > 0) throw failures[0]
}
