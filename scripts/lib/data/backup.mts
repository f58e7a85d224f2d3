/** Makes a backup set: one state of database and uploads, and the configuration. Nothing is stopped. */
import { createHmac } from 'node:crypto'
import { statSync } from 'node:fs'
import { readFile, stat, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { run } from '../command.mts'
import { query, type Server } from '../compose.mts'
import * as engine from '../engine.mts'
import { readEnv } from '../envfile.mts'
import { alive, detail, exitCodes, explain, interrupted, pause, Problem, warn } from '../report.mts'
import { appSecrets } from '../secrets.mts'
import { composeCommand, type Site } from '../settings.mts'
import { observe } from '../slots.mts'
import { archiveConfig, configFiles, type ConfigFile } from './config.mts'
import { filesOfPart, format, sumOf, writeManifest, type Manifest, type Part } from './manifest.mts'
import { databaseSize } from './databases.mts'
import * as tools from './postgresql.mts'
import { recovery, type ByHand } from './recovery.mts'
import { pendingExchanges } from './plan.mts'
import { megabytes, needRoom, reserveOn, sparing } from './room.mts'
import {
  adopt,
  commitSet,
  incomingFolder,
  newSetName,
  partialSets,
  readBack,
  removePartial,
  stageSet,
} from './sets.mts'
import { openSnapshot, structureFormat, type Snapshot } from './snapshot.mts'
import { archiveUploads, folderBytes } from './uploads.mts'

export interface Backup {
  name: string
  manifest: Manifest
}

/** Where a backup comes from that is not of the site as it runs here. */
export interface Origin {
  server: Server
  configFiles: ConfigFile[]
  byHand?: ByHand
}

export interface BackupOptions {
  origin?: Origin
  /** What ends it half-way; the interruption, if nothing is said. */
  signal?: AbortSignal
}

/** What a killed run left: when PostgreSQL answers, its sessions and files; half-made sets. @returns what was found, in words */
export async function endBackupLeftovers(site: Site): Promise<string[]> {
  const found: string[] = []
  try {
    found.push(...(await endDumps(site)))
  } finally {
    // Also where PostgreSQL answers badly.
    found.push(...(await removePartialSets(site)))
  }
  return found
}

async function endDumps(site: Site): Promise<string[]> {
  const found: string[] = []
  const postgresql = await healthyPostgresql(site)
  // First of all: a dump that still runs holds locks that Strapi may wait for.
  if (postgresql !== undefined) {
    const ended = await endSessions(postgresql)
    if (ended > 0) found.push(`${ended} sessions in PostgreSQL`)
    const files = (await run(tools.listIncoming(postgresql)))
      .split('\n')
      .filter((name) => /^[\d_-]+\.(dump|sql)$/.test(name))
    if (files.length > 0) {
      await run(tools.removeIncoming(postgresql, files))
      found.push(`half-written files (${files.join(', ')})`)
    }
  }
  return found
}

async function removePartialSets(site: Site): Promise<string[]> {
  const found: string[] = []
  const stuck: unknown[] = []
  for (const name of await partialSets(site)) {
    // Another user's must not keep ours.
    await removePartial(site, name).then(
      () => found.push(`a half-made set (${name})`),
      (error: unknown) => stuck.push(error),
    )
  }
  if (stuck.length > 0) throw new AggregateError(stuck, 'not all half-made sets could be removed')
  return found
}

/** @returns how many sessions of killed backups and restores were ended */
export async function endSessions(server: Server): Promise<number> {
  const end = `SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name IN ('${tools.backupSession}', '${tools.restoreSession}') AND pid <> pg_backend_pid()`
  return Number(await run(query(server, 'postgres', end)))
}

/**
 * Makes a set of these parts and reads it back.
 * @throws Problem or Error, with everything half-made removed
 */
export async function makeBackup(
  site: Site,
  parts: Part[],
  { origin, signal = interrupted }: BackupOptions = {},
): Promise<Backup> {
  const createdAt = new Date()
  const name = await newSetName(site, createdAt)
  const database =
    parts.includes('database') || parts.includes('uploads')
      ? (origin?.server ?? (await reachDatabase(site)))
      : undefined
  await needSpace(site, parts, database)
  const folder = await stageSet(site, name)
  try {
    const manifest = await sparing(
      folder,
      site.folders.postgres,
      (spared) => fill(site, { name, folder, parts, createdAt, database, origin, signal: spared }),
      signal,
    )
    detail('reading everything back')
    const wrong = await readBack(folder)
    if (wrong.length > 0) throw new Error(`what was written reads back differently: ${wrong.join('; ')}`)
    signal.throwIfAborted()
    detail(`making it the set ${name}`)
    await commitSet(site, name)
    return { name, manifest }
  } catch (error) {
    await endBackupLeftovers(site).catch((failure: unknown) =>
      warn(`what is half-made is removed by the next run: ${explain(failure)}`),
    )
    throw understood(site, error)
  }
}

function understood(site: Site, error: unknown): unknown {
  if (isFull(error))
    return new Problem(
      exitCodes.failed,
      `the disk of ${site.folders.backups} is full; there is no set`,
      'Make room, or remove old sets, then run it again.',
      error,
    )
  if (/lock timeout|Query was: LOCK TABLE/.test(explain(error)))
    return new Problem(
      exitCodes.failed,
      'somebody changes a table just now (ALTER TABLE, VACUUM FULL), which no dump can pass; there is no set',
      'Run it again when that is through.',
      error,
    )
  return error
}

interface Job {
  name: string
  folder: string
  parts: Part[]
  createdAt: Date
  /** PostgreSQL. */
  database: Server | undefined
  origin: Origin | undefined
  signal: AbortSignal
}

async function fill(site: Site, job: Job): Promise<Manifest> {
  const { folder, parts, createdAt, origin } = job
  const { state, uploads } = await takeState(site, job)
  const missing = [...(uploads?.missing ?? [])].map(([name, reason]) => `uploads/${name} ${reason}`)
  if (uploads)
    for (const { id } of await pendingExchanges(site))
      missing.push(
        `uploads are those of restore ${id}, which is half done: the database may be another state`,
      )
  if (parts.includes('config')) {
    detail('archiving the configuration')
    const files = origin?.configFiles ?? (await configFiles(site))
    missing.push(...(await archiveConfig(files, join(folder, 'config.tar'))))
  }
  const { master, slave, flag } = await observe(site)
  const manifest: Manifest = {
    format,
    createdAt: createdAt.toISOString(),
    parts,
    missing,
    files: {},
    release: (flag === 'strapi-slave' ? slave : master).release,
    schemaHash: state?.schemaHash,
    versions: { postgresql: state?.serverVersion, strapi: await strapiVersion(site) },
    database: state && {
      name: site.database.name,
      bytes: state.databaseBytes,
      settings: state.settings,
      rows: state.rows,
      structure: { format: structureFormat, digests: state.structure },
    },
    uploads: uploads && {
      files: uploads.files,
      bytes: uploads.bytes,
      missing: [...uploads.missing.keys()],
    },
    secrets: secretsPrint(await readEnv(join(site.source, '.env')), createdAt.toISOString()),
  }
  await writeFile(join(folder, 'RECOVERY.md'), recovery(site, job.name, manifest, origin?.byHand), {
    mode: 0o600,
  })
  const names = ['RECOVERY.md', ...parts.flatMap((part) => filesOfPart[part])]
  const progress = { bytes: 0 }
  await alive(
    () => `reckoning sums, ${megabytes(progress.bytes)}`,
    async () => {
      for (const file of names)
        manifest.files[file] =
          file === 'uploads.tar' && uploads ? uploads.sum : await sumOf(join(folder, file), progress)
    },
  )
  await writeManifest(folder, manifest)
  return manifest
}

/**
 * Uploads once, then the snapshot, then at once the uploads that came or changed meanwhile, then the dump of the snapshot:
 * a file that a row of the snapshot refers to has been there at one of the two passes.
 */
async function takeState(site: Site, job: Job) {
  const { folder, parts, database, signal } = job
  if (database === undefined) return {}
  await using uploads = parts.includes('uploads')
    ? archiveUploads(site.folders.uploads, join(folder, 'uploads.tar'), join(folder, 'uploads.jsonl'), signal)
    : undefined
  const archive = async (title: string) => {
    if (!uploads) return
    detail(title)
    await alive(
      () => `uploads: ${uploads.progress.files} files, ${megabytes(uploads.progress.bytes)}`,
      () => uploads.pass(),
    )
  }
  await archive('archiving the uploads')
  detail('taking a snapshot of the database')
  const snapshot = await alive(
    () => 'counting rows',
    () => openSnapshot(database, site.database.name, tools.backupSession, { signal }),
  )
  try {
    await archive('archiving the uploads that have changed meanwhile')
    // What was being written just then is whole by now, or still changes.
    await uploads?.settle()
    const archived = await uploads?.close(snapshot.uploads)
    if (parts.includes('database')) await dumpDatabase(site, database, snapshot, job)
    return { state: parts.includes('database') ? snapshot : undefined, uploads: archived }
  } finally {
    await snapshot.close()
  }
}

async function dumpDatabase(
  site: Site,
  database: Server,
  snapshot: Snapshot,
  { name, folder, signal }: Job,
): Promise<void> {
  // zstd is there from 16 on, and several times as fast.
  const compression = Number.parseInt(snapshot.serverVersion) >= 16 ? 'zstd' : 'gzip'
  const owner = `${process.getuid?.() ?? 0}:${process.getgid?.() ?? 0}`
  const options = { timeoutMs: 12 * 3_600_000, signal }
  const common = { database: site.database.name, snapshot: snapshot.id, compression } as const
  // Another's container does not see our folder.
  if (typeof database !== 'string') {
    for (const [to, argv] of [
      ['database.dump', tools.dump(database, { ...common, file: undefined })],
      ['roles.sql', tools.dumpRoles(database, undefined)],
    ] as const) {
      detail(`dumping ${to}`)
      const path = join(folder, to)
      await alive(
        () => `dumping ${to}, ${megabytes(sizeOf(path))}`,
        () => run(['sh', '-c', 'umask 077; exec "$@" > "$0"', path, ...argv], options),
      )
    }
    return
  }
  await needSharedFolder(site, database)
  const written = [
    {
      argv: tools.dump(database, { ...common, file: `${name}.dump` }),
      from: `${name}.dump`,
      to: 'database.dump',
    },
    { argv: tools.dumpRoles(database, `${name}.sql`), from: `${name}.sql`, to: 'roles.sql' },
  ]
  for (const { argv, from, to } of written) {
    detail(`dumping ${to}`)
    await alive(
      () => `dumping ${to}, ${megabytes(sizeOf(join(incomingFolder(site), from)))}`,
      () => run(argv, options),
    )
    await run(tools.takeOver(database, from, owner))
    await adopt(join(incomingFolder(site), from), join(folder, to))
  }
  await run(
    tools.removeIncoming(
      database,
      written.map(({ from }) => from),
    ),
  )
}

/** @throws Problem when PostgreSQL writes to another folder than the one that is read here */
export async function needSharedFolder(site: Site, postgresql: string): Promise<void> {
  const found = await engine.container(postgresql)
  const mounted = found?.Mounts.find(({ Destination }) => Destination === '/backup')?.Source
  // By what it is, not by its name alone: a disk may have been mounted there since, or a link changed.
  const seen = await run(tools.lookAtIncoming(postgresql))
  const { dev, ino } = await stat(incomingFolder(site))
  if (mounted !== undefined && seen.trim() === `${dev}:${ino}`) return
  throw new Problem(
    exitCodes.failed,
    `PostgreSQL still has ${mounted ?? 'nothing'} for its dumps, not ${incomingFolder(site)}: BACKUP_DIR has changed since it was made`,
    `Make it anew, which takes it away for some seconds: ${composeCommand(site, 'up -d postgresql')}`,
  )
}

function sizeOf(path: string): number {
  return statSync(path, { throwIfNoEntry: false })?.size ?? 0
}

/** Id of PostgreSQL's container, or undefined while it does not answer. */
export async function healthyPostgresql(site: Site): Promise<string | undefined> {
  const containers = await engine.serviceContainers(site.project, 'postgresql')
  return containers.find((one) => one.State.Status === 'running' && one.State.Health?.Status === 'healthy')
    ?.Id
}

/** The same; one that is just starting gets half a minute. */
export async function startingPostgresql(site: Site): Promise<string | undefined> {
  for (let waitedMs = 0; ; waitedMs += 500) {
    const [one] = await engine.serviceContainers(site.project, 'postgresql')
    if (one?.State.Status !== 'running') return undefined
    if (one.State.Health?.Status === 'healthy') return one.Id
    if (one.State.Health?.Status !== 'starting' || waitedMs >= 30_000) return undefined
    await pause(500)
  }
}

/** @throws Problem when it does not answer */
export async function reachDatabase(site: Site): Promise<string> {
  const id = await startingPostgresql(site)
  if (id !== undefined) return id
  throw new Problem(
    exitCodes.failed,
    'PostgreSQL does not run; nothing was backed up',
    `Start it: ${composeCommand(site, 'up -d postgresql')}\nOr back up what can be: --only config`,
  )
}

/** A dump is smaller than its database; uploads and the rest are as large as they are. @throws Problem before anything is written */
async function needSpace(site: Site, parts: Part[], database: Server | undefined): Promise<void> {
  const size = databaseSize(site.database.name)
  const bytes =
    (parts.includes('uploads') ? await folderBytes(site.folders.uploads) : 0) +
    (parts.includes('database') && database ? Number(await run(query(database, 'postgres', size))) / 2 : 0)
  const advice = 'Make room, or set BACKUP_DIR to a larger disk.'
  const { backups, postgres } = site.folders
  const wants = [{ folder: backups, bytes }, ...(await reserveOn(backups, postgres))]
  await needRoom('a backup needs', wants, { advice })
}

async function strapiVersion(site: Site): Promise<string | undefined> {
  try {
    const text = await readFile(join(site.source, 'package.json'), 'utf8')
    return (JSON.parse(text) as { dependencies?: Record<string, string> }).dependencies?.['@strapi/strapi']
  } catch {
    // Only for people to read: not worth a backup.
    return undefined
  }
}

/**
 * @param application its settings; undefined when there are none
 * @param key `createdAt` of the set, so that two sets cannot be compared with each other
 */
export function secretsPrint(
  application: Record<string, string> | undefined,
  key: string,
): string | undefined {
  if (!application) return undefined
  return createHmac('sha256', key)
    .update(JSON.stringify(appSecrets.map((name) => application[name] ?? '')))
    .digest('hex')
}

function isFull(error: unknown): boolean {
  return (
    error instanceof Error &&
    (('code' in error && error.code === 'ENOSPC') || /No space left on device/.test(error.message))
  )
}
