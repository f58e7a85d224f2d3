/** What a restore is going to do, decided before anything is touched: does the set fit, what would change, is there room. */
import { join } from 'node:path'
import { readEnv } from '../envfile.mts'
import { smoke } from '../health.mts'
import { imageOf } from '../releases.mts'
import { alive, exitCodes, explain, pause, Problem, warn } from '../report.mts'
import { scriptCommand, type Site, type SlotName } from '../settings.mts'
import { observe } from '../slots.mts'
import { needSharedFolder, secretsPrint } from './backup.mts'
import { readDatabases, serverVersionOf, type Databases } from './databases.mts'
import { bytesOf, planExchange, type Plan } from './plan.mts'
import { listed, obstacles, type Acceptable, type Obstacle } from './fitness.mts'
import {
  missingIn,
  readManifest,
  uploadLines,
  wrongSums,
  type Manifest,
  type Part,
  type UploadLine,
} from './manifest.mts'
import { databaseNeeds, megabytes, needRoom, reserveOn } from './room.mts'
import { setFolder } from './sets.mts'
import { needPostgresql, needRoot, newId, refusePending, runningSchema } from './undo.mts'
import { readLines } from './untar.mts'

export interface Request {
  set: string
  parts: Part[]
  accept: Acceptable[]
  isAgreed: boolean
  /** A host that is being set up: its settings were written, nothing serves yet. */
  isNewHost: boolean
  /** Texts sort as this server does by itself, not as in the set: it may not know the locale of the set. */
  sortsAsServer?: boolean
}

export interface Job extends Request {
  site: Site
  /** Time at which it began; names what it leaves. */
  id: string
  manifest: Manifest
  folder: string
  /** Id of PostgreSQL's container. */
  postgresql: string
  databases: Databases
  serverVersion: string
  withDatabase: boolean
  /** What happens to the uploads; undefined when they stay. */
  uploads: Plan | undefined
  /** The list of its uploads, from its archive where the list itself is damaged. */
  lines: () => AsyncIterable<UploadLine> | Iterable<UploadLine>
  release: string | undefined
  /** Whether the image of the set's release is still here. */
  hasRelease: boolean
  /** Whether visitors were served well before, what reads the database included. */
  wasServing: boolean
  /** Why they are not served now, when they were not before either. */
  unserved?: unknown
}

/** @throws Problem that lists all that speaks against it */
export async function prepare(site: Site, request: Request): Promise<Job> {
  needRoot(site.envFile, `restore ${request.set}`)
  const folder = setFolder(site, request.set)
  const progress = { bytes: 0 }
  const wrong = await alive(
    () => `reading ${request.set}, ${megabytes(progress.bytes)}`,
    () => wrongSums(folder, progress),
  )
  const manifest = await readManifest(folder).catch((error: unknown) => {
    throw refusal(site, request, [explain(error)], [])
  })
  const absent = request.parts.filter((part) => !manifest.parts.includes(part))
  if (absent.length > 0)
    throw new Problem(
      exitCodes.usage,
      `${request.set} holds ${manifest.parts.join(', ')}, not ${absent.join(', ')}`,
      `Restore what it has with --only, or take another one: ${scriptCommand('data', site.envFile, 'list')}`,
    )
  const postgresql = await needPostgresql(site)
  if (request.parts.includes('database')) await needSharedFolder(site, postgresql)
  await refusePending(site)
  const databases = await readDatabases(site, postgresql)
  const serverVersion = await serverVersionOf(postgresql)
  const { master, slave, flag } = await observe(site)
  const serving = flag === 'strapi-slave' ? slave : master
  const hasRelease = manifest.release !== undefined && (await imageOf(site, manifest.release)) !== undefined
  const found = obstacles(manifest, {
    parts: request.parts,
    wrong,
    serverVersion,
    secrets: secretsPrint(await readEnv(join(site.source, '.env')), manifest.createdAt),
    schemaHash: await runningSchema(site, serving.release ?? (request.isNewHost ? undefined : site.release)),
    isRunning: !request.isNewHost && serving.status !== 'absent',
    runningRelease: serving.release ?? site.release,
    hasRelease,
  })
  refuseObstacles(site, request, found)
  const isListLost = wrong.some((sentence) => sentence.startsWith('uploads.jsonl '))
  const known = isListLost ? await readLines(join(folder, 'uploads.tar')) : undefined
  const lines = () => known ?? uploadLines(folder)
  const compared = { bytes: 0 }
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
    serverVersion,
    lines,
    withDatabase: request.parts.includes('database'),
    uploads: request.parts.includes('uploads')
      ? await alive(
          () => `comparing the uploads, ${megabytes(compared.bytes)}`,
          () => planExchange(site, lines(), missingIn(manifest), compared),
        )
      : undefined,
    release: serving.release,
    hasRelease,
    wasServing: !['absent', 'stopped', 'booting'].includes(serving.status) && (await isServing(site, flag)),
  }
  await needSpace(job)
  return job
}

/** Warns of what was accepted. @throws Problem that lists the rest */
function refuseObstacles(site: Site, request: Request, found: Obstacle[]): void {
  const { accept } = request
  const refused = found.filter((one) => !accept.includes(one.accept))
  const words = [...new Set(found.map((one) => one.accept))]
  if (refused.length > 0)
    throw refusal(
      site,
      request,
      refused.map(({ sentence }) => sentence),
      words,
    )
  for (const { sentence } of found) warn(`accepted: ${sentence}`)
}

function refusal(
  site: Site,
  { set, parts, isNewHost }: Request,
  sentences: string[],
  accept: Acceptable[],
): Problem {
  const only = parts.length === 1 ? ` --only ${parts.join()}` : ''
  const other = `Take another one: ${scriptCommand('data', site.envFile, 'list')}`
  const accepting =
    accept.length > 0
      ? `\nOr accept it: ${scriptCommand('data', site.envFile, `restore ${set}${only} ${accept.map((word) => `--accept ${word}`).join(' ')}`)}`
      : ''
  return new Problem(
    exitCodes.failed,
    `${set} is not restored, and ${unchanged(isNewHost)}:${listed(sentences)}`,
    `${other}${accepting}`,
  )
}

function unchanged(isNewHost: boolean): string {
  return isNewHost ? 'the settings were written, no data was touched' : 'nothing was changed'
}

/** Twice, and whatever the engine calls it: we have just kept this machine busy. */
async function isServing(site: Site, slot: SlotName): Promise<boolean> {
  const isAnswered = () =>
    smoke(site, slot).then(
      () => true,
      () => false,
    )
  return (await isAnswered()) || (await pause(1000), await isAnswered())
}

async function needSpace({ site, manifest, withDatabase, uploads, isNewHost }: Job): Promise<void> {
  const dump = manifest.files['database.dump']?.sizeBytes ?? 0
  await needRoom(
    'to restore it needs',
    [
      {
        folder: site.folders.postgres,
        bytes: withDatabase ? databaseNeeds(manifest.database?.bytes ?? 6 * dump) : 0,
      },
      { folder: site.folders.uploads, bytes: uploads ? bytesOf(uploads) : 0 },
      ...(withDatabase ? [] : await reserveOn(site.folders.uploads, site.folders.postgres)),
    ],
    { unchanged: unchanged(isNewHost) },
  )
}
