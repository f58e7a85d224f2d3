/** Is a set what was written, and can it be read to its end? Nothing is restored. */
import { createHash } from 'node:crypto'
import { join } from 'node:path'
import { run } from '../command.mts'
import { query } from '../compose.mts'
import { alive, detail, exitCodes, interrupted, Problem } from '../report.mts'
import { composeCommand, type Site } from '../settings.mts'
import { healthyPostgresql } from './backup.mts'
import { databaseNeeds, megabytes, needRoom, sparing } from './room.mts'
import { createDatabase, scratch, serverVersionOf, watchSize } from './databases.mts'
import {
  missingIn,
  readManifest,
  sumOf,
  textOf,
  uploadLines,
  wrongSums,
  type Manifest,
  type UploadLine,
} from './manifest.mts'
import { readDump, restoreDump } from './postgresql.mts'
import { setFolder } from './sets.mts'
import { openSnapshot, structureFormat, type Snapshot } from './snapshot.mts'
import { readArchive } from './untar.mts'

/** A dump of many gigabytes takes its time. */
const timeoutMs = 12 * 3_600_000

/**
 * @param progress counts the bytes that were read, sums and contents
 * @returns what is wrong with the set, one sentence each
 * @throws Problem when there is a dump and PostgreSQL, whose own tool reads it, does not run
 */
export async function verifySet(site: Site, name: string, progress = { bytes: 0 }): Promise<string[]> {
  const folder = setFolder(site, name)
  const wrong = await wrongSums(folder, progress)
  if (wrong.length > 0) return wrong
  const { files } = await readManifest(folder)
  const postgresql = 'database.dump' in files ? await needPostgresql(site) : ''
  const reads: [string, (path: string) => Promise<unknown>][] = [
    ['database.dump', (path) => run(readDump(postgresql), { input: path, timeoutMs, signal: interrupted })],
    ['uploads.tar', (path) => readUploads(path, join(folder, 'uploads.jsonl'), progress)],
    ['config.tar', (path) => readArchive(path, () => undefined)],
  ]
  for (const [file, read] of reads) {
    if (!(file in files)) continue
    await read(join(folder, file)).catch((error: unknown) => {
      interrupted.throwIfAborted()
      if (!blamesTheSet(error)) throw error
      wrong.push(
        `${file} cannot be read to its end: ${error instanceof Error ? error.message : String(error)}`,
      )
    })
  }
  return wrong
}

/**
 * Restores the dump of a set into a database of its own, compares it with the manifest, and drops it.
 * One at a time per site: it removes what a killed one left.
 * @returns what is wrong with the set, one sentence each
 */
export async function verifyDeeply(site: Site, name: string): Promise<string[]> {
  const folder = setFolder(site, name)
  const manifest = await readManifest(folder)
  if (!manifest.database) return []
  const postgresql = await needPostgresql(site)
  const { postgres } = site.folders
  const bytes = databaseNeeds(
    manifest.database.bytes ?? 6 * (manifest.files['database.dump']?.sizeBytes ?? 0),
  )
  const advice = 'Make room, or verify without --deep.'
  await needRoom('to restore the dump for a look needs', [{ folder: postgres, bytes }], { advice })
  await run(query(postgresql, 'postgres', `DROP DATABASE IF EXISTS "${scratch}" WITH (FORCE)`))
  const version = await serverVersionOf(postgresql)
  const create = createDatabase(scratch, 'postgres', manifest.database.settings, version)
  await run(query(postgresql, 'postgres', create))
  try {
    detail('restoring the dump for a look')
    const input = join(folder, 'database.dump')
    const size = watchSize(postgresql, scratch)
    const failure = await alive(
      () => `restoring ${name} for a look, ${megabytes(size.bytes)}`,
      () =>
        sparing(postgres, postgres, (signal) =>
          run(restoreDump(postgresql, scratch), { input, timeoutMs, signal }),
        ),
    )
      .then(
        () => undefined,
        (error: Error) => error,
      )
      .finally(size.stop)
    interrupted.throwIfAborted()
    if (failure && !blamesTheSet(failure)) throw failure
    if (failure) return [`database.dump cannot be restored: ${failure.message}`]
    detail('comparing it with the manifest')
    const restored = await openSnapshot(postgresql, scratch, 'strapi-blue-green-verify')
    await restored.close()
    return [
      ...differentRows(manifest.database.rows, restored.rows),
      ...(restored.schemaHash === manifest.schemaHash
        ? []
        : ['the schema is not the one that was backed up']),
      ...differentStructure(manifest, restored),
      ...(manifest.uploads ? await missingUploads(folder, restored.uploads, missingIn(manifest)) : []),
    ]
  } finally {
    await run(query(postgresql, 'postgres', `DROP DATABASE "${scratch}" WITH (FORCE)`))
  }
}

/** Row counts that are not equal, one sentence each. */
export function differentRows(wanted: Record<string, number>, found: Record<string, number>): string[] {
  const tables = [...new Set([...Object.keys(wanted), ...Object.keys(found)])].toSorted()
  return tables
    .filter((table) => wanted[table] !== found[table])
    .map((table) => `${table} has ${found[table] ?? 'no'} rows instead of ${wanted[table] ?? 'no'}`)
}

/** What a dump lost or made otherwise, one sentence each. Another major version may write its definitions otherwise. */
function differentStructure({ database, versions }: Manifest, restored: Snapshot): string[] {
  const isSameMajor = Number.parseInt(versions.postgresql ?? '') === Number.parseInt(restored.serverVersion)
  if (database?.structure?.format !== structureFormat || !isSameMajor) return []
  const [wanted, found] = [database.structure.digests, restored.structure]
  return [...new Set([...Object.keys(wanted), ...Object.keys(found)])]
    .toSorted()
    .filter((name) => wanted[name] !== found[name])
    .map((name) => `${name} has other columns, indexes or constraints than the one that was backed up`)
}

/** Names that the database refers to and the archive does not hold, but for those that the set names itself. */
async function missingUploads(
  folder: string,
  referenced: string[],
  isNamed: (name: string) => boolean,
): Promise<string[]> {
  const wanted = new Set(referenced)
  for await (const { name } of uploadLines(folder)) wanted.delete(name)
  return [...wanted]
    .filter((name) => !isNamed(name))
    .map((name) => `uploads/${name} is referred to and not in the set`)
}

/** Not so what says nothing about the set: a disk without room, a server that went away, a file that this user may not read. */
export function blamesTheSet(error: unknown): boolean {
  const text = error instanceof Error ? error.message : String(error)
  return !/No space left on device|ENOSPC|EACCES|server closed the connection|the database system is|is not running|No such container|exit code 137|terminating connection|too many clients|connection to server|almost full|docker (daemon|API)/.test(
    text,
  )
}

async function needPostgresql(site: Site): Promise<string> {
  const id = await healthyPostgresql(site)
  if (id !== undefined) return id
  throw new Problem(
    exitCodes.failed,
    'PostgreSQL does not run well, so that its own tools cannot read the dump; nothing is known of the set',
    `Start it: ${composeCommand(site, 'up -d postgresql')}`,
  )
}

/** The list has the same files in the same order, so its text can be made again from what the archive holds. */
async function readUploads(tarPath: string, listPath: string, progress: { bytes: number }): Promise<void> {
  const list = createHash('sha256')
  await readArchive(tarPath, ({ name, sizeBytes }) => {
    const hash = createHash('sha256')
    return {
      write(part) {
        hash.update(part)
        progress.bytes += part.length
      },
      end() {
        const line: UploadLine = { name, sizeBytes, sha256: hash.digest('hex') }
        list.update(textOf(line))
      },
    }
  })
  if (list.digest('hex') !== (await sumOf(listPath)).sha256)
    throw new Error('it does not hold what uploads.jsonl says')
}
