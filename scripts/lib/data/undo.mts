/** Takes a restore back, ends one that was interrupted, and removes what old ones have left. */
import { existsSync } from 'node:fs'
import { rm } from 'node:fs/promises'
import { join } from 'node:path'
import { agree } from '../agree.mts'
import { allowBooting } from '../booting.mts'
import { run } from '../command.mts'
import { query } from '../compose.mts'
import { readText } from '../envfile.mts'
import { makeStateDir, recordedSchema, writeSynced } from '../history.mts'
import { takeLock, verifyLock } from '../lock.mts'
import { describeFigures, startProof } from '../proof.mts'
import {
  addToResult,
  change,
  detail,
  exitCodes,
  explain,
  interrupted,
  isDryRun,
  Problem,
  say,
  step,
  warn,
} from '../report.mts'
import { readSchema } from '../schema.mts'
import { asRoot, composeCommand, scriptCommand, type Site } from '../settings.mts'
import { observe } from '../slots.mts'
import { flagged } from '../traffic.mts'
import { healthyPostgresql, startingPostgresql } from './backup.mts'
import { megabytes } from './room.mts'
import { failureToServe, isOff } from './serving.mts'
import { setFolder } from './sets.mts'
import { incoming, keptName, readDatabases, scratch, swap, type Databases } from './databases.mts'
import * as exchange from './exchange.mts'
import * as plans from './plan.mts'
import type { Acceptable } from './fitness.mts'

/** A large database takes its time. */
const patiently = { timeoutMs: 3_600_000 }
/** For the next run after a kill. */
const recentMs = 30 * 60_000
/** Errors that end when somebody makes room. */
const passing = ['ENOSPC', 'EDQUOT', 'EMFILE', 'ENFILE', 'ENOMEM']

/** Takes the last restore back. */
export async function undoRestore(
  site: Site,
  { accept, isAgreed }: { accept: Acceptable[]; isAgreed: boolean },
): Promise<void> {
  needRoot(site.envFile, 'undo')
  const postgresql = await needPostgresql(site)
  await refusePending(site)
  const last = await lastRestore(site, await readDatabases(site, postgresql))
  if (last.database !== undefined && !accept.includes('other-schema')) {
    const sql = 'SELECT hash FROM strapi_database_schema ORDER BY id DESC LIMIT 1'
    const hash = await run(query(postgresql, last.database, sql)).then(
      (answer) => answer.trim(),
      (error: unknown) => {
        // Not a Strapi's.
        if (String(error).includes('does not exist')) return
        throw new Problem(
          exitCodes.failed,
          `whether the database before restore ${last.id} has the schema of the release that runs cannot be seen; nothing was changed`,
          `To take the restore back nevertheless: ${scriptCommand('data', site.envFile, 'undo --accept other-schema')}`,
          error,
        )
      },
    )
    const { master, slave, flag } = await observe(site)
    const { release } = flag === 'strapi-slave' ? slave : master
    const expected = await runningSchema(site, release)
    if (hash && expected !== undefined && hash !== expected)
      throw new Problem(
        exitCodes.failed,
        `the database before restore ${last.id} has another schema than ${release ?? 'the release'}, which runs; nothing was changed`,
        `Deploy the release that belongs to it right afterwards, and accept it: ${scriptCommand('data', site.envFile, 'undo --accept other-schema')}`,
      )
  }
  const parts = [last.database && 'database', last.withUploads && 'uploads'].filter(Boolean).join(', ')
  const made = last.id.replace(/^(\d{4})(\d\d)(\d\d)_(\d\d)(\d\d).*/, 'of $1-$2-$3 $4:$5 UTC')
  const what = `${made}${last.fromSet === undefined ? '' : `, set ${last.fromSet}`}: ${parts}`
  await change(`take back restore ${last.id} (${what})`, async () => {
    await agree(`Take back restore ${last.id} (${what})`, isAgreed)
    interrupted.throwIfAborted()
    const proof = await startProof(site)
    try {
      await step('1/1', `Take back restore ${last.id} (${what})`, () => takeBack(site, last.id, postgresql))
    } catch (error) {
      throw new Problem(
        exitCodes.degraded,
        `restore ${last.id} may be taken back by half`,
        `The next run finishes it: ${scriptCommand('data', site.envFile, 'undo')}`,
        error,
      )
    } finally {
      const figures = await proof.stop()
      addToResult({ undone: last.id, figures })
      say(describeFigures(figures), 'proof', { ...figures })
    }
    say(
      `Done: what was live before restore ${last.id} is live again; what it had brought is kept for ${site.restoreKeepDays} days.`,
    )
  })
}

async function lastRestore(site: Site, databases: Databases) {
  const swapped = databases.live?.restoredBy
  const done = (await plans.readExchanges(site)).findLast(({ stage }) => stage === 'done')
  // Where the live one is gone, the last one that was replaced is still there.
  const replaced = databases.live ? swapped : done?.id
  const kept = databases.kept.find(({ kind, id }) => kind === 'replaced' && id === replaced)
  // Of a version that wrote nothing down for a database alone.
  if (kept && kept.id > (done?.id ?? ''))
    return { id: kept.id, database: kept.name, withUploads: false, fromSet: databases.live?.fromSet }
  const scope = done && (await plans.scopeOf(site, done.id))
  if (done === undefined || (scope?.withDatabase && kept?.id !== done.id)) {
    const undone = databases.kept.findLast(({ kind }) => kind === 'undone')
    const why =
      swapped !== undefined
        ? `: the database before restore ${swapped} is not kept any more`
        : undone !== undefined
          ? `: restore ${undone.id} was taken back already`
          : ''
    throw new Problem(
      exitCodes.usage,
      `there is no restore to take back${why}`,
      `What a restore replaces is kept for ${site.restoreKeepDays} days. An older state: ${scriptCommand('data', site.envFile, 'list')}`,
    )
  }
  return {
    id: done.id,
    database: scope?.withDatabase ? kept?.name : undefined,
    withUploads: scope?.withUploads,
    fromSet: scope?.withDatabase ? databases.live?.fromSet : undefined,
  }
}

/** May be repeated, and goes on where a killed one stopped. @throws Error before anything is touched when it cannot be */
export async function takeBack(site: Site, id: string, postgresql: string): Promise<void> {
  const files = (await plans.readExchanges(site)).find((one) => one.id === id && one.stage !== 'staging')
  const { live, kept } = await readDatabases(site, postgresql)
  const before = kept.find((one) => one.kind === 'replaced' && one.id === id)
  const isToSwap = live ? live.restoredBy === id : before !== undefined
  if (isToSwap && !before) {
    const gone = `the database before restore ${id} is not kept any more`
    // Half of it has gone back already: somebody has dropped that database since.
    if (files?.stage === 'undoing') warn(`${gone}: only the uploads are taken back`)
    else throw new Error(gone)
  }
  if (files) {
    detail('putting replaced and surplus uploads back')
    await exchange.putBack(site, id)
  }
  if (isToSwap && before) {
    detail('swapping the databases')
    const names = { live: site.database.name, from: before.name, to: keptName('undone', id) }
    await swap(postgresql, { ...names, hasLive: live !== undefined, comment: undefined })
  }
  // A restore of another schema has kept it from booting.
  await allowBooting(site, flagged(site), id).catch((error: unknown) => warn(explain(error)))
  if (files) {
    detail('taking out the uploads that it had brought')
    await exchange.takeAdded(site, id)
  }
}

export interface Mended {
  /** In words. */
  found: string[]
  /** What is not live any more, in words: who types undo means this one, not the one before. */
  takenBack?: string
}

/** Ends what a killed restore or undo left: back before the swap, forward after it if visitors are served; uploads alone go back. */
export async function mendRestore(site: Site): Promise<Mended> {
  const pending = await plans.pendingExchanges(site)
  if (pending.length > 0 && process.getuid?.() !== 0)
    throw new Problem(
      exitCodes.usage,
      'a restore was interrupted, and only root can mend it',
      asRoot(scriptCommand('data', site.envFile)),
    )
  const found: string[] = []
  let takenBack: string | undefined
  // Nothing depends on them, and they may fill the disk that PostgreSQL needs to start.
  for (const { id } of pending.filter(({ stage }) => stage === 'staging')) {
    try {
      await plans.removeExchange(site, id)
      found.push(`unpacked uploads of restore ${id}: removed`)
      takenBack = `restore ${id} is taken back`
    } catch (error) {
      warn(`what restore ${id} had unpacked cannot be removed yet: ${explain(error)}`)
      // It is none any more, only its files are still there.
      if (!existsSync(plans.folderOf(site, id))) takenBack = `restore ${id} is taken back`
    }
  }
  const exchanges = pending.filter(({ stage }) => stage !== 'staging')
  const postgresql = await (exchanges.length > 0 ? startingPostgresql(site) : healthyPostgresql(site))
  if (postgresql === undefined)
    return {
      found: [
        ...found,
        ...exchanges.map(({ id }) => `restore ${id} unfinished; that has to wait for PostgreSQL`),
      ],
      ...(takenBack === undefined ? {} : { takenBack }),
    }
  const databases = await readDatabases(site, postgresql)
  if (databases.hasScratch && (await dropScratch(site, postgresql)))
    found.push('a database that verify --deep had restored for a look: removed')
  if (databases.hasIncoming) {
    await run(query(postgresql, 'postgres', `DROP DATABASE "${incoming}" WITH (FORCE)`), patiently)
    takenBack = 'a restore that was interrupted before it was live is removed'
    found.push('a half-restored database: removed')
  }
  for (const one of exchanges) {
    try {
      const { did, isBack } = await mendExchange(site, one, databases, postgresql)
      found.push(did)
      if (isBack) takenBack = `restore ${one.id} is taken back`
    } catch (error) {
      // It must not keep everybody from everything else; the next restore is refused until it can be mended.
      warn(`restore ${one.id} was interrupted, and cannot be mended yet: ${explain(error)}`)
    }
  }
  return { found, ...(takenBack === undefined ? {} : { takenBack }) }
}

/** @returns whether it was nobody's any more */
async function dropScratch(site: Site, postgresql: string): Promise<boolean> {
  const lock = await takeLock(verifyLock(site), 'removing what verify --deep has left').catch(() => undefined)
  if (!lock) return false
  try {
    await run(query(postgresql, 'postgres', `DROP DATABASE IF EXISTS "${scratch}" WITH (FORCE)`), patiently)
    return true
  } finally {
    lock.release()
  }
}

async function mendExchange(
  site: Site,
  { id, stage }: plans.Exchange,
  { live, kept }: Databases,
  postgresql: string,
): Promise<{ did: string; isBack: boolean }> {
  if (stage === 'undoing') {
    await takeBack(site, id, postgresql)
    return { did: `an undo of restore ${id}: finished`, isBack: true }
  }
  if (live?.restoredBy === id) {
    await exchange.resumeLate(site, id, setFolder(site, live.fromSet ?? '')).catch((error: unknown) => {
      // What may go better the next time is left to it. A set that is gone or damaged never will.
      const isPassing = passing.includes((error as NodeJS.ErrnoException).code ?? '')
      if (interrupted.aborted || isPassing) throw error
      warn(`what editors changed during restore ${id} stays so: ${explain(error)}`)
    })
    await exchange.putIncoming(site, id)
    const failure = (await mayGoBack(site, id, kept)) ? await failureToServe(site) : undefined
    if (failure !== undefined) {
      warn(`restore ${id} was interrupted, and visitors are not served with it: ${explain(failure)}`)
      await takeBack(site, id, postgresql)
      return { did: `restore ${id}: taken back`, isBack: true }
    }
    await exchange.takeSurplus(site, id)
    return { did: `restore ${id}: finished`, isBack: false }
  }
  await exchange.keepWhatIsNewer(site, id)
  await takeBack(site, id, postgresql)
  return { did: `restore ${id}, which was interrupted before it was live: taken back`, isBack: true }
}

/**
 * Whether a restore that is live and was not seen to the end goes back where visitors are not served: as its own run would have
 * done. Hours later they have written to what it brought, and whatever is wrong by then is another thing.
 */
async function mayGoBack(site: Site, id: string, kept: Databases['kept']): Promise<boolean> {
  const { mustServe } = await plans.scopeOf(site, id)
  const begun = await plans.endedAt(site, id)
  const isRecent = Date.now() - begun.getTime() < recentMs
  const isKept = kept.some((one) => one.kind === 'replaced' && one.id === id)
  return mustServe === true && isRecent && isKept && !(await isOff(site))
}

/** For the next `undo`. */
export async function rememberTakenBack(site: Site, sentence: string): Promise<void> {
  await makeStateDir(site)
  await writeSynced(join(site.stateDir, 'taken-back'), 'w', sentence)
}

/** @returns what was remembered; a dry run leaves it */
export async function forgetTakenBack(site: Site): Promise<string | undefined> {
  const file = join(site.stateDir, 'taken-back')
  const sentence = await readText(file)
  if (!isDryRun()) await rm(file, { force: true })
  return sentence?.trim() || undefined
}

/** Removes what restores replaced before RESTORE_KEEP_DAYS. What is from the future stays. */
export async function removeOldRestores(site: Site, now: Date): Promise<void> {
  const before = idOf(new Date(now.getTime() - site.restoreKeepDays * 86_400_000))
  const postgresql = await healthyPostgresql(site)
  // Database and uploads of a restore go together or not at all.
  if (postgresql === undefined) return warn('what restores replaced stays for now: PostgreSQL does not run')
  if (!isDryRun())
    await plans
      .endRemovals(site)
      .catch((error: unknown) => warn(`not all that restores replaced could be removed: ${explain(error)}`))
  const exchanges = await plans.readExchanges(site)
  if (exchanges.length > 0 && process.getuid?.() !== 0)
    return warn('what restores replaced stays for now: only root can remove it')
  const underWay = (await plans.pendingExchanges(site)).map(({ id }) => id)
  // An undo keeps, too, and from its own day on.
  const isOld = async (id: string) =>
    !underWay.includes(id) && id < before && idOf(await plans.endedAt(site, id)) < before
  for (const { name, id, bytes } of (await readDatabases(site, postgresql)).kept) {
    if (!(await isOld(id))) continue
    await change(`drop ${name}, ${megabytes(bytes)}: older than RESTORE_KEEP_DAYS`, async () => {
      await run(query(postgresql, 'postgres', `DROP DATABASE "${name}" WITH (FORCE)`), patiently)
      detail(`dropped ${name}, ${megabytes(bytes)}: older than RESTORE_KEEP_DAYS`)
    })
  }
  for (const { id } of exchanges) {
    if (await isOld(id))
      await change(`remove what restore ${id} replaced: older than RESTORE_KEEP_DAYS`, async () => {
        await plans.removeExchange(site, id)
        detail(`removed what restore ${id} replaced: older than RESTORE_KEEP_DAYS`)
      })
  }
}

/** Later than all others, also when the clock went backwards: `undo` takes back the last one. */
export async function newId(site: Site, databases: Databases): Promise<string> {
  const used = [...databases.kept, ...(await plans.readExchanges(site))].map(({ id }) => id)
  const last = used.toSorted().at(-1) ?? ''
  const now = idOf(new Date())
  if (now > last) return now
  const [, ...parts] = /^(\d{4})(\d\d)(\d\d)_(\d\d)(\d\d)(\d\d)$/.exec(last) ?? []
  const [year = 0, month = 1, day = 1, hour = 0, minute = 0, second = 0] = parts.map(Number)
  return idOf(new Date(Date.UTC(year, month - 1, day, hour, minute, second + 1)))
}

function idOf(date: Date): string {
  return date.toISOString().slice(0, 19).replaceAll(/[-:]/g, '').replace('T', '_')
}

/** What the running release expects, as it was when it was deployed: a database restored since may have another one. */
export async function runningSchema(site: Site, release: string | undefined): Promise<string | undefined> {
  if (release === undefined) return undefined
  return ((await recordedSchema(site, release)) ?? (await readSchema(site)))?.hash
}

/** A restore on top of one that is half done would be torn apart by the mending. @throws Problem */
export async function refusePending(site: Site): Promise<void> {
  const [first] = await plans.pendingExchanges(site)
  if (first && isDryRun())
    throw new Problem(
      exitCodes.failed,
      `restore ${first.id} was interrupted; the next run without --dry-run finishes it or takes it back first`,
      `Now: ${scriptCommand('data', site.envFile)}`,
    )
  if (first)
    throw new Problem(
      exitCodes.failed,
      `restore ${first.id} was interrupted and could not be mended yet; nothing was changed`,
      `Mend what the warning says, then: ${scriptCommand('data', site.envFile)}`,
    )
}

/** Files get the owner that the image needs, and the dump is read as root in the container. @throws Problem (usage) */
export function needRoot(envFile: string, command: string): void {
  if (process.getuid?.() === 0) return
  throw new Problem(
    exitCodes.usage,
    `${command} has to give files to the user of the image, which only root can`,
    asRoot(scriptCommand('data', envFile, command)),
  )
}

/** @throws Problem when it does not run, or does not let us rename databases */
export async function needPostgresql(site: Site): Promise<string> {
  const id = await startingPostgresql(site)
  if (id === undefined)
    throw new Problem(
      exitCodes.failed,
      'PostgreSQL does not run; nothing was changed',
      `Start it: ${composeCommand(site, 'up -d postgresql')}`,
    )
  const sql = 'SELECT rolsuper FROM pg_roles WHERE rolname = current_user'
  if ((await run(query(id, 'postgres', sql))).trim() === 't') return id
  throw new Problem(
    exitCodes.failed,
    'the user postgres is no superuser of this PostgreSQL; nothing was changed',
    'Its local socket must let it in as one: see docker/postgresql/pg_hba.conf.',
  )
}
