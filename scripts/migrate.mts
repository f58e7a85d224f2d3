/** Moves a legacy set-up (one Strapi container with the project mounted) to this one: resumable anywhere, and back at any time. */
import { parseArgs } from 'node:util'
import { resolve } from 'node:path'
import { agree, needAnswer } from './lib/agree.mts'
import { endOrphans, markCommands } from './lib/command.mts'
import { endLeftovers } from './lib/data/exclusive.mts'
import { listed } from './lib/data/fitness.mts'
import { installSoftware, missingSoftware } from './lib/install.mts'
import {
  describeRollback,
  finalize,
  refuseNewSchema,
  removeForGood,
  rollBack,
  showStatus,
} from './lib/legacy/back.mts'
import { checkList } from './lib/legacy/checklist.mts'
import { runningServices } from './lib/legacy/containers.mts'
import { note, notes } from './lib/legacy/journal.mts'
import { describe, needFit, see, type Migration } from './lib/legacy/migration.mts'
import { impact, preparation, type Step } from './lib/legacy/steps.mts'
import { isSwitched, settle } from './lib/legacy/switch.mts'
import { parseDuration, takeLock } from './lib/lock.mts'
import * as report from './lib/report.mts'
import { detail, exitCodes, Problem, say, step } from './lib/report.mts'
import { asRoot, loadSite, projectOf, projectRoot, scriptCommand, stateDirOf } from './lib/settings.mts'

const impactQuestion = 'Stop the legacy site'
const names = ['look', ...preparation.map(({ name }) => name), ...impact.map(({ name }) => name), 'check']

const usage = `
Migrates a legacy set-up (one container strapi with the project mounted, built at each start) to the blue-green one beside it.

  sudo npx zx scripts/migrate.mts --from FOLDER --dry-run   what is there, and what would be done
  sudo npx zx scripts/migrate.mts --from FOLDER             migrate; FOLDER holds the legacy docker-compose.yml
  sudo npx zx scripts/migrate.mts --status                  how far it has come
  sudo npx zx scripts/migrate.mts --rollback                back to the legacy set-up
  sudo npx zx scripts/migrate.mts --finalize                remove what is kept of the legacy set-up for the way back

  --install          install missing software from the distribution first (Debian, Ubuntu)
  --until STEP       stop after one of: ${names.join(', ')}; visitors notice from switch on
  --leave SERVICES   legacy services that stay as they are, separated by commas
  --yes              do not ask before visitors notice
  --accept-schema-change   with --rollback: although the legacy Strapi would drop what has come to the database schema since
  --dry-run          say what would be done, change nothing
  --env-file FILE    settings of the new set-up (default docker/.env)
  --wait DURATION    wait for another run to end, for example 30m
  --json             one JSON object a line, the last one is the result
  --help

Killed at any moment, the same command goes on. Exit codes: 0 done; 1 failed, the legacy site serves as before; 2 usage or
settings, or something is not understood; 3 degraded: a person must act; 4 another run holds the lock; 130 interrupted.`

await report.main(async () => {
  process.umask(0o022)
  const { values: options } = parseArgs({
    args: report.scriptArguments(),
    options: {
      from: { type: 'string' },
      status: { type: 'boolean' },
      rollback: { type: 'boolean' },
      finalize: { type: 'boolean' },
      install: { type: 'boolean' },
      until: { type: 'string' },
      leave: { type: 'string' },
      yes: { type: 'boolean' },
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
  refuseNonsense(options)
  const envFile = resolve(options['env-file'] ?? resolve(projectRoot, 'docker/.env'))
  needRoot(envFile)
  const waitMs = parseDuration(options.wait ?? '0')
  const isAgreed = options.yes ?? false

  const isReading = report.isDryRun() || options.status
  const lock = isReading ? undefined : await takeLock(await projectOf(envFile), 'migrate', waitMs)
  try {
    const noted = await notes({ stateDir: stateDirOf(envFile) })
    const from = options.from ?? noted.from
    if (from === undefined) throw unsaid()
    const leave = options.leave?.split(',') ?? noted.leave ?? []
    if (options.install && !isReading) await installSoftware(await missingSoftware())
    const look = () => see(envFile, from, leave)
    if (options.status) return await showStatus(await look())
    if (options.rollback) return await back(await look(), isAgreed, options['accept-schema-change'] ?? false)
    if (options.finalize && noted.final && !isReading) return await removeForGood(await loadSite(envFile))
    if (options.finalize) return await forGood(await look(), isAgreed)
    await migrate(await step('1/8', 'Look at the legacy set-up', look), options.until, isAgreed)
  } finally {
    lock?.release()
  }
})

async function migrate(migration: Migration, until: string | undefined, isAgreed: boolean): Promise<void> {
  if (until === undefined && !report.isDryRun() && (await isAlreadyThrough(migration))) return
  await describe(migration)
  if (migration.stage === 'legacy') await needFit(migration)
  if (until === 'look') return
  const mayImpact = !report.isDryRun() && migration.stage === 'legacy'
  if (mayImpact && !preparation.some(({ name }) => name === until)) needAnswer(impactQuestion, isAgreed)
  await clear(migration)

  // No impact yet.
  const isPrepared = migration.stage !== 'legacy'
  for (const [at, one] of preparation.entries()) {
    await take(`${at + 2}/8`, one, migration, isPrepared)
    if (until === one.name) return sayNext(migration)
  }

  // From here on visitors notice.
  if (mayImpact) {
    say('From here on visitors notice: the site is off until strapi-master is healthy.')
    await agree(impactQuestion, isAgreed)
  }
  for (const [at, one] of impact.entries()) {
    await take(`${at + 6}/8`, one, migration)
    if (until === one.name) return sayNext(migration)
  }
  if (report.isDryRun()) return say('Nothing was changed.')
  const isSettled = await settle(migration).then(
    () => true,
    (error: unknown) => (report.warn(report.explain(error)), false),
  )
  await step('8/8', 'Check list', () => checkList(migration.site))
  await note(migration.site, { isChecked: isSettled })
  if (!isSettled)
    throw new Problem(
      exitCodes.degraded,
      'visitors are served by the new set-up, but not all of the rest is done: see the warning above',
      `Mend that, then: ${scriptCommand('migrate', migration.envFile)}`,
    )
  const option = (word: string) => scriptCommand('migrate', migration.envFile, word)
  say(
    `Done: the new set-up serves. The legacy one is kept; back to it: ${option('--rollback')}; without it for good: ${option('--finalize')}`,
  )
}

/** Nothing is left to do: then nothing is changed, and visitors are not asked for anything. */
async function isAlreadyThrough(migration: Migration): Promise<boolean> {
  const { isChecked, outageMs } = await notes(migration.site)
  if (!isChecked || !(await isSwitched(migration))) return false
  if ((await runningServices(migration.legacy)).length > 0) return false
  const option = (word: string) => scriptCommand('migrate', migration.envFile, word)
  say(
    `Migrated already${outageMs === undefined ? '' : `, the site was off for ${(outageMs / 1000).toFixed(1)} s`}: the new set-up serves, and nothing was changed.\nThe list once more: ${option('--until check')}\nBack: ${option('--rollback')}\nFor good: ${option('--finalize')}`,
  )
  return true
}

/** What is done already is not done again; whether it is done then is seen by looking anew. */
async function take(
  number: string,
  { name, title, plan, isDone, act, left }: Step,
  migration: Migration,
  isBehind = false,
): Promise<void> {
  await step(number, title, async () => {
    if (isBehind || (await isDone(migration))) return detail('done already')
    if (report.isDryRun()) return detail(`would ${await plan(migration)}`)
    const since = Date.now()
    await act(migration)
    const now = await seeAgain(migration)
    const undone = left ? await left(now, since) : (await isDone(now)) ? [] : [title]
    if (undone.length === 0) return
    const hasImpact = impact.some((one) => one.name === name)
    throw new Problem(
      hasImpact ? exitCodes.degraded : exitCodes.failed,
      `nothing failed, and yet this is not done:${listed(undone)}`,
      `See: ${scriptCommand('migrate', migration.envFile, '--status')}`,
    )
  })
}

/** With nothing believed that was known before. */
async function seeAgain({ envFile, legacy, leave }: Migration): Promise<Migration> {
  return await see(envFile, legacy.folder, leave)
}

async function back(migration: Migration, isAgreed: boolean, acceptsSchema: boolean): Promise<void> {
  await describeRollback(migration)
  await refuseNewSchema(migration, acceptsSchema)
  if (report.isDryRun()) return say('Nothing was changed.')
  await agree('Go back to the legacy set-up', isAgreed)
  await clear(migration)
  await rollBack(migration)
}

async function forGood(migration: Migration, isAgreed: boolean): Promise<void> {
  if (report.isDryRun()) return say('Nothing was changed.')
  await agree('Remove the legacy containers, and with them the way back', isAgreed)
  await finalize(migration)
}

/** Ends what a killed run left running. */
async function clear({ site, legacy, leave }: Migration): Promise<void> {
  if (report.isDryRun()) return
  markCommands(site.project)
  await endOrphans(site.project)
  await endLeftovers(site)
  await note(site, { from: legacy.folder, leave })
}

function unsaid(): Problem {
  return new Problem(
    exitCodes.usage,
    'where the legacy set-up is was not said',
    'Add: --from FOLDER   (of its docker-compose.yml)',
  )
}

function sayNext({ site, legacy }: Migration): void {
  if (report.isDryRun()) return say('Nothing was changed.')
  say(`Next: ${scriptCommand('migrate', site.envFile, `--from ${legacy.folder}`)}`)
}

/** Folders of containers are read, files get the owners that the images need. */
function needRoot(envFile: string): void {
  if (process.getuid?.() === 0) return
  throw new Problem(
    exitCodes.usage,
    'a migration reads and gives files of other users, which only root can',
    asRoot(scriptCommand('migrate', envFile)),
  )
}

function refuseNonsense(options: Record<string, unknown>): void {
  const wrong: string[] = []
  const modes = ['status', 'rollback', 'finalize'].filter((name) => options[name])
  if (modes.length > 1) wrong.push(`--${modes.join(' and --')} cannot go together`)
  if (options.until !== undefined && modes.length > 0)
    wrong.push(`--until does not go with --${modes.join()}`)
  if (typeof options.until === 'string' && !names.includes(options.until))
    wrong.push(`--until ${options.until}: the steps are ${names.join(', ')}`)
  if (wrong.length > 0) throw new Problem(exitCodes.usage, wrong.join('; '), 'See --help.')
}
