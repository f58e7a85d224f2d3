/** Makes this host ready for the site, as far as it may, and says everything that is still to do. */
import { parseArgs } from 'node:util'
import { resolve } from 'node:path'
import { runChecks } from './lib/checks.mts'
import { markCommands } from './lib/command.mts'
import { installSoftware, missingSoftware } from './lib/install.mts'
import { describeHolder, lockHolder, parseDuration, takeLock } from './lib/lock.mts'
import { install as installNginx, isInstallable, revive } from './lib/nginx.mts'
import * as report from './lib/report.mts'
import { detail, say, step, warn } from './lib/report.mts'
import { loadSite, projectOf, projectRoot, scriptCommand } from './lib/settings.mts'
import { makeFolders } from './lib/folders.mts'
import { observe } from './lib/slots.mts'
import { recognise, type Way } from './lib/state.mts'
import { differences } from './lib/traffic.mts'
import { writeApplicationEnv, writeDockerEnv } from './lib/secrets.mts'

const usage = `
Is this host ready? Writes both .env with generated secrets, makes the folders, installs the nginx files,
and lists everything that is still missing, each with the command to type. It never overwrites a value.

  npx zx scripts/setup.mts

  --install         install missing software from the distribution (Debian, Ubuntu; as root)
  --replace-nginx   take the shipped nginx configuration, the installed one is kept as .previous
  --check           only look, change nothing
  --dry-run         say what would be done, change nothing
  --env-file FILE   settings (default docker/.env); an empty file to begin with
  --wait DURATION   wait for another run to end, for example 30m
  --json            one JSON object a line, the last one is the result
  --help

Exit codes: 0 ready; 2 something is left to do; 4 another run holds the lock; 130 interrupted.`

await report.main(async () => {
  const { values: options } = parseArgs({
    args: report.scriptArguments(),
    options: {
      install: { type: 'boolean' },
      'replace-nginx': { type: 'boolean' },
      check: { type: 'boolean' },
      'dry-run': { type: 'boolean' },
      'env-file': { type: 'string' },
      wait: { type: 'string' },
      json: { type: 'boolean' },
      help: { type: 'boolean', short: 'h' },
    },
  })
  if (options.help) return say(usage.trim())
  report.configureReport({ json: options.json, dryRun: options['dry-run'] })
  const waitMs = parseDuration(options.wait ?? '0')
  const envFile = resolve(options['env-file'] ?? resolve(projectRoot, 'docker/.env'))
  if (options.check) return await onlyLook(envFile)

  await step('1/5', 'Software', () => software(options.install ?? false))
  const lock = report.isDryRun() ? undefined : await takeLock(await projectOf(envFile), 'setup', waitMs)
  try {
    const site = await step('2/5', 'Settings', async () => {
      const text = await writeDockerEnv(envFile)
      const loaded = await loadSite(envFile, { text })
      markCommands(loaded.project)
      await writeApplicationEnv(loaded)
      return loaded
    })
    await step('3/5', 'Folders', () => makeFolders(site))
    await step('4/5', 'nginx', async () => {
      const found = await differences(site)
      if (found.length === 0 && !options['replace-nginx'])
        return detail('runs this site’s configuration already')
      if (!options['replace-nginx'] && !report.isDryRun() && (await revive(site)))
        return detail('runs this site’s configuration again')
      const obstacle = await isInstallable(site)
      if (obstacle) return warn(obstacle)
      await report.change(`install ${site.nginx.confFile}, test and reload nginx`, () => installNginx(site))
    })
    if (report.isDryRun()) return say('Nothing was changed.')
    await step('5/5', 'Checks', async () => {
      await runChecks(site, await wayOf(site), 'what could be done by itself is done')
    })
    say(`This host is ready. Next: ${scriptCommand('deploy', site.envFile)}`)
  } finally {
    lock?.release()
  }
})

async function software(mayInstall: boolean): Promise<void> {
  const missing = await missingSoftware()
  if (missing.length === 0) return detail('everything is there')
  if (mayInstall) return await installSoftware(missing)
  for (const one of missing) warn(`${one.name} is missing\n-> ${one.fix}`)
}

/** Nothing is written and no lock is needed. */
async function onlyLook(envFile: string): Promise<void> {
  const site = await loadSite(envFile)
  const holder = await lockHolder(site.project)
  if (holder) warn(describeHolder(holder))
  await runChecks(site, await wayOf(site))
  say('This host is ready.')
}

async function wayOf(site: Parameters<typeof observe>[0]): Promise<Way> {
  const situation = await observe(site).then(recognise, () => undefined)
  if (situation?.way === 'refuse') warn(`${situation.sentence}: a deploy needs its port`)
  return situation?.way ?? 'first'
}
