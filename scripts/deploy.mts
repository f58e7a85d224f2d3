/** Puts a new release live without losing a request, or leaves visitors where they are and says why. */
import { parseArgs } from 'node:util'
import * as act from './lib/actions.mts'
import { runChecks } from './lib/checks.mts'
import { applicationProblems } from './lib/checks/settings.mts'
import { markCommands } from './lib/command.mts'
import { endLeftovers } from './lib/data/exclusive.mts'
import { masterFailed, moveFailed, slaveFailed, type Run } from './lib/failures.mts'
import { smoke, stillFit, untilHealthy } from './lib/health.mts'
import { readHistory, remember, trail, type Entry } from './lib/history.mts'
import { describeHolder, lockHolder, parseDuration, takeLock } from './lib/lock.mts'
import { describeFigures, startProof, type Proof } from './lib/proof.mts'
import * as releases from './lib/releases.mts'
import * as report from './lib/report.mts'
import { detail, exitCodes, Problem, say, step, warn } from './lib/report.mts'
import { readSchema } from './lib/schema.mts'
import { composeCommand, loadSite, scriptCommand, type Site, type SlotName } from './lib/settings.mts'
import { observe } from './lib/slots.mts'
import { impatient, recognise, type Situation } from './lib/state.mts'
import { showStatus } from './lib/status.mts'

const usage = `
Puts a new release of the Strapi site live without losing a request.

  npx zx scripts/deploy.mts                       build and deploy
  npx zx scripts/deploy.mts --status              what runs, where visitors go, the last deploy
  npx zx scripts/deploy.mts --build-only          build the image, deploy nothing
  npx zx scripts/deploy.mts --rollback [RELEASE]  back to the last good release, or to this one

  --accept-schema-change  roll back although the database schema has changed since
  --dry-run               say what would be done, change nothing
  --env-file FILE         settings (default docker/.env)
  --wait DURATION         wait for another run to end, for example 30m
  --json                  one JSON object a line, the last one is the result
  --help

Exit codes: 0 done; 1 failed, visitors are served as before; 2 usage or settings; 3 degraded, a person must act;
4 another run holds the lock; 130 interrupted and safe.`

await report.main(async () => {
  const { values: options, positionals } = parseArgs({
    args: report.scriptArguments(),
    allowPositionals: true,
    options: {
      status: { type: 'boolean' },
      'build-only': { type: 'boolean' },
      rollback: { type: 'boolean' },
      'accept-schema-change': { type: 'boolean' },
      'dry-run': { type: 'boolean' },
      'env-file': { type: 'string' },
      wait: { type: 'string' },
      json: { type: 'boolean' },
      help: { type: 'boolean', short: 'h' },
    },
  })
  if (options.help) return say(usage.trim())
  report.configureReport({ json: options.json, dryRun: options['dry-run'] })
  refuseNonsense(options, positionals)
  const waitMs = parseDuration(options.wait ?? '0')
  const site = await loadSite(options['env-file'], { alsoWrong: applicationProblems })
  if (options.status) return await showStatus(site)

  const holder = report.isDryRun() ? await lockHolder(site.project) : undefined
  if (holder) warn(describeHolder(holder))
  const lock = report.isDryRun()
    ? undefined
    : await takeLock(site.project, ['deploy', ...report.scriptArguments()].join(' '), waitMs)
  try {
    markCommands(site.project)
    if (options['build-only']) return await buildOnly(site)
    const request = options.rollback
      ? { rollbackTo: positionals[0], acceptSchemaChange: options['accept-schema-change'] ?? false }
      : undefined
    await deploy(site, request)
  } finally {
    lock?.release()
  }
})

interface Rollback {
  /** Undefined: the last good one before the live one. */
  rollbackTo: string | undefined
  acceptSchemaChange: boolean
}

async function deploy(site: Site, rollback: Rollback | undefined): Promise<void> {
  const startedAt = Date.now()
  // They may be those of a run that goes on; only who holds the lock can tell.
  if (!report.isDryRun()) await endLeftovers(site)
  const situation = await look(site)
  await runChecks(site, situation.way)
  // Without a running database nobody can tell what an older release would drop.
  if (rollback && situation.way === 'first') await act.startServices(site)
  const target = rollback ? await releases.rollbackTarget(site, situation, rollback) : undefined
  await mend(site, situation)
  if (situation.way === 'full') await noteLiveRelease(site, situation.live)

  const release = target ?? (await releases.newReleaseName(site))
  const outcome = await recorded(site, release, startedAt, async () => {
    const imageId = await step('1/7', target ? `Use the image of ${target}` : 'Build the new release', () =>
      makeImage(site, release, target === undefined),
    )
    const schemaBefore = await readSchema(site)
    const run = {
      site,
      release,
      imageId,
      live: situation.live,
      schemaBefore,
      isRollback: rollback !== undefined,
    }
    // A release that serves has booted already. Where nothing serves, PostgreSQL is started first.
    if (situation.way !== 'first' && release !== situation.live)
      await act.backUpDatabase(site, 'visitors are served as before')
    switch (situation.way) {
      case 'first':
        return await startFirst(run)
      case 'resume':
        return await finishFromSlave(run)
      default:
        return await replaceMaster(run)
    }
  })
  await releases.prune(site, release)
  await conclude(site, release, outcome, startedAt)
}

/** @returns the id of the release's image */
async function makeImage(site: Site, release: string, isNew: boolean): Promise<string> {
  detail(release)
  if (isNew) {
    await act.build(site, release).catch((error: unknown) => {
      report.interrupted.throwIfAborted()
      const advice = `Then: ${scriptCommand('deploy', site.envFile)}`
      throw new Problem(
        exitCodes.failed,
        'the new release was not built; visitors are served as before',
        advice,
        error,
      )
    })
  }
  const imageId = report.isDryRun() ? '' : await releases.imageOf(site, release)
  if (imageId === undefined) throw new Error(`there is no image ${site.image}:${release}`)
  return imageId
}

/** Master serves: the seven steps. */
async function replaceMaster(run: Run): Promise<Proof> {
  const { site, release } = run
  // No impact yet.
  try {
    await step('2/7', `Start slave on ${release}`, async () => {
      await act.seclude(site, 'strapi-slave')
      await act.start(site, 'strapi-slave', release)
    })
    await step('3/7', 'Wait until slave is healthy', () => fitForVisitors(run, 'strapi-slave'))
  } catch (error) {
    throw await slaveFailed(run, error)
  }

  // From here on visitors move.
  const proof = await startProof(site)
  try {
    await step('4/7', 'Send visitors to slave, let master finish, stop it', async () => {
      await act.route(site, 'strapi-slave')
      await act.pin(site, release)
      await act.drain(site, 'strapi-master', proof)
      await stillFitForVisitors(run, 'strapi-slave')
      await act.stop(site, 'strapi-master')
    })
  } catch (error) {
    try {
      throw await moveFailed(run, error)
    } finally {
      await showFigures(proof)
    }
  }
  return await finishFromSlave(run, proof)
}

/** Only slave serves: steps 5 to 7. */
async function finishFromSlave(run: Run, proof?: Proof): Promise<Proof> {
  const { site, release } = run
  const counting = proof ?? (await startProof(site))
  try {
    await step('5/7', `Start master on ${release}`, async () => {
      await act.seclude(site, 'strapi-master')
      await act.start(site, 'strapi-master', release)
    })
    await step('6/7', 'Wait until master is healthy', () => fitForVisitors(run, 'strapi-master'))
    await step('7/7', 'Send visitors back to master, let slave finish, stop it', async () => {
      await act.route(site, 'strapi-master')
      await act.pin(site, release)
      await act.drain(site, 'strapi-slave', counting)
      await stillFitForVisitors(run, 'strapi-master')
      await act.stop(site, 'strapi-slave')
    })
    return counting
  } catch (error) {
    try {
      throw await masterFailed(run, error)
    } finally {
      await showFigures(counting)
    }
  }
}

/** Nothing serves: PostgreSQL and Redis, then master straight away. */
async function startFirst(run: Run): Promise<undefined> {
  const { site, release } = run
  await step('2/7', 'Nothing serves yet: start PostgreSQL and Redis, no slave', async () => {
    await act.startServices(site)
    if (!report.isDryRun()) await endLeftovers(site)
    await act.backUpDatabase(site, 'nothing served before, nothing serves now')
  })
  try {
    await step('5/7', `Start master on ${release}`, () => act.start(site, 'strapi-master', release))
    await step('6/7', 'Wait until master is healthy', () => fitForVisitors(run, 'strapi-master'))
    await act.pin(site, release)
  } catch (error) {
    const log = await act.logTail(site, 'strapi-master')
    await act
      .stop(site, 'strapi-master')
      .catch((failure: unknown) => warn(`master could not be stopped: ${report.explain(failure)}`))
    if (report.interrupted.aborted) throw error
    const advice = `Its container is kept. Look at: ${composeCommand(site, 'logs strapi-master')}\nThen: ${scriptCommand('deploy', site.envFile)}`
    throw new Problem(
      exitCodes.failed,
      `master did not start on ${release}; nothing served before, nothing serves now\n${log}`,
      advice,
      error,
    )
  }
}

/** Healthy by the engine and by our own probe, on this release's image, and the smoke paths answer. */
async function fitForVisitors(run: Run, slot: SlotName): Promise<void> {
  await report.change(
    `wait until ${slot} is healthy, at most ${run.site.health.timeoutMs / 1000} s, then ask ${run.site.health.smokePaths.join(' ')}`,
    async () => {
      await report.alive(
        () => `waiting for ${slot}`,
        () => untilHealthy(run.site, slot, run.imageId),
      )
      await smoke(run.site, slot)
    },
  )
}

/** Before the other slot is stopped, for which there is no way back. */
async function stillFitForVisitors(run: Run, slot: SlotName): Promise<void> {
  await report.change(`see that ${slot} has run all the time`, () => stillFit(run.site, slot, run.imageId))
}

/** What is, in one line. Waits while the only slot that could serve is booting. */
async function look(site: Site): Promise<Situation> {
  const deadline = Date.now() + site.health.timeoutMs
  for (;;) {
    const now = await observe(site)
    const situation = recognise(Date.now() < deadline ? now : impatient(now))
    if (situation.way === 'refuse') {
      const advice = `Stop it first: ${composeCommand(site, '--profile dev stop strapi-dev')}`
      throw new Problem(exitCodes.usage, 'strapi-dev is running and holds the port of strapi-master', advice)
    }
    if (situation.way !== 'wait') {
      say(`Found: ${situation.sentence}`, 'found', { way: situation.way, live: situation.live })
      return situation
    }
    if (!report.isDryRun()) for (const repair of situation.repairs) await act.repair(site, repair)
    await report.pause(500)
  }
}

/** Brings an interrupted run to a state that a deploy starts from. */
async function mend(site: Site, situation: Situation): Promise<void> {
  for (const repair of situation.repairs) await act.repair(site, repair)
  const handMade = await releases.findHandMade(site)
  if (handMade) await releases.nameHandMade(handMade)
}

/** The release that served before us counts as good, and its schema is needed to roll back to it. */
async function noteLiveRelease(site: Site, live: string | undefined): Promise<void> {
  if (live === undefined || report.isDryRun()) return
  // Also one that an interrupted rollback brought back: what came after it has been left.
  const isKnown = trail(await readHistory(site)).at(-1) === live
  if (!isKnown) await remember(site, { release: live, result: 'found' }, await readSchema(site))
}

/** Runs the steps and writes down how they ended, whatever happens. */
async function recorded(
  site: Site,
  release: string,
  startedAt: number,
  steps: () => Promise<Proof | undefined>,
): Promise<Outcome> {
  const seconds = () => Math.round((Date.now() - startedAt) / 1000)
  try {
    const figures = await (await steps())?.stop()
    if (report.isDryRun()) return { figures }
    // It is live, whatever becomes of this line.
    const known = readSchema(site).catch((failure: unknown) => {
      warn(`the schema is not written down: ${report.explain(failure)}`)
      return undefined
    })
    const noted = known.then((schema) =>
      remember(site, { release, result: 'done', seconds: seconds(), figures }, schema),
    )
    await noted.catch((failure: unknown) => warn(`not written down: ${report.explain(failure)}`))
    return { figures }
  } catch (error) {
    if (report.isDryRun()) throw error
    const code = error instanceof Problem ? error.code : exitCodes.failed
    const result =
      code === exitCodes.degraded ? 'degraded' : code === exitCodes.interrupted ? 'interrupted' : 'failed'
    const noted = remember(site, {
      release,
      result,
      seconds: seconds(),
      why: report.explain(error).split('\n')[0] ?? '',
    })
    await noted.catch((failure: unknown) => warn(`not written down: ${report.explain(failure)}`))
    throw error
  }
}

type Outcome = Pick<Entry, 'figures'>

/** What visitors got of a move that failed. */
async function showFigures(proof: Proof): Promise<void> {
  warn(describeFigures(await proof.stop()))
}

async function buildOnly(site: Site): Promise<void> {
  const release = await releases.newReleaseName(site)
  await step('1/7', 'Build the new release', () => act.build(site, release))
  report.addToResult({ release })
  say(
    `Built ${site.image}:${release}; nothing was deployed. To deploy the source: ${scriptCommand('deploy', site.envFile)}`,
  )
}

async function conclude(site: Site, release: string, outcome: Outcome, startedAt: number): Promise<void> {
  const seconds = Math.round((Date.now() - startedAt) / 1000)
  report.addToResult({ release, seconds, ...outcome })
  if (report.isDryRun()) return say('Nothing was changed.')
  if (outcome.figures) say(describeFigures(outcome.figures), 'proof', { ...outcome.figures })
  const back =
    releases.previousRelease(await readHistory(site), release) === undefined
      ? ''
      : ` Back to the one before: ${scriptCommand('deploy', site.envFile, '--rollback')}`
  say(`Done in ${seconds} s: master serves ${release}.${back}`)
}

function refuseNonsense(options: Record<string, unknown>, positionals: string[]): void {
  const wrong: string[] = []
  const modes = ['status', 'build-only', 'rollback'].filter((name) => options[name])
  if (modes.length > 1) wrong.push(`--${modes.join(' and --')} cannot go together`)
  if (positionals.length > (options.rollback ? 1 : 0))
    wrong.push(`unexpected: ${positionals.slice(options.rollback ? 1 : 0).join(' ')}`)
  if (options['accept-schema-change'] && !options.rollback)
    wrong.push('--accept-schema-change belongs to --rollback')
  if (wrong.length > 0) throw new Problem(exitCodes.usage, wrong.join('; '), 'See --help.')
}
