/** Commands of Docker and Compose as data. What they name is decided here, what runs them is `run`. */
import { isDryRun } from './report.mts'
import { composeFile, type Site, type SlotName } from './settings.mts'

/** `docker compose …` for this site. The files are named, so that the current folder does not matter. */
export function compose(site: Site, ...rest: string[]): string[] {
  return [
    'docker',
    'compose',
    '--file',
    composeFile,
    '--env-file',
    site.envFile,
    '--project-name',
    site.project,
    ...rest,
  ]
}

/** Slave has a profile of its own; master is a plain service. */
function slotCompose(site: Site, slot: SlotName, ...rest: string[]): string[] {
  return slot === 'strapi-slave'
    ? compose(site, '--profile', 'blue-green', ...rest, slot)
    : compose(site, ...rest, slot)
}

/** Run with STRAPI_VERSION=release in the environment. */
export const build = (site: Site) => compose(site, '--progress', 'plain', 'build', 'strapi-master')

/** PostgreSQL and Redis, from docker/ of this project. */
export const buildServices = (site: Site) =>
  compose(site, '--progress', 'plain', 'build', 'postgresql', 'redis')

/** Removes a slot's container, so that a killed `up` never leaves a half-renamed one. */
export const remove = (site: Site, slot: SlotName) => ['docker', 'rm', '--force', site.slots[slot].container]

/**
 * Makes a slot's container. `--no-recreate` leaves PostgreSQL and Redis as they are even when their definition changed;
 * `up --no-deps` would do so too, but Compose then hashes another definition, and the next plain `up` would recreate the slot.
 * STRAPI_VERSION as in build.
 */
export const create = (site: Site, slot: SlotName) =>
  slotCompose(site, slot, 'create', '--no-recreate', '--no-build')

/** STRAPI_VERSION as in build: Compose reads the whole file. */
export const createLiveKit = (site: Site) => compose(site, 'create', '--no-recreate', 'livekit')

/** Not by Compose, which would wait half a second for PostgreSQL and Redis: the checks have seen them healthy. */
export const start = (site: Site, slot: SlotName) => ['docker', 'start', site.slots[slot].container]

/** PostgreSQL, Redis and the optional services that .env asks for. */
export const startServices = (site: Site, services: string[]) => compose(site, 'up', '--detach', ...services)

export const stop = (site: Site, slot: SlotName) => ['docker', 'stop', site.slots[slot].container]

export const logs = (site: Site, slot: SlotName, lines: number) => [
  'docker',
  'logs',
  '--tail',
  String(lines),
  site.slots[slot].container,
]
export const tag = (from: string, to: string) => ['docker', 'tag', from, to]
export const removeImage = (name: string) => ['docker', 'image', 'rm', name]

/** The id of a container of ours; or another's PostgreSQL, with the superuser whom its local socket lets in without a password. */
export type Server = string | { containerId: string; superuser: string }

/** What `docker exec` needs to know of a server, behind its other options. */
export function target(server: Server): string[] {
  return typeof server === 'string' ? [server] : [`--env=PGUSER=${server.superuser}`, server.containerId]
}

/** A query as the superuser on the local socket: no password, nothing on the network. In a dry run it cannot write. */
export const query = (server: Server, database: string, sql: string) => {
  return [
    'docker',
    'exec',
    '--user=postgres',
    ...(isDryRun() ? ['--env=PGOPTIONS=-c default_transaction_read_only=on'] : []),
    ...target(server),
    'psql',
    '--no-psqlrc',
    '--tuples-only',
    '--no-align',
    '--dbname',
    database,
    '--command',
    sql,
  ]
}
