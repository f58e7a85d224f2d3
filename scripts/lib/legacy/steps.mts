/** The steps of the migration: each says by looking whether it is done, does it, and may be killed and repeated at any moment. */
import { existsSync, statSync } from 'node:fs'
import { copyFile, rename } from 'node:fs/promises'
import { basename, join, relative } from 'node:path'
import type { Server } from '../compose.mts'
import { endSessions, makeBackup } from '../data/backup.mts'
import { credentialFiles, serviceFiles, type ConfigFile } from '../data/config.mts'
import { parts, readManifest, type Manifest } from '../data/manifest.mts'
import type { ByHand } from '../data/recovery.mts'
import { megabytes } from '../data/room.mts'
import { setFolder } from '../data/sets.mts'
import { rememberProven } from '../data/verified.mts'
import { readEnv, readText } from '../envfile.mts'
import { makeFolders } from '../folders.mts'
import { alive, detail, interrupted, refuseInDryRun, warn } from '../report.mts'
import { appSecrets } from '../secrets.mts'
import type { Site } from '../settings.mts'
import { differences as nginxDifferences } from '../traffic.mts'
import { isCopyOld } from './application.mts'
import { buildAll, isBuilt, notPrepared } from './build.mts'
import { note, notes } from './journal.mts'
import { nameOf, type Legacy } from './look.mts'
import { see, type Migration } from './migration.mts'
import { replaceNginx, type LegacyNginx } from './nginx.mts'
import { differences, writeSettings } from './settings.mts'
import { isSwitched, legacyView, switchOver, uploadsOwner } from './switch.mts'
import { copyUploads, differingUploads, keepOwn, newProgress } from './uploads.mts'

export interface Step {
  /** For --until. */
  name: string
  title: string
  /** What a dry run says. */
  plan: (migration: Migration) => string | Promise<string>
  /** Already done? */
  isDone: (migration: Migration) => Promise<boolean>
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
      // A backup may have taken long: what was edited meanwhile counts.
      Object.assign(migration, await see(migration.envFile, migration.legacy.folder, migration.leave))
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
    isDone: isBuilt,
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
  const ageMs = Date.now() - Date.parse(manifest?.createdAt ?? '')
  // One from the future was made by a clock that was wrong.
  return ageMs >= 0 && ageMs < backupAgeMs
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
function byHand({ services: { strapi, postgresql } }: Legacy, server: Server): ByHand {
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
  if ((await notes(site)).areUploadsUnsaved) {
    const kept = await keepOwn(legacy.uploads, site.folders.uploads)
    if (kept !== undefined)
      warn(`uploads that are in no set, of the last time that this set-up served: ${kept}`)
    await note(site, { areUploadsUnsaved: false })
  }
  const progress = newProgress()
  const options = { removesOthers: true, progress, signal: interrupted }
  const { files, copied, bytes } = await alive(
    () => `${progress.files} files looked at, ${megabytes(progress.bytes)} copied`,
    () => copyUploads(legacy.uploads, site.folders.uploads, uploadsOwner, options),
  )
  detail(`${files} files: ${copied} copied (${megabytes(bytes)}), each compared by its SHA-256`)
}

/** What editors have changed since is for the pass that comes when Strapi has stopped. */
async function notCopied({ legacy, site }: Migration, since: number): Promise<string[]> {
  const different = await differingUploads(legacy.uploads, site.folders.uploads)
  return different.filter((name) => {
    const source = statSync(join(legacy.uploads, name), { throwIfNoEntry: false })
    return source !== undefined && source.ctimeMs < since
  })
}
