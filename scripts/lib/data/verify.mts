/** Is a set what was written, and can it be read to its end? Nothing is restored. */
import { createHash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { open } from 'node:fs/promises'
import { join } from 'node:path'
import { pipeline } from 'node:stream/promises'
import { Parser, type ReadEntry } from 'tar'
import { converse } from '../command.mts'
import { readDump } from '../compose.mts'
import * as engine from '../engine.mts'
import type { Site } from '../settings.mts'
import { readManifest, sumOf, wrongSums, type UploadLine } from './manifest.mts'
import { setFolder } from './sets.mts'

/** @returns what is wrong with the set, one sentence each */
export async function verifySet(site: Site, name: string): Promise<string[]> {
  const folder = setFolder(site, name)
  const wrong = await wrongSums(folder)
  if (wrong.length > 0) return wrong
  const { files } = await readManifest(folder)
  const reads: [string, (path: string) => Promise<void>][] = [
    ['database.dump', (path) => readDatabaseDump(site, path)],
    ['uploads.tar', (path) => readUploads(path, join(folder, 'uploads.jsonl'))],
    ['config.tar', (path) => readTar(path, () => undefined)],
  ]
  for (const [file, read] of reads) {
    if (!(file in files)) continue
    await read(join(folder, file)).catch((error: unknown) => {
      wrong.push(
        `${file} cannot be read to its end: ${error instanceof Error ? error.message : String(error)}`,
      )
    })
  }
  return wrong
}

/** By the server's own pg_restore. @throws Error with what it said */
async function readDatabaseDump(site: Site, path: string): Promise<void> {
  const [postgresql] = await engine.serviceContainers(site.project, 'postgresql')
  if (postgresql?.State.Status !== 'running')
    throw new Error('PostgreSQL does not run, so that nobody can read it')
  const child = converse(readDump(postgresql.Id))
  let errors = ''
  child.stdout.resume()
  child.stderr.on('data', (part: Buffer) => (errors += part.toString()))
  const ended = new Promise<number | null>((resolve) => child.on('close', resolve))
  const file = await open(path, 'r')
  await pipeline(file.createReadStream(), child.stdin).catch((error: Error) => (errors += error.message))
  if ((await ended) !== 0) throw new Error(errors.trim())
}

/** The list has the same files in the same order, so its text can be made again from what the archive holds. */
async function readUploads(tarPath: string, listPath: string): Promise<void> {
  const list = createHash('sha256')
  await readTar(tarPath, (line) => list.update(`${JSON.stringify(line)}\n`))
  if (list.digest('hex') !== (await sumOf(listPath)).sha256)
    throw new Error('it does not hold what uploads.jsonl says')
}

/** Reads an archive to its end. @throws Error at the first thing that is not right */
async function readTar(path: string, onFile: (line: UploadLine) => void): Promise<void> {
  const parser = new Parser({ strict: true })
  parser.on('entry', (entry: ReadEntry) => {
    const hash = createHash('sha256')
    entry.on('data', (part: Buffer) => hash.update(part))
    entry.on('end', () => onFile({ name: entry.path, sizeBytes: entry.size, sha256: hash.digest('hex') }))
  })
  await new Promise<void>((resolve, reject) => {
    parser.on('end', resolve)
    parser.on('error', reject)
    createReadStream(path, { highWaterMark: 1 << 20 })
      .on('error', reject)
      .pipe(parser)
  })
}
