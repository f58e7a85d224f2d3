/** Backs up the running site as one state that is proven to be readable, and puts such a state in place again so that it can be undone. */
import { existsSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { parseArgs } from 'node:util'
import { setFlagsFromString } from 'node:v8'
import { shellQuoted } from './lib/command.mts'
import { makeBackup } from './lib/data/backup.mts'
import { megabytes } from './lib/data/room.mts'
import {
  bytesOf,
  findSet,
  lookAtOpenSets,
  lookAtSets,
  newestUnreadable,
  setsWithUploads,
} from './lib/data/catalogue.mts'
import { exclusively } from './lib/data/exclusive.mts'
import { acceptable, listed, type Acceptable } from './lib/data/fitness.mts'
import { parts as allParts, readManifest, type Manifest, type Part } from './lib/data/manifest.mts'
import { restoreNewHost } from './lib/data/newhost.mts'
import { pinged, type Pings } from './lib/data/ping.mts'
import { alarmOf, known, retention } from './lib/data/retention.mts'
import { pendingExchanges, readExchanges } from './lib/data/plan.mts'
import { restoreSet } from './lib/data/restore.mts'
import { incomingFolder, isOpen, removeSet, setFolder, strangersIn } from './lib/data/sets.mts'
import { schedule, unschedule } from './lib/data/schedule.mts'
import { exportSet, importSet } from './lib/data/transfer.mts'
import { forgetTakenBack, refusePending, removeOldRestores, undoRestore } from './lib/data/undo.mts'
import { verifyDeeply, verifySet } from './lib/data/verify.mts'
import { rememberProven, rememberVerified } from './lib/data/verified.mts'
import { strapiUid } from './lib/folders.mts'
import { parseDuration, takeLock, verifyLock } from './lib/lock.mts'
import * as report from './lib/report.mts'
import { exitCodes, Problem, say, warn } from './lib/report.mts'
import { asRoot, loadSite, projectRoot, scriptCommand, type Site } from './lib/settings.mts'

const usage = `
Backs up the Strapi site while it runs, reads back what was written, and puts it in place again.

  npx zx scripts/data.mts [backup]            database, uploads and configuration, as one state
  npx zx scripts/data.mts list                the sets, oldest first
  npx zx scripts/data.mts verify [SET]        read every byte of a set
  npx zx scripts/data.mts restore [SET]       put database and uploads of a set in place of the live ones
  npx zx scripts/data.mts undo                take the last restore back
  npx zx scripts/data.mts restore --new-host FOLDER
                                              the server is lost, here is a bare one and the folder of a set
  npx zx scripts/data.mts export SET FILE     write a set to one file
  npx zx scripts/data.mts import FILE         take a set from such a file
  npx zx scripts/data.mts schedule            back up and prune every night, verify --deep every week, by cron
  npx zx scripts/data.mts prune               remove sets that KEEP_DAILY, KEEP_WEEKLY and KEEP_MONTHLY do not ask for, and what
                                              restores replaced before RESTORE_KEEP_DAYS; with --dry-run: why each stays or goes

  SET is a name from the list, or latest (default): the newest that has all parts that are asked for.

  --only PARTS      with backup and restore: database, uploads, config (backup alone), separated by commas
  --deep            with verify: also restore the dump into a database of its own, and compare
  --yes             with restore and undo: do not ask
  --keep-settings   with --new-host: what is set in docker/.env here wins over the set
  --at "MIN HOUR …" with schedule: when the backup runs, as cron writes it (default "30 3 * * *")
  --remove          with schedule: remove the cron file
  --accept WHAT     with restore and undo: take what would be refused; the refusal says what
  --dry-run         say what would be done, change nothing
  --env-file FILE   settings (default docker/.env)
  --wait DURATION   wait for another run to end, for example 30m
  --quiet           say nothing when all is well, for cron
  --json            one JSON object a line, the last one is the result
  --help

Exit codes: 0 done; 1 failed; 2 usage or settings; 3 degraded: the set is there, something is missing in it, or a restore is
half done; 4 another run holds the lock; 130 interrupted.`

interface Command {
  run: (site: Site, wish: Wish) => Promise<void>
  takes: string[]
  /** How many words may follow it, and how many must. */
  words?: { most: number; least: number }
  pings?: Pings
}

const commands: Record<string, Command> = {
  backup: { run: backup, takes: ['only'], pings: 'all' },
  list: { run: list, takes: [] },
  verify: { run: verify, takes: ['deep'], words: { least: 0, most: 1 }, pings: 'failures' },
  restore: {
    run: restore,
    takes: ['only', 'yes', 'accept', 'new-host', 'keep-settings'],
    words: { least: 0, most: 1 },
  },
  undo: { run: undo, takes: ['yes', 'accept'] },
  prune: { run: prune, takes: [], pings: 'failures' },
  export: { run: exportTo, takes: [], words: { least: 2, most: 2 } },
  import: { run: importFrom, takes: [], words: { least: 1, most: 1 } },
  schedule: { run: setSchedule, takes: ['at', 'remove'] },
}
const forEvery = ['dry-run', 'env-file', 'wait', 'quiet', 'json']

await report.main(async () => {
  // Whatever root's shell or cron has: what may be read says so, and what is secret, too.
  process.umask(0o022)
  // What passes here is short-lived; V8 would keep three times 16 MB for it. (120,000 uploads: 158 MB instead of 197.)
  setFlagsFromString('--semi-space-growth-factor=1')
  const { values: options, positionals } = parseArgs({
    args: report.scriptArguments(),
    allowPositionals: true,
    options: {
      only: { type: 'string' },
      deep: { type: 'boolean' },
      yes: { type: 'boolean' },
      accept: { type: 'string', multiple: true },
      'new-host': { type: 'boolean' },
      'keep-settings': { type: 'boolean' },
      at: { type: 'string' },
      remove: { type: 'boolean' },
      'dry-run': { type: 'boolean' },
      'env-file': { type: 'string' },
      wait: { type: 'string' },
      quiet: { type: 'boolean' },
      json: { type: 'boolean' },
      help: { type: 'boolean', short: 'h' },
    },
  })
  if (options.help) return say(usage.trim())
  report.configureReport({ json: options.json, dryRun: options['dry-run'], quiet: options.quiet })
  const [name = 'backup', ...rest] = positionals
  const command = Object.entries(commands).find(([one]) => one === name)?.[1]
  refuseNonsense(name, command, rest, options)
  const wish: Wish = {
    only: options.only === undefined ? undefined : partsOf(options.only),
    waitMs: parseDuration(options.wait ?? '0'),
    words: rest,
    deep: options.deep ?? false,
    isAgreed: options.yes ?? false,
    accept: acceptedOf(options.accept ?? []),
    at: options.at ?? '30 3 * * *',
    isRemoval: options.remove ?? false,
  }
  if (options['new-host']) {
    const envFile = resolve(options['env-file'] ?? resolve(projectRoot, 'docker/.env'))
    const folder = resolve(rest[0] ?? '')
    return await restoreNewHost({
      ...wish,
      envFile,
      folder,
      keepSettings: options['keep-settings'] ?? false,
    })
  }
  const work = async () => {
    await command?.run(await reachSite(options['env-file']), wish)
  }
  if (report.isDryRun() || !command?.pings) return await work()
  await pinged(options['env-file'], wish.only ? 'failures' : command.pings, work)
})

/** @throws Problem (usage) */
async function reachSite(envFile: string | undefined): Promise<Site> {
  const site = await loadSite(envFile)
  if (existsSync(incomingFolder(site))) return site
  const advice = `Make it: ${asRoot(scriptCommand('setup', site.envFile))}`
  throw new Problem(
    exitCodes.usage,
    `there is no ${incomingFolder(site)}, to which PostgreSQL writes its dumps`,
    advice,
  )
}

interface Wish {
  /** Undefined: all that the command is for. */
  only: Part[] | undefined
  waitMs: number
  /** Restores the dump, too. */
  deep: boolean
  /** What follows the command: a set, a file. */
  words: string[]
  isAgreed: boolean
  accept: Acceptable[]
  /** Five fields of cron. */
  at: string
  isRemoval: boolean
}

async function backup(site: Site, { only, waitMs }: Wish): Promise<void> {
  const parts = only ?? [...allParts]
  await exclusively(site, 'backup', waitMs, async () => {
    await report.change(
      `write ${parts.join(', ')} to a set in ${site.folders.backups}, and read it back`,
      async () => {
        const { name, manifest } = await makeBackup(site, parts)
        report.addToResult({ set: name, bytes: bytesOf(manifest), missing: manifest.missing })
        await rememberProven(site, name)
        if (manifest.missing.length > 0) throw await degraded(site, name, manifest)
        say(`Done: ${setFolder(site, name)}, ${megabytes(bytesOf(manifest))}, read back and right.`)
      },
    )
  })
}

async function degraded(site: Site, name: string, { missing, uploads }: Manifest): Promise<Problem> {
  // Others' sets may be closed to this user: that must not hide what is said here.
  const held = await setsWithUploads(site, uploads?.missing ?? []).catch(() => new Map<string, string>())
  // The uploads come first, in this order.
  const sentences = missing.map((sentence, at) => {
    const set = held.get(uploads?.missing?.[at] ?? '')
    return set === undefined ? sentence : `${sentence}; ${set} still has it`
  })
  const [[upload, set] = []] = held
  const putBack =
    set === undefined || upload === undefined
      ? ''
      : `Put one back, as root: tar -xf ${join(setFolder(site, set), 'uploads.tar')} -C ${site.folders.uploads} ${shellQuoted(upload)} && chown ${strapiUid}:${strapiUid} ${shellQuoted(join(site.folders.uploads, upload))}\n`
  return new Problem(
    exitCodes.degraded,
    `the set ${name} was written, but it lacks what its manifest.json names:${listed(sentences)}`,
    `${putBack}Rows that refer to files which are gone can be removed in the media library. The set: ${setFolder(site, name)}`,
  )
}

async function list(site: Site): Promise<void> {
  const { sets, unreadable, closed } = await lookAtOpenSets(site)
  for (const { name, why } of unreadable) warn(`${name}: DAMAGED, ${why}`)
  for (const { name } of closed) warn(`${name}: who made it can read it, or root`)
  for (const { name, manifest, last } of sets) {
    const bytes = bytesOf(manifest)
    const proof =
      last === undefined
        ? 'never verified'
        : last.wrong.length === 0
          ? `${last.deep ? 'restored' : 'read'} and right on ${last.at.slice(0, 10)}`
          : `DAMAGED: ${last.wrong.join('; ')}`
    const missing = manifest.missing.length > 0 ? `, ${manifest.missing.length} MISSING` : ''
    const what = `${manifest.parts.join(', ')}, release ${manifest.release ?? 'unknown'}`
    say(`${name}  ${megabytes(bytes).padStart(10)}  ${what}, ${proof}${missing}`, 'set', {
      set: name,
      bytes,
      parts: manifest.parts,
      release: manifest.release,
      missing: manifest.missing,
      verified: last,
    })
  }
  const last = (await readExchanges(site)).findLast(({ stage }) => stage === 'done')
  if (last)
    say(
      `Restore ${last.id} can be taken back for ${site.restoreKeepDays} days: ${scriptCommand('data', site.envFile, 'undo')}`,
    )
  for (const { id } of await pendingExchanges(site))
    warn(`restore ${id} was interrupted; the next run mends it: ${scriptCommand('data', site.envFile)}`)
  if (sets.length + unreadable.length + closed.length === 0)
    say(`There is no set yet in ${site.folders.backups}. Make one: ${scriptCommand('data', site.envFile)}`)
}

async function prune(site: Site, { waitMs }: Wish): Promise<void> {
  await exclusively(site, 'prune', waitMs, async () => {
    // It may need its set.
    await refusePending(site)
    const catalogue = await lookAtSets(site)
    const { sets, unreadable } = catalogue
    for (const { name, why } of unreadable) warn(`${name} stays: ${why}`)
    const newest = newestUnreadable(catalogue)
    if (newest !== undefined)
      throw new Problem(
        exitCodes.degraded,
        `the newest set, ${newest}, is damaged: nothing goes`,
        `Make another one: ${scriptCommand('data', site.envFile)}`,
      )
    const looked = sets.map(({ name, manifest, last }) =>
      known(name, manifest, last && last.wrong.length === 0),
    )
    const verdicts = retention(looked, site.keepSets, new Date())
    for (const { name, keep, reason } of verdicts) {
      const strangers = keep ? [] : await strangersIn(site, name)
      if (strangers.length > 0) {
        warn(`${name} stays: it holds what no backup has put there: ${strangers.join(', ')}`)
        continue
      }
      say(`${name} ${keep ? 'stays' : 'goes'}: ${reason}`, 'verdict', { set: name, keep, reason })
      if (keep) continue
      await report.change(`remove ${name}`, async () => {
        await removeSet(site, name)
        report.detail(`removed ${name}`)
      })
    }
    const alarm = alarmOf(looked, new Date())
    // What a restore has replaced may be the last that is good.
    if (!alarm) await removeOldRestores(site, new Date())
    else
      throw new Problem(
        exitCodes.degraded,
        alarm,
        `Look at it: ${scriptCommand('data', site.envFile, 'verify latest')}\nIf it is as it should be, another backup of that size makes this pass.`,
      )
  })
}

async function restore(site: Site, { only, words, waitMs, accept, isAgreed }: Wish): Promise<void> {
  if (only?.includes('config'))
    throw new Problem(
      exitCodes.usage,
      'the configuration of a set is not put in place of a live one',
      'Its config.tar can be unpacked anywhere, see RECOVERY.md in the set.',
    )
  await exclusively(site, 'restore', waitMs, async () => {
    const name = await findSet(site, words[0], only ?? ['database', 'uploads'])
    const held = await readManifest(setFolder(site, name)).then(
      ({ parts }) => parts.filter((part) => part !== 'config'),
      // Read again there, and refused.
      (): Part[] => ['database'],
    )
    const wanted = only ?? held
    if (wanted.length === 0)
      throw new Problem(
        exitCodes.usage,
        `${name} holds neither database nor uploads`,
        `See: ${scriptCommand('data', site.envFile, 'list')}`,
      )
    await restoreSet(site, { set: name, parts: wanted, accept, isAgreed, isNewHost: false })
  })
}

async function undo(site: Site, { waitMs, accept, isAgreed }: Wish): Promise<void> {
  await exclusively(site, 'undo', waitMs, async () => {
    await refusePending(site)
    const takenBack = await forgetTakenBack(site)
    // By this run or by one since: who types undo means that restore, not the one before.
    if (takenBack !== undefined)
      return say(`Done: ${takenBack}. The one before it, too: ${scriptCommand('data', site.envFile, 'undo')}`)
    await undoRestore(site, { accept, isAgreed })
  })
}

async function exportTo(site: Site, { words: [set, file = ''] }: Wish): Promise<void> {
  const name = await findSet(site, set, allParts)
  const target = resolve(file)
  await report.change(`write ${name} to ${target}`, async () => {
    await exportSet(site, name, target)
    report.addToResult({ set: name, file: target })
    say(
      `Done: ${target} holds ${name}, its secrets too. On the other server: npx zx scripts/data.mts import ${target}`,
    )
  })
}

async function importFrom(site: Site, { words: [file = ''], waitMs }: Wish): Promise<void> {
  await exclusively(site, 'import', waitMs, async () => {
    await report.change(`take a set from ${resolve(file)}`, async () => {
      const name = await importSet(site, resolve(file))
      await rememberProven(site, name)
      report.addToResult({ set: name })
      say(`Done: ${setFolder(site, name)}, read back and right.`)
    })
  })
}

async function holdsDatabase(site: Site, name: string): Promise<boolean> {
  return await readManifest(setFolder(site, name)).then(
    ({ parts }) => parts.includes('database'),
    () => false,
  )
}

async function setSchedule(site: Site, { at, isRemoval }: Wish): Promise<void> {
  await (isRemoval ? unschedule(site) : schedule(site, at))
}

async function verify(site: Site, { words, deep, waitMs }: Wish): Promise<void> {
  const name = await findSet(site, words[0], allParts)
  const lock =
    deep && !report.isDryRun() ? await takeLock(verifyLock(site), 'verify --deep', waitMs) : undefined
  try {
    await report.change(
      deep ? `read ${name} to its end, restore its dump for a look` : `read ${name} to its end`,
      async () => {
        const progress = { bytes: 0 }
        const wrong = await report.alive(
          () => `reading ${name}, ${megabytes(progress.bytes)}`,
          () => verifySet(site, name, progress),
        )
        if (deep && wrong.length === 0) wrong.push(...(await verifyDeeply(site, name)))
        // Without a database there is nothing to restore.
        const isRestored = deep && (await holdsDatabase(site, name))
        await rememberVerified(site, { set: name, deep: isRestored, wrong })
        report.addToResult({ set: name, deep: isRestored, wrong })
        if (wrong.length > 0) throw damaged(site, name, wrong)
        if (await isOpen(site, name))
          warn(
            `others on this host can read ${name}, secrets included: chmod -R go= ${setFolder(site, name)}`,
          )
        say(
          `${name} is what was written, ${isRestored ? 'and its dump was restored and compared.' : 'and can be read to its end.'}`,
        )
      },
    )
  } finally {
    lock?.release()
  }
}

function damaged(site: Site, name: string, wrong: string[]): Problem {
  return new Problem(
    exitCodes.failed,
    `${name} is damaged:${listed(wrong)}`,
    `Use another one: ${scriptCommand('data', site.envFile, 'list')}`,
  )
}

function refuseNonsense(
  name: string,
  command: Command | undefined,
  rest: string[],
  options: Record<string, unknown>,
): void {
  const { least, most } = options['new-host']
    ? { least: 1, most: 1 }
    : (command?.words ?? { least: 0, most: 0 })
  const flags = Object.keys(options).filter((key) => ![...forEvery, ...(command?.takes ?? [])].includes(key))
  const wrong = [...(command ? [] : [name]), ...rest.slice(most), ...flags.map((key) => `--${key}`)]
  if (options['keep-settings'] && !options['new-host']) wrong.push('--keep-settings without --new-host')
  if (options['new-host'] && options.only) wrong.push('--only with --new-host')
  if (wrong.length > 0) throw new Problem(exitCodes.usage, `unexpected: ${wrong.join(' ')}`, 'See --help.')
  if (rest.length < least) throw new Problem(exitCodes.usage, `${name} needs more: see --help`, 'See --help.')
}

function acceptedOf(words: string[]): Acceptable[] {
  const unknown = words.filter((word) => !acceptable.some((one) => one === word))
  if (unknown.length > 0)
    throw new Problem(
      exitCodes.usage,
      `--accept does not know "${unknown.join(', ')}"`,
      `It takes ${acceptable.join(', ')}.`,
    )
  return acceptable.filter((one) => words.includes(one))
}

function partsOf(only: string): Part[] {
  const wanted = only.split(',').map((word) => word.trim())
  const unknown = wanted.filter((word) => !allParts.some((part) => part === word))
  if (unknown.length > 0)
    throw new Problem(
      exitCodes.usage,
      `--only does not know "${unknown.join(', ')}"`,
      `It takes ${allParts.join(', ')}.`,
    )
  return allParts.filter((part) => wanted.includes(part))
}
