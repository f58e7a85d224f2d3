/** The site's nginx configuration: rendered from the shipped file, installed, tested, reloaded, and put back when the test fails. */
import { access, constants, mkdir, readdir, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { existsSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { readText } from './envfile.mts'
import { ask, hasSystemd, run } from './command.mts'
import { detail, exitCodes, explain, Problem, refuseInDryRun, warn } from './report.mts'
import { releaseTime } from './releases.mts'
import { projectRoot, type Site } from './settings.mts'
import { differences } from './traffic.mts'

export const shippedFile = join(projectRoot, 'nginx/bob.strapi-pro.com.conf')

/** The shipped file with the defaults of .env.example replaced by this site's values. */
export async function render(site: Site): Promise<string> {
  const shipped = await readFile(shippedFile, 'utf8')
  const all = replacements(site)
  // In one pass, so that no value is taken for a default that comes later.
  const pattern = new RegExp(all.map(([source]) => `(${source.source})`).join('|'), 'gm')
  return shipped.replace(pattern, (found: string, ...groups: unknown[]) => {
    const at = groups.slice(0, all.length).findIndex((group) => group !== undefined)
    return all[at]?.[1] ?? found
  })
}

/** What the shipped file says literally, and what this site has in its place. The first that fits counts. */
export function replacements(site: Site): [RegExp, string][] {
  const { nginx, folders, slots } = site
  // Names of upstreams, zones and variables are shared by all sites of one nginx.
  // $2bob would be the second part of the last match, and "bob".
  const prefix = prefixOf(site)
  const tls: [RegExp, string][] = nginx.tls
    ? [
        [/#tls# /, ''],
        [/"tls":"none"/, `"tls":"${nginx.tls.certificate}"`],
        [/\/etc\/letsencrypt\/live\/bob\.strapi-pro\.com\/fullchain\.pem/, nginx.tls.certificate],
        [/\/etc\/letsencrypt\/live\/bob\.strapi-pro\.com\/privkey\.pem/, nginx.tls.key],
      ]
    : []
  const address = nginx.listen.slice(0, nginx.listen.lastIndexOf(':') + 1)
  const secure = nginx.tls ? '' : '#tls# '
  const listen: [RegExp, string][] = nginx.listen.includes(':')
    ? [
        [/ {2}listen 80;\n {2}listen \[::\]:80;/, `  listen ${nginx.listen};`],
        [
          / {2}#tls# listen 443 ssl http2;\n {2}#tls# listen \[::\]:443 ssl http2;/,
          `  ${secure}listen ${address}443 ssl http2;`,
        ],
      ]
    : [
        [/listen 80;/, `listen ${nginx.listen};`],
        [/listen \[::\]:80;/, `listen [::]:${nginx.listen};`],
      ]
  return [
    ...listen,
    ...tls,
    [/"listen":"80"/, `"listen":"${nginx.listen}"`],
    [/127\.0\.0\.1:1337\b/, slots['strapi-master'].address],
    [/127\.0\.0\.1:1338\b/, slots['strapi-slave'].address],
    [/127\.0\.0\.1:1339\b/, nginx.control],
    [/\/var\/log\/nginx\/bob\.strapi-pro\.com\.access\.log/, nginx.accessLog],
    [/\/var\/www\/bob\/traffic/, folders.traffic],
    [/\/var\/www\/bob\/uploads/, folders.uploads],
    [/bob\.strapi-pro\.com/, nginx.serverName],
    [/\bbob_(?=master|slave|inflight|connection|tls|\$slot)/, `${prefix}_`],
    [/(?<=log_format )bob\b|(?<= )bob(?=;$)/, prefix],
  ]
}

function prefixOf({ project }: Site): string {
  return project.replaceAll(/\W/g, '_').replace(/^(?=\d)/, '_')
}

/** User that nginx's workers run as, from its main configuration file; undefined when nginx does not tell. */
export async function workerUser(site: Site): Promise<string | undefined> {
  const dump = await ask([...site.nginx.command, '-T'])
  if (dump === undefined) return undefined
  return /^\s*user\s+(\S+?)[\s;]/m.exec(dump)?.[1] ?? 'nobody'
}

/**
 * Installs the configuration, tests it, makes nginx run it, and sees that it does.
 * An installed file that differs is kept beside the new one as `.previous`, as one is that has the name of an earlier SERVER_NAME.
 * @throws Problem with nginx's own words, and the old files back in place
 */
export async function install(site: Site): Promise<void> {
  const { confFile, command } = site.nginx
  refuseInDryRun(`write ${confFile}`)
  const wanted = await render(site)
  const before = await readText(confFile)
  await mkdir(dirname(confFile), { recursive: true })
  await mkdir(dirname(site.nginx.accessLog), { recursive: true })
  await writeFile(`${confFile}.new`, wanted)
  if (before !== undefined && before !== wanted) await writeFile(`${confFile}.previous`, before)
  await rename(`${confFile}.new`, confFile)
  if (before !== undefined && before !== wanted)
    detail(`${confFile} was there and differed: it is kept as ${confFile}.previous`)
  const former = (await formerFiles(site)).map((path) => ({ path, kept: unusedName(`${path}.previous`) }))
  for (const { path, kept } of former) {
    await rename(path, kept)
    detail(`${path} is this site's under another name: it is kept as ${kept}`)
  }
  try {
    await run([...command, '-t'])
  } catch (error) {
    for (const { path, kept } of former) await rename(kept, path)
    if (before === undefined) await rm(confFile, { force: true })
    else await writeFile(confFile, before)
    throw new Problem(
      exitCodes.usage,
      'nginx refuses the configuration; the old one is back in place',
      `See: ${command.join(' ')} -t`,
      error,
    )
  }
  try {
    await reloadOrStart(site)
  } catch (error) {
    // The checks that follow say who holds its ports.
    return warn(`nginx does not start:\n${explain(error)}`)
  }
  await untilLive(site)
}

/** What setup has installed under an earlier SERVER_NAME: nginx would refuse two files that name the same upstreams. */
async function formerFiles(site: Site): Promise<string[]> {
  // All three, or it is of another site, which nginx may refuse together with this one.
  const own = [`upstream ${prefixOf(site)}_master {`, `listen ${site.nginx.control};`, site.folders.traffic]
  const others = await otherFiles(site)
  return others.filter(({ text }) => own.every((part) => text.includes(part))).map(({ path }) => path)
}

function unusedName(path: string): string {
  return existsSync(path) ? `${path}-${releaseTime(new Date())}` : path
}

/** Makes nginx run what is installed, if it will: it may only have been stopped. @returns whether that is this site */
export async function revive(site: Site): Promise<boolean> {
  if ((await readText(site.nginx.confFile)) === undefined) return false
  if ((await ask([...site.nginx.command, '-t'])) === undefined) return false
  await reloadOrStart(site)
  for (let tries = 0; tries < 10; tries += 1) {
    if ((await differences(site)).length === 0) return true
    await sleep(100)
  }
  return false
}

async function reloadOrStart(site: Site): Promise<void> {
  const { command } = site.nginx
  const reloaded = await ask([...command, '-s', 'reload'])
  if (reloaded !== undefined) return
  const isHostNginx = command.length === 1
  await run(hasSystemd && isHostNginx ? ['systemctl', 'start', 'nginx'] : command, { daemon: true })
}

/** A reload is asynchronous: new workers take over some milliseconds later. */
async function untilLive(site: Site): Promise<void> {
  let found: string[] = []
  for (let tries = 0; tries < 50; tries += 1) {
    found = await differences(site)
    if (found.length === 0) return
    await sleep(100)
  }
  const included = `Is ${dirname(site.nginx.confFile)}/*.conf included by nginx's main file, and its error log quiet?`
  throw new Problem(
    exitCodes.usage,
    `nginx does not run the new configuration: ${found.join('; ')}`,
    included,
  )
}

/** Files of the folder that name the same control port: a second copy under another name. */
export async function rivals(site: Site): Promise<string[]> {
  const control = `listen ${site.nginx.control};`
  return (await otherFiles(site)).filter(({ text }) => text.includes(control)).map(({ path }) => path)
}

async function otherFiles({ nginx: { confFile } }: Site): Promise<{ path: string; text: string }[]> {
  const folder = dirname(confFile)
  const names: string[] = await readdir(folder).catch(() => [])
  const paths = names.filter((name) => name.endsWith('.conf')).map((name) => join(folder, name))
  const others = paths.filter((path) => path !== confFile)
  return await Promise.all(others.map(async (path) => ({ path, text: (await readText(path)) ?? '' })))
}

/** A folder that is not there yet is made in the nearest one that is. */
async function mayWrite(folder: string): Promise<boolean> {
  return await access(folder, constants.W_OK).then(
    () => true,
    (error: NodeJS.ErrnoException) => error.code === 'ENOENT' && mayWrite(dirname(folder)),
  )
}

/** Why this process cannot install the configuration, or undefined. */
export async function isInstallable(site: Site): Promise<string | undefined> {
  if ((await ask([...site.nginx.command, '-v'])) === undefined) return 'nginx is missing'
  const folder = dirname(site.nginx.confFile)
  return (await mayWrite(folder)) ? undefined : `${folder} is not writable by this user: run this with sudo`
}
