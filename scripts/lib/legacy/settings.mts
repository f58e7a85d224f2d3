/** The settings of the new set-up: those of the legacy one, with what is different here. Comments and order stay. */
import { existsSync } from 'node:fs'
import { cp, mkdir } from 'node:fs/promises'
import { dirname, isAbsolute, join, resolve } from 'node:path'
import { parse } from 'dotenv'
import { addMissing, readText, setValues, writeEnv } from '../envfile.mts'
import { detail } from '../report.mts'
import { appSecrets, connection, writeApplicationEnv, writeDockerEnv } from '../secrets.mts'
import { exampleFile, loadSite, projectRoot, type Site } from '../settings.mts'
import type { Legacy } from './look.mts'
import type { LegacyNginx } from './nginx.mts'

export interface Settings {
  /** docker/.env as it will be. */
  docker: string
  /** The application's. */
  application: string
  /** The site that they make. */
  site: Site
}

/** Names of the legacy set-up itself, and what has another meaning here. */
const notCarried =
  /^(COMPOSE_|CONTAINER_PREFIX$|NETWORK_NAME$|STRAPI_VERSION$|STRAPI_IMAGE$|STRAPI_VOLUME$|STRAPI_PORT$)/
const paths = ['UPLOADS_VOLUME', 'POSTGRES_VOLUME', 'BACKUP_DIR', 'FIREBASE_CREDENTIALS', 'APNS_KEY']

/**
 * What is set in docker/.env here stays, but for what describes the data: that is as the legacy set-up has it.
 * @throws Problem (usage) that lists all that is wrong with the result
 */
export async function planSettings(envFile: string, legacy: Legacy, nginx: LegacyNginx): Promise<Settings> {
  const example = (await readText(exampleFile)) ?? ''
  const defaults = parse(example)
  const own = (await readText(envFile)) ?? ''
  const legacyText = (await readText(join(legacy.folder, '.env'))) ?? ''
  const set = Object.fromEntries(
    Object.entries(parse(own)).filter(([key, value]) => value !== '' && value !== defaults[key]),
  )
  const carried = Object.entries(legacy.settings)
    .filter(([key, value]) => value !== '' && !notCarried.test(key) && set[key] === undefined)
    .map(([key, value]): [string, string] => [
      key,
      paths.includes(key) ? absolute(legacy.folder, value) : value,
    ])
  const base = addMissing(own.trim() === '' ? withoutNames(legacyText) : own, example)
  const values: Record<string, string> = {
    ...Object.fromEntries(carried),
    ...(set.SERVER_NAME || !nginx.serverName ? {} : { SERVER_NAME: nginx.serverName }),
    ...(set.TLS_CERTIFICATE || !nginx.tls
      ? {}
      : { TLS_CERTIFICATE: nginx.tls.certificate, TLS_CERTIFICATE_KEY: nginx.tls.key }),
    ...(set.MASTER_PORT ? {} : { MASTER_PORT: legacy.address.split(':').at(-1) ?? '' }),
    POSTGRES_USER: legacy.database.user,
    POSTGRES_PASSWORD: legacy.database.password,
    POSTGRES_DB: legacy.database.name,
    REDIS_PASSWORD: legacy.redis.password,
    // The application has them, too.
    ...Object.fromEntries(Object.entries(legacy.settings).filter(([key]) => /^LIVEKIT_API_/.test(key))),
  }
  if (!set.POSTGRES_VOLUME) values.POSTGRES_VOLUME = legacy.database.folder
  // The new containers must not be found by the names of the legacy ones, nor the other way round.
  const network = set.NETWORK_NAME ?? defaults.NETWORK_NAME ?? ''
  if (networksOf(legacy).includes(network)) values.NETWORK_NAME = `${network}-blue-green`
  if (samePath(values.UPLOADS_VOLUME ?? '', legacy.uploads))
    values.UPLOADS_VOLUME = defaults.UPLOADS_VOLUME ?? ''
  const docker = setValues(
    base,
    Object.fromEntries(Object.entries(values).filter(([, value]) => value !== '')),
  )
  const site = await loadSite(envFile, { text: docker })
  return { docker, application: await planApplication(site, legacy), site }
}

/** Its secrets are those of the legacy application: sessions and tokens stay valid. */
async function planApplication(site: Site, legacy: Legacy): Promise<string> {
  const before = await readText(join(site.source, '.env'))
  const text = (await readText(join(legacy.source, '.env'))) ?? ''
  const theirs = parse(text)
  const own = parse(before ?? '')
  const values: Record<string, string> = {}
  for (const [key, value] of Object.entries(theirs))
    if (!own[key] || appSecrets.includes(key)) values[key] = value
  for (const [key, source] of Object.entries(connection))
    values[key] = 'key' in source ? (site.values[source.key] ?? '') : source.constant
  return setValues(
    before ?? text,
    Object.fromEntries(Object.entries(values).filter(([, value]) => value !== '')),
  )
}

/** The application comes along where there is none yet: without what is built, installed or uploaded. */
export async function writeSettings(
  envFile: string,
  legacy: Legacy,
  { docker, application, site }: Settings,
): Promise<Site> {
  await mkdir(dirname(envFile), { recursive: true })
  await writeEnv(envFile, docker)
  const text = await writeDockerEnv(envFile)
  const written = await loadSite(envFile, { text })
  if (!existsSync(join(site.source, 'package.json'))) {
    await copyApplication(legacy, site.source)
    detail(`copied the application to ${site.source}`)
  }
  await writeEnv(join(site.source, '.env'), application)
  await writeApplicationEnv(written)
  return written
}

/** package.json comes last: a folder without it is not taken for an application. */
async function copyApplication(legacy: Legacy, target: string): Promise<void> {
  const left = ['node_modules', 'dist', 'build', '.cache', '.tmp', '.env', 'public/uploads', 'package.json']
  const skipped = new Set(left.map((name) => join(legacy.source, name)))
  await cp(legacy.source, target, {
    recursive: true,
    preserveTimestamps: true,
    filter: (path) => !skipped.has(path) && path !== legacy.uploads,
  })
  await mkdir(join(target, 'public/uploads'), { recursive: true })
  await cp(join(legacy.source, 'package.json'), join(target, 'package.json'), { preserveTimestamps: true })
}

/** Lines such as "REDIS_PASSWORD ******** -> ********": which values change, none of the secret ones readable. */
export function differences(before: string | undefined, after: string): string[] {
  const [old, values] = [parse(before ?? ''), parse(after)]
  return Object.entries(values)
    .filter(([key, value]) => old[key] !== value)
    .map(([key, value]) => `${key}: ${shown(key, old[key])} -> ${shown(key, value)}`)
}

function shown(key: string, value: string | undefined): string {
  if (value === undefined) return '(not there)'
  if (value === '') return '(empty)'
  return /PASSWORD|SECRET|KEY|SALT|TOKEN|CREDENTIAL|DSN|URL/i.test(key) ? '********' : value
}

/** Beside the legacy one, but not among the engine's own volumes; no default, so that it counts as set. */
export async function freshDatabaseFolder({ database }: Legacy): Promise<string> {
  const isVolume = database.folder.endsWith('/_data')
  const folder = isVolume ? parse((await readText(exampleFile)) ?? '').POSTGRES_VOLUME : database.folder
  return `${(folder ?? '').replace(/\/+$/, '')}-migrated`
}

export function networksOf({ services }: Legacy): string[] {
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

function samePath(one: string, other: string): boolean {
  return isAbsolute(one)
    ? resolve(one) === resolve(other)
    : resolve(projectRoot, 'docker', one) === resolve(other)
}
