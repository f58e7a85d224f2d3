/** The uploads of a set: everything once, and then, beside the snapshot, what has come or changed meanwhile. */
import { closeSync, opendirSync, openSync, statSync, writeFileSync, type Dir } from 'node:fs'
import { join } from 'node:path'
import { setImmediate as breathe, setTimeout as pause } from 'node:timers/promises'
import { detail, interrupted } from '../report.mts'
import { createArchive, type Added } from './archive.mts'
import { textOf, type FileSum } from './manifest.mts'
import { ownFolder, unsafeName } from './untar.mts'

export interface UploadsArchive {
  /** Adds what is new or has changed since the last pass. */
  pass(): Promise<void>
  /** Adds again what was still being written in the last pass: a pause of its writer looks like its end. */
  settle(): Promise<void>
  /**
   * @param referenced names that a row of the snapshot refers to
   * @returns what is in the archive, its own sum, and the names that should be in it and are not, each with the reason
   */
  close(
    referenced: string[],
  ): Promise<{ files: number; bytes: number; sum: FileSum; missing: Map<string, string> }>
  [Symbol.asyncDispose](): Promise<void>
  readonly progress: { files: number; bytes: number }
}

/** What was added under which name. As objects, those of 120,000 files would take twice the memory. */
class Looks {
  readonly #places = new Map<string, number>()
  /** Three for each place: size, time, inode. */
  #numbers = new Float64Array(3 * 1024)
  #next = 0

  get size(): number {
    return this.#places.size
  }

  has(name: string): boolean {
    return this.#places.has(name)
  }

  get(name: string): Added | undefined {
    const place = this.#places.get(name)
    if (place === undefined) return undefined
    const [sizeBytes = 0, mtimeMs = 0, inode = 0] = this.#numbers.subarray(3 * place)
    return { sizeBytes, mtimeMs, inode }
  }

  set(name: string, { sizeBytes, mtimeMs, inode }: Added): void {
    const place = this.#places.get(name) ?? this.#next++
    this.#places.set(name, place)
    if (3 * place >= this.#numbers.length) {
      const larger = new Float64Array(2 * this.#numbers.length)
      larger.set(this.#numbers)
      this.#numbers = larger
    }
    this.#numbers.set([sizeBytes, mtimeMs, inode], 3 * place)
  }

  delete(name: string): void {
    this.#places.delete(name)
  }

  bytes(): number {
    let total = 0
    for (const place of this.#places.values()) total += this.#numbers[3 * place] ?? 0
    return total
  }
}

/** Between two parts of a file that is being uploaded. */
const settlingMs = 200
const settlings = 10

/** Strapi writes a file before its row and removes it before its row, so a pass right after a snapshot has what it refers to. */
export function archiveUploads(
  uploads: string,
  tarPath: string,
  listPath: string,
  signal = interrupted,
): UploadsArchive {
  const list = openSync(listPath, 'wx', 0o600)
  let lines = ''
  const archive = createArchive(tarPath, (file) => {
    lines += textOf(file)
    if (lines.length > 65_536) flush()
  })
  const known = new Looks()
  const skipped = new Map<string, string>()
  let recent: string[] = []

  async function add(name: string): Promise<void> {
    signal.throwIfAborted()
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
      recent.push(name)
    }
  }

  function flush(): void {
    writeFileSync(list, lines)
    lines = ''
  }

  return {
    async pass() {
      recent = []
      for await (const name of filesBelow(uploads)) await add(name)
    },
    async settle() {
      for (let times = 0; recent.length > 0 && times < settlings; times += 1) {
        await pause(settlingMs, undefined, { signal })
        const names = recent
        recent = []
        // What is gone by now was there when the rows referred to it.
        for (const name of names)
          if (statSync(join(uploads, name), { throwIfNoEntry: false })) await add(name)
      }
    },
    async close(referenced) {
      const sum = await archive.close()
      flush()
      const lost = referenced.filter((name) => !known.has(name))
      const reasons = new Map(lost.map((name) => [name, 'is not there']))
      for (const [name, reason] of skipped) {
        if (known.has(name)) continue
        // What came or went just then matters only when a row refers to it.
        const isPassing = /^(vanished|changed)/.test(reason)
        if (reasons.has(name) || !isPassing) reasons.set(name, reason)
        else detail(`uploads/${name} ${reason}, and no row refers to it: left out`)
      }
      return { files: known.size, bytes: known.bytes(), sum, missing: reasons }
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
  for await (const name of filesBelow(folder)) bytes += sizeOf(join(folder, name))
  return bytes
}

function sizeOf(path: string): number {
  return statSync(path, { throwIfNoEntry: false })?.size ?? 0
}

/** Names relative to `top` of everything below it that is no folder, but for what restores keep there. */
export async function* filesBelow(top: string): AsyncGenerator<string> {
  let number = 0
  for (const name of walk(top, '')) {
    yield name
    number += 1
    // So that others get their turn as well: the walk itself waits for nothing.
    if (number % 256 === 0) await breathe()
  }
}

/** Synchronous: a promise for each of many thousand files costs more time and memory than the file. */
function* walk(top: string, below: string): Generator<string> {
  const folder = openFolder(join(top, below), below !== '')
  // A closed folder is named as what cannot be backed up.
  if (folder === 'closed') return yield below
  if (!folder) return
  try {
    for (let entry = folder.readSync(); entry; entry = folder.readSync()) {
      if (below === '' && entry.name === ownFolder) continue
      const name = below === '' ? entry.name : `${below}/${entry.name}`
      if (entry.isDirectory()) yield* walk(top, name)
      else yield name
    }
  } finally {
    folder.closeSync()
  }
}

/** Undefined for an inner one that vanished meanwhile. @throws Error when it is the outer one that cannot be opened */
function openFolder(path: string, isInner: boolean): Dir | 'closed' | undefined {
  try {
    return opendirSync(path, { bufferSize: 512 })
  } catch (error) {
    if (!isInner) throw error
    // Node puts this sign where a name is not UTF-8, and then does not find it.
    const isGone = (error as NodeJS.ErrnoException).code === 'ENOENT' && !path.includes('\u{fffd}')
    return isGone ? undefined : 'closed'
  }
}

function isSame(path: string, before: Added): boolean {
  const now = statSync(path, { throwIfNoEntry: false })
  // What has vanished stays as it was in the archive.
  if (!now) return true
  return now.size === before.sizeBytes && now.mtimeMs === before.mtimeMs && now.ino === before.inode
}
