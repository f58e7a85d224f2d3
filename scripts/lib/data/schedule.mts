/** The cron file of a site: a nightly backup with prune, a weekly verify --deep. Written, tried, removed. */
import { existsSync } from 'node:fs'
import { chmod, readdir, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { ask, run, shellQuoted } from '../command.mts'
import { readText } from '../envfile.mts'
import {
  alive,
  change,
  detail,
  exitCodes,
  explain,
  interrupted,
  isDryRun,
  Problem,
  say,
  warn,
} from '../report.mts'
import { asRoot, scriptCommand, type Site } from '../settings.mts'

const mark = '# strapi-blue-green:'
const path = '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'
const weekly = '45 5 * * 0'
const commands = [['backup'], ['prune'], ['verify', '--deep']]

/**
 * Text of the file. Everything in it is absolute, since cron gives neither a folder nor a PATH.
 * @param at five fields of cron, see crontab(5)
 */
export function cronFile(site: Site, at: string): string {
  const [backup, prune, verify] = commands.map((one) =>
    cronCommand(site, ...one).replaceAll('%', String.raw`\%`),
  )
  return `${mark} written by "${scriptCommand('data', site.envFile, 'schedule')}", removed by the same with --remove
SHELL=/bin/sh
PATH=${path}
${at} root ${backup}; ${prune}
${weekly} root ${verify}
`
}

function cronCommand(site: Site, ...options: string[]): string {
  const words = [process.execPath, join(site.root, 'scripts/data.mts'), ...options]
  return [...words, '--quiet', '--wait', '4h', '--env-file', site.envFile].map(shellQuoted).join(' ')
}

/** Installs the file and runs all that is in it once, as cron would. @throws Problem */
export async function schedule(site: Site, at: string): Promise<void> {
  if (!/^([\d*,/A-Za-z-]+\s+){4}[\d*,/A-Za-z-]+$/.test(at))
    throw new Problem(
      exitCodes.usage,
      `--at "${at}" is not five fields of cron`,
      'For example: --at "30 3 * * *"',
    )
  const text = cronFile(site, at)
  await needCron(site, text)
  if (isDryRun()) say(text)
  await change(`write ${fileOf(site)}`, async () => {
    await refuseForeign(site)
    const partial = join(site.cronDir, `.${nameOf(site)}`)
    try {
      await writeFile(partial, text, { mode: 0o644 })
      // Whatever the umask: cron takes no file that others could not read, and none that they could write.
      await chmod(partial, 0o644)
      await rename(partial, fileOf(site))
    } catch (error) {
      throw new Problem(
        exitCodes.usage,
        `${fileOf(site)} could not be written`,
        asRoot(scriptCommand('data', site.envFile, 'schedule')),
        error,
      )
    }
    detail(`wrote ${fileOf(site)}`)
  })
  await change('run backup, prune and verify --deep once as cron would', () => tryAsCron(site, at))
}

/** Without a terminal, from another folder, with nothing in the environment but what cron sets. */
async function tryAsCron(site: Site, at: string): Promise<void> {
  const bare = ['env', '-i', 'HOME=/root', 'LOGNAME=root', 'SHELL=/bin/sh', `PATH=${path}`]
  for (const command of commands) {
    interrupted.throwIfAborted()
    const job = `umask 077; cd /; ${cronCommand(site, ...command)}`
    await alive(
      () => `${command.join(' ')} runs as cron would run it`,
      () => run([...bare, '/bin/sh', '-c', job], { timeoutMs: 12 * 3_600_000 }),
    ).catch((error: unknown) => {
      interrupted.throwIfAborted()
      // Behind the long command.
      const said = explain(error).split('\n').slice(1).join('\n')
      throw new Problem(
        exitCodes.degraded,
        `${fileOf(site)} is in place, but its ${command.join(' ')} did not go well:\n${said}`,
        `Mend what it says, then: ${scriptCommand('data', site.envFile, `schedule --at "${at}"`)}`,
      )
    })
  }
  say(`Done: ${fileOf(site)} is in place, and all that is in it ran well.`)
}

/** Removes the file. Not being there is fine. */
export async function unschedule(site: Site): Promise<void> {
  if (!existsSync(fileOf(site))) return say(`There is no ${fileOf(site)}.`)
  await refuseForeign(site)
  await change(`remove ${fileOf(site)}`, async () => {
    await rm(fileOf(site))
    say(`Removed ${fileOf(site)}: nothing is backed up by itself any more.`)
  })
}

async function refuseForeign(site: Site): Promise<void> {
  const text = await readText(fileOf(site))
  if (text === undefined || text.startsWith(mark)) return
  throw new Problem(exitCodes.usage, `${fileOf(site)} was written by somebody else`, 'Move it away.')
}

async function needCron(site: Site, text: string): Promise<void> {
  const daemon = await ask(['sh', '-c', `PATH=${path}; command -v cron || command -v crond`])
  if (daemon === undefined || !existsSync(site.cronDir))
    throw new Problem(
      exitCodes.usage,
      daemon === undefined ? 'there is no cron on this host' : `there is no ${site.cronDir} (CRON_DIR)`,
      `Install it: ${asRoot('apt-get install cron')}\nThen: ${scriptCommand('data', site.envFile, 'schedule')}\nOr let something else run these lines:\n${text}`,
    )
  if (!(await isRunning(['cron', 'crond'])))
    warn(`cron is installed, but does not run: ${asRoot('systemctl enable --now cron')}`)
}

async function isRunning(names: string[]): Promise<boolean> {
  for (const pid of await readdir('/proc')) {
    const name = await readFile(`/proc/${pid}/comm`, 'utf8').catch(() => '')
    if (names.includes(name.trim())) return true
  }
  return false
}

function nameOf(site: Site): string {
  return `strapi-blue-green-${site.project}`
}

function fileOf(site: Site): string {
  return join(site.cronDir, nameOf(site))
}
