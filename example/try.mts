/** The whole thing on this machine with one command: a site, two deploys, visitors meanwhile, and what was lost. */
import { spawn } from 'node:child_process'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { removeImage } from '../scripts/lib/compose.mts'
import { ask, run } from '../scripts/lib/command.mts'
import { installSoftware, missingSoftware } from '../scripts/lib/install.mts'
import * as report from '../scripts/lib/report.mts'
import { exitCodes, Problem, say, step } from '../scripts/lib/report.mts'
import { projectRoot } from '../scripts/lib/settings.mts'
import { baseImages } from './images.mts'
import { describe, startLoad } from './load.mts'
import { removeOwnSite, writeOwnSite, type OwnSite } from './site.mts'

const usage = `
Tries a zero-downtime deploy on this machine: installs what is missing (Debian or Ubuntu, as root), builds the example
site, deploys it, deploys a second release while visitors come, and says what they lost. Everything is in .try/.

  npm run try             TRY_PORT (8080) and the three ports behind it must be free
  npm run try -- --down   removes all that it made`

await report.main(async () => {
  const { values: options } = parseArgs({
    args: report.scriptArguments(),
    options: { down: { type: 'boolean' }, help: { type: 'boolean', short: 'h' } },
  })
  if (options.help) return say(usage.trim())
  const port = Number(process.env.TRY_PORT ?? 8080)
  if (!Number.isInteger(port) || port < 1 || port > 65_532)
    throw new Problem(exitCodes.usage, 'TRY_PORT is not a port')
  const place = {
    folder: join(projectRoot, '.try'),
    project: 'bob-try',
    port,
    application: join(projectRoot, 'example/strapi'),
  }
  if (options.down) return await down(await writeOwnSite(place))

  await step('1/6', 'Install what is missing', async () => {
    const missing = await missingSoftware()
    if (missing.length > 0) await installSoftware(missing)
  })
  const site = await step('2/6', 'Base images', async () => {
    const images = await baseImages()
    if (images.standIns) {
      report.detail(
        'No container registry can be reached: Debian packages stand in for the base images, here only.',
      )
    }
    report.detail(
      'LiveKit is left out: it has no Debian package, and its public ports are for one site a host.',
    )
    return await writeOwnSite({ ...place, settings: images.settings })
  })
  await step('3/6', 'Set the site up', () => script('setup', site))
  await step('4/6', 'Deploy it for the first time', () => script('deploy', site))
  const lost = await step('5/6', 'Deploy a second release while visitors come', () => deployUnderLoad(site))
  await step('6/6', 'Look at it', () => script('deploy', site, '--status'))
  for (const line of lost) say(line)
  say(`
It runs at ${site.url} (the admin panel is at ${site.url}/admin). Go on with:
  npx zx scripts/deploy.mts --env-file .try/.env            edit .try/strapi first, if you like
  npx zx scripts/deploy.mts --env-file .try/.env --status
  npm run try -- --down`)
})

async function deployUnderLoad(site: OwnSite): Promise<string[]> {
  const load = startLoad({
    url: site.url,
    getsPerSecond: 20,
    postsPerSecond: 5,
    slowBodiesPerSecond: 0.5,
    slowAnswersPerSecond: 0.5,
  })
  try {
    await script('deploy', site)
  } finally {
    await report.pause(1000)
  }
  return describe(await load.stop())
}

/** Runs one of the project's scripts as an operator would, its output on this terminal. */
async function script(name: 'setup' | 'deploy', site: OwnSite, ...options: string[]): Promise<void> {
  const argv = [join(projectRoot, `scripts/${name}.mts`), '--env-file', site.envFile, ...options]
  const child = spawn(process.execPath, argv, { stdio: ['ignore', 'inherit', 'inherit'] })
  const code = await new Promise<number | null>((resolve) => child.on('exit', resolve))
  if (code !== 0)
    throw new Problem(
      exitCodes.failed,
      `${name} ended with exit code ${code}`,
      'Its own message stands above.',
    )
}

async function down(site: OwnSite): Promise<void> {
  await removeOwnSite(site)
  const standIns =
    (await ask(['docker', 'image', 'ls', '--quiet', '--filter', 'reference=bob-standin/*'])) ?? ''
  for (const id of new Set(standIns.split('\n').filter(Boolean)))
    await run(removeImage(id)).catch(() => undefined)
  say(
    'Removed the trial: containers, images, volumes, network, nginx, .try/. Software from packages stays installed.',
  )
}
