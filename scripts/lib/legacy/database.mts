/** The legacy data under the new PostgreSQL: the same folder where it sorts alike, otherwise by dump and restore. */
import { ask, run } from '../command.mts'
import { query } from '../compose.mts'
import * as engine from '../engine.mts'
import { openSnapshot } from '../data/snapshot.mts'
import * as tools from '../data/postgresql.mts'
import type { Legacy } from './look.mts'

/** What the order of texts depends on. https://wiki.postgresql.org/wiki/Locale_data_changes */
export interface Sorting {
  /** Of the server. */
  major: number
  /** "musl", or glibc with its version. */
  library: string
  /** Version of ICU, where there is one. */
  icu: string
  /** Locales of glibc; musl takes any name and sorts by code points. */
  locales: string[]
}

const look = `postgres --version
ldd --version 2>&1 | head -n 1
ls /usr/lib /usr/lib/*-linux-gnu* 2>/dev/null | sed -n 's/^libicui18n\\.so\\.//p' | sort -u | tail -n 1 | sed 's/^/icu /'
locale -a 2>/dev/null | sed 's/^/locale /'`

/** Of an image that is here; a container of it runs for a moment, without network and data. */
export async function sortingOf(image: string): Promise<Sorting> {
  const text = await run(['docker', 'run', '--rm', '--network=none', '--entrypoint=sh', image, '-c', look])
  return parseSorting(text)
}

export function parseSorting(text: string): Sorting {
  const lines = text.split('\n')
  const value = (word: string) =>
    lines.filter((line) => line.startsWith(`${word} `)).map((line) => line.slice(word.length + 1))
  return {
    major: Number(/(\d+)/.exec(lines[0] ?? '')?.[1]),
    library: /musl/.test(lines[1] ?? '')
      ? 'musl'
      : `glibc ${/([\d.]+)\s*$/.exec(lines[1] ?? '')?.[1] ?? 'unknown'}`,
    icu: value('icu')[0]?.split('.')[0] ?? '',
    locales: value('locale').map(normal),
  }
}

/** Why the data cannot be used as it is, or undefined. @param used locales of the databases */
export function reasonToDump(from: Sorting, to: Sorting, used: string[]): string | undefined {
  if (from.major !== to.major) return `PostgreSQL ${to.major} cannot use data of PostgreSQL ${from.major}`
  if (from.library !== to.library) return `${to.library} sorts differently than ${from.library}`
  if (from.icu !== to.icu) return `ICU ${to.icu} sorts differently than ICU ${from.icu}`
  const absent = used.filter((name) => !/^(C|POSIX)$/.test(name) && !to.locales.includes(normal(name)))
  if (to.library !== 'musl' && absent.length > 0)
    return `the new image does not know the locale ${absent.join(', ')}`
  return undefined
}

/** "fr_FR.UTF-8" and "fr_FR.utf8" are the same. */
function normal(locale: string): string {
  return locale.toLowerCase().replace(/\.utf-?8$/, '.utf8')
}

/** Locales that the legacy databases were made with. It must run. */
export async function usedLocales({ database: { live } }: Legacy): Promise<string[]> {
  if (!live) return []
  const sql = 'SELECT DISTINCT unnest(ARRAY[datcollate, datctype]) FROM pg_database'
  return (await run(query(live.server, 'postgres', sql))).trim().split('\n')
}

/** What came along can be compared with this, and a way back. It must run. */
export async function countRows({ database: { live, name } }: Legacy) {
  if (!live) return {}
  const snapshot = await openSnapshot(live.server, name)
  await snapshot.close()
  return { rows: snapshot.rows, schemaHash: snapshot.schemaHash }
}

/**
 * Our tools work as the user postgres on the local socket, and Strapi proves itself by SCRAM: both may be missing in data that
 * another image made.
 * @param containerId of the new PostgreSQL, which runs on the legacy data
 */
export async function adoptRoles(containerId: string, legacy: Legacy): Promise<void> {
  const create = `DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'postgres') THEN CREATE ROLE postgres SUPERUSER LOGIN; END IF; END $$`
  if ((await ask(query(containerId, 'postgres', 'SELECT 1'))) === undefined)
    await run(query({ containerId, superuser: legacy.database.owner }, 'postgres', create))
  await run(tools.setPassword(containerId))
}

/** Ready for connections; asked ten times a second, where the engine would look every five. @throws Error with the end of its log */
export async function untilReady(containerId: string, probe: string[], timeoutMs = 120_000): Promise<void> {
  const deadline = Date.now() + timeoutMs
  while ((await ask(['docker', 'exec', containerId, ...probe])) === undefined) {
    const found = await engine.container(containerId)
    if (found?.State.Status === 'running' && Date.now() < deadline) continue
    let log = ''
    await ask(['docker', 'logs', '--tail', '10', containerId], { onLine: (line) => (log += `${line}\n`) })
    throw new Error(
      `${found?.Name.slice(1) ?? containerId} does not become ready (${found?.State.Status ?? 'gone'})\n${log.trimEnd()}`,
    )
  }
}
