/**
 * Puts the state of a set in place of the live one, without stopping Strapi, and takes it back.
 *
 * The database goes into a fresh one beside the live one, and a swap of names makes it live: that moment is the restore. Until
 * then an interrupted one goes back, from then on it is finished; `mendRestore` sees which from names, comments and the plan.
 */
import { join } from 'node:path'
import { logTail } from '../actions.mts'
import { agree } from '../agree.mts'
import { forbidBooting } from '../booting.mts'
import { describeFigures, startProof } from '../proof.mts'
import {
  addToResult,
  alive,
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
import { composeCommand, scriptCommand, type Site } from '../settings.mts'
import { flagged } from '../traffic.mts'
import { incoming, keptName, readDatabases, restoredComment, swap } from './databases.mts'
import * as exchange from './exchange.mts'
import * as plans from './plan.mts'
import { listed } from './fitness.mts'
import { prepare, type Job, type Request } from './job.mts'
import { loadDump } from './load.mts'
import { missingIn } from './manifest.mts'
import * as tools from './postgresql.mts'
import { megabytes } from './room.mts'
import { failureToServe, isOff } from './serving.mts'
import { openSnapshot } from './snapshot.mts'
import { forgetTakenBack, mendRestore, takeBack } from './undo.mts'
import { differentRows } from './verify.mts'

export async function restoreSet(site: Site, request: Request): Promise<void> {
  const job = await step('1/6', `Read ${request.set}, see that it fits this site`, () =>
    prepare(site, request),
  )
  await describe(job)
  if (!job.isNewHost && job.databases.live)
    detail('what was written since then is not seen any more; undo brings it back')
  if (isDryRun()) return say('Nothing was changed.')
  await agree(`Put ${request.set} in place of what is live`, request.isAgreed)

  await forgetTakenBack(site)

  // No impact yet.
  try {
    if (job.withDatabase) await step('2/6', 'Restore the dump beside the live database', () => loadDump(job))
    await step('3/6', 'Write down what changes, unpack the uploads that differ', () => writeDown(job))
  } catch (error) {
    throw await notRestored(job, error)
  }

  // From here on visitors see it.
  const proof = await startProof(site)
  try {
    if (job.uploads)
      await step('4/6', 'Put new and changed uploads in their places', async () => {
        await exchange.putIncoming(site, job.id)
        await putLate(job)
      })
    // Before the swap: killed right after it, the old release must not boot. The deploy that follows makes new containers.
    if (belongsToOther(job)) await forbidBooting(site, job.id)
    if (job.withDatabase) await step('5/6', 'Swap the databases', () => swapDatabases(job))
    await step('6/6', 'See that visitors are served, take surplus uploads out', async () => {
      const late = await putLate(job).then(() => undefined, asError)
      await stillServed(job)
      if (late) throw late
      await exchange.takeSurplus(site, job.id)
    })
  } catch (error) {
    throw await notRestored(job, error)
  } finally {
    const figures = await proof.stop()
    addToResult({ figures })
    if (!job.isNewHost) say(describeFigures(figures), 'proof', { ...figures })
  }
  conclude(job)
}

async function describe(job: Job): Promise<void> {
  const { manifest, uploads, site } = job
  const taken = `${manifest.createdAt.slice(0, 16).replace('T', ' ')} UTC`
  detail(`taken ${taken}, release ${manifest.release ?? 'unknown'}: ${job.parts.join(', ')}`)
  if (job.withDatabase) {
    const before = await liveRows(job)
    const rows = manifest.database?.rows ?? {}
    detail(
      `database: its ${total(rows)} rows take the place of those of ${site.database.name}${before ? ` (${total(before)})` : ''}, which are kept`,
    )
    const different = before ? differentRows(before, rows) : []
    if (different.length > 0) detail(`in the set:${listed(different)}`)
  }
  if (uploads)
    detail(
      `uploads: ${uploads.added.size} missing ones come back, ${uploads.changed.size} get the bytes of the set, ${uploads.surplus.length} that it does not have are taken out and kept, ${uploads.same.size} are the same`,
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

/** Undefined where it is gone, or damaged: the more it is wanted. */
async function liveRows({ site, postgresql, databases }: Job): Promise<Record<string, number> | undefined> {
  if (!databases.live) return undefined
  try {
    const { name } = site.database
    const live = await alive(
      () => 'counting the rows that are live',
      () => openSnapshot(postgresql, name, tools.restoreSession, { patienceMs: 60_000 }),
    )
    await live.close()
    return live.rows
  } catch {
    return undefined
  }
}

function total(rows: Record<string, number>): string {
  return Object.values(rows)
    .reduce((sum, count) => sum + count, 0)
    .toLocaleString('en')
}

/** Also without uploads: what is written down lets the next run finish this one. */
async function writeDown(job: Job): Promise<void> {
  const { site, id, folder, manifest, withDatabase } = job
  const mustServe = job.wasServing && job.databases.live !== undefined && !job.accept.includes('other-schema')
  // Visitors went on while the dump was restored.
  const compared = { bytes: 0 }
  if (job.uploads)
    job.uploads = await alive(
      () => `comparing the uploads, ${megabytes(compared.bytes)}`,
      () => plans.planExchange(site, job.lines(), missingIn(manifest), compared),
    )
  await alive(
    () => (job.uploads ? `unpacking ${megabytes(plans.bytesOf(job.uploads))}` : ''),
    () =>
      exchange.begin(
        site,
        { id, withDatabase, mustServe },
        job.uploads,
        join(folder, 'uploads.tar'),
        job.accept.includes('damaged'),
      ),
  )
}

/** What editors replaced or deleted since the plan was made: as much as can be before the swap, the rest right after it. */
async function putLate({ site, id, folder, uploads }: Job): Promise<void> {
  if (uploads) await exchange.putLate(site, id, uploads, join(folder, 'uploads.tar'))
}

function asError(error: unknown): Error {
  return error instanceof Error ? error : new Error(String(error))
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
  if (job.isNewHost) return detail('no Strapi runs on this host yet: visitors are served after the deploy')
  const failure =
    !job.wasServing && (await isOff(site)) ? new Error(`${slot} is off`) : await failureToServe(site)
  if (failure === undefined) return
  // As before; to take it back would change nothing for visitors.
  if (!job.wasServing) {
    job.unserved = failure
    return
  }
  if (job.accept.includes('other-schema')) return warn(explain(failure))
  if (job.withDatabase && !job.databases.live)
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

/** Nothing was changed, or all was taken back, or the new state is live, or nobody knows yet. */
async function notRestored(job: Job, error: unknown): Promise<unknown> {
  const { site, set } = job
  // Told already.
  if (error instanceof Problem && error.code !== exitCodes.interrupted) {
    await mendRestore(site).catch((failure: unknown) => warn(explain(failure)))
    return error
  }
  const code = interrupted.aborted ? exitCodes.interrupted : exitCodes.failed
  const how = interrupted.aborted ? 'interrupted' : 'not everything went well'
  try {
    for (const line of (await mendRestore(site)).found) detail(line)
    if ((await plans.pendingExchanges(site)).length > 0) throw new Error('something could not be mended yet')
    if (!(await isLive(job)))
      return new Problem(code, `${set} was not restored (${how}); what is live is as before`, '', error)
    return new Problem(
      interrupted.aborted ? exitCodes.interrupted : exitCodes.degraded,
      `${how}, and ${set} is live`,
      `Back to what was before: ${scriptCommand('data', site.envFile, 'undo')}`,
      error,
    )
  } catch (failure) {
    warn(explain(failure))
    return new Problem(
      exitCodes.degraded,
      `${how}, and ${set} is restored by half; the next run finishes it or takes it back`,
      `Mend what the warning says (PostgreSQL must run), then: ${scriptCommand('data', site.envFile)}`,
      error,
    )
  }
}

/** @throws Error when PostgreSQL cannot be asked */
async function isLive(job: Job): Promise<boolean> {
  if (job.withDatabase) return (await readDatabases(job.site, job.postgresql)).live?.restoredBy === job.id
  const own = (await plans.readExchanges(job.site)).find(({ id }) => id === job.id)
  return own?.stage === 'done'
}

function conclude(job: Job): void {
  const { site, manifest } = job
  addToResult({ restore: job.id })
  const isFirst = job.withDatabase && !job.databases.live
  const undo = `Back to what was before, within ${site.restoreKeepDays} days: ${scriptCommand('data', site.envFile, 'undo')}`
  const deploy =
    belongsToOther(job) && job.hasRelease
      ? scriptCommand('deploy', site.envFile, `--rollback ${manifest.release}`)
      : `${scriptCommand('deploy', site.envFile)}${belongsToOther(job) ? `   with the application as it was in release ${manifest.release ?? 'that the set was made with'}` : ''}`
  const back = isFirst ? 'There was no database before, so this cannot be taken back.' : undo
  if (job.unserved !== undefined)
    throw new Problem(
      exitCodes.degraded,
      `${job.set} is in place, but visitors are not served, neither before nor now`,
      `Now: ${deploy}\n${back}`,
      job.unserved,
    )
  say(`Done: ${job.set} is live. ${job.isNewHost ? '' : back}`.trim())
  if (belongsToOther(job)) warn(`Strapi still runs ${job.release ?? 'no release'}. Now: ${deploy}`)
}

/** Whether the database belongs to another release than the one that runs: booted on it, that one would drop columns. */
function belongsToOther({ accept }: Job): boolean {
  return accept.includes('other-schema')
}
