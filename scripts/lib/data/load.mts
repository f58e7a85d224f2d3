/** The dump of a set into a fresh database beside the live one. */
import { link } from 'node:fs/promises'
import { availableParallelism } from 'node:os'
import { join } from 'node:path'
import { ask, run } from '../command.mts'
import { query } from '../compose.mts'
import { alive, detail, exitCodes, interrupted, Problem, warn } from '../report.mts'
import type { Site } from '../settings.mts'
import { createDatabase, databaseSize, incoming, properties } from './databases.mts'
import type { Job } from './job.mts'
import * as tools from './postgresql.mts'
import { createMissingRoles, runSql } from './roles.mts'
import { freeBytes, megabytes } from './room.mts'
import { incomingFolder } from './sets.mts'
import { openSnapshot } from './snapshot.mts'
import { differentRows } from './verify.mts'

/** A second of writing at full speed, and some segments of PostgreSQL's log. */
export const leastFreeBytes = 512 * 2 ** 20

/** @throws Error when the dump does not hold what its manifest says; Problem when the disk is almost full */
export async function loadDump(job: Job): Promise<void> {
  const { site, manifest, postgresql, id } = job
  const owner = site.database.user
  const settings = manifest.database?.settings
  const locale = job.sortsAsServer ? undefined : settings
  await run(query(postgresql, 'postgres', createDatabase(incoming, owner, locale, job.serverVersion)))
  const roles = await createMissingRoles(site, postgresql, job.folder, id)
  if (roles.created.length > 0) detail(`created the roles ${roles.created.join(', ')}, as in the set`)
  const file = `${id}.dump`
  await link(join(job.folder, 'database.dump'), join(incomingFolder(site), file))
  const isForeign = settings !== undefined && settings.owner !== owner
  if (isForeign) detail(`what belonged to ${settings.owner} belongs to ${owner} now`)
  const disk = watchDisk(site, postgresql)
  try {
    const restoring = tools.restoreFile(postgresql, {
      database: incoming,
      file,
      jobs: Math.min(4, availableParallelism()),
      owner: isForeign ? owner : undefined,
    })
    const options = { timeoutMs: 12 * 3_600_000, signal: AbortSignal.any([interrupted, disk.full]) }
    await alive(
      () => `restoring, ${megabytes(disk.restoredBytes)}`,
      () => run(restoring, options),
    )
  } finally {
    disk.stop()
    // What stays is removed by the next run; a PostgreSQL that died must not hide why.
    await ask(tools.removeIncoming(postgresql, [file]))
  }
  const counted = (async () => {
    const restored = await openSnapshot(postgresql, incoming, tools.restoreSession)
    await restored.close()
    return restored
  })()
  // What the server thinks of its tables is in no dump; without it the first visitors would get slow plans.
  const analyzed = run(query(postgresql, incoming, 'ANALYZE'), { timeoutMs: 3_600_000, signal: interrupted })
  const [restored] = await Promise.all([counted, analyzed])
  const different = differentRows(manifest.database?.rows ?? {}, restored.rows)
  if (different.length > 0 && !job.accept.includes('damaged'))
    throw new Error(`the dump does not hold what its manifest says: ${different.join('; ')}`)
  for (const line of different) warn(`accepted: ${line}`)
  // Last of all: they may keep one from writing.
  for (const line of await setProperties(job, properties(incoming, settings, roles.all))) warn(line)
}

/** @returns what could not be set, in PostgreSQL's words: not worth a restore */
async function setProperties({ site, postgresql, id }: Job, sql: string[]): Promise<string[]> {
  const said: string[] = []
  const onLine = (line: string) => said.push(line)
  if (sql.length > 0) await runSql(site, postgresql, id, sql.join('\n'), { goesOn: true, onLine })
  return said.filter((line) => line.includes('ERROR'))
}

/** PostgreSQL stops altogether when it cannot write its log: the restore has to give up before that. */
function watchDisk(site: Site, postgresql: string) {
  const controller = new AbortController()
  const look = async () => {
    if ((await freeBytes(site.folders.postgres)) >= leastFreeBytes) return
    controller.abort(
      new Problem(
        exitCodes.failed,
        `the disk of ${site.folders.postgres} is almost full, so the restore gave up; what is live is as before`,
        'Make room, then run it again.',
      ),
    )
  }
  const measure = async () => {
    const size = await run(query(postgresql, 'postgres', databaseSize(incoming)))
    watch.restoredBytes = Number(size)
  }
  const timers = [
    setInterval(() => void look().catch(() => undefined), 100),
    // A process in the container each time, which a restore on few cores would notice.
    setInterval(() => void measure().catch(() => undefined), 5000),
  ]
  const watch = { full: controller.signal, restoredBytes: 0, stop: () => timers.forEach(clearInterval) }
  return watch
}
