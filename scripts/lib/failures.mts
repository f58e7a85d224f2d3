/** How a deploy that fails leaves the site: visitors served by what can serve them, and the operator told what to look at. */
import * as act from './actions.mts'
import { stillFit } from './health.mts'
import { exitCodes, explain, interrupted, Problem, warn } from './report.mts'
import { readSchema, type Schema } from './schema.mts'
import { composeCommand, scriptCommand, type Site, type SlotName } from './settings.mts'
import { observe } from './slots.mts'
import { flagged, setAlone } from './traffic.mts'

/** What this run brings live, and what it found. */
export interface Run {
  site: Site
  release: string
  imageId: string
  live: string | undefined
  schemaBefore: Schema | undefined
  isRollback: boolean
}

/** Step 2 or 3: master was not touched. Slave's container is kept, stopped, for a look. */
export async function slaveFailed(run: Run, error: unknown): Promise<Problem> {
  const { site, release } = run
  const log = interrupted.aborted ? '' : await act.logTail(site, 'strapi-slave')
  await act
    .stop(site, 'strapi-slave')
    .catch((failure: unknown) => warn(`slave could not be stopped: ${explain(failure)}`))
  if (interrupted.aborted)
    return new Problem(
      exitCodes.interrupted,
      `interrupted; master serves ${run.live ?? ''} as before`,
      '',
      error,
    )
  const advice = [
    `Look at: ${composeCommand(site, '--profile blue-green logs strapi-slave')}`,
    `Then: ${resumeCommand(run)}`,
  ]
  const schema = await readSchema(site)
  if (schema?.hash !== run.schemaBefore?.hash) {
    advice.unshift(
      `Release ${release} changed the database schema while it booted, and master still runs ${run.live ?? 'the older release'}. See "expand and contract" in README.md.`,
    )
  }
  return new Problem(
    exitCodes.failed,
    `slave is not fit for visitors; master was not touched and serves as before\n${log}`,
    advice.join('\n'),
    error,
  )
}

/** Step 4: nobody has moved yet, or everybody goes back to master, or slave serves and both keep running. */
export async function moveFailed(run: Run, error: unknown): Promise<Problem> {
  const { site } = run
  if (flagged(site) === 'strapi-master') return await slaveFailed(run, error)
  if (!interrupted.aborted && (await hasFailed(run, 'strapi-slave')) && (await goBack(run, 'strapi-master')))
    return await slaveFailed(run, error)
  await setAlone(site, false)
  return stillServed(run, 'strapi-slave', 'slave has taken over, but master was not stopped', error)
}

/** Steps 5 to 7: slave serves. A broken master is stopped: a closed port fails over without loss, a booting one does not. */
export async function masterFailed(run: Run, error: unknown): Promise<Problem> {
  const { site } = run
  const isInterrupted = interrupted.aborted
  if (flagged(site) === 'strapi-master' && !isInterrupted && (await hasFailed(run, 'strapi-master')))
    await goBack(run, 'strapi-slave')
  if (flagged(site) === 'strapi-master') {
    await setAlone(site, false)
    return stillServed(run, 'strapi-slave', 'master serves, but slave was not stopped', error)
  }
  const log = isInterrupted ? '' : `\n${await act.logTail(site, 'strapi-master')}`
  await act
    .stop(site, 'strapi-master')
    .catch((failure: unknown) => warn(`master could not be stopped: ${explain(failure)}`))
  const why = isInterrupted
    ? 'interrupted before master was ready'
    : `master is not fit for visitors on ${run.release}`
  return stillServed(run, 'strapi-master', `${why}; it was stopped, slave keeps serving${log}`, error)
}

/** Whether a slot that got the visitors cannot serve them. */
async function hasFailed(run: Run, slot: SlotName): Promise<boolean> {
  return await stillFit(run.site, slot, run.imageId).then(
    () => false,
    () => true,
  )
}

/** Visitors go back to the slot that served before. @returns whether it has them now */
async function goBack(run: Run, slot: SlotName): Promise<boolean> {
  const { site } = run
  warn(`visitors go back to ${slot}`)
  try {
    await act.route(site, slot)
  } catch (error) {
    warn(`they could not: ${explain(error)}`)
    return false
  }
  // Else "docker compose up -d" would start the release that has just failed.
  const { master, slave } = await observe(site)
  const release = (slot === 'strapi-master' ? master : slave).release
  if (release !== undefined)
    await act
      .pin(site, release)
      .catch((error: unknown) => warn(`STRAPI_VERSION is not ${release}: ${explain(error)}`))
  return true
}

/** @param suspect the slot to look at */
function stillServed(run: Run, suspect: SlotName, message: string, error: unknown): Problem {
  const { site } = run
  const profile = suspect === 'strapi-slave' ? '--profile blue-green ' : ''
  const advice = `Look at: ${composeCommand(site, `${profile}logs ${suspect}`)}\nThen: ${resumeCommand(run)}`
  const code = interrupted.aborted ? exitCodes.interrupted : exitCodes.degraded
  return new Problem(code, message, advice, error)
}

/** A rollback is finished as one: a plain deploy would build the source again. */
function resumeCommand({ site, release, isRollback }: Run): string {
  return scriptCommand('deploy', site.envFile, isRollback ? `--rollback ${release}` : '')
}
