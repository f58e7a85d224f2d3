/** Roles that a dump names and this server lacks: without them its owners and grants cannot be restored. They stay. */
import { readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { ask, run } from '../command.mts'
import { query } from '../compose.mts'
import type { Site } from '../settings.mts'
import * as tools from './postgresql.mts'
import { incomingFolder } from './sets.mts'

const role = String.raw`("(?:[^"]|"")+"|[^\s;]+)`
const ofRole = new RegExp(`^(?:CREATE|ALTER) ROLE ${role}`)
const membership = new RegExp(`^GRANT ${role} TO ${role}[^;]*;`)

/** SQL of roles.sql for the roles that are not there, each with its password, rights and memberships. */
export function missingRoles(rolesSql: string, present: string[]): { names: string[]; sql: string } {
  const names: string[] = []
  const sql: string[] = []
  for (const line of statements(rolesSql)) {
    const [group, member] = (membership.exec(line) ?? []).slice(1).map(unquoted)
    const name = unquoted(ofRole.exec(line)?.[1] ?? '')
    if (group !== undefined && member !== undefined) {
      const isNew = [group, member].some((one) => names.includes(one))
      const areThere = [group, member].every((one) => names.includes(one) || present.includes(one))
      // Granted by whoever restores: its former grantor may not be there.
      if (isNew && areThere) sql.push(line.replace(/ GRANTED BY .*/s, ';'))
    } else if (name !== '' && !present.includes(name)) {
      if (line.startsWith('CREATE')) names.push(name)
      sql.push(line)
    }
  }
  return { names, sql: sql.join('\n') }
}

/** One string each, also where a value goes over several lines. */
function statements(sql: string): string[] {
  const found: string[] = []
  let open = ''
  for (const line of sql.split('\n')) {
    open = open === '' ? line : `${open}\n${line}`
    // Inside a text its quotes are not all closed.
    if ((open.match(/'/g)?.length ?? 0) % 2 === 1) continue
    found.push(open)
    open = ''
  }
  return found
}

function unquoted(name: string): string {
  return name.startsWith('"') ? name.slice(1, -1).replaceAll('""', '"') : name
}

/** @returns names of the roles that were created, and of all that are there now */
export async function createMissingRoles(
  site: Site,
  postgresql: string,
  setFolder: string,
  id: string,
): Promise<{ created: string[]; all: string[] }> {
  const present = (await run(query(postgresql, 'postgres', 'SELECT rolname FROM pg_roles'))).split('\n')
  const { names, sql } = missingRoles(await readFile(join(setFolder, 'roles.sql'), 'utf8'), present)
  if (names.length === 0) return { created: [], all: present }
  await runSql(site, postgresql, id, sql)
  return { created: names, all: [...present, ...names] }
}

/** Runs SQL with secrets in it: by a file, since everybody can read the list of processes. @param id of the restore */
export async function runSql(
  site: Site,
  postgresql: string,
  id: string,
  sql: string,
  { goesOn = false, onLine }: { goesOn?: boolean; onLine?: (line: string) => void } = {},
): Promise<void> {
  const file = `${id}.sql`
  try {
    await writeFile(join(incomingFolder(site), file), `${tools.unlogged}\n${sql}\n`, { mode: 0o600 })
    await run(tools.runFile(postgresql, file, goesOn), onLine ? { onLine } : {})
  } finally {
    await ask(tools.removeIncoming(postgresql, [file]))
  }
}
