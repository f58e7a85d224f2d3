/** The uploads of a set: everything once, and then, beside the snapshot, what has come or changed meanwhile. */
import { closeSync, openSync, statSync, writeFileSync } from 'node:fs'
import { opendir, stat } from 'node:fs/promises'
import { join, relative } from 'node:path'
import { interrupted } from '../report.mts'
import { createArchive, type Added } from './archive.mts'
import { textOf } from './manifest.mts'
import { ownFolder, unsafeName } from './untar.mts'

export interface UploadsArchive {
  /** Adds what is new or has changed since the last pass. */
  pass(): Promise<void>
  /**
   * @param referenced names that a row of the snapshot refers to
   * @returns what is in the archive, and the names that should be and are not, each with the reason
   */
  close(referenced: string[]): Promise<{ files: number; bytes: number; missing: string[] }>
  [Symbol.asyncDispose](): Promise<void>
  readonly progress: { files: number; bytes: number }
}

/** Strapi writes a file before its row and removes it before its row, so a pass right after a snapshot has what it refers to. */
export function archiveUploads(uploads: string, tarPath: string, listPath: string): UploadsArchive {
  const list = openSync(listPath, 'wx', 0o600)
  let lines = ''
  const archive = createArchive(tarPath, (file) => {
    lines += textOf(file)
    if (lines.length > 65_536) flush()
  })
  const known = new Map<string, Added>()
  const skipped = new Map<string, string>()

  async function add(name: string): Promise<void> {
    interrupted.throwIfAborted()
    const before = known.get(name)
    if (before && isSame(join(uploads, name), before)) return
    const unsafe = unsafeName(name)
    const added = unsafe ? { skipped: unsafe } : await archive.addFile(join(uploads, name), name)
    if ('skipped' in added) {
      skipped.set(name, added.skipped)
      // What the first pass has of it is not what the snapshot refers to.
      known.delete(name)
    } else {
      skipped.delete(name)
      known.set(name, added)
    }
  }

  function flush(): void {
    writeFileSync(list, lines)
    lines = ''
  }

  return {
    async pass() {
      for await (const name of filesBelow(uploads)) await add(name)
    },
    async close(referenced) {
      await archive.close()
      flush()
      const lost = referenced.filter((name) => !known.has(name))
      const reasons = new Map(lost.map((name) => [name, 'is not there']))
      for (const [name, reason] of skipped) {
        // What came or went just then matters only when a row refers to it.
        const isPassing = /^(vanished|changed)/.test(reason)
        if (!known.has(name) && (reasons.has(name) || !isPassing)) reasons.set(name, reason)
      }
      const sizes = [...known.values()].map(({ sizeBytes }) => sizeBytes)
      return {
        files: known.size,
        bytes: sizes.reduce((total, size) => total + size, 0),
        missing: [...reasons].map(([name, reason]) => `uploads/${name} ${reason}`),
      }
    },
    async [Symbol.asyncDispose]() {
      // Its last sums may come even now.
      await archive[Symbol.asyncDispose]()
      closeSync(list)
    },
    get progress() {
      return { files: known.size, bytes: archive.sizeBytes }
    },
  }
}

/** Bytes of all files below a folder, as they are now. */
export async function folderBytes(folder: string): Promise<number> {
  let bytes = 0
  for await (const name of filesBelow(folder)) {
    bytes += (await stat(join(folder, name)).catch(() => undefined))?.size ?? 0
  }
  return bytes
}

/** Names relative to `top` of everything below it that is no folder, but for what restores keep there. */
export async function* filesBelow(top: string, folder = top): AsyncGenerator<string> {
  const entries = await opendir(folder, { bufferSize: 512 }).catch((error: NodeJS.ErrnoException) => {
    if (folder === top) throw error
    return error.code
  })
  // A folder that vanishes meanwhile has none.
  if (entries === 'ENOENT') return
  // A closed folder is named as what cannot be backed up.
  if (typeof entries !== 'object') return yield relative(top, folder)
  for await (const entry of entries) {
    const path = join(folder, entry.name)
    if (folder === top && entry.name === ownFolder) continue
    if (entry.isDirectory()) yield* filesBelow(top, path)
    else yield relative(top, path)
  }
}

function isSame(path: string, before: Added): boolean {
  const now = statSync(path, { throwIfNoEntry: false })
  // What has vanished stays as it was in the archive.
  if (!now) return true
  return now.size === before.sizeBytes && now.mtimeMs === before.mtimeMs && now.ino === before.inode
}
