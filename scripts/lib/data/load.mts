/** The dump of a set into a fresh database beside the live one. */
import { link } from 'node:fs/promises'
import { availableParallelism } from 'node:os'
import { join } from 'node:path'
import { ask, run } from '../command.mts'
import { query } from '../compose.mts'
import { alive, detail, explain, interrupted, Problem, warn } from '../report.mts'
import { createDatabase, incoming, properties, watchSize } from './databases.mts'
import type { Job } from './job.mts'
import * as tools from './postgresql.mts'
import { createMissingRoles, runSql } from './roles.mts'
import { megabytes, sparing } from './room.mts'
import { incomingFolder } from './sets.mts'
import { openSnapshot } from './snapshot.mts'
import { blamesTheSet, differentRows } from './verify.mts'

/**
 * With `--accept damaged`, what can be read of it.
 * @throws Error when the dump does not hold what its manifest says; Problem when the disk is almost full
 */
export async function loadDump(job: Job): Promise<void> {
  const { site, manifest, postgresql, id } = job
  const owner = site.database.user
  const settings = manifest.database?.settings
  const locale = job.sortsAsServer ? undefined : settings
  const create = () =>
    run(query(postgresql, 'postgres', createDatabase(incoming, owner, locale, job.serverVersion)))
  await create()
  const isDamaged = job.accept.includes('damaged')
  const roles = await createMissingRoles(site, postgresql, job.folder, id).catch((error: unknown) => {
    if (!isDamaged) throw error
    warn(`accepted: no roles from the set: ${explain(error)}`)
    return { created: [], all: [] }
  })
  if (roles.created.length > 0) detail(`created the roles ${roles.created.join(', ')}, as in the set`)
  const file = `${id}.dump`
  await link(join(job.folder, 'database.dump'), join(incomingFolder(site), file))
  const isForeign = settings !== undefined && settings.owner !== owner
  if (isForeign) detail(`what belonged to ${settings.owner} belongs to ${owner} now`)
  try {
    await restoreInto(job, create, {
      database: incoming,
      file,
      jobs: Math.min(4, availableParallelism()),
      owner: isForeign ? owner : undefined,
    })
  } finally {
    // What stays is removed by the next run; a PostgreSQL that died must not hide why.
    await ask(tools.removeIncoming(postgresql, [file]))
  }
  detail('counting its rows, making statistics')
  const counted = (async () => {
    const restored = await openSnapshot(postgresql, incoming, tools.restoreSession)
    await restored.close()
    return restored
  })()
  // What the server thinks of its tables is in no dump; without it the first visitors would get slow plans.
  const analyzed = run(query(postgresql, incoming, 'ANALYZE'), { timeoutMs: 3_600_000, signal: interrupted })
  const [restored] = await Promise.all([counted, analyzed])
  const different = differentRows(manifest.database?.rows ?? {}, restored.rows)
  if ((different.length > 0 && !isDamaged) || Object.keys(restored.rows).length === 0)
    throw new Error(`the dump does not hold what its manifest says: ${different.join('; ')}`)
  for (const line of different) warn(`accepted: ${line}`)
  // Last of all: they may keep one from writing.
  for (const line of await setProperties(job, properties(incoming, settings, roles.all))) warn(line)
}

/** As a whole or, where damage is accepted, each table by itself. */
async function restoreInto(
  { site, postgresql, accept }: Job,
  create: () => Promise<unknown>,
  restore: tools.FileRestore,
): Promise<void> {
  const { postgres } = site.folders
  const size = watchSize(postgresql, restore.database)
  let said: string[] = []
  const restoring = (argv: string[]) =>
    alive(
      () => `restoring, ${megabytes(size.bytes)}`,
      () =>
        sparing(postgres, postgres, (signal) =>
          run(argv, { timeoutMs: 12 * 3_600_000, signal, onLine: (line) => said.push(line) }),
        ),
    )
  const acceptDamage = (error: unknown) => {
    interrupted.throwIfAborted()
    if (!accept.includes('damaged') || error instanceof Problem || !blamesTheSet(error)) throw error
  }
  try {
    await restoring(tools.restoreFile(postgresql, restore))
  } catch (error) {
    acceptDamage(error)
    detail('it cannot be restored as a whole: each table by itself')
    await run(query(postgresql, 'postgres', `DROP DATABASE "${restore.database}" WITH (FORCE)`), {
      timeoutMs: 3_600_000,
    })
    await create()
    said = []
    await restoring(tools.restoreReadable(postgresql, restore)).catch((failure: unknown) => {
      acceptDamage(failure)
      // The cause may have come long before the end.
      acceptDamage(new Error(said.join('\n')))
      for (const line of said.slice(0, 20)) warn(`accepted: ${line}`)
    })
  } finally {
    size.stop()
  }
}

/** @returns what could not be set, in PostgreSQL's words: not worth a restore */
async function setProperties({ site, postgresql, id }: Job, sql: string[]): Promise<string[]> {
  const said: string[] = []
  const onLine = (line: string) => said.push(line)
  if (sql.length > 0) await runSql(site, postgresql, id, sql.join('\n'), { goesOn: true, onLine })
  return said.filter((line) => line.includes('ERROR'))
}
