/** Backs up database, uploads and configuration of the running site as one state, and proves that what it wrote can be read. */
import { existsSync } from 'node:fs'
import { parseArgs } from 'node:util'
import { markCommands, endOrphans, orphans } from './lib/command.mts'
import { endBackupLeftovers, makeBackup, megabytes } from './lib/data/backup.mts'
import { parts as allParts, readManifest, type Manifest, type Part } from './lib/data/manifest.mts'
import { alarmOf, known, retention } from './lib/data/retention.mts'
import { incomingFolder, listSets, removeSet, setFolder } from './lib/data/sets.mts'
import { verifyDeeply, verifySet } from './lib/data/verify.mts'
import { readVerified, rememberVerified, type Verified } from './lib/data/verified.mts'
import { parseDuration, takeLock } from './lib/lock.mts'
import * as report from './lib/report.mts'
import { detail, exitCodes, Problem, say, warn } from './lib/report.mts'
import { asRoot, loadSite, scriptCommand, type Site } from './lib/settings.mts'

const usage = `
Backs up the Strapi site while it runs, and reads back what was written.

  npx zx scripts/data.mts [backup]            database, uploads and configuration, as one state
  npx zx scripts/data.mts list                the sets, oldest first
  npx zx scripts/data.mts verify [SET]        read every byte of a set; default: latest
  npx zx scripts/data.mts prune               remove sets that KEEP_DAILY, KEEP_WEEKLY and KEEP_MONTHLY do not ask for;
                                              with --dry-run: why each stays or goes

  --only PARTS      with backup: database, uploads, config, separated by commas
  --deep            with verify: also restore the dump into a database of its own, and compare
  --dry-run         say what would be done, change nothing
  --env-file FILE   settings (default docker/.env)
  --wait DURATION   wait for another run to end, for example 30m
  --quiet           say nothing when all is well, for cron
  --json            one JSON object a line, the last one is the result
  --help

Exit codes: 0 done; 1 failed; 2 usage or settings; 3 degraded: the set is there, something is missing in it;
4 another run holds the lock; 130 interrupted.`

await report.main(async () => {
  const { values: options, positionals } = parseArgs({
    args: report.scriptArguments(),
    allowPositionals: true,
    options: {
      only: { type: 'string' },
      deep: { type: 'boolean' },
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
  const [command = 'backup', ...rest] = positionals
  const commands = { backup, list, verify, prune }
  const action = Object.entries(commands).find(([name]) => name === command)?.[1]
  if (
    !action ||
    rest.length > (command === 'verify' ? 1 : 0) ||
    (options.only !== undefined && command !== 'backup') ||
    (options.deep && command !== 'verify')
  )
    throw new Problem(
      exitCodes.usage,
      `unexpected: ${[...positionals, options.only && '--only', options.deep && '--deep'].filter(Boolean).join(' ')}`,
      'See --help.',
    )
  const parts = partsOf(options.only)
  const waitMs = parseDuration(options.wait ?? '0')
  const site = await loadSite(options['env-file'])
  if (!existsSync(incomingFolder(site))) {
    const advice = `Make it: ${asRoot(scriptCommand('setup', site.envFile))}`
    throw new Problem(
      exitCodes.usage,
      `there is no ${incomingFolder(site)}, to which PostgreSQL writes its dumps`,
      advice,
    )
  }
  await action(site, { parts, waitMs, set: rest[0], deep: options.deep ?? false })
})

interface Wish {
  parts: Part[]
  waitMs: number
  /** Restores the dump, too. */
  deep: boolean
  /** As typed; undefined is the latest. */
  set: string | undefined
}

async function backup(site: Site, { parts, waitMs }: Wish): Promise<void> {
  await locked(site, 'backup', waitMs, async () => {
    await report.change(
      `write ${parts.join(', ')} to a set in ${site.folders.backups}, and read it back`,
      async () => {
        const { name, manifest } = await makeBackup(site, parts)
        report.addToResult({ set: name, bytes: bytesOf(manifest), missing: manifest.missing })
        await rememberVerified(site, { set: name, deep: false, wrong: [] })
        if (manifest.missing.length > 0) throw degraded(site, name, manifest.missing)
        say(`Done: ${setFolder(site, name)}, ${megabytes(bytesOf(manifest))}, read back and right.`)
      },
    )
  })
}

function degraded(site: Site, name: string, missing: string[]): Problem {
  const shown = missing.slice(0, 20).map((line) => `\n  - ${line}`)
  const more = missing.length > 20 ? `\n  and ${missing.length - 20} more, all in its manifest.json` : ''
  return new Problem(
    exitCodes.degraded,
    `the set ${name} was written, but it lacks:${shown.join('')}${more}`,
    `Rows that refer to files which are gone can be removed in the media library. The set: ${setFolder(site, name)}`,
  )
}

async function endLeftovers(site: Site): Promise<void> {
  const left = await orphans(site.project)
  if (left.length > 0) {
    detail(`an earlier run left commands behind: ${left.map((one) => one.command).join('; ')}`)
    await endOrphans(site.project)
  }
  for (const found of await endBackupLeftovers(site)) detail(`an earlier run left ${found}: removed`)
}

async function list(site: Site): Promise<void> {
  const { sets, unreadable } = await lookAtSets(site)
  for (const line of unreadable) warn(line)
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
  if (sets.length === 0)
    say(`There is no set yet in ${site.folders.backups}. Make one: ${scriptCommand('data', site.envFile)}`)
}

/** Every set with what it says of itself and what was last seen of it, oldest first. */
async function lookAtSets(site: Site) {
  const verified = await readVerified(site)
  const sets: { name: string; manifest: Manifest; last: Verified | undefined }[] = []
  const unreadable: string[] = []
  for (const name of await listSets(site)) {
    const manifest = await readManifest(setFolder(site, name)).catch((error: Error) => error)
    if (manifest instanceof Error) unreadable.push(`${name}: ${manifest.message}`)
    else sets.push({ name, manifest, last: verified.findLast((one) => one.set === name) })
  }
  return { sets, unreadable }
}

async function prune(site: Site, { waitMs }: Wish): Promise<void> {
  await locked(site, 'prune', waitMs, async () => {
    const { sets, unreadable } = await lookAtSets(site)
    for (const line of unreadable) warn(`stays: ${line}`)
    const looked = sets.map(({ name, manifest, last }) =>
      known(name, manifest, last && last.wrong.length === 0),
    )
    const verdicts = retention(looked, site.keepSets, new Date())
    for (const { name, keep, reason } of verdicts) {
      say(`${name} ${keep ? 'stays' : 'goes'}: ${reason}`, 'verdict', { set: name, keep, reason })
      if (!keep) await report.change(`remove ${name}`, () => removeSet(site, name))
    }
    const alarm = alarmOf(looked, new Date())
    if (alarm)
      throw new Problem(
        exitCodes.degraded,
        alarm,
        `Look at it: ${scriptCommand('data', site.envFile, 'verify latest')}\nIf it is as it should be, another backup of that size makes this pass.`,
      )
  })
}

/** Under the lock of the site, with what an earlier run left removed first. */
async function locked(
  site: Site,
  command: string,
  waitMs: number,
  action: () => Promise<void>,
): Promise<void> {
  const lock = report.isDryRun() ? undefined : await takeLock(site.project, command, waitMs)
  try {
    markCommands(site.project)
    await report.change('remove what an earlier run left half-made', () => endLeftovers(site))
    await action()
  } finally {
    lock?.release()
  }
}

function bytesOf({ files }: Manifest): number {
  return Object.values(files).reduce((total, { sizeBytes }) => total + sizeBytes, 0)
}

async function verify(site: Site, { set = 'latest', deep, waitMs }: Wish): Promise<void> {
  const names = await listSets(site)
  const name = set === 'latest' ? names.at(-1) : names.find((one) => one === set)
  if (name === undefined)
    throw new Problem(
      exitCodes.usage,
      `there is no set ${set} in ${site.folders.backups}`,
      `See: ${scriptCommand('data', site.envFile, 'list')}`,
    )
  // Not the lock of the site: a deploy need not wait for it.
  const lock =
    deep && !report.isDryRun() ? await takeLock(`${site.project}/verify`, 'verify --deep', waitMs) : undefined
  try {
    await report.change(
      deep ? `read ${name} to its end, restore its dump for a look` : `read ${name} to its end`,
      async () => {
        const wrong = await report.alive(
          () => `reading ${name}`,
          () => verifySet(site, name),
        )
        if (deep && wrong.length === 0) {
          wrong.push(
            ...(await report.alive(
              () => `restoring the dump of ${name} for a look`,
              () => verifyDeeply(site, name),
            )),
          )
        }
        await rememberVerified(site, { set: name, deep, wrong })
        report.addToResult({ set: name, deep, wrong })
        if (wrong.length > 0) throw damaged(site, name, wrong)
        say(
          `${name} is what was written, ${deep ? 'and its dump was restored and compared.' : 'and can be read to its end.'}`,
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
    `${name} is damaged:${wrong.map((line) => `\n  - ${line}`).join('')}`,
    `Use another one: ${scriptCommand('data', site.envFile, 'list')}`,
  )
}

function partsOf(only: string | undefined): Part[] {
  if (only === undefined) return [...allParts]
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
