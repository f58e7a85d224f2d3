/** The steps of the migration: each says by looking whether it is done, does it, and may be killed and repeated at any moment. */
import { existsSync } from 'node:fs'
import { copyFile } from 'node:fs/promises'
import { join, relative } from 'node:path'
import { build, pin } from '../actions.mts'
import { run } from '../command.mts'
import * as compose from '../compose.mts'
import { endSessions, makeBackup } from '../data/backup.mts'
import type { ConfigFile } from '../data/config.mts'
import { parts, readManifest } from '../data/manifest.mts'
import { megabytes } from '../data/room.mts'
import { setFolder } from '../data/sets.mts'
import { rememberVerified } from '../data/verified.mts'
import * as engine from '../engine.mts'
import { readText, setValues, writeEnv } from '../envfile.mts'
import { makeFolders } from '../folders.mts'
import { imageOf, isReleaseName, newReleaseName } from '../releases.mts'
import { alive, detail, warn } from '../report.mts'
import { loadSite } from '../settings.mts'
import { differences as nginxDifferences } from '../traffic.mts'
import { reasonToDump, sortingOf, untilReady, usedLocales } from './database.mts'
import { note, notes } from './journal.mts'
import type { Legacy } from './look.mts'
import type { Migration } from './migration.mts'
import { replaceNginx, type LegacyNginx } from './nginx.mts'
import { differences, freshDatabaseFolder, writeSettings } from './settings.mts'
import { isSwitched, legacyView, sharesData, switchOver, uploadsOwner } from './switch.mts'
import { copyUploads, newProgress } from './uploads.mts'

export interface Step {
  /** For --until. */
  name: string
  title: string
  /** What a dry run says. */
  plan: (migration: Migration) => string | Promise<string>
  isDone: (migration: Migration) => Promise<boolean>
  act: (migration: Migration) => Promise<void>
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
  },
  {
    name: 'settings',
    title: 'Write the settings of the new set-up',
    plan: describeSettings,
    isDone: async (migration) =>
      (await changes(migration)).length === 0 && existsSync(migration.site.folders.postgres),
    act: async (migration) => {
      for (const line of await changes(migration)) detail(line)
      migration.site = await writeSettings(migration.envFile, migration.legacy, migration.settings)
      await makeFolders(migration.site)
    },
  },
  {
    name: 'uploads',
    title: 'Copy the uploads, while the legacy site runs',
    plan: ({ legacy, site }) =>
      `copy ${legacy.uploads} to ${site.folders.uploads}, and compare the SHA-256 of each file`,
    // A pass over what is the same costs as much as to see that it is.
    isDone: async () => false,
    act: copyAll,
  },
  {
    name: 'build',
    title: 'Build the new images, start nothing that collides',
    plan: ({ site }) => `build ${site.image} from ${site.source}, PostgreSQL and Redis`,
    isDone: isBuilt,
    act: buildAll,
  },
]

/** From the first of these on visitors notice. */
export const impact: Step[] = [
  {
    name: 'switch',
    title: 'Switch: stop the legacy set-up, start the new one on its data',
    plan: ({ legacy, site }) =>
      `stop ${legacy.folder}, copy the uploads that have changed, start PostgreSQL, Redis and strapi-master on ${site.folders.postgres}`,
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
  const { backup } = await notes(site)
  if (!backup) return false
  return await readManifest(setFolder(site, backup)).then(
    ({ createdAt }) => Date.now() - Date.parse(createdAt) < backupAgeMs,
    () => false,
  )
}

/** Through the code of data.mts: one state, read back. The copies beside the files are those of the runbook. */
async function backUp({ site, legacy, nginx }: Migration): Promise<void> {
  await makeFolders(site)
  for (const path of [
    ...legacy.composeFiles,
    join(legacy.folder, '.env'),
    join(legacy.folder, 'strapi/Dockerfile'),
  ])
    if (existsSync(path) && !existsSync(`${path}.backup`)) await copyFile(path, `${path}.backup`)
  const { live } = legacy.database
  if (!live) throw new Error('the legacy PostgreSQL does not run')
  const ended = await endSessions(live.server)
  if (ended > 0) detail(`ended ${ended} sessions that an earlier run left in PostgreSQL`)
  const origin = { server: live.server, configFiles: configFiles(legacy, nginx) }
  const { name, manifest } = await makeBackup(legacyView(site, legacy), [...parts], origin)
  await rememberVerified(site, { set: name, deep: false, wrong: [] })
  await note(site, { backup: name })
  detail(`${setFolder(site, name)}, read back and right`)
  for (const line of manifest.missing) warn(`missing in the legacy site already: ${line}`)
}

function configFiles(legacy: Legacy, nginx: LegacyNginx): ConfigFile[] {
  const files: ConfigFile[] = [
    ['docker/.env', join(legacy.folder, '.env')],
    ['strapi/.env', join(legacy.source, '.env')],
    ...legacy.composeFiles.map((path): ConfigFile => [`docker/${relative(legacy.folder, path)}`, path]),
    ...nginx.files.map((path): ConfigFile => [`nginx${path}`, path]),
  ]
  return files.filter(([, path]) => existsSync(path))
}

async function changes({ envFile, settings }: Migration): Promise<string[]> {
  const files: [string, string][] = [
    [envFile, settings.docker],
    [join(settings.site.source, '.env'), settings.application],
  ]
  const lines = await Promise.all(
    files.map(async ([path, text]) =>
      differences(await readText(path), text).map((line) => `${path}: ${line}`),
    ),
  )
  return lines.flat()
}

async function describeSettings(migration: Migration): Promise<string> {
  return ['write, secrets masked:', ...(await changes(migration))].join('\n')
}

async function copyAll({ legacy, site }: Migration): Promise<void> {
  const progress = newProgress()
  const copied = await alive(
    () => `${progress.files} files looked at, ${megabytes(progress.bytes)} copied`,
    () => copyUploads(legacy.uploads, site.folders.uploads, uploadsOwner, { removesOthers: true, progress }),
  )
  detail(
    `${copied.files} files: ${copied.copied} copied (${megabytes(copied.bytes)}), the SHA-256 of each compared`,
  )
}

async function isBuilt({ site }: Migration): Promise<boolean> {
  if (!isReleaseName(site.release) || (await imageOf(site, site.release)) === undefined) return false
  const made = await Promise.all(
    ['postgresql', 'redis'].map((service) => engine.serviceContainers(site.project, service)),
  )
  return (
    made.every((containers) => containers.length > 0) &&
    (await engine.container(site.slots['strapi-master'].container)) !== undefined
  )
}

/** The release is written down only once all of it is there. */
async function buildAll(migration: Migration): Promise<void> {
  const release = await newReleaseName(migration.site)
  await build(migration.site, release)
  await alive(
    () => 'building PostgreSQL and Redis',
    () => run(compose.buildServices(migration.site), { timeoutMs: 3_600_000, env: { DOCKER_BUILDKIT: '1' } }),
  )
  await chooseDatabaseFolder(migration)
  const { site } = migration
  await removeIdle(migration)
  await run(compose.create(site, 'strapi-master'), { env: { STRAPI_VERSION: release } })
  if (!sharesData(migration)) await startFreshDatabase(migration)
  await pin(site, release)
}

/** The legacy folder, as long as its texts sort the same under the new PostgreSQL. */
async function chooseDatabaseFolder(migration: Migration): Promise<void> {
  const { legacy, envFile } = migration
  if (!sharesData(migration))
    return detail('POSTGRES_VOLUME is another folder: the database goes there by dump and restore')
  const [from, to, used] = await Promise.all([
    sortingOf(legacy.services.postgresql.container.Image),
    sortingOf(`${migration.site.values.CONTAINER_PREFIX || 'bob-'}postgresql`),
    usedLocales(legacy),
  ])
  const reason = reasonToDump(from, to, used)
  if (reason === undefined) return detail('the new PostgreSQL takes the data over as it is')
  const text = setValues((await readText(envFile)) ?? '', {
    POSTGRES_VOLUME: await freshDatabaseFolder(legacy),
  })
  await writeEnv(envFile, text)
  migration.site = await loadSite(envFile)
  await makeFolders(migration.site)
  detail(
    `${reason}: the database goes to ${migration.site.folders.postgres} by dump and restore; the old folder is kept`,
  )
}

/** What an earlier run made with other settings; what runs already is left. */
async function removeIdle({ site }: Migration): Promise<void> {
  const services = await Promise.all(
    ['strapi-master', 'postgresql', 'redis'].map((service) =>
      engine.serviceContainers(site.project, service),
    ),
  )
  for (const { Id, State } of services.flat()) if (State.Status !== 'running') await run(['docker', 'rm', Id])
}

async function startFreshDatabase({ site }: Migration): Promise<void> {
  const [postgresql] = await engine.serviceContainers(site.project, 'postgresql')
  if (!postgresql) throw new Error('the new PostgreSQL has no container')
  await run(['docker', 'start', postgresql.Id])
  await untilReady(postgresql.Id, ['pg_isready', '--quiet', '--host=127.0.0.1'])
}
