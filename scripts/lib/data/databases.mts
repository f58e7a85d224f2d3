/** The live database and those that restores have put beside it. Which is which, their names and comments tell. */
import { setTimeout as sleep } from 'node:timers/promises'
import { run } from '../command.mts'
import { query } from '../compose.mts'
import type { Site } from '../settings.mts'
import type { DatabaseSettings } from './manifest.mts'

const prefix = 'strapi_blue_green_'

/** What a dump is restored into. One that is there while no restore runs was left by a killed one. */
export const incoming = `${prefix}incoming`

/** What a dump is restored into for a look. */
export const scratch = `${prefix}verify`

export interface Databases {
  /** Undefined when there is none of that name. */
  live: { restoredBy: string | undefined; fromSet: string | undefined } | undefined
  hasIncoming: boolean
  hasScratch: boolean
  /** Those that a restore or an undo has replaced, oldest first. */
  kept: KeptDatabase[]
}

export interface KeptDatabase {
  name: string
  /** `replaced` was live before restore `id`; `undone` is what restore `id` had brought. */
  kind: 'replaced' | 'undone'
  id: string
  bytes: number
}

export const keptName = (kind: KeptDatabase['kind'], id: string) => `${prefix}${kind}_${id}`

export async function readDatabases(site: Site, containerId: string): Promise<Databases> {
  const sql = `SELECT json_build_object('name', datname, 'comment', shobj_description(oid, 'pg_database'),
      'bytes', pg_database_size(oid))
    FROM pg_database WHERE datname = ${literal(site.database.name)} OR starts_with(datname, '${prefix}')`
  const rows = (await run(query(containerId, 'postgres', sql)))
    .split('\n')
    .filter((line) => line !== '')
    .map((line) => JSON.parse(line) as { name: string; comment: string | null; bytes: number })
  const live = rows.find(({ name }) => name === site.database.name)
  const comment = /^restore (\d{8}_\d{6}) of set (\S+)/.exec(live?.comment ?? '')
  return {
    live: live && { restoredBy: comment?.[1], fromSet: comment?.[2] },
    hasIncoming: rows.some(({ name }) => name === incoming),
    hasScratch: rows.some(({ name }) => name === scratch),
    kept: rows
      .flatMap(({ name, bytes }) => {
        const [, kind, id] =
          new RegExp(String.raw`^${prefix}(replaced|undone)_(\d{8}_\d{6})$`).exec(name) ?? []
        return id === undefined ? [] : [{ name, kind: kind as KeptDatabase['kind'], id, bytes }]
      })
      .toSorted((one, other) => (one.id < other.id ? -1 : 1)),
  }
}

/** As in 16.4. */
export async function serverVersionOf(containerId: string): Promise<string> {
  return (await run(query(containerId, 'postgres', "SELECT current_setting('server_version')"))).trim()
}

/** SQL that makes an empty database as the set's was. @param settings of the set; undefined takes the server's own */
export function createDatabase(
  name: string,
  owner: string,
  settings: DatabaseSettings | undefined,
  serverVersion: string,
): string {
  const parts = [`CREATE DATABASE ${identifier(name)} OWNER ${identifier(owner)} TEMPLATE template0`]
  if (settings?.provider !== undefined) {
    const providers: Record<string, string> = {
      c: 'libc',
      i: `icu ICU_LOCALE ${literal(settings.locale ?? '')}`,
      b: `builtin BUILTIN_LOCALE ${literal(settings.locale ?? '')}`,
    }
    parts.push(`ENCODING ${literal(settings.encoding)}`)
    parts.push(`LC_COLLATE ${literal(settings.collation)} LC_CTYPE ${literal(settings.characters)}`)
    // Before 15 there was only libc, and no word for it.
    if (Number.parseInt(serverVersion) >= 15)
      parts.push(`LOCALE_PROVIDER ${providers[settings.provider ?? 'c'] ?? 'libc'}`)
  }
  return parts.join(' ')
}

/**
 * SQL that gives a database what no dump of it holds: the parameters of the set's database, those of roles in it, and who may
 * connect to it. One statement each.
 * @param roles that the server has; what was granted to others is left out
 */
export function properties(name: string, settings: DatabaseSettings | undefined, roles: string[]): string[] {
  const database = identifier(name)
  const inRoles = (settings?.roleParameters ?? []).filter(({ role }) => roles.includes(role))
  const sql = [
    ...(settings?.parameters ?? []).map((one) => setParameter(`DATABASE ${database}`, one)),
    ...inRoles.flatMap(({ role, parameters }) =>
      parameters.map((one) => setParameter(`ROLE ${identifier(role)} IN DATABASE ${database}`, one)),
    ),
  ]
  const limit = settings?.connectionLimit ?? -1
  if (Number.isInteger(limit) && limit >= 0) sql.push(`ALTER DATABASE ${database} CONNECTION LIMIT ${limit};`)
  // Without a list of its own, the defaults of the server apply.
  if (settings?.grants) sql.push(`REVOKE ALL ON DATABASE ${database} FROM PUBLIC;`)
  for (const { grantee, privilege, isGrantable } of settings?.grants ?? []) {
    // Its owner has all rights, under whatever name.
    if (grantee === settings?.owner || (grantee !== null && !roles.includes(grantee))) continue
    if (!/^(CREATE|CONNECT|TEMPORARY)$/.test(privilege)) continue
    const to = grantee === null ? 'PUBLIC' : identifier(grantee)
    sql.push(`GRANT ${privilege} ON DATABASE ${database} TO ${to}${isGrantable ? ' WITH GRANT OPTION' : ''};`)
  }
  return sql
}

/** What holds a list of quoted names, in which each is a value of its own: GUC_LIST_QUOTE in PostgreSQL's source. */
const lists = new Set([
  'local_preload_libraries',
  'search_path',
  'session_preload_libraries',
  'temp_tablespaces',
])

function setParameter(target: string, parameter: string): string {
  const at = parameter.indexOf('=')
  const [key, value] = [parameter.slice(0, at), parameter.slice(at + 1)]
  const names = [...value.matchAll(/"((?:[^"]|"")*)"|[^\s,]+/g)].map(([plain, quoted]) =>
    literal(quoted?.replaceAll('""', '"') ?? plain),
  )
  // An empty list has one empty name.
  const values = lists.has(key) ? names.join(', ') || "''" : literal(value)
  return `ALTER ${target} SET ${key.split('.').map(identifier).join('.')} = ${values};`
}

export function databaseSize(name: string): string {
  return `SELECT pg_database_size(${literal(name)})`
}

/** Its size in bytes while something fills it. To be stopped. */
export function watchSize(containerId: string, name: string): { readonly bytes: number; stop: () => void } {
  const measure = async () => {
    watch.bytes = Number(await run(query(containerId, 'postgres', databaseSize(name))))
  }
  // A process in the container each time, which a restore on few cores would notice.
  const timer = setInterval(() => void measure().catch(() => undefined), 5000)
  const watch = { bytes: 0, stop: () => clearInterval(timer) }
  return watch
}

export interface Swap {
  /** Name of the live database, which Strapi connects to. */
  live: string
  hasLive: boolean
  /** Becomes the live one. */
  from: string
  /** Name that the live one gets. */
  to: string
  /** Of the new live one; undefined leaves the one that it has. */
  comment: string | undefined
}

/**
 * One transaction: all of it happens or nothing, whoever is killed. The lock is the fence: whoever connects meanwhile
 * waits for it, and then finds the new database under the old name. (Measured with Strapi at 200 requests/s: 0 to 2 errors,
 * where ALLOW_CONNECTIONS false, which refuses instead, cost 8 to 11.)
 * @throws Error when sessions do not end, or the lock cannot be had for 10 s; then nothing has changed
 */
export async function swap(containerId: string, names: Swap): Promise<void> {
  for (let tries = 1; ; tries += 1) {
    try {
      await run(query(containerId, 'postgres', swapping(names)))
      return await sleep(reconnectingMs)
    } catch (error) {
      // Somebody creates or drops a database just now.
      if (tries === 50 || !/lock timeout/.test(String(error))) throw error
      await sleep(200)
    }
  }
}

/** Strapi makes its connections anew now, and visitors wait for them: whatever else needs the processors comes later. */
const reconnectingMs = 300

/** While the lock is waited for, everybody who connects waits, too. */
function swapping({ live, hasLive, from, to, comment }: Swap): string {
  const sql = [
    'BEGIN',
    "SET LOCAL lock_timeout = '100ms'",
    // A session that reads this table in a long transaction (somebody's pg_dump) would keep us, and us everybody, waiting.
    endSessions(`datname IN (${literal(live)}, ${literal(from)}, ${literal(scratch)}) AND pid IN (
      SELECT pid FROM pg_locks WHERE relation = 'pg_database'::regclass AND granted)`),
    'LOCK TABLE pg_database IN ACCESS EXCLUSIVE MODE',
    endSessions(`datname IN (${literal(live)}, ${literal(from)})`),
    untilGone([live, from]),
    ...(hasLive ? [`ALTER DATABASE ${identifier(live)} RENAME TO ${identifier(to)}`] : []),
    `ALTER DATABASE ${identifier(from)} RENAME TO ${identifier(live)}`,
    ...(comment === undefined ? [] : [`COMMENT ON DATABASE ${identifier(live)} IS ${literal(comment)}`]),
    'COMMIT',
  ]
  return `${sql.join(';\n')};`
}

/** What the swap writes on the database that it makes live. */
export const restoredComment = (id: string, set: string) => `restore ${id} of set ${set}`

function endSessions(where: string): string {
  return `SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND ${where}`
}

/** RENAME itself looks only every 100 ms. */
function untilGone(names: string[]): string {
  return `DO $$ DECLARE began timestamptz := clock_timestamp();
  BEGIN
    LOOP
      PERFORM pg_stat_clear_snapshot();
      EXIT WHEN NOT EXISTS (SELECT FROM pg_stat_activity WHERE datname IN (${names.map(literal).join(', ')}));
      IF clock_timestamp() > began + interval '5 s' THEN RAISE 'its sessions do not end'; END IF;
      PERFORM pg_sleep(0.001);
    END LOOP;
  END $$`
}

export function identifier(name: string): string {
  return `"${name.replaceAll('"', '""')}"`
}

export function literal(text: string): string {
  return text.includes('\\') ? `E'${escaped(text)}'` : `'${escaped(text)}'`
}

function escaped(text: string): string {
  return text.replaceAll("'", "''").replaceAll('\\', '\\\\')
}
