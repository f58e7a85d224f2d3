/** A lost server from a bare one and a set: configuration first, then database and uploads. The application is there already. */
import { existsSync } from 'node:fs'
import { chown, mkdir, readFile, writeFile } from 'node:fs/promises'
import { basename, dirname, join, relative, resolve } from 'node:path'
import { parse } from 'dotenv'
import { startServices } from '../actions.mts'
import { agree } from '../agree.mts'
import { run, shellQuoted } from '../command.mts'
import { readText, setValues, writeEnv } from '../envfile.mts'
import { makeFolders, nearestFolder, strapiUid } from '../folders.mts'
import { alive, detail, exitCodes, explain, isDryRun, Problem, say, step, warn } from '../report.mts'
import { writeApplicationEnv, writeDockerEnv } from '../secrets.mts'
import { invokingUser } from '../users.mts'
import { asRoot, loadSite, projectRoot, scriptCommand, stateDirOf, type Site } from '../settings.mts'
import { observe } from '../slots.mts'
import { reachDatabase, secretsPrint } from './backup.mts'
import { exclusively } from './exclusive.mts'
import { listed, obstacles, type Acceptable } from './fitness.mts'
import { readManifest, wrongSums, type Manifest } from './manifest.mts'
import * as tools from './postgresql.mts'
import { restoreSet } from './restore.mts'
import { needRoom } from './room.mts'
import { importFolder } from './transfer.mts'
import { needRoot } from './undo.mts'
import { readArchive } from './untar.mts'

export interface NewHost {
  envFile: string
  /** The set, wherever it is. */
  folder: string
  /** Values that are set on this host win over those of the set. */
  keepSettings: boolean
  accept: Acceptable[]
  isAgreed: boolean
  waitMs: number
}

interface Found {
  manifest: Manifest
  /** config.tar, by name. */
  config: Map<string, Buffer>
  /** docker/.env and the application's as they will be. */
  settings: string
  application: string
  planned: Site
}

export async function restoreNewHost(request: NewHost): Promise<void> {
  const { envFile, folder, accept } = request
  needRoot(envFile, `restore --new-host ${folder}`)
  const found = await step('1/4', `Read ${folder}`, () => read(request))
  if (isDryRun()) {
    for (const [path, text] of [
      [envFile, found.settings],
      [join(found.planned.source, '.env'), found.application],
    ] as const)
      detail(`would write ${path}: ${changedNames((await readText(path)) ?? '', text) || 'as it is'}`)
    detail(
      `would set up the project ${found.planned.project} in ${found.planned.folders.uploads}, ${found.planned.folders.postgres}`,
    )
    return say('Nothing was changed.')
  }
  await agree(`Set this host up from ${folder}`, request.isAgreed)

  await refuseLiveSite(found.planned)
  await exclusively(found.planned, 'restore --new-host', request.waitMs, async () => {
    const site = await step('2/4', 'Settings of the set', () => writeSettings(request, found))
    const set = await step('3/4', 'Folders, PostgreSQL and Redis', async () => {
      await makeFolders(site)
      const name = await alive(
        () => 'taking the set over',
        () => importFolder(site, folder, accept),
      )
      await startServices(site)
      await run(tools.setPassword(await reachDatabase(site)))
      return name
    })
    const parts = found.manifest.parts.filter((part) => part !== 'config')
    const wish = {
      set,
      parts,
      // The secrets are those of the set by now, or it was accepted that they are not.
      accept: [...accept, 'other-secrets' as const],
      isAgreed: true,
      isNewHost: true,
    }
    if (parts.length > 0) await step('4/4', `Restore ${set}`, () => restoreSet(site, wish))
    const others = await differingConfig(found.config)
    if (others.length > 0)
      warn(
        `of the set's configuration these files are other ones here, and stay so:${listed(others)}\nPut one back: tar -xf ${shellQuoted(join(site.folders.backups, set, 'config.tar'))} -C ${shellQuoted(projectRoot)} ${others[0]}`,
      )
    const release = found.manifest.release ?? 'unknown'
    say(
      `Now: ${asRoot(scriptCommand('setup', envFile, '--install'))}\nThen: ${scriptCommand('deploy', envFile)} (the set is of release ${release}: the application should be that version)\nAnd backups every night: ${asRoot(scriptCommand('data', envFile, 'schedule'))}`,
    )
  })
}

/** Its passwords and settings would be changed under it. @throws Problem (usage) */
async function refuseLiveSite(site: Site): Promise<void> {
  const { master, slave } = await observe(site)
  if ([master, slave].every(({ status }) => status === 'absent' || status === 'stopped')) return
  throw new Problem(
    exitCodes.usage,
    'this host runs the site already; nothing was changed',
    `To restore a set on it: ${scriptCommand('data', site.envFile, 'restore SET')}`,
  )
}

/** Everything that can be known before anything is written. @throws Problem that lists all that speaks against it */
async function read({ envFile, folder, keepSettings, accept }: NewHost): Promise<Found> {
  const wrong = existsSync(folder)
    ? await alive(
        () => `reading ${folder}`,
        () => wrongSums(folder),
      )
    : [`there is no ${folder}`]
  const manifest = await readManifest(folder).catch((error: unknown) => {
    throw refusal(folder, wrong.length > 0 ? wrong : [explain(error)], [])
  })
  if (!manifest.parts.includes('config'))
    throw new Problem(
      exitCodes.usage,
      `${folder} holds no configuration, so it cannot set a host up`,
      `Take a set of everything, or set the host up by hand: ${scriptCommand('setup', envFile)}`,
    )
  const config = await readConfig(join(folder, 'config.tar')).catch((error: unknown) => {
    throw refusal(folder, [...wrong, `config.tar cannot be read: ${explain(error)}`], [])
  })
  const settings = merged(await readText(envFile), config.get('docker/.env')?.toString() ?? '', keepSettings)
  // Also checks them before they are written.
  const planned = await loadSite(envFile, { text: settings })
  const { source } = planned
  if (!existsSync(join(source, 'package.json')))
    throw new Problem(
      exitCodes.usage,
      `the application is not in ${source} (STRAPI_SOURCE); nothing was changed`,
      'Get it there first: a set holds its data and its secrets, not its code.',
    )
  const application = merged(
    await readText(join(source, '.env')),
    config.get('strapi/.env')?.toString() ?? '',
    keepSettings,
  )
  const found = obstacles(manifest, {
    parts: manifest.parts,
    wrong,
    // As far as the image's name tells: postgres:16-alpine.
    serverVersion: /(?:^|\/)postgres(?:ql)?:(\d+)/.exec(parse(settings).POSTGRES_IMAGE ?? '')?.[1],
    secrets: secretsPrint(parse(application), manifest.createdAt),
    schemaHash: undefined,
    isRunning: false,
    runningRelease: undefined,
    hasRelease: false,
  }).filter((one) => !accept.includes(one.accept))
  if (found.length > 0)
    throw refusal(
      folder,
      found.map(({ sentence }) => sentence),
      found.map((one) => one.accept),
    )
  await needPlace(planned, folder, manifest)
  detail(`release ${manifest.release ?? 'unknown'}: ${manifest.parts.join(', ')}`)
  return { manifest, config, settings, application, planned }
}

/** For the set itself; what it brings is looked at when the folders are there. @throws Problem before anything is written */
async function needPlace({ folders }: Site, folder: string, { files }: Manifest): Promise<void> {
  // It is in its place already.
  if (dirname(folder) === folders.backups || existsSync(join(folders.backups, basename(folder)))) return
  const bytes = Object.values(files).reduce((total, { sizeBytes }) => total + sizeBytes, 0)
  await needRoom('the set needs', [{ folder: await nearestFolder(folders.backups), bytes }])
}

function refusal(folder: string, sentences: string[], accept: Acceptable[]): Problem {
  const words = [...new Set(accept)].map((word) => ` --accept ${word}`).join('')
  return new Problem(
    exitCodes.usage,
    `this host is not set up from ${folder}; nothing was changed:${listed(sentences)}`,
    `Give the folder of another set; an exported one is unpacked with: tar -xf FILE${words && `\nOr accept it:${words}`}`,
  )
}

async function writeSettings({ envFile }: NewHost, { config, settings, application }: Found): Promise<Site> {
  await mkdir(dirname(envFile), { recursive: true })
  const stateDir = stateDirOf(envFile)
  await replaceText(envFile, settings, stateDir)
  // What this version of the project needs and the set does not know yet.
  const site = await loadSite(envFile, { text: await writeDockerEnv(envFile) })
  await replaceText(join(site.source, '.env'), application, stateDir)
  await writeApplicationEnv(site)
  await writeCredentials(site, config)
  return site
}

/** Files of services, which belong to the version of this project: named, not overwritten. */
export async function differingConfig(config: Map<string, Buffer>): Promise<string[]> {
  const others: string[] = []
  for (const [name, content] of config) {
    if (!name.startsWith('docker/') || name === 'docker/.env') continue
    const own = await readFile(join(projectRoot, name)).catch(() => undefined)
    if (!own?.equals(content)) others.push(name)
  }
  return others
}

/** The old text is kept in the folder of what is remembered. */
async function replaceText(path: string, text: string, stateDir: string): Promise<void> {
  const before = await readText(path)
  if (before === text) return detail(`${path} is as in the set`)
  if (before?.trim()) {
    await mkdir(stateDir, { recursive: true, mode: 0o700 })
    const kept = join(stateDir, `${relative(projectRoot, path).replaceAll(/[^\w.-]+/g, '-')}.before-restore`)
    const earlier = await readText(kept)
    // Never over another one: that is what somebody wrote by hand.
    if (earlier !== undefined && earlier !== before) await writeEnv(`${kept}.${Date.now()}`, before)
    else await writeEnv(kept, before)
    detail(`what was in ${path} is in ${kept}`)
  }
  await writeEnv(path, text)
  const user = invokingUser()
  if (before === undefined && user) await chown(path, user.uid, user.gid)
  detail(`${path}: ${before === undefined ? 'written' : `changed ${changedNames(before, text)}`}`)
}

function changedNames(before: string, text: string): string {
  const [old, values] = [parse(before), parse(text)]
  return Object.keys(values)
    .filter((key) => old[key] !== values[key])
    .join(', ')
}

/** Keys for Firebase and Apple, where they are missing; Strapi's user reads them. */
async function writeCredentials(site: Site, config: Map<string, Buffer>): Promise<void> {
  for (const [name, path] of [
    ['secrets/firebase', site.values.FIREBASE_CREDENTIALS],
    ['secrets/apns', site.values.APNS_KEY],
  ] as const) {
    const content = config.get(name)
    if (!content || !path) continue
    const target = resolve(projectRoot, 'docker', path)
    if (existsSync(target)) continue
    await mkdir(dirname(target), { recursive: true })
    await writeFile(target, content, { mode: 0o400 })
    await chown(target, strapiUid, strapiUid)
    detail(`wrote ${target}`)
  }
}

/** The release of the lost server is not here; a deploy names its own. */
function merged(own: string | undefined, theirs: string, keepOwn: boolean): string {
  const known = parse(own ?? '')
  const values = Object.fromEntries(Object.entries(parse(theirs)).filter(([key]) => !(keepOwn && known[key])))
  if ('STRAPI_VERSION' in values) values.STRAPI_VERSION = known.STRAPI_VERSION || 'latest'
  return setValues(own?.trim() ? own : theirs, values)
}

async function readConfig(tarPath: string): Promise<Map<string, Buffer>> {
  const files = new Map<string, Buffer>()
  await readArchive(tarPath, ({ name }) => {
    const parts: Buffer[] = []
    return { write: (part) => parts.push(part), end: () => files.set(name, Buffer.concat(parts)) }
  })
  return files
}
