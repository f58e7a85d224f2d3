/** Roles that a dump names and this server lacks: without them its owners and grants cannot be restored. */
import { readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { run } from '../command.mts'
import { query } from '../compose.mts'
import type { Site } from '../settings.mts'
import * as tools from './postgresql.mts'
import { incomingFolder } from './sets.mts'

/** SQL of roles.sql for the roles that are not there, each with its password and rights. */
export function missingRoles(rolesSql: string, present: string[]): { names: string[]; sql: string } {
  const names: string[] = []
  const sql: string[] = []
  for (const line of rolesSql.split('\n')) {
    const [, written = ''] = /^(?:CREATE|ALTER) ROLE ("(?:[^"]|"")+"|[^\s;]+)/.exec(line) ?? []
    const name = written.startsWith('"') ? written.slice(1, -1).replaceAll('""', '"') : written
    if (name === '' || present.includes(name)) continue
    if (line.startsWith('CREATE')) names.push(name)
    sql.push(line)
  }
  return { names, sql: sql.join('\n') }
}

/** @returns names of the roles that were created */
export async function createMissingRoles(
  site: Site,
  postgresql: string,
  setFolder: string,
  id: string,
): Promise<string[]> {
  const present = (await run(query(postgresql, 'postgres', 'SELECT rolname FROM pg_roles'))).split('\n')
  const { names, sql } = missingRoles(await readFile(join(setFolder, 'roles.sql'), 'utf8'), present)
  if (names.length === 0) return []
  const file = `${id}.sql`
  try {
    // By a file, since a password's hash must not be seen in the list of processes.
    await writeFile(join(incomingFolder(site), file), `${tools.unlogged}\n${sql}\n`, { mode: 0o600 })
    await run(tools.runFile(postgresql, file))
  } finally {
    await run(tools.removeIncoming(postgresql, [file]))
  }
  return names
}
