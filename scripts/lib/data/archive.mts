/** Writes a tar file entry by entry. A file that changes while it is read is read again, or left out and named: never cut. */
import {
  closeSync,
  constants,
  fstatSync,
  ftruncateSync,
  openSync,
  readSync,
  writeSync,
  type Stats,
} from 'node:fs'
import { setImmediate as breathe } from 'node:timers/promises'
import { Header, Pax } from 'tar'
import type { FileSum, UploadLine } from './manifest.mts'
import { startSumThread } from './sums.mts'

export interface Added {
  sizeBytes: number
  mtimeMs: number
  inode: number
}

export interface Archive {
  /**
   * Adds a file under a name of its own.
   * @returns what was added, or why nothing was
   */
  addFile(path: string, name: string): Promise<Added | { skipped: string }>
  /** Writes the end of the archive. @returns size and sum of all of it */
  close(): Promise<FileSum>
  /** Also for one that was given up: lets go of the file and the thread. */
  [Symbol.asyncDispose](): Promise<void>
  readonly sizeBytes: number
}

const blockBytes = 512
/** What ends every archive. */
export const emptyArchive = Buffer.alloc(2 * blockBytes)
const bufferBytes = 1 << 20
const buffers = 4
const tries = 5

/**
 * Files are gathered in a buffer, headers and padding included, and written together; a second thread reckons their sums, and that
 * of the archive, meanwhile. Synchronous calls: for 12,000 small files promises cost three times as much.
 * @param onFile gets each file in the order of the archive, at the latest when that is closed
 */
export function createArchive(
  tarPath: string,
  onFile: (file: UploadLine) => void = () => undefined,
): Archive {
  const archive = openSync(tarPath, 'wx', 0o600)
  const thread = startSumThread()
  const free = Array.from({ length: buffers - 1 }, () => new ArrayBuffer(bufferBytes))
  const underway: Promise<void>[] = []
  let buffer = Buffer.from(new ArrayBuffer(bufferBytes))
  /** `file` where it ends. */
  let pieces: { at: number; sizeBytes: number; file: Omit<UploadLine, 'sha256'> | undefined }[] = []
  let used = 0
  let written = 0
  // For the next batch.
  let goesBack = false
  let isMark = false

  /** Writes what was gathered, and has its sums reckoned. */
  async function flush(): Promise<void> {
    if (used === 0) return
    for (let done = 0; done < used;) done += writeSync(archive, buffer, done, used - done, written + done)
    written += used
    const files = pieces.flatMap(({ file }) => file ?? [])
    const sums = thread.reckon({
      buffer: buffer.buffer,
      used,
      pieces: pieces.map(({ at, sizeBytes, file }) => ({ at, sizeBytes, isLast: file !== undefined })),
      goesBack,
      isMark,
    })
    const told = sums.then((answer) => {
      files.forEach((file, index) => onFile({ ...file, sha256: answer.sums[index] ?? '' }))
      free.push(answer.buffer)
    })
    // Waited for later; until then nobody else would hear of a failure.
    told.catch(() => undefined)
    underway.push(told)
    pieces = []
    used = 0
    goesBack = false
    isMark = false
    // The oldest ones may have come back long ago. All others are under way: one of them comes back, or throws.
    while (free.length === 0) await underway.shift()
    buffer = Buffer.from(free.pop() ?? new ArrayBuffer(bufferBytes))
  }

  function fill(bytes: number): void {
    buffer.fill(0, used, used + bytes)
    used += bytes
  }

  /** @returns whether the file was what it was said to be; if not, nothing was gathered */
  async function gather(from: number, name: string, before: Stats): Promise<boolean> {
    const header = headerOf(name, before)
    const wholeBytes = header.length + padded(before.size)
    if (used + wholeBytes > bufferBytes) await flush()
    const at = used + header.length
    if (!readFull(from, buffer.subarray(at, at + before.size)) || !isSame(before, fstatSync(from)))
      return false
    header.copy(buffer, used)
    pieces.push({ at, sizeBytes: before.size, file: { name, sizeBytes: before.size } })
    used = at + before.size
    fill(padded(before.size) - before.size)
    return true
  }

  /** Piece by piece. The same answers; what was written of a file that changed is taken back. */
  async function copy(from: number, name: string, before: Stats): Promise<boolean> {
    await flush()
    const start = written
    isMark = true
    let isWhole = false
    try {
      used += headerOf(name, before).copy(buffer)
      for (let done = 0; done < before.size;) {
        if (used === bufferBytes) await flush()
        if (done % (32 * bufferBytes) < bufferBytes) await breathe()
        const part = buffer.subarray(used, Math.min(bufferBytes, used + before.size - done))
        if (!readFull(from, part)) return false
        done += part.length
        const file = done === before.size ? { name, sizeBytes: done } : undefined
        pieces.push({ at: used, sizeBytes: part.length, file })
        used += part.length
      }
      isWhole = isSame(before, fstatSync(from))
      if (isWhole) fill(padded(before.size) - before.size)
      return isWhole
    } finally {
      // Also after a read that failed half-way: what follows must not begin in the middle of a file.
      if (!isWhole) {
        ftruncateSync(archive, start)
        // What has not been sent yet needs nothing to be taken back.
        goesBack ||= !isMark
        isMark = false
        written = start
        pieces = []
        used = 0
      }
    }
  }

  async function tryFile(path: string, name: string): Promise<Added | { skipped: string } | undefined> {
    // A link or a pipe put there by somebody must neither be followed nor waited for.
    const from = openSync(path, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK)
    try {
      const before = fstatSync(from)
      if (!before.isFile()) return { skipped: 'is not a plain file' }
      // With room for the longest header.
      const isWhole = await (before.size <= bufferBytes / 2 ? gather : copy)(from, name, before)
      return isWhole ? { sizeBytes: before.size, mtimeMs: before.mtimeMs, inode: before.ino } : undefined
    } finally {
      closeSync(from)
    }
  }

  return {
    async addFile(path, name) {
      for (let time = 0; time < tries; time += 1) {
        try {
          const added = await tryFile(path, name)
          if (added) return added
        } catch (error) {
          const reason = reasonToSkip(error, name)
          if (reason !== undefined) return { skipped: reason }
          throw error
        }
      }
      return { skipped: `changed each of the ${tries} times that it was read` }
    },
    async close() {
      await flush()
      fill(emptyArchive.length)
      await flush()
      await Promise.all(underway)
      return { sizeBytes: written, sha256: await thread.finish() }
    },
    async [Symbol.asyncDispose]() {
      await thread.end()
      closeSync(archive)
    },
    get sizeBytes() {
      return written + used
    },
  }
}

/** @returns whether as many bytes as `part` has were there */
function readFull(from: number, part: Buffer): boolean {
  for (let done = 0; done < part.length;) {
    const read = readSync(from, part, done, part.length - done, null)
    if (read === 0) return false
    done += read
  }
  return true
}

function headerOf(name: string, { size, mtimeMs, mode }: Stats): Buffer {
  const header = new Header({
    path: name,
    size,
    mtime: new Date(Math.floor(mtimeMs / 1000) * 1000),
    mode: mode & 0o777,
    type: 'File',
    uid: 0,
    gid: 0,
  })
  const block = Buffer.alloc(blockBytes)
  // What does not fit into the block (a long name, a size of 8 GB) is said in a block before it.
  // So does a name of exactly 100 bytes, which the header would give a prefix.
  const needsMore = header.encode(block, 0) || Buffer.byteLength(name) >= 100
  return needsMore ? Buffer.concat([new Pax({ path: name, size }).encode(), block]) : block
}

function padded(sizeBytes: number): number {
  return Math.ceil(sizeBytes / blockBytes) * blockBytes
}

/** Why the backup goes on without a file; undefined for what concerns the whole backup, such as a full disk. */
function reasonToSkip(error: unknown, name: string): string | undefined {
  const { code, syscall } = error as NodeJS.ErrnoException
  // Of the archive, not of the file.
  if (syscall === 'write' || syscall === 'ftruncate') return undefined
  // Node puts this sign where a name is not UTF-8, and then does not find it.
  if (code === 'ENOENT' && name.includes('\u{fffd}')) return 'has a name that is not UTF-8'
  if (code === 'ENOENT') return 'vanished while the backup ran'
  if (code === 'ELOOP') return 'is a link'
  if (code === 'ENXIO') return 'is a socket'
  return code === 'EACCES' || code === 'EPERM' || code === 'EIO' ? `cannot be read (${code})` : undefined
}

function isSame(one: Stats, other: Stats): boolean {
  return one.size === other.size && one.mtimeMs === other.mtimeMs && one.ctimeMs === other.ctimeMs
}
