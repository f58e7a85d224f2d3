/** The moment that visitors notice: the legacy services stop, the new ones start on the same data. If any of it fails, back. */
import { existsSync } from 'node:fs'
import { stat } from 'node:fs/promises'
import { start as startSlot } from '../actions.mts'
import { run } from '../command.mts'
import * as compose from '../compose.mts'
import { makeBackup, type Origin } from '../data/backup.mts'
import { readDatabases } from '../data/databases.mts'
import { restoreSet } from '../data/restore.mts'
import { openSnapshot } from '../data/snapshot.mts'
import { differentRows } from '../data/verify.mts'
import * as engine from '../engine.mts'
import { strapiUid } from '../folders.mts'
import { smoke, untilHealthy } from '../health.mts'
import { remember } from '../history.mts'
import { imageOf } from '../releases.mts'
import { addToResult, alive, detail, exitCodes, explain, interrupted, Problem, warn } from '../report.mts'
import { readSchema } from '../schema.mts'
import { scriptCommand, type Site } from '../settings.mts'
import { observe } from '../slots.mts'
import * as containers from './containers.mts'
import { adoptRoles, countRows, untilReady } from './database.mts'
import { note, notes } from './journal.mts'
import type { Legacy } from './look.mts'
import type { Migration } from './migration.mts'
import { restoreNginx } from './nginx.mts'
import { copyRedis } from './redis.mts'
import { copyUploads, endCopy } from './uploads.mts'

export const uploadsOwner = { uid: strapiUid, gid: strapiUid }

/** The legacy site as something that a backup can be made of. */
export function legacyView(site: Site, legacy: Legacy): Site {
  return { ...site, source: legacy.source, folders: { ...site.folders, uploads: legacy.uploads } }
}

/** Whether the new PostgreSQL works in the folder of the legacy one. */
export function sharesData({ site, legacy }: Migration): boolean {
  return site.folders.postgres === legacy.database.folder
}

/** The new master serves, and nothing of the legacy set-up runs. */
export async function isSwitched({ site, legacy }: Migration): Promise<boolean> {
  const { master } = await observe(site)
  return master.status === 'healthy' && (await containers.runningServices(legacy)).length === 0
}

export async function switchOver(migration: Migration): Promise<void> {
  const { site, legacy } = migration
  const startedAt = Date.now()
  try {
    // First of all, so that a killed run is seen to have begun, and nobody starts it again by hand.
    await containers.retireFiles(legacy)
    detail('stopping the legacy Strapi')
    await containers.stopStrapi(legacy)
    detail('moving database, Redis and uploads over')
    await all([
      moveDatabase(migration),
      moveRedis(migration),
      copyLastUploads(migration),
      containers.stopLiveKit(legacy),
    ])
    interrupted.throwIfAborted()
    detail('starting strapi-master')
    await startMaster(site)
  } catch (error) {
    throw await wentWrong(migration, error)
  }
  const outageMs = Date.now() - startedAt
  await containers.renameRetired(legacy)
  await note(site, { outageMs })
  await remember(site, { release: site.release, result: 'done' }, await readSchema(site))
  if ((site.values.COMPOSE_PROFILES ?? '').split(',').includes('livekit'))
    await run(compose.startServices(site, ['livekit'])).catch((error: unknown) =>
      warn(`LiveKit: ${explain(error)}`),
    )
  addToResult({ outageMs })
  detail(`the site was off for ${(outageMs / 1000).toFixed(1)} s`)
}

/** Lets all of them end before the first failure counts: what undoes them must not race with them. */
async function all(actions: Promise<unknown>[]): Promise<void> {
  const failed = (await Promise.allSettled(actions)).filter((one) => one.status === 'rejected')
  const [first, ...others] = failed.map(({ reason }): unknown => reason)
  for (const other of others) warn(explain(other))
  if (failed.length > 0) throw first
}

async function moveDatabase(migration: Migration): Promise<void> {
  const { site, legacy } = migration
  const postgresql = await serviceOf(site, 'postgresql')
  if (sharesData(migration)) {
    const rows = await countRows(legacy)
    if (rows) await note(site, { rows })
    await containers.stopPostgresql(legacy)
    await run(['docker', 'start', postgresql])
    await untilReady(postgresql, ['pg_isready', '--quiet', '--host=127.0.0.1'])
    await adoptRoles(postgresql, legacy)
  } else {
    await dumpAndRestore(migration, postgresql)
    await containers.stopPostgresql(legacy)
  }
  await compareRows(site, postgresql)
}

/** Through the code of data.mts. What an earlier run restored counts only if nobody can have written since. */
async function dumpAndRestore({ site, legacy }: Migration, postgresql: string): Promise<void> {
  const isRunning =
    (await engine.container(legacy.services.postgresql.container.Id))?.State.Status === 'running'
  const { live } = await readDatabases(site, postgresql)
  if (!isRunning && live?.restoredBy !== undefined) return
  if (!legacy.database.live)
    throw new Error('the legacy PostgreSQL does not run, and its data is not in the new one yet')
  const origin: Origin = { server: legacy.database.live.server, configFiles: [] }
  const { name, manifest } = await makeBackup(legacyView(site, legacy), ['database'], origin)
  await note(site, { rows: manifest.database?.rows ?? {} })
  await restoreSet(site, {
    set: name,
    parts: ['database'],
    accept: ['other-secrets'],
    isAgreed: true,
    isNewHost: true,
    sortsAsServer: true,
  })
}

/** @throws Error when one is missing, before Strapi has touched anything */
async function compareRows(site: Site, postgresql: string): Promise<void> {
  const { rows } = await notes(site)
  if (!rows) return warn('how many rows there were is not known any more: an earlier run was killed')
  const now = await openSnapshot(postgresql, site.database.name)
  await now.close()
  const different = differentRows(rows, now.rows)
  if (different.length > 0) throw new Error(`not all rows came along: ${different.join('; ')}`)
  await note(site, { areRowsSame: true })
}

async function moveRedis({ site, legacy }: Migration): Promise<void> {
  const redis = await serviceOf(site, 'redis')
  if ((await engine.container(redis))?.State.Status !== 'running') {
    await containers.stopRedis(legacy)
    await copyRedis(site, legacy)
    await run(['docker', 'start', redis])
  }
  await untilReady(redis, ['redis-cli', '-e', 'ping'])
}

async function copyLastUploads({ site, legacy }: Migration): Promise<void> {
  const { copied, removed } = await copyUploads(legacy.uploads, site.folders.uploads, uploadsOwner, {
    removesOthers: true,
  })
  detail(`uploads that had changed meanwhile: ${copied} copied, ${removed} removed`)
}

async function startMaster(site: Site): Promise<void> {
  const imageId = await imageOf(site, site.release)
  if (imageId === undefined) throw new Error(`there is no image ${site.image}:${site.release}`)
  const found = await engine.container(site.slots['strapi-master'].container)
  // Made beforehand, when nobody waited for it.
  if (found?.State.Status === 'created' && found.Image === imageId)
    await run(compose.start(site, 'strapi-master'))
  else await startSlot(site, 'strapi-master', site.release)
  await alive(
    () => 'waiting for strapi-master',
    () => untilHealthy(site, 'strapi-master', imageId),
  )
  await smoke(site, 'strapi-master')
}

async function serviceOf(site: Site, service: string): Promise<string> {
  const [found] = await engine.serviceContainers(site.project, service)
  if (!found) throw new Error(`${service} has no container: it is made in the step before`)
  return found.Id
}

/** The legacy set-up serves again by itself, or a person is told. */
async function wentWrong(migration: Migration, error: unknown): Promise<Problem> {
  const { site, legacy, envFile } = migration
  const log = await run(compose.logs(site, 'strapi-master', 20)).catch(() => '')
  const again = scriptCommand('migrate', envFile, `--from ${legacy.folder}`)
  warn(`${interrupted.aborted ? 'interrupted' : explain(error)}\ngoing back to the legacy set-up`)
  try {
    await goBack(migration)
  } catch (failure) {
    warn(explain(failure))
    return new Problem(
      exitCodes.degraded,
      'the switch failed, and the legacy set-up could not be brought back: visitors are not served',
      `Try: ${scriptCommand('migrate', envFile, `--rollback --from ${legacy.folder}`)}`,
      error,
    )
  }
  return new Problem(
    interrupted.aborted ? exitCodes.interrupted : exitCodes.failed,
    `the switch did not go through; the legacy set-up serves again, nothing is lost${log ? `\n${log.trimEnd()}` : ''}`,
    `Then: ${again}`,
    error,
  )
}

/**
 * Out of service: everything new. In service: everything legacy, seen to answer.
 * @throws Error or Problem when it does not
 */
export async function goBack(migration: Migration): Promise<void> {
  const { site, legacy } = migration
  const hasServed = await wasStarted(site)
  await removeNew(site)
  if (sharesData(migration)) await giveBackFolder(legacy)
  if (hasServed) await copyUploadsBack(migration)
  await restoreNginx(site)
  await containers.bringBack(legacy)
  await containers.untilServing(legacy)
}

/** Whether the new Strapi may have taken something from visitors. */
export async function wasStarted(site: Site): Promise<boolean> {
  const found = await engine.container(site.slots['strapi-master'].container)
  return found !== undefined && found.State.Status !== 'created'
}

/** Where both use one database, its rows refer to them. What is older there is in the set that was made before. */
export async function copyUploadsBack(migration: Migration): Promise<void> {
  const { site, legacy } = migration
  if (!sharesData(migration)) return
  const { uid, gid } = await stat(legacy.uploads)
  const { copied } = await copyUploads(
    site.folders.uploads,
    legacy.uploads,
    { uid, gid },
    { removesOthers: false },
  )
  await endCopy(legacy.uploads)
  if (copied > 0) detail(`${copied} uploads copied back`)
}

/** Containers only: volumes and folders stay. PostgreSQL gets the time to end well. */
async function removeNew(site: Site): Promise<void> {
  for (const service of ['strapi-slave', 'strapi-master', 'livekit', 'redis', 'postgresql'])
    for (const { Id, State } of await engine.serviceContainers(site.project, service)) {
      if (State.Status === 'running') await run(['docker', 'stop', '--time', '60', Id])
      await run(['docker', 'rm', '--force', Id])
    }
}

/** The user postgres has another number in another image. */
async function giveBackFolder({ database, services }: Legacy): Promise<void> {
  if (!existsSync(database.folder)) throw new Error(`${database.folder} is gone`)
  const image = services.postgresql.container.Image
  const mount = `--volume=${database.folder}:/data`
  await run([
    'docker',
    'run',
    '--rm',
    '--network=none',
    '--user=0',
    mount,
    '--entrypoint=chown',
    image,
    '-R',
    'postgres:postgres',
    '/data',
  ])
}
