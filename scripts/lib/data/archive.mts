/** Writes a tar file entry by entry. A file that changes while it is read is read again, or left out and named: never cut. */
import { createHash } from 'node:crypto'
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
import type { UploadLine } from './manifest.mts'
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
  /** Writes the end of the archive. */
  close(): Promise<void>
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
 * Small files are gathered in a buffer, headers and padding included, and written together; a second thread reckons their sums
 * meanwhile. Synchronous calls: for 12,000 small files promises cost three times as much.
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
  let gathered: { name: string; at: number; sizeBytes: number }[] = []
  let used = 0
  let written = 0

  function write(bytes: Buffer): void {
    for (let done = 0; done < bytes.length;) {
      done += writeSync(archive, bytes, done, bytes.length - done, written + done)
    }
    written += bytes.length
  }

  /** Writes what was gathered, and has its sums reckoned. */
  async function flush(): Promise<void> {
    if (used === 0) return
    write(buffer.subarray(0, used))
    const files = gathered
    const sums = thread.reckon({
      buffer: buffer.buffer,
      files: files.map(({ at, sizeBytes }) => ({ at, sizeBytes })),
    })
    const told = sums.then((answer) => {
      files.forEach(({ name, sizeBytes }, index) =>
        onFile({ name, sizeBytes, sha256: answer.sums[index] ?? '' }),
      )
      free.push(answer.buffer)
    })
    // Waited for later; until then nobody else would hear of a failure.
    told.catch(() => undefined)
    underway.push(told)
    gathered = []
    used = 0
    // The oldest ones may have come back long ago. All others are under way: one of them comes back, or throws.
    while (free.length === 0) await underway.shift()
    buffer = Buffer.from(free.pop() ?? new ArrayBuffer(bufferBytes))
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
    buffer.fill(0, at + before.size, used + wholeBytes)
    used += wholeBytes
    gathered.push({ name, at, sizeBytes: before.size })
    return true
  }

  /** Piece by piece. The same answers; what was written of a file that changed is taken back. */
  async function copy(from: number, name: string, before: Stats): Promise<boolean> {
    await flush()
    await Promise.all(underway)
    const start = written
    const hash = createHash('sha256')
    let isWhole = false
    try {
      write(headerOf(name, before))
      for (let done = 0; done < before.size; done += bufferBytes) {
        if (done % (32 * bufferBytes) === 0) await breathe()
        const part = buffer.subarray(0, Math.min(bufferBytes, before.size - done))
        if (!readFull(from, part)) return false
        hash.update(part)
        write(part)
      }
      write(Buffer.alloc(padded(before.size) - before.size))
      isWhole = isSame(before, fstatSync(from))
      if (isWhole) onFile({ name, sizeBytes: before.size, sha256: hash.digest('hex') })
      return isWhole
    } finally {
      // Also after a read that failed half-way: what follows must not begin in the middle of a file.
      if (!isWhole) {
        ftruncateSync(archive, start)
        written = start
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
      await Promise.all(underway)
      write(emptyArchive)
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
