/** The steps of the migration: each says by looking whether it is done, does it, and may be killed and repeated at any moment. */
import { existsSync, statSync } from 'node:fs'
import { copyFile, rename } from 'node:fs/promises'
import { basename, join, relative } from 'node:path'
import { build, pin } from '../actions.mts'
import { run } from '../command.mts'
import * as compose from '../compose.mts'
import { endSessions, makeBackup } from '../data/backup.mts'
import { credentialFiles, serviceFiles, type ConfigFile } from '../data/config.mts'
import { parts, readManifest, type Manifest } from '../data/manifest.mts'
import type { ByHand } from '../data/recovery.mts'
import { megabytes } from '../data/room.mts'
import { setFolder } from '../data/sets.mts'
import { rememberProven } from '../data/verified.mts'
import * as engine from '../engine.mts'
import { readEnv, readText } from '../envfile.mts'
import { isSameFolder, makeFolders } from '../folders.mts'
import { newReleaseName } from '../releases.mts'
import type { Site } from '../settings.mts'
import { alive, detail, exitCodes, interrupted, Problem, refuseInDryRun, warn } from '../report.mts'
import { usesLiveKit } from '../checks/settings.mts'
import { appSecrets } from '../secrets.mts'
import { differences as nginxDifferences } from '../traffic.mts'
import { reasonToDump, sortingOf, usedLocales } from './database.mts'
import { note, notes } from './journal.mts'
import { nameOf, type Legacy } from './look.mts'
import type { Migration } from './migration.mts'
import { replaceNginx, type LegacyNginx } from './nginx.mts'
import { redisMajor } from './redis.mts'
import { differences, freshDatabaseFolder, isCopyOld, writeSettings } from './settings.mts'
import { removeNew, startPostgresql } from './newsetup.mts'
import { isSwitched, legacyView, switchOver, uploadsOwner } from './switch.mts'
import { copyUploads, differingUploads, newProgress } from './uploads.mts'

export interface Step {
  /** For --until. */
  name: string
  title: string
  /** What a dry run says. */
  plan: (migration: Migration) => string | Promise<string>
  /** Already done? Missing for a build: only to build it tells, from the engine's cache. */
  isDone?: (migration: Migration) => Promise<boolean>
  act: (migration: Migration) => Promise<void>
  /** Really done? Where that is another question than `isDone`. @param since when it was begun, in ms since 1970 @returns what is not */
  left?: (migration: Migration, since: number) => Promise<string[]>
}

/** Nobody notices. */
export const preparation: Step[] = [
  {
    name: 'backup',
    title: 'Back the legacy site up',
    plan: ({ site }) =>
      `write a set of database, uploads and configuration to ${site.folders.backups}, and *.backup beside the legacy files`,
    isDone: hasBackup,
    act: backUp,
    // However long it took.
    left: async ({ site }) => ((await backupOf(site)) ? [] : ['the set cannot be read']),
  },
  {
    name: 'settings',
    title: 'Write the settings of the new set-up',
    plan: async (migration) => ['write, secrets masked:', ...(await changes(migration))].join('\n'),
    isDone: areSettingsDone,
    act: async (migration) => {
      for (const line of await changes(migration)) detail(line)
      migration.site = await writeSettings(migration.envFile, migration.legacy, migration.settings)
      await makeFolders(migration.site)
    },
    // Somebody may edit the legacy application at any time: the next run takes that.
    left: async (migration) =>
      (await areSettingsWritten(migration))
        ? []
        : ['a file or folder is missing', ...(await changes(migration))],
  },
  {
    name: 'uploads',
    title: 'Copy the uploads, while the legacy site runs',
    plan: ({ legacy, site }) =>
      `copy ${legacy.uploads} to ${site.folders.uploads}, and compare the SHA-256 of each file`,
    isDone: async ({ legacy, site }) =>
      existsSync(site.folders.uploads) &&
      (await differingUploads(legacy.uploads, site.folders.uploads)).length === 0,
    act: copyAll,
    left: notCopied,
  },
  {
    name: 'build',
    title: 'Build the new images, make the containers, start nothing that collides',
    plan: ({ site }) => `build ${site.image} from ${site.source}, PostgreSQL and Redis`,
    act: buildAll,
    left: notPrepared,
  },
]

/** From the first of these on visitors notice. */
export const impact: Step[] = [
  {
    name: 'switch',
    title: 'Switch: stop the legacy set-up, start the new one on its data',
    plan: ({ legacy }) =>
      `stop ${legacy.folder}, copy the uploads that have changed, start PostgreSQL, Redis and strapi-master`,
    isDone: isSwitched,
    act: switchOver,
  },
  {
    name: 'nginx',
    title: 'nginx: the new site in place of the legacy one',
    plan: ({ site, nginx }) =>
      `install ${site.nginx.confFile}${nginx.files.length > 0 ? `, keep ${nginx.files.join(', ')} elsewhere` : ''}`,
    isDone: async ({ site, nginx }) =>
      (await nginxDifferences(site)).length === 0 && nginx.files.length === 0,
    act: ({ site, nginx }) => replaceNginx(site, nginx.files),
  },
]

/** What visitors do in an hour may be lost; more is worth another set. */
const backupAgeMs = 3_600_000

async function hasBackup({ site }: Migration): Promise<boolean> {
  const manifest = await backupOf(site)
  return manifest !== undefined && Date.now() - Date.parse(manifest.createdAt) < backupAgeMs
}

async function backupOf(site: Site): Promise<Manifest | undefined> {
  const { backup } = await notes(site)
  return backup ? await readManifest(setFolder(site, backup)).catch(() => undefined) : undefined
}

/** Through the code of data.mts: one state, read back. The copies beside the files are those of the runbook. */
async function backUp({ site, legacy, nginx }: Migration): Promise<void> {
  refuseInDryRun('back the legacy site up')
  await makeFolders(site)
  const beside = [
    ...legacy.composeFiles,
    join(legacy.folder, '.env'),
    join(legacy.folder, 'strapi/Dockerfile'),
  ]
  for (const path of beside.filter((one) => existsSync(one))) {
    const kept = await readText(`${path}.backup`)
    if (kept === undefined) {
      await copyFile(path, `${path}.backup.new`)
      await rename(`${path}.backup.new`, `${path}.backup`)
    } else if (kept !== (await readText(path)))
      detail(`${path}.backup was there before, is another one and stays; as it is now it is in the set`)
  }
  const { live } = legacy.database
  if (!live) throw new Error('the legacy PostgreSQL does not run')
  const ended = await endSessions(live.server)
  if (ended > 0) detail(`ended ${ended} sessions that an earlier run left in PostgreSQL`)
  const origin = {
    server: live.server,
    configFiles: await configFiles(legacy, nginx),
    byHand: byHand(legacy, live.server),
  }
  const { name, manifest } = await makeBackup(legacyView(site, legacy), [...parts], { origin })
  await rememberProven(site, name)
  await note(site, { backup: name })
  detail(`${setFolder(site, name)}, read back and right`)
  for (const line of manifest.missing) warn(`missing in the legacy site already: ${line}`)
}

/** For RECOVERY.md. */
function byHand({ services: { strapi, postgresql } }: Legacy, server: compose.Server): ByHand {
  const superuser = typeof server === 'string' ? 'postgres' : server.superuser
  return {
    inContainer: `docker exec -i -u postgres -e PGUSER=${superuser} ${nameOf(postgresql)}`,
    stop: `docker stop ${nameOf(strapi)}`,
    start: `docker start ${nameOf(strapi)}`,
  }
}

async function configFiles(legacy: Legacy, nginx: LegacyNginx): Promise<ConfigFile[]> {
  const { folder, source, settings } = legacy
  const nameIn = (path: string) => {
    const inside = relative(folder, path)
    return inside.startsWith('..') ? basename(path) : inside
  }
  // Below the folders of the services there may be data.
  const ofServices = (await serviceFiles(folder)).filter(([name]) => name.split('/').length === 3)
  const files: ConfigFile[] = [
    ['docker/.env', join(folder, '.env')],
    ['strapi/.env', join(source, '.env')],
    ...legacy.composeFiles.map((path): ConfigFile => [`docker/${nameIn(path)}`, path]),
    ...ofServices.filter(([, path]) => statSync(path, { throwIfNoEntry: false })?.isFile()),
    ...nginx.files.map((path): ConfigFile => [`nginx${path}`, path]),
    ...credentialFiles(settings, folder),
  ]
  return files.filter(([, path]) => existsSync(path))
}

async function areSettingsDone(migration: Migration): Promise<boolean> {
  if (await isCopyOld(migration.site, migration.legacy)) return false
  return await areSettingsWritten(migration)
}

async function areSettingsWritten(migration: Migration): Promise<boolean> {
  const { site } = migration
  const application = (await readEnv(join(site.source, '.env'))) ?? {}
  const isComplete =
    appSecrets.every((key) => application[key]) && existsSync(join(site.source, 'package.json'))
  return isComplete && existsSync(site.folders.postgres) && (await changes(migration)).length === 0
}

/** Where there is no file yet, it is told from the legacy one. */
async function changes({ envFile, settings, legacy }: Migration): Promise<string[]> {
  const files: [string, string, string][] = [
    [envFile, join(legacy.folder, '.env'), settings.docker],
    [join(settings.site.source, '.env'), join(legacy.source, '.env'), settings.application],
  ]
  const lines: string[] = []
  for (const [path, theirs, text] of files) {
    const own = await readText(path)
    const different = await differences(own ?? (await readText(theirs)), text)
    if (own === undefined)
      lines.push(`${path}: as ${theirs}${different.length > 0 ? ', but for what follows' : ''}`)
    lines.push(...different.map((line) => `${path}: ${line}`))
  }
  return lines
}

async function copyAll({ legacy, site }: Migration): Promise<void> {
  const progress = newProgress()
  const options = { removesOthers: true, progress, signal: interrupted }
  const { files, copied, bytes } = await alive(
    () => `${progress.files} files looked at, ${megabytes(progress.bytes)} copied`,
    () => copyUploads(legacy.uploads, site.folders.uploads, uploadsOwner, options),
  )
  detail(`${files} files: ${copied} copied (${megabytes(bytes)}), the SHA-256 of each compared`)
}

/** What editors have changed since is for the pass that comes when Strapi has stopped. */
async function notCopied({ legacy, site }: Migration, since: number): Promise<string[]> {
  const different = await differingUploads(legacy.uploads, site.folders.uploads)
  return different.filter((name) => {
    const source = statSync(join(legacy.uploads, name), { throwIfNoEntry: false })
    return source !== undefined && source.ctimeMs < since
  })
}

async function buildAll(migration: Migration): Promise<void> {
  const { site } = migration
  // Also what was built before: somebody may have mended it since. What has not changed comes from the cache.
  const release = await newReleaseName(site)
  await build(site, release)
  await pin(site, release)
  await alive(
    () => 'building PostgreSQL and Redis',
    () => run(compose.buildServices(site), { timeoutMs: 3_600_000, env: { DOCKER_BUILDKIT: '1' } }),
  )
  const reason = await reasonNotToShare(migration)
  detail(
    reason === undefined
      ? 'the new PostgreSQL takes the data over as it is'
      : `${reason}: the database goes to ${site.folders.postgres} by dump and restore; the old one is kept`,
  )
  await refuseOlderRedis(migration)
  if (reason !== undefined) await warnOfOthers(migration)
  await makeContainers(migration, reason === undefined)
}

/** Each service has a container of the image that is there under its name now, and what would collide does not run. */
async function notPrepared({ site }: Migration): Promise<string[]> {
  const wrong: string[] = []
  for (const service of ['postgresql', 'redis', 'strapi-master']) {
    const [made] = await engine.serviceContainers(site.project, service)
    const { Image: id, Config, State } = made ?? {}
    if (Config === undefined) wrong.push(`${service} has no container`)
    else if ((await engine.image(Config.Image))?.Id !== id) wrong.push(`${service} is not of ${Config.Image}`)
    else if (service === 'strapi-master' && Config.Image !== `${site.image}:${site.release}`)
      wrong.push(`strapi-master is of ${Config.Image}, not of ${site.release}`)
    // In a folder of its own, PostgreSQL runs already.
    else if (service !== 'postgresql' && State?.Status !== 'created') wrong.push(`${service} was started`)
  }
  return wrong
}

async function refuseOlderRedis({ site, legacy }: Migration): Promise<void> {
  const [from, to] = await Promise.all([
    redisMajor(legacy.services.redis.container.Image),
    redisMajor(`${site.values.CONTAINER_PREFIX || 'bob-'}redis`),
  ])
  if (!(to < from)) return
  throw new Problem(
    exitCodes.usage,
    `the data is of Redis ${from}, and ${site.values.REDIS_IMAGE} is Redis ${to}; visitors are served as before`,
    `Set REDIS_IMAGE in ${site.envFile} to one of Redis ${from} or newer.`,
  )
}

/** A dump is of one database. */
async function warnOfOthers({ legacy: { database } }: Migration): Promise<void> {
  if (!database.live) return
  const sql = `SELECT datname FROM pg_database WHERE NOT datistemplate AND datname <> 'postgres' ORDER BY 1`
  const names = (await run(compose.query(database.live.server, 'postgres', sql))).trim().split('\n')
  const others = names.filter((name) => name !== database.name)
  if (others.length > 0)
    warn(`PostgreSQL also holds ${others.join(', ')}, which stays behind: dump and restore it by hand`)
}

/** The order of texts, and who owns what, must not change under the data. @throws Problem when there is no way at all */
async function reasonNotToShare({ site, legacy }: Migration): Promise<string | undefined> {
  const { database } = legacy
  const [from, to, used] = await Promise.all([
    sortingOf(legacy.services.postgresql.container.Image),
    sortingOf(`${site.values.CONTAINER_PREFIX || 'bob-'}postgresql`),
    usedLocales(legacy),
  ])
  if (to.major < from.major)
    throw new Problem(
      exitCodes.usage,
      `the data is of PostgreSQL ${from.major}, and ${site.values.POSTGRES_IMAGE} is PostgreSQL ${to.major}; visitors are served as before`,
      `Set POSTGRES_IMAGE in ${site.envFile} to one of PostgreSQL ${from.major} or newer.`,
    )
  if (database.isVolume) return 'the data is in a volume of the engine, not in a folder'
  if (site.database.name !== database.name || site.database.user !== database.user)
    return 'Strapi gets a database and a user of its own'
  if (!isSameFolder(site.folders.postgres, await freshDatabaseFolder(legacy)))
    return 'POSTGRES_VOLUME is another folder'
  return reasonToDump(from, to, used)
}

/** All of them, as the settings are now; none is started, but PostgreSQL in a folder of its own. */
async function makeContainers({ site, legacy }: Migration, isShared: boolean): Promise<void> {
  await removeNew(site)
  const volume = isShared ? { POSTGRES_VOLUME: legacy.database.folder } : undefined
  const env = { STRAPI_VERSION: site.release, ...volume }
  await run(compose.create(site, 'strapi-master'), { env })
  // Its image may have to come from far away: not while calls are off.
  if (usesLiveKit(site))
    await alive(
      () => 'fetching the image of LiveKit',
      () => run(compose.createLiveKit(site), { env, timeoutMs: 1_800_000 }),
    )
  if (isShared) return
  const [postgresql] = await engine.serviceContainers(site.project, 'postgresql')
  if (postgresql) await startPostgresql(postgresql)
}
