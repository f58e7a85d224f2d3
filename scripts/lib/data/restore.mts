/**
 * Puts the state of a set in place of the live one, without stopping Strapi, and takes it back.
 *
 * The database goes into a fresh one beside the live one, and a swap of names makes it live: that moment is the restore. Until
 * then an interrupted one goes back, from then on it is finished; `mendRestore` sees which from names and comments alone.
 */
import { link, statfs, stat } from 'node:fs/promises'
import { availableParallelism } from 'node:os'
import { join } from 'node:path'
import { logTail } from '../actions.mts'
import { agree } from '../agree.mts'
import { run } from '../command.mts'
import { query } from '../compose.mts'
import { smoke } from '../health.mts'
import { describeFigures, startProof } from '../proof.mts'
import {
  addToResult,
  alive,
  detail,
  exitCodes,
  explain,
  interrupted,
  isDryRun,
  pause,
  Problem,
  say,
  step,
  warn,
} from '../report.mts'
import { composeCommand, scriptCommand, type Site, type SlotName } from '../settings.mts'
import { imageOf } from '../releases.mts'
import { observe } from '../slots.mts'
import { flagged } from '../traffic.mts'
import { megabytes, secretsPrint } from './backup.mts'
import {
  createDatabase,
  incoming,
  keptName,
  readDatabases,
  restoredComment,
  setParameters,
  swap,
  type Databases,
} from './databases.mts'
import * as exchange from './exchange.mts'
import { obstacles, type Acceptable } from './fitness.mts'
import { readManifest, wrongSums, type Manifest, type Part } from './manifest.mts'
import * as tools from './postgresql.mts'
import { incomingFolder, setFolder } from './sets.mts'
import { openSnapshot } from './snapshot.mts'
import { createMissingRoles } from './roles.mts'
import {
  mendRestore,
  needPostgresql,
  needRoot,
  refusePending,
  newId,
  runningSchema,
  takeBack,
} from './undo.mts'
import { differentRows } from './verify.mts'

/** For a slot that runs to serve again after the swap. */
const patienceMs = 15_000
/** A second of writing at full speed, and some segments of PostgreSQL's log. */
const leastFreeBytes = 512 * 2 ** 20

export interface Request {
  set: string
  parts: Part[]
  accept: Acceptable[]
  isAgreed: boolean
}

interface Job extends Request {
  site: Site
  /** Time at which it began; names what it leaves. */
  id: string
  manifest: Manifest
  folder: string
  /** Id of PostgreSQL's container. */
  postgresql: string
  databases: Databases
  uploads: exchange.Plan | undefined
  release: string | undefined
  /** Whether visitors were served well before, what reads the database included. */
  wasServing: boolean
}

export async function restoreSet(site: Site, request: Request): Promise<void> {
  const job = await step('1/6', `Read ${request.set}, see that it fits this site`, () =>
    prepare(site, request),
  )
  describe(job)
  if (isDryRun()) return say('Nothing was changed.')
  await agree(`Put ${request.set} in place of what is live`, request.isAgreed)

  // No impact yet.
  const { withDatabase, withUploads } = partsOf(job)
  try {
    if (withDatabase)
      await step('2/6', 'Restore the dump beside the live database', () => restoreDatabase(job))
    if (withUploads)
      await step('3/6', 'Unpack the uploads that differ beside the live ones', () => unpackUploads(job))
  } catch (error) {
    throw await notRestored(job, error)
  }

  // From here on visitors see it.
  const proof = await startProof(site)
  try {
    if (withUploads)
      await step('4/6', 'Put new and changed uploads in their places', () =>
        exchange.putIncoming(site, job.id),
      )
    if (withDatabase) await step('5/6', 'Swap the databases', () => swapDatabases(job))
    await step('6/6', 'See that visitors are served, take surplus uploads out', async () => {
      if (job.uploads) await putLate(job, job.uploads)
      await stillServed(job)
      if (withUploads) await exchange.takeSurplus(site, job.id)
    })
  } catch (error) {
    throw await notRestored(job, error)
  } finally {
    const figures = await proof.stop()
    addToResult({ figures })
    say(describeFigures(figures), 'proof', { ...figures })
  }
  conclude(job)
}

/** Everything that can be known before anything is touched. @throws Problem that lists all that speaks against it */
async function prepare(site: Site, request: Request): Promise<Job> {
  needRoot(site.envFile, `restore ${request.set}`)
  const folder = setFolder(site, request.set)
  const progress = { bytes: 0 }
  const wrong = await alive(
    () => `reading ${request.set}, ${megabytes(progress.bytes)}`,
    () => wrongSums(folder, progress),
  )
  const manifest = await readManifest(folder).catch((error: unknown) => {
    throw refusal(site, request.set, [explain(error)], [])
  })
  const absent = request.parts.filter((part) => !manifest.parts.includes(part))
  if (absent.length > 0)
    throw new Problem(
      exitCodes.usage,
      `${request.set} holds ${manifest.parts.join(', ')}, not ${absent.join(', ')}`,
      `Restore what it has with --only, or take another one: ${scriptCommand('data', site.envFile, 'list')}`,
    )
  const postgresql = await needPostgresql(site)
  await refusePending(site)
  const databases = await readDatabases(site, postgresql)
  const { master, slave, flag } = await observe(site)
  const serving = flag === 'strapi-slave' ? slave : master
  const serverVersion = (
    await run(query(postgresql, 'postgres', "SELECT current_setting('server_version')"))
  ).trim()
  const found = obstacles(manifest, {
    parts: request.parts,
    wrong,
    serverVersion,
    secrets: await secretsPrint(site, manifest.createdAt),
    schemaHash: await runningSchema(site, serving.release),
    runningRelease: serving.release,
    hasRelease: manifest.release !== undefined && (await imageOf(site, manifest.release)) !== undefined,
  })
  const refused = found.filter(({ accept }) => !request.accept.includes(accept))
  if (refused.length > 0)
    throw refusal(
      site,
      request.set,
      refused.map(({ sentence }) => sentence),
      [...new Set(found.map(({ accept }) => accept))],
    )
  for (const { sentence } of found) warn(`accepted: ${sentence}`)
  const withUploads = request.parts.includes('uploads')
  const job: Job = {
    ...request,
    // What was accepted just in case must not change anything.
    accept: request.accept.filter(
      (word) => word === 'damaged' || found.some(({ accept }) => accept === word),
    ),
    site,
    id: await newId(site, databases),
    manifest,
    folder,
    postgresql,
    databases,
    uploads: withUploads
      ? await alive(
          () => 'comparing the uploads',
          () => exchange.planExchange(site, folder, manifest.missing),
        )
      : undefined,
    release: serving.release,
    wasServing: serving.status === 'healthy' && (await isServing(site, flag)),
  }
  await needSpace(job)
  return job
}

function refusal(site: Site, set: string, sentences: string[], accept: Acceptable[]): Problem {
  const lines = sentences.slice(0, 20).map((line) => `\n  - ${line}`)
  if (sentences.length > 20) lines.push(`\n  and ${sentences.length - 20} more`)
  const other = `Take another one: ${scriptCommand('data', site.envFile, 'list')}`
  const accepting =
    accept.length > 0
      ? `\nOr accept it: ${scriptCommand('data', site.envFile, `restore ${set} ${accept.map((word) => `--accept ${word}`).join(' ')}`)}`
      : ''
  return new Problem(
    exitCodes.failed,
    `${set} is not restored, and nothing was changed:${lines.join('')}`,
    `${other}${accepting}`,
  )
}

async function isServing(site: Site, slot: SlotName): Promise<boolean> {
  return await smoke(site, slot).then(
    () => true,
    () => false,
  )
}

function describe(job: Job): void {
  const { manifest, uploads, site } = job
  const taken = `${manifest.createdAt.slice(0, 16).replace('T', ' ')} UTC`
  detail(`taken ${taken}, release ${manifest.release ?? 'unknown'}: ${job.parts.join(', ')}`)
  if (partsOf(job).withDatabase) {
    const rows = Object.values(manifest.database?.rows ?? {}).reduce((total, count) => total + count, 0)
    detail(
      `database: ${rows.toLocaleString('en')} rows take the place of ${site.database.name}, which is kept`,
    )
  }
  if (uploads)
    detail(
      `uploads: ${uploads.added.size} come back, ${uploads.changed.size} get other bytes, ${uploads.surplus.length} are taken out and kept, ${uploads.same.size} stay`,
    )
  addToResult({
    set: job.set,
    uploads: uploads && {
      added: uploads.added.size,
      changed: uploads.changed.size,
      surplus: uploads.surplus.length,
      same: uploads.same.size,
    },
  })
}

async function restoreDatabase(job: Job): Promise<void> {
  const { site, manifest, postgresql, id } = job
  const owner = site.database.user
  const settings = manifest.database?.settings
  await run(query(postgresql, 'postgres', createDatabase(incoming, owner, settings)))
  if (settings?.parameters?.length)
    await run(query(postgresql, 'postgres', setParameters(incoming, settings.parameters)))
  const file = `${id}.dump`
  const created = await createMissingRoles(site, postgresql, job.folder, id)
  if (created.length > 0) detail(`created the roles ${created.join(', ')}, as in the set`)
  await link(join(job.folder, 'database.dump'), join(incomingFolder(site), file))
  const isForeign = settings !== undefined && settings.owner !== owner
  if (isForeign) detail(`what belonged to ${settings.owner} belongs to ${owner} now`)
  const disk = watchDisk(job)
  try {
    const restoring = tools.restoreFile(postgresql, {
      database: incoming,
      file,
      jobs: Math.min(4, availableParallelism()),
      owner: isForeign ? owner : undefined,
    })
    const options = { timeoutMs: 12 * 3_600_000, signal: AbortSignal.any([interrupted, disk.full]) }
    await alive(
      () => `restoring, ${megabytes(disk.restoredBytes)}`,
      () => run(restoring, options),
    )
  } finally {
    disk.stop()
    await run(tools.removeIncoming(postgresql, [file]))
  }
  // What the server thinks of its tables is in no dump; without it the first visitors would get slow plans.
  await run(query(postgresql, incoming, 'ANALYZE'), { timeoutMs: 3_600_000, signal: interrupted })
  const restored = await openSnapshot(postgresql, incoming, tools.restoreSession)
  await restored.close()
  const different = differentRows(manifest.database?.rows ?? {}, restored.rows)
  if (different.length === 0) return
  if (!job.accept.includes('damaged'))
    throw new Error(`the dump does not hold what its manifest says: ${different.join('; ')}`)
  for (const line of different) warn(`accepted: ${line}`)
}

/** PostgreSQL stops altogether when it cannot write its log: the restore has to give up before that. */
function watchDisk({ site, postgresql }: Job) {
  const controller = new AbortController()
  const watch = { full: controller.signal, restoredBytes: 0, stop: () => clearInterval(timer) }
  let isAsking = false
  const look = async () => {
    const { bavail, bsize } = await statfs(site.folders.postgres)
    if (bavail * bsize < leastFreeBytes)
      controller.abort(
        new Problem(
          exitCodes.failed,
          `the disk of ${site.folders.postgres} is almost full, so the restore gave up; nothing was changed`,
          'Make room, then run it again.',
        ),
      )
    if (isAsking) return
    isAsking = true
    try {
      const size = await run(query(postgresql, 'postgres', `SELECT pg_database_size('${incoming}')`))
      watch.restoredBytes = Number(size)
    } finally {
      isAsking = false
    }
  }
  const timer = setInterval(() => void look().catch(() => undefined), 250)
  return watch
}

async function unpackUploads(job: Job): Promise<void> {
  const { site, id, folder, manifest } = job
  const { withDatabase } = partsOf(job)
  // Visitors went on while the dump was restored.
  const uploads = await exchange.planExchange(site, folder, manifest.missing)
  job.uploads = uploads
  await alive(
    () => `unpacking ${megabytes(exchange.bytesOf(uploads))}`,
    () => exchange.stage(site, { id, withDatabase }, uploads, join(folder, 'uploads.tar')),
  )
}

/** What editors replaced or deleted between the plan and the swap. */
async function putLate({ site, id, folder }: Job, uploads: exchange.Plan): Promise<void> {
  const late = await exchange.stageLate(site, id, uploads, join(folder, 'uploads.tar'))
  if (late > 0) await exchange.putIncoming(site, id)
}

async function swapDatabases({ site, id, set, postgresql }: Job): Promise<void> {
  const { live } = await readDatabases(site, postgresql)
  const names = { live: site.database.name, from: incoming, to: keptName('replaced', id) }
  await swap(postgresql, { ...names, hasLive: live !== undefined, comment: restoredComment(id, set) })
}

/** @throws Problem when visitors were served well before, and are not now */
async function stillServed(job: Job): Promise<void> {
  const { site } = job
  const slot = flagged(site)
  if (!job.wasServing) return warn(`${slot} did not run well before, so nothing is known of it`)
  const failure = await failureToServe(site, slot)
  if (failure === undefined) return
  if (job.accept.includes('other-schema')) return warn(explain(failure))
  if (partsOf(job).withDatabase && !job.databases.live)
    throw new Problem(
      exitCodes.degraded,
      `${job.set} is live, but ${slot} does not serve with it; there was no database before`,
      `Look at: ${composeCommand(site, `logs ${slot}`)}`,
      failure,
    )
  const log = await logTail(site, slot)
  await takeBack(site, job.id, job.postgresql)
  throw new Problem(
    exitCodes.failed,
    `${slot} did not serve with ${job.set}, so it was taken back: visitors are served as before\n${log}`,
    `Look at: ${composeCommand(site, `logs ${slot}`)}`,
    failure,
  )
}

/** Gives it time to find out that its connections are gone, and to boot when that was too much for it. */
async function failureToServe(site: Site, slot: SlotName): Promise<unknown> {
  const startedAt = Date.now()
  let bootedAt = startedAt
  for (;;) {
    try {
      const { master, slave } = await observe(site)
      const { status } = slot === 'strapi-slave' ? slave : master
      if (status === 'booting') bootedAt = Date.now()
      if (status !== 'healthy') throw new Error(`${slot} is ${status}`)
      await smoke(site, slot)
      return undefined
    } catch (failure) {
      const isTooLate = Date.now() - startedAt > site.health.timeoutMs
      if (isTooLate || Date.now() - bootedAt > patienceMs) return failure
    }
    await pause(200)
  }
}

/** Nothing was changed, or all was taken back, or the new state is live, or nobody knows yet. */
async function notRestored(job: Job, error: unknown): Promise<unknown> {
  const { site } = job
  // Told already.
  if (error instanceof Problem && error.code !== exitCodes.interrupted) {
    await mendRestore(site).catch((failure: unknown) => warn(explain(failure)))
    return error
  }
  const code = interrupted.aborted ? exitCodes.interrupted : exitCodes.failed
  const why = interrupted.aborted ? 'interrupted' : `${job.set} was not restored`
  try {
    for (const line of (await mendRestore(site)).found) detail(line)
    await refusePending(site)
    if (!(await isLive(job))) return new Problem(code, `${why}; nothing was changed`, '', error)
    return new Problem(
      interrupted.aborted ? exitCodes.interrupted : exitCodes.degraded,
      `${interrupted.aborted ? 'interrupted' : 'not everything went well'}, and ${job.set} is live`,
      `Back to what was before: ${scriptCommand('data', site.envFile, 'undo')}`,
      error,
    )
  } catch (failure) {
    warn(explain(failure))
    return new Problem(
      exitCodes.degraded,
      `${why}; what is half done is finished or taken back by the next run`,
      `See that PostgreSQL runs, then: ${scriptCommand('data', site.envFile)}`,
      error,
    )
  }
}

/** @throws Error when PostgreSQL cannot be asked */
async function isLive(job: Job): Promise<boolean> {
  if (partsOf(job).withDatabase)
    return (await readDatabases(job.site, job.postgresql)).live?.restoredBy === job.id
  const own = (await exchange.readExchanges(job.site)).find(({ id }) => id === job.id)
  return own?.stage === 'done'
}

function conclude(job: Job): void {
  const { site, manifest } = job
  addToResult({ restore: job.id })
  const back = `Back to what was before: ${scriptCommand('data', site.envFile, 'undo')}`
  say(`Done: ${job.set} is live. ${back}`)
  if (job.accept.includes('other-schema') && manifest.release !== undefined)
    warn(
      `Strapi still runs ${job.release ?? 'no release'}. Now: ${scriptCommand('deploy', site.envFile, `--rollback ${manifest.release}`)}`,
    )
}

function partsOf({ parts }: Pick<Request, 'parts'>) {
  return { withDatabase: parts.includes('database'), withUploads: parts.includes('uploads') }
}

/** The database itself, and what PostgreSQL's log of it may grow to (max_wal_size). */
function databaseNeeds(bytes: number): number {
  return 1.2 * bytes + Math.min(bytes, 2 ** 30) + leastFreeBytes
}

/** A full disk would stop the live database. @throws Problem before anything is written */
async function needSpace(job: Job): Promise<void> {
  const { site, manifest, uploads } = job
  const dump = manifest.files['database.dump']?.sizeBytes ?? 0
  const wants = [
    {
      folder: site.folders.postgres,
      bytes: partsOf(job).withDatabase ? databaseNeeds(manifest.database?.bytes ?? 6 * dump) : 0,
    },
    { folder: site.folders.uploads, bytes: uploads ? exchange.bytesOf(uploads) : 0 },
  ]
  const disks = Map.groupBy(
    await Promise.all(wants.map(async (want) => ({ ...want, disk: (await stat(want.folder)).dev }))),
    ({ disk }) => disk,
  )
  for (const group of disks.values()) {
    const needed = group.reduce((total, { bytes }) => total + bytes, 0)
    const [{ folder } = { folder: '' }] = group
    const disk = await statfs(folder)
    const free = disk.bavail * disk.bsize
    if (needed < free) continue
    throw new Problem(
      exitCodes.failed,
      `to restore it needs about ${megabytes(needed)}, and ${megabytes(free)} are free on the disk of ${folder}; nothing was changed`,
      'Make room, then run it again.',
    )
  }
}
