/** Commands of Docker and Compose as data. What they name is decided here, what runs them is `run`. */
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

/** Removes a slot's container, so that a killed `up` never leaves a half-renamed one. */
export const remove = (site: Site, slot: SlotName) => ['docker', 'rm', '--force', site.slots[slot].container]

/**
 * Makes a slot's container. `--no-recreate` leaves PostgreSQL and Redis as they are even when their definition changed;
 * `up --no-deps` would do so too, but Compose then hashes another definition, and the next plain `up` would recreate the slot.
 * STRAPI_VERSION as in build.
 */
export const create = (site: Site, slot: SlotName) =>
  slotCompose(site, slot, 'create', '--no-recreate', '--no-build')

/** Not by Compose, which would wait half a second for PostgreSQL and Redis: the checks have seen them healthy. */
export const start = (site: Site, slot: SlotName) => ['docker', 'start', site.slots[slot].container]

/** PostgreSQL, Redis and the optional services that .env asks for. */
export const startServices = (site: Site, services: string[]) => compose(site, 'up', '--detach', ...services)

export const stop = (site: Site, slot: SlotName) => ['docker', 'stop', site.slots[slot].container]

/** Does not count as a change for Compose. */
export const setRestart = (site: Site, slot: SlotName, policy: 'no' | 'unless-stopped') => {
  return ['docker', 'update', '--restart', policy, site.slots[slot].container]
}

export const logs = (site: Site, slot: SlotName, lines: number) => [
  'docker',
  'logs',
  '--tail',
  String(lines),
  site.slots[slot].container,
]
export const tag = (from: string, to: string) => ['docker', 'tag', from, to]
export const removeImage = (name: string) => ['docker', 'image', 'rm', name]

/** Sessions that a backup opens in PostgreSQL call themselves this, so that the next run finds those that a kill left. */
export const backupSession = 'strapi-blue-green-backup'

/** psql as the superuser on the local socket, for a conversation. It stops at the first error. */
export const psql = (containerId: string, database: string) => [
  ...inPostgres(containerId, '--interactive'),
  'psql',
  '--no-psqlrc',
  '--quiet',
  '--tuples-only',
  '--no-align',
  '--set=ON_ERROR_STOP=1',
  '--dbname',
  database,
]

/** Dumps the state of an exported snapshot onto the folder that both sides see. Nobody but its owner may read what is written. */
export const dump = (
  containerId: string,
  database: string,
  snapshot: string,
  compression: string,
  file: string,
) => [
  ...inPostgres(containerId),
  ...privately('pg_dump'),
  '--format=custom',
  `--compress=${compression}`,
  `--snapshot=${snapshot}`,
  `--file=/backup/${file}`,
  '--dbname',
  database,
]

/** Roles with their password hashes, and tablespaces: what a dump of one database leaves out. */
export const dumpRoles = (containerId: string, file: string) => [
  ...inPostgres(containerId),
  ...privately('pg_dumpall'),
  '--globals-only',
  `--file=/backup/${file}`,
]

/** Reads a dump from stdin to its end, and writes nothing. */
export const readDump = (containerId: string) => [
  ...inPostgres(containerId, '--interactive'),
  'pg_restore',
  '--file=/dev/null',
]

/** A file that PostgreSQL's user wrote becomes the caller's. */
export const takeOver = (containerId: string, file: string, owner: string) => [
  'docker',
  'exec',
  '--user=root',
  containerId,
  'chown',
  owner,
  `/backup/${file}`,
]

export const listIncoming = (containerId: string) => [
  'docker',
  'exec',
  '--user=root',
  containerId,
  'ls',
  '-A',
  '/backup',
]

export const removeIncoming = (containerId: string, files: string[]) => [
  'docker',
  'exec',
  '--user=root',
  '--workdir=/backup',
  containerId,
  'rm',
  '-f',
  '--',
  ...files,
]

function inPostgres(containerId: string, ...options: string[]): string[] {
  return ['docker', 'exec', '--user=postgres', `--env=PGAPPNAME=${backupSession}`, ...options, containerId]
}

function privately(command: string): string[] {
  return ['sh', '-c', 'umask 077; exec "$0" "$@"', command]
}

/** A query as the superuser on the local socket: no password, nothing on the network. */
export const query = (containerId: string, database: string, sql: string) => {
  return [
    'docker',
    'exec',
    '--user',
    'postgres',
    containerId,
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
