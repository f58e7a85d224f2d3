/** The ways out: back to the legacy set-up, or for good without it. */
import { existsSync, realpathSync } from 'node:fs'
import { readdir } from 'node:fs/promises'
import { join, relative, resolve } from 'node:path'
import { ask, run } from '../command.mts'
import { query } from '../compose.mts'
import * as engine from '../engine.mts'
import { makeBackup, startingPostgresql } from '../data/backup.mts'
import { listed } from '../data/fitness.mts'
import { parts } from '../data/manifest.mts'
import { ownFolder } from '../data/untar.mts'
import { setFolder } from '../data/sets.mts'
import { openSnapshot } from '../data/snapshot.mts'
import { rememberProven } from '../data/verified.mts'
import { addToResult, detail, exitCodes, explain, interrupted, Problem, say, step, warn } from '../report.mts'
import { isSameFolder } from '../folders.mts'
import { readSchema } from '../schema.mts'
import { composeCommand, projectRoot, scriptCommand, type Site } from '../settings.mts'
import { observe } from '../slots.mts'
import { bringBack, bringFilesBack, bringLiveKitBack, runningServices } from './containers.mts'
import { note, notes, type Note } from './journal.mts'
import { inStartOrder, isRunning, nameOf } from './look.mts'
import { wasStarted, type Migration } from './migration.mts'
import { goBack } from './goback.mts'
import { removeNew, sharesData, startPostgresql, writeDatabaseFolder } from './newsetup.mts'
import { freshDatabaseFolder } from './settings.mts'
import { isSwitched } from './switch.mts'
import { differingUploads, endCopy } from './uploads.mts'

/** What was made since the switch, and what becomes of it; said before anything happens. @throws Problem (usage) */
export async function describeRollback(migration: Migration): Promise<void> {
  const { site, legacy, stage } = migration
  if (stage === 'legacy') {
    await refuseOthers(migration)
    return detail('the legacy set-up is in service; the containers that were prepared beside it are removed')
  }
  const noted = await notes(site)
  const postgresql = await startingPostgresql(site)
  // A killed switch may have left it without that database, or without our role.
  const more =
    postgresql === undefined
      ? undefined
      : await newRows(postgresql, site.database.name, noted).catch(() => undefined)
  const uploads = existsSync(site.folders.uploads)
    ? await differingUploads(legacy.uploads, site.folders.uploads)
    : []
  const fate = (await sharesData(migration))
    ? 'both set-ups use the same database, so rows stay and uploads are copied back'
    : 'they are left behind, in a backup set'
  const rowsSaid =
    more === undefined
      ? 'rows are not known, PostgreSQL does not tell'
      : more.join(', ') || 'no table has other rows'
  detail(`since the switch: ${rowsSaid}; ${uploads.length} uploads are new or differ; ${fate}`)
  if (uploads.length > 0) detail(`uploads:${listed(uploads)}`)
  detail(
    'what Redis (Bull’s queue) got since then is left behind; jobs that were waiting at the switch are there again, and run twice',
  )
  addToResult({ newRows: more, newUploads: uploads.length })
}

/** What was added, changed and removed, one phrase a table. Strapi itself writes down when it changed a row. */
async function newRows(postgresql: string, database: string, noted: Partial<Note>): Promise<string[]> {
  const now = await openSnapshot(postgresql, database)
  await now.close()
  const before = noted.rows ?? {}
  const changed = await changedRows(postgresql, database, noted.switchedAt)
  const tables = new Set([...Object.keys(before), ...Object.keys(now.rows)])
  return [...tables].toSorted().flatMap((table) => {
    const more = (now.rows[table] ?? 0) - (before[table] ?? 0)
    return [
      ...(more > 0 ? [`${more} rows more in ${table}`] : []),
      ...(more < 0 ? [`${-more} rows fewer in ${table}`] : []),
      ...(changed.has(table) ? [`${changed.get(table)} changed in ${table}`] : []),
    ]
  })
}

async function changedRows(
  postgresql: string,
  database: string,
  since: string | undefined,
): Promise<Map<string, number>> {
  if (since === undefined) return new Map()
  const tables = `SELECT format('SELECT json_build_array(%L::text, count(*)) FROM %I.%I WHERE updated_at >= %L AND created_at < %L',
      table_schema || '.' || table_name, table_schema, table_name, '${since}', '${since}')
    FROM information_schema.columns JOIN information_schema.tables USING (table_schema, table_name)
    WHERE table_type = 'BASE TABLE' AND column_name IN ('created_at', 'updated_at') AND data_type LIKE 'timestamp%'
    GROUP BY table_schema, table_name HAVING count(*) = 2`
  const questions = (await run(query(postgresql, database, tables))).trim()
  if (questions === '') return new Map()
  // Strapi keeps UTC in columns without a time zone; a format of several lines would be several questions.
  const counts = await run(query(postgresql, database, questions.split('\n').join(' UNION ALL ')))
  const rows = counts.trim().split('\n')
  return new Map(rows.map((line) => JSON.parse(line) as [string, number]).filter(([, count]) => count > 0))
}

/** The legacy Strapi, booted on a newer schema, drops what it does not know. @throws Problem (usage) */
export async function refuseNewSchema(migration: Migration, isAccepted: boolean): Promise<void> {
  const { site, stage } = migration
  const { schemaHash, back } = await notes(site)
  // Begun already, it was looked at then.
  const isBegun = back && !(await isSwitched(migration))
  if (stage !== 'served' || isAccepted || isBegun || !(await sharesData(migration))) return
  const accepting = scriptCommand('migrate', site.envFile, '--rollback --accept-schema-change')
  if ((await startingPostgresql(site)) === undefined)
    throw new Problem(
      exitCodes.usage,
      'whether the database schema has changed since the switch cannot be seen: PostgreSQL does not run',
      `Start it: ${composeCommand(site, 'up -d postgresql')}\nOr, if the legacy Strapi may drop what it does not know: ${accepting}`,
    )
  if (schemaHash !== undefined && (await readSchema(site))?.hash === schemaHash) return
  throw new Problem(
    exitCodes.usage,
    schemaHash === undefined
      ? 'whether the database schema has changed since the switch is not known, since the journal of the migration is gone: the legacy Strapi would drop what it does not know'
      : 'the database schema has changed since the switch: the legacy Strapi would drop what it does not know, with all data in it',
    `If that is wanted: ${accepting}`,
  )
}

/** @throws Problem (degraded) when the legacy set-up does not serve */
export async function rollBack(migration: Migration): Promise<void> {
  const { site, legacy, stage } = migration
  const isShared = await sharesData(migration)
  // What is needed again is not removed any more.
  if ((await notes(site)).final) await note(site, { final: null })
  // Of an earlier way back that came to nothing: visitors have gone on since.
  if (await isSwitched(migration)) await note(site, { back: null, areUploadsBack: false })
  if (stage === 'served' && (await notes(site)).back?.set === undefined)
    await step('1/2', 'Back the new site up', () => backUpNew(site, isShared))
  await step('2/2', 'Stop the new set-up, start the legacy one', async () => {
    const areAllRunning = async () => (await runningServices(legacy)).length === inStartOrder(legacy).length
    let isUntouched = stage === 'legacy' && (await areAllRunning())
    if (isUntouched) {
      // A killed switch may have taken their restarts away already, or told one to end.
      const { networks } = await notes(site)
      await bringBack(legacy, networks)
      await bringLiveKitBack(legacy, networks)
      isUntouched = await areAllRunning()
    }
    if (isUntouched) {
      await bringFilesBack(legacy)
      if (isShared) await writeDatabaseFolder(migration, await freshDatabaseFolder(legacy))
      return await removeNew(site)
    }
    await goBack(migration).catch((error: unknown) => {
      throw new Problem(
        exitCodes.degraded,
        `the legacy set-up is not wholly back: ${explain(error)}`,
        `Mend that, then the same command again: ${scriptCommand('migrate', site.envFile, '--rollback')}`,
      )
    })
  })
  await note(site, { backup: '', areRowsSame: false, restoredSet: '', isSwitching: false, hasServed: false })
  say(
    `Done: the legacy set-up serves. Again: ${scriptCommand('migrate', site.envFile, `--from ${legacy.folder}`)}`,
  )
  const commands = await leftovers(migration).catch((error: unknown) => (warn(explain(error)), []))
  if (commands.length > 0)
    say(`What was prepared stays for that, as the settings do. To be rid of it: ${commands.join('; ')}`)
}

/** Commands that undo the steps before the switch, but for what only they have. */
async function leftovers({ site, legacy }: Migration): Promise<string[]> {
  const { uploads } = site.folders
  const isCopy = existsSync(uploads) && !isSameFolder(uploads, legacy.uploads)
  const own = isCopy
    ? (await differingUploads(legacy.uploads, uploads)).filter((name) => existsSync(join(uploads, name)))
    : []
  if (own.length > 0) detail(`${uploads} holds what the legacy set-up does not have:${listed(own)}`)
  const kept = isCopy && (await keepsReplaced(uploads))
  const used = inStartOrder(legacy).map(({ container }) => container.Image)
  const images = (await engine.tags(site.image)).filter(({ id }) => !used.includes(id))
  return [
    ...(isCopy && !kept && own.length === 0 ? [`rm -r ${uploads}`] : []),
    ...(images.length > 0
      ? [`docker image rm ${images.map(({ tag }) => `${site.image}:${tag}`).join(' ')}`]
      : []),
  ]
}

/** Whether restores hold uploads there that they have replaced. */
async function keepsReplaced(uploads: string): Promise<boolean> {
  const options = { recursive: true, withFileTypes: true } as const
  const entries = await readdir(join(uploads, ownFolder), options).catch(() => [])
  return entries.some((one) => one.isFile() && /\/(replaced|undone)(\/|$)/.test(one.parentPath))
}

/** What is not of this migration must not be taken for what was prepared. @throws Problem (usage) */
async function refuseOthers({ site, legacy }: Migration): Promise<void> {
  if (site.project === legacy.project)
    throw new Problem(
      exitCodes.usage,
      `the legacy set-up is in service, and both would be the Compose project ${site.project}: nothing was prepared, and nothing was changed`,
      `Set COMPOSE_PROJECT_NAME in ${site.envFile} to another name before you migrate.`,
    )
  const { master, slave } = await observe(site)
  if ([master, slave].every(({ status }) => status === 'absent' || status === 'stopped')) return
  throw new Problem(
    exitCodes.usage,
    `the legacy set-up is in service, and a Strapi of the project ${site.project} runs, too: it is none that this migration has started`,
    'Name the settings of the new set-up with --env-file.',
  )
}

/** Where the database is left behind, visitors must not write to it any more: what they wrote would be nowhere. */
async function backUpNew(site: Site, isShared: boolean): Promise<void> {
  const [postgresql] = await engine.serviceContainers(site.project, 'postgresql')
  const failure = postgresql && (await startPostgresql(postgresql).then(() => undefined, explain))
  if (failure !== undefined) {
    await note(site, { back: { set: '' }, isUnsaved: !isShared, areUploadsUnsaved: !isShared })
    return warn(`there is no set: ${failure}\nwhat PostgreSQL has stays in ${site.folders.postgres}`)
  }
  const slots = await Promise.all(
    Object.values(site.slots).map(({ container }) => engine.container(container)),
  )
  const running = slots.flatMap((found) => (found && isRunning({ container: found }) ? [found.Id] : []))
  if (!isShared) for (const id of running) await run(['docker', 'stop', id])
  try {
    const { name } = await makeBackup(site, [...parts])
    await note(site, { back: { set: name } })
    await rememberProven(site, name)
    detail(`${setFolder(site, name)}, read back and right`)
    addToResult({ backup: name })
  } catch (error) {
    // Nothing is left behind.
    if (isShared && !interrupted.aborted) {
      await note(site, { back: { set: '' } })
      return warn(`not backed up: ${explain(error)}`)
    }
    if (!isShared && running.length === 0 && !interrupted.aborted) {
      await note(site, { back: { set: '' }, isUnsaved: true, areUploadsUnsaved: true })
      return warn(`there is no set: ${explain(error)}\nwhat PostgreSQL has stays in ${site.folders.postgres}`)
    }
    if (!isShared) for (const id of running) await ask(['docker', 'start', id])
    throw new Problem(
      interrupted.aborted ? exitCodes.interrupted : exitCodes.failed,
      'the new site could not be backed up, and what it has would be left behind; it serves as before',
      'Mend what the cause says, then run it again.',
      error,
    )
  }
}

/** The legacy containers go; folders and volumes stay, and are named. @throws Problem (usage) while they may still be needed */
export async function finalize(migration: Migration): Promise<void> {
  const { site, legacy } = migration
  if (!(await isSwitched(migration)) || (await runningServices(legacy)).length > 0)
    throw new Problem(
      exitCodes.usage,
      'the new set-up does not serve alone, so the legacy one stays; nothing was changed',
      `See: ${scriptCommand('migrate', site.envFile, '--status')}`,
    )
  const { redis, postgresql } = legacy.services
  const volumes = [
    redis.container.Mounts.find(({ Destination }) => Destination === '/data'),
    ...postgresql.container.Mounts.filter(({ Source }) =>
      `${legacy.database.folder}/`.startsWith(`${Source}/`),
    ),
  ].flatMap((mount) => (mount?.Type === 'volume' && mount.Name ? [mount.Name] : []))
  const inUse = (await engine.mountsInUse()).map(({ folder }) => folder)
  const rest = [
    ...volumes.map((name) => `docker volume rm ${name}`),
    ...[legacy.source, legacy.folder]
      .filter((path) => !holdsLive(site, path, inUse))
      .map((path) => `rm -r ${path}`),
  ]
  const containers = inStartOrder(legacy).map(({ container }) => container.Id)
  await note(site, { final: { containers, byHand: rest.join('; ') } })
  await removeForGood(site)
}

/** From the decision on; repeated, it goes on. */
export async function removeForGood(site: Site): Promise<void> {
  const { final } = await notes(site)
  if (!final) return
  detail('removing the legacy containers')
  for (const id of final.containers) if (await engine.container(id)) await run(['docker', 'rm', id])
  await endCopy(site.folders.uploads)
  say('Done: the legacy containers are removed. There is no way back by --rollback any more.')
  say(`By hand, when nobody needs it any more: ${final.byHand}`)
}

/** Whether something that is in use lies below a folder. @param inUse what running containers see */
function holdsLive(site: Site, folder: string, inUse: string[]): boolean {
  const { values, folders, nginx } = site
  const files = [values.FIREBASE_CREDENTIALS, values.APNS_KEY, nginx.tls?.certificate, nginx.tls?.key]
  const used = [
    ...Object.values(folders),
    ...inUse,
    site.source,
    site.envFile,
    ...files.filter((path) => path !== undefined),
  ]
  const real = (path: string) => (existsSync(path) ? realpathSync(path) : path)
  return used.some(
    (path) => !relative(real(folder), real(resolve(join(projectRoot, 'docker'), path))).startsWith('..'),
  )
}

export async function showStatus(migration: Migration): Promise<void> {
  const { site, legacy, stage } = migration
  const running = await runningServices(legacy)
  const state = stage === 'served' && !(await isSwitched(migration)) ? 'down' : stage
  const words = {
    legacy: 'the legacy set-up serves; nothing was switched',
    switching: 'the switch has begun and is not through: visitors are not served',
    served: 'the new set-up serves; the legacy one is out of service and kept',
    down: 'the new set-up has served, and does not now (it may be booting), or a way back was begun',
  }
  const { backup, outageMs } = await notes(site)
  addToResult({ state, backup, outageMs })
  say(words[state])
  say(
    `legacy         ${running.length} of ${inStartOrder(legacy).length} run: ${inStartOrder(legacy).map(nameOf).join(', ')}`,
  )
  const master = await engine.container(site.slots['strapi-master'].container)
  say(`new            strapi-master ${master?.State.Status ?? 'not there'}, release ${site.release}`)
  say(`backup before  ${backup || 'none'}`)
  if (outageMs !== undefined) say(`outage         ${(outageMs / 1000).toFixed(1)} s`)
  const option = (word: string) => scriptCommand('migrate', site.envFile, word)
  if (state !== 'served') say(`Go on: ${option(`--from ${legacy.folder}`)}`)
  if (state !== 'legacy' || (await wasStarted(site))) say(`Back: ${option('--rollback')}`)
  if (state === 'served') say(`For good: ${option('--finalize')}`)
}
