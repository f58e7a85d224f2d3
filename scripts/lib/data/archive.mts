/** Writes a tar file entry by entry. A file that changes while it is read is read again, or left out and named: never cut. */
import { createHash, type Hash } from 'node:crypto'
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

export interface Added {
  sizeBytes: number
  sha256: string
  mtimeMs: number
  inode: number
}

export interface Archive {
  /**
   * Adds a file under a name of its own.
   * @returns what was added, or why nothing was
   */
  addFile(path: string, name: string): Promise<Added | { skipped: string }>
  /** Ends the archive. */
  close(): void
  readonly sizeBytes: number
}

const blockBytes = 512
/** What ends every archive. */
export const emptyArchive = Buffer.alloc(2 * blockBytes)
const bufferBytes = 1 << 20
const tries = 5

/** Synchronous calls: 12,000 small files cost a third of the time that promises cost. Between files others get their turn. */
export function createArchive(tarPath: string): Archive {
  const archive = openSync(tarPath, 'wx', 0o600)
  const buffer = Buffer.allocUnsafe(bufferBytes)
  let at = 0

  function write(bytes: Buffer): void {
    for (let written = 0; written < bytes.length;) {
      written += writeSync(archive, bytes, written, bytes.length - written, at + written)
    }
    at += bytes.length
  }

  function writeHeader(name: string, sizeBytes: number, mtimeMs: number, mode: number): void {
    const header = new Header({
      path: name,
      size: sizeBytes,
      mtime: new Date(Math.floor(mtimeMs / 1000) * 1000),
      mode,
      type: 'File',
      uid: 0,
      gid: 0,
    })
    const block = Buffer.alloc(blockBytes)
    // What does not fit into the block (a long name, a size of 8 GB) is said in a block before it.
    // So does a name of exactly 100 bytes, which the header would give a prefix.
    if (header.encode(block, 0) || Buffer.byteLength(name) >= 100)
      write(new Pax({ path: name, size: sizeBytes }).encode())
    write(block)
  }

  function pad(sizeBytes: number): void {
    const rest = sizeBytes % blockBytes
    if (rest > 0) write(Buffer.alloc(blockBytes - rest))
  }

  /** @returns whether exactly `sizeBytes` were there */
  async function copy(from: number, sizeBytes: number, hash: Hash): Promise<boolean> {
    for (let left = sizeBytes; left > 0;) {
      const done = sizeBytes - left
      if (done > 0 && done % (32 * bufferBytes) === 0) await breathe()
      const read = readSync(from, buffer, 0, Math.min(left, bufferBytes), null)
      if (read === 0) return false
      const part = buffer.subarray(0, read)
      hash.update(part)
      write(part)
      left -= read
    }
    return true
  }

  async function tryFile(path: string, name: string): Promise<Added | { skipped: string } | undefined> {
    // A link or a pipe put there by somebody must neither be followed nor waited for.
    const from = openSync(path, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK)
    const start = at
    let isWhole = false
    try {
      const before = fstatSync(from)
      if (!before.isFile()) return { skipped: 'is not a plain file' }
      const hash = createHash('sha256')
      writeHeader(name, before.size, before.mtimeMs, before.mode & 0o777)
      if ((await copy(from, before.size, hash)) && isSame(before, fstatSync(from))) {
        pad(before.size)
        isWhole = true
        return {
          sizeBytes: before.size,
          sha256: hash.digest('hex'),
          mtimeMs: before.mtimeMs,
          inode: before.ino,
        }
      }
      return undefined
    } finally {
      closeSync(from)
      // Also after a read that failed half-way: what follows must not begin in the middle of a file.
      if (!isWhole) {
        ftruncateSync(archive, start)
        at = start
      }
    }
  }

  return {
    async addFile(path, name) {
      for (let turn = 0; turn < tries; turn += 1) {
        await breathe()
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
    close() {
      write(emptyArchive)
      closeSync(archive)
    },
    get sizeBytes() {
      return at
    },
  }
}

/** Why the backup goes on without a file; undefined for what concerns the whole backup, such as a full disk. */
function reasonToSkip(error: unknown, name: string): string | undefined {
  const code = error instanceof Error && 'code' in error ? String(error.code) : ''
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
