/** The settings of the new set-up: those of the legacy one, with what is different here. Comments and order stay. */
import { existsSync } from 'node:fs'
import { mkdir } from 'node:fs/promises'
import { dirname, join, resolve } from 'node:path'
import { parse } from 'dotenv'
import { addMissing, readText, setValues, writeEnv } from '../envfile.mts'
import { isSameFolder } from '../folders.mts'
import { refuseInDryRun } from '../report.mts'
import { appSecrets, connection, writeApplicationEnv, writeDockerEnv } from '../secrets.mts'
import { exampleFile, loadSite, projectRoot, type Site } from '../settings.mts'
import { bringApplication, giveToUser } from './application.mts'
import type { Legacy } from './look.mts'
import type { LegacyNginx } from './nginx.mts'

export interface Settings {
  /** docker/.env as it will be. */
  docker: string
  /** The application's. */
  application: string
  /** The site that they make. */
  site: Site
  /** Keys that were set here already, and stay, to another value than in the legacy set-up. */
  kept: string[]
}

/** Names of the legacy set-up itself, and what has another meaning here. */
const notCarried =
  /^(COMPOSE_.*|CONTAINER_PREFIX|NETWORK_NAME|STRAPI_(VERSION|IMAGE|VOLUME|PORT)|POSTGRES_(VOLUME|USER|PASSWORD|DB)|REDIS_PASSWORD)$/
const paths = ['UPLOADS_VOLUME', 'BACKUP_DIR', 'FIREBASE_CREDENTIALS', 'APNS_KEY']
/** Roles and databases that the new PostgreSQL has for itself. */
const reserved = /^(postgres|pg_.*|template[01])$/

/**
 * What is set in docker/.env here stays, but for what describes the data: that is as the legacy set-up has it.
 * @param alsoWrong what else is to be said of a site that cannot be
 * @throws Problem (usage) that lists all that is wrong with the result
 */
export async function planSettings(
  envFile: string,
  legacy: Legacy,
  nginx: LegacyNginx,
  { isRetired, alsoWrong }: { isRetired: boolean; alsoWrong: (site: Site) => Promise<string[]> },
): Promise<Settings> {
  const example = (await readText(exampleFile)) ?? ''
  const defaults = parse(example)
  const own = (await readText(envFile)) ?? ''
  const ownValues = parse(own)
  const set = Object.fromEntries(
    Object.entries(ownValues).filter(([key, value]) => value !== '' && value !== defaults[key]),
  )
  // Never the folder in which the legacy one runs, until that has stopped: somebody may type `up` in between.
  const ownFolder = set.POSTGRES_VOLUME && resolve(projectRoot, 'docker', set.POSTGRES_VOLUME)
  if (!isRetired && ownFolder && isSameFolder(ownFolder, legacy.database.folder)) delete set.POSTGRES_VOLUME
  // From then on it is what the switch has written, a default or not.
  if (isRetired && ownValues.POSTGRES_VOLUME) set.POSTGRES_VOLUME = ownValues.POSTGRES_VOLUME
  const theirs = Object.entries(legacy.settings)
    .filter(([key, value]) => value !== '' && !notCarried.test(key))
    .map(([key, value]): [string, string] => [
      key,
      paths.includes(key) ? absolute(legacy.folder, value) : value,
    ])
  const data = describeData(legacy, ownValues, defaults)
  const values: Record<string, string | undefined> = {
    ...Object.fromEntries(theirs.filter(([key]) => set[key] === undefined)),
    ...data,
    POSTGRES_VOLUME: set.POSTGRES_VOLUME ?? (await freshDatabaseFolder(legacy)),
    SERVER_NAME: set.SERVER_NAME ?? nginx.serverName,
    TLS_CERTIFICATE: set.TLS_CERTIFICATE ?? nginx.tls?.certificate,
    TLS_CERTIFICATE_KEY: set.TLS_CERTIFICATE_KEY ?? nginx.tls?.key,
    MASTER_PORT: set.MASTER_PORT ?? legacy.address.split(':').at(-1),
  }
  // The containers of the two must not be found by the same names.
  const network = set.NETWORK_NAME ?? defaults.NETWORK_NAME ?? ''
  if (networksOf(legacy).includes(network)) values.NETWORK_NAME = `${network}-blue-green`
  if (values.UPLOADS_VOLUME && isSameFolder(values.UPLOADS_VOLUME, legacy.uploads))
    delete values.UPLOADS_VOLUME
  const base = addMissing(
    own.trim() === '' ? withoutNames((await readText(join(legacy.folder, '.env'))) ?? '') : own,
    example,
  )
  const profiles = set.COMPOSE_PROFILES ?? (legacy.services.livekit ? 'livekit' : '')
  const docker = setValues(base, { ...filled(values), COMPOSE_PROFILES: profiles })
  const site = await loadSite(envFile, { text: docker, alsoWrong })
  const application = await planApplication(site, legacy)
  const kept = [
    ...otherThan(parse(docker), theirs).map((key) => `${key} (docker/.env)`),
    ...otherThan(parse(application), Object.entries(legacy.application)).map(
      (key) => `${key} (the application's .env)`,
    ),
  ]
  return { docker, application, site, kept }
}

/** Keys that have another value than the legacy set-up gives them, but for what must be another one here. */
function otherThan(values: Record<string, string>, theirs: [string, string][]): string[] {
  return theirs
    .filter(([key, value]) => value !== '' && values[key] !== value && !(key in connection))
    .map(([key]) => key)
    .filter((key) => key !== 'UPLOADS_VOLUME')
}

/** A superuser, or a database that every PostgreSQL has, cannot be Strapi's here: it gets its own, by dump and restore. */
function describeData(
  { database, redis, settings }: Legacy,
  own: Record<string, string>,
  defaults: Record<string, string>,
): Record<string, string | undefined> {
  return {
    POSTGRES_USER: reserved.test(database.user)
      ? (own.POSTGRES_USER ?? defaults.POSTGRES_USER)
      : database.user,
    POSTGRES_PASSWORD: database.password,
    POSTGRES_DB: reserved.test(database.name) ? (own.POSTGRES_DB ?? defaults.POSTGRES_DB) : database.name,
    REDIS_PASSWORD: redis.password,
    // The application has them, too.
    LIVEKIT_API_KEY: settings.LIVEKIT_API_KEY ?? own.LIVEKIT_API_KEY,
    LIVEKIT_API_SECRET: settings.LIVEKIT_API_SECRET ?? own.LIVEKIT_API_SECRET,
  }
}

/** Its secrets are those of the legacy application: sessions and tokens stay valid. */
async function planApplication(site: Site, legacy: Legacy): Promise<string> {
  const before = await readText(join(site.source, '.env'))
  const own = parse(before ?? '')
  const values: Record<string, string | undefined> = {}
  for (const [key, value] of Object.entries(legacy.application))
    if (!own[key] || appSecrets.includes(key)) values[key] = value
  for (const [key, source] of Object.entries(connection))
    values[key] = 'key' in source ? site.values[source.key] : source.constant
  return setValues(before ?? (await readText(join(legacy.source, '.env'))) ?? '', filled(values))
}

function filled(values: Record<string, string | undefined>): Record<string, string> {
  return Object.fromEntries(
    Object.entries(values).flatMap(([key, value]): [string, string][] => (value ? [[key, value]] : [])),
  )
}

/** Both .env files, and the application where it is not there yet. */
export async function writeSettings(
  envFile: string,
  legacy: Legacy,
  { docker, application, site }: Settings,
): Promise<Site> {
  refuseInDryRun('write settings')
  await mkdir(dirname(envFile), { recursive: true })
  const isFirst = !existsSync(envFile)
  await writeEnv(envFile, docker)
  if (isFirst) await giveToUser(envFile)
  const text = await writeDockerEnv(envFile)
  const written = await loadSite(envFile, { text })
  await bringApplication(site, legacy)
  await writeEnv(join(site.source, '.env'), application)
  await giveToUser(join(site.source, '.env'))
  await writeApplicationEnv(written)
  return written
}

/** Lines such as "REDIS_PASSWORD: (empty) -> ********": which values change, none that could be a secret readable. */
export async function differences(before: string | undefined, after: string): Promise<string[]> {
  const defaults = parse((await readText(exampleFile)) ?? '')
  const known = Object.keys(defaults).filter((key) => !/PASSWORD|SECRET|KEY|URL/.test(key))
  const readable = new Set([...known, ...Object.keys(connection).filter((key) => !key.includes('PASSWORD'))])
  const [old, values] = [parse(before ?? ''), parse(after)]
  const shown = (key: string, value: string | undefined) => {
    if (value === undefined) return '(not there)'
    if (value === '') return '(empty)'
    return readable.has(key) ? value : '********'
  }
  return (
    Object.entries(values)
      .filter(([key, value]) => old[key] !== value)
      // What nobody has set, and is not set now either.
      .filter(([key, value]) => old[key] !== undefined || (value !== '' && value !== defaults[key]))
      .map(([key, value]) => `${key}: ${shown(key, old[key])} -> ${shown(key, value)}`)
  )
}

/** Beside the legacy one, but not among the engine's own volumes; no default, so that it counts as set. */
export async function freshDatabaseFolder({ database }: Legacy): Promise<string> {
  const folder = database.isVolume
    ? parse((await readText(exampleFile)) ?? '').POSTGRES_VOLUME
    : database.folder
  return `${(folder ?? '').replace(/\/+$/, '')}-migrated`
}

function networksOf({ services }: Legacy): string[] {
  return [services.strapi, services.postgresql, services.redis].flatMap(({ container }) =>
    Object.keys(container.NetworkSettings.Networks),
  )
}

/** What the legacy file says of itself must not name the new containers. */
function withoutNames(text: string): string {
  return text
    .split('\n')
    .filter((line) => !notCarried.test(/^\s*(?:export\s+)?([\w.-]+)\s*=/.exec(line)?.[1] ?? ''))
    .join('\n')
}

function absolute(folder: string, path: string): string {
  return path.startsWith('.') ? resolve(folder, path) : path
}
