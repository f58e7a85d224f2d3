/** The moment that visitors notice: the legacy services stop, the new ones start on the same data. If any of it fails, back. */
import { stat } from 'node:fs/promises'
import { join } from 'node:path'
import { logTail } from '../actions.mts'
import { setRestart } from '../booting.mts'
import { usesLiveKit } from '../checks/settings.mts'
import { run } from '../command.mts'
import * as compose from '../compose.mts'
import { makeBackup, type Origin } from '../data/backup.mts'
import { readDatabases } from '../data/databases.mts'
import { setFolder } from '../data/sets.mts'
import { restoreSet } from '../data/restore.mts'
import { openSnapshot } from '../data/snapshot.mts'
import { differentRows } from '../data/verify.mts'
import * as engine from '../engine.mts'
import { strapiUid } from '../folders.mts'
import { smoke, untilHealthy } from '../health.mts'
import { readHistory, remember } from '../history.mts'
import { imageOf } from '../releases.mts'
import {
  addToResult,
  alive,
  detail,
  exitCodes,
  explain,
  interrupted,
  pause,
  Problem,
  warn,
} from '../report.mts'
import { readSchema } from '../schema.mts'
import { composeCommand, scriptCommand, type Site } from '../settings.mts'
import { observe } from '../slots.mts'
import * as containers from './containers.mts'
import { adoptRoles, countRows, untilReady } from './database.mts'
import { goBack, logsFolder, untilEngineAnswers } from './goback.mts'
import { note, notes } from './journal.mts'
import { inStartOrder, type Legacy, type Service } from './look.mts'
import type { Migration } from './migration.mts'
import { madeContainer, sharesData, startPostgresql, stopSlots, writeDatabaseFolder } from './newsetup.mts'
import { copyRedis } from './redis.mts'
import { copyUploads, differingUploads } from './uploads.mts'

export const uploadsOwner = { uid: strapiUid, gid: strapiUid }

/** The legacy site as something that a backup can be made of. */
export function legacyView(site: Site, { source, uploads, database: { name, user } }: Legacy): Site {
  return { ...site, source, folders: { ...site.folders, uploads }, database: { name, user } }
}

/** The new Strapi serves, and nothing of the legacy set-up runs. */
export async function isSwitched({ site, legacy, stage }: Migration): Promise<boolean> {
  if (stage !== 'served' || (await stillRunning(legacy)).length > 0) return false
  const { master, slave } = await observe(site)
  return master.status === 'healthy' || slave.status === 'healthy'
}

/** LiveKit may still be ending: settle waits for that. */
async function stillRunning(legacy: Legacy): Promise<Service[]> {
  const running = await containers.runningServices(legacy)
  return running.filter(({ name }) => name !== legacy.services.livekit?.name)
}

export async function switchOver(migration: Migration): Promise<void> {
  if (migration.stage === 'served') return await startAgain(migration)
  const { legacy } = migration
  const startedAt = Date.now()
  let isLiveKitOut: Promise<void> | undefined
  try {
    if (migration.stage === 'legacy') await noteService(migration)
    // Begun before; somebody may have taken them down since.
    else
      await run(compose.create(migration.site, 'strapi-master'), {
        env: { STRAPI_VERSION: migration.site.release },
      })
    // First of all, so that a killed run is seen to have begun, and nobody starts it again by hand.
    await containers.retireFiles(legacy)
    migration.stage = 'switching'
    detail('stopping the legacy Strapi')
    await containers.stopStrapi(legacy)
    detail('moving database, Redis and uploads over')
    // The engine takes seconds for its many ports, and the new Strapi needs none of them: settle sees that it is out.
    isLiveKitOut = containers.stopLiveKit(legacy).catch((error: unknown) => warn(explain(error)))
    await all([moveDatabase(migration), moveRedis(migration), copyLastUploads(migration)])
    interrupted.throwIfAborted()
    detail('starting strapi-master')
    await startMaster(migration.site)
  } catch (error) {
    await isLiveKitOut
    throw await wentWrong(migration, error)
  }
  migration.stage = 'served'
  const outageMs = Date.now() - startedAt
  await isLiveKitOut
  await note(migration.site, { outageMs, isSwitching: false })
  addToResult({ outageMs })
  detail(`the site was off for ${(outageMs / 1000).toFixed(1)} s`)
}

/** What a way back needs to know, and what cannot be seen any more when it is out of service. */
async function noteService({ site, legacy }: Migration): Promise<void> {
  const policies = Object.fromEntries(inStartOrder(legacy).map(({ name, restart }) => [name, restart]))
  const { uid, gid } = await stat(join(legacy.database.folder, 'PG_VERSION'))
  const names = new Set(
    inStartOrder(legacy).flatMap(({ container }) => Object.keys(container.NetworkSettings.Networks)),
  )
  const networks = await Promise.all(
    [...names].map(async (name) => [name, (await engine.network(name))?.Labels ?? {}] as const),
  )
  await note(site, {
    policies,
    networks: Object.fromEntries(networks),
    dataOwner: `${uid}:${gid}`,
    rows: null,
    switchedAt: new Date().toISOString(),
    areRowsSame: false,
    restoredSet: '',
    hasServed: false,
    isSwitching: true,
    back: null,
    areUploadsBack: false,
    isChecked: false,
  })
}

/** What is not worth an outage: names, LiveKit, the history. Repeated until it is done. */
export async function settle(migration: Migration): Promise<void> {
  const { site, legacy } = migration
  // The journal may have been lost since, or the run that started it been killed.
  const { hasServed, isSwitching } = await notes(site)
  if (!hasServed || isSwitching) await note(site, { hasServed: true, isSwitching: false })
  await containers.stopLiveKit(legacy)
  await containers.renameRetired(legacy)
  if (usesLiveKit(site)) await run(compose.startServices(site, ['livekit']), { timeoutMs: 1_800_000 })
  const isKnown = (await readHistory(site)).some(({ release }) => release === site.release)
  if (!isKnown) await remember(site, { release: site.release, result: 'done' }, await readSchema(site))
}

/** The new Strapi has served before: everything is there, and only has to run. */
async function startAgain(migration: Migration): Promise<void> {
  const { legacy } = migration
  const back = scriptCommand('migrate', migration.envFile, '--rollback')
  const running = await stillRunning(legacy)
  if (running.length > 0)
    throw new Problem(
      exitCodes.degraded,
      `a way back was begun: ${running.map(({ name }) => name).join(', ')} of the legacy set-up run; nothing was changed`,
      `End it: ${back}`,
    )
  if (await sharesData(migration)) await writeDatabaseFolder(migration, legacy.database.folder)
  const { site } = migration
  try {
    await note(site, { isSwitching: false, back: null, areUploadsBack: false })
    // A way back that came to nothing may have given it to them again.
    await containers.keepOut(legacy)
    // Also where somebody has taken the containers down.
    await run(compose.create(site, 'strapi-master'), { env: { STRAPI_VERSION: site.release } })
    await startPostgresql(await madeContainer(site, 'postgresql'))
    await run(['docker', 'start', (await madeContainer(site, 'redis')).Id])
    const { master, slave } = await observe(site)
    if ([master, slave].every(({ status }) => status === 'stopped' || status === 'absent'))
      await run(compose.start(site, 'strapi-master'))
    await comeBackAfterReboot(site)
  } catch (error) {
    throw new Problem(
      exitCodes.degraded,
      'the new set-up has served before, and cannot be started now: visitors are not served',
      `Mend what the cause says, then run it again. Back to the legacy set-up: ${back}`,
      error,
    )
  }
  const deadline = Date.now() + site.health.timeoutMs
  await alive(
    () => 'waiting for strapi-master',
    async () => {
      for (;;) {
        const now = await observe(site)
        if (now.master.status === 'healthy' || now.slave.status === 'healthy') return
        if (Date.now() > deadline)
          throw new Problem(
            exitCodes.degraded,
            `the new set-up has served before, and does not now: strapi-master is ${now.master.status}`,
            `Look at: ${composeCommand(site, 'logs strapi-master')}\nBack to the legacy set-up: ${back}`,
          )
        await pause(200)
      }
    },
  )
}

/** A way back that was begun has taken that from them. Slave's own policy is none. */
async function comeBackAfterReboot(site: Site): Promise<void> {
  for (const service of ['postgresql', 'redis', 'livekit', 'strapi-master'])
    for (const { Id } of await engine.serviceContainers(site.project, service))
      await setRestart(Id, 'unless-stopped')
}

/** Lets all of them end before the first failure counts: what undoes them must not race with them. */
async function all(actions: Promise<unknown>[]): Promise<void> {
  const failed = (await Promise.allSettled(actions)).filter((one) => one.status === 'rejected')
  const [first, ...others] = failed.map(({ reason }): unknown => reason)
  for (const other of others) warn(explain(other))
  if (failed.length > 0) throw first
}

async function moveDatabase(migration: Migration): Promise<void> {
  const { legacy } = migration
  const made = await madeContainer(migration.site, 'postgresql')
  const postgresql = made.Id
  const isRunning =
    (await engine.container(legacy.services.postgresql.container.Id))?.State.Status === 'running'
  if (await sharesData(migration)) {
    if (isRunning) await note(migration.site, await countRows(legacy))
    await containers.stopPostgresql(legacy)
    await writeDatabaseFolder(migration, legacy.database.folder)
    await startPostgresql(made)
    await adoptRoles(postgresql, legacy)
  } else {
    await startPostgresql(made)
    if (isRunning || !(await isRestored(migration, postgresql)))
      await dumpAndRestore(migration, postgresql, isRunning)
    await containers.stopPostgresql(legacy)
  }
  await compareRows(migration.site, postgresql)
}

async function isRestored({ site }: Migration, postgresql: string): Promise<boolean> {
  const { restoredSet } = await notes(site)
  return Boolean(restoredSet) && (await readDatabases(site, postgresql)).live?.fromSet === restoredSet
}

/** Through the code of data.mts. */
async function dumpAndRestore(
  { site, legacy }: Migration,
  postgresql: string,
  isRunning: boolean,
): Promise<void> {
  const { live } = legacy.database
  if (!isRunning || !live)
    throw new Error('the legacy PostgreSQL does not run, and its data is not in the new one yet')
  const origin: Origin = { server: live.server, configFiles: [] }
  const { name, manifest } = await makeBackup(legacyView(site, legacy), ['database'], { origin })
  await note(site, { rows: manifest.database?.rows ?? {}, restoredSet: name })
  await clearDatabase(site, postgresql)
  await restoreSet(site, {
    set: name,
    parts: ['database'],
    accept: ['other-secrets', 'other-schema'],
    isAgreed: true,
    isNewHost: true,
    sortsAsServer: true,
  })
}

/** What is there is empty, a copy that was not used, or in a set; or else it stays, by another name. */
async function clearDatabase(site: Site, postgresql: string): Promise<void> {
  const { name } = site.database
  if ((await notes(site)).isUnsaved) {
    const kept = `${name}_before_${new Date().toISOString().slice(0, 19).replaceAll(/\D/g, '')}`
    const isThere = (await readDatabases(site, postgresql)).live !== undefined
    if (isThere)
      await run(compose.query(postgresql, 'postgres', `ALTER DATABASE "${name}" RENAME TO "${kept}"`))
    if (isThere) warn(`what the new Strapi had taken before is in no set, and kept as the database ${kept}`)
    await note(site, { isUnsaved: false })
  }
  await run(compose.query(postgresql, 'postgres', `DROP DATABASE IF EXISTS "${name}" WITH (FORCE)`))
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
  const redis = (await madeContainer(site, 'redis')).Id
  const status = (await engine.container(redis))?.State.Status
  // A crashed one would come up in the middle of the copy.
  if (status === 'restarting') await run(['docker', 'stop', redis])
  if (status !== 'running') {
    await containers.stopRedis(legacy)
    await copyRedis(site, legacy)
    await run(['docker', 'start', redis])
  }
  await untilReady(redis, ['redis-cli', '-e', 'ping'])
}

async function copyLastUploads({ site, legacy }: Migration): Promise<void> {
  // Without the journal nobody knows whether the new Strapi has served: what only that one has must stay.
  const isKnown = (await notes(site)).isSwitching === true
  const { copied, removed } = await copyUploads(legacy.uploads, site.folders.uploads, uploadsOwner, {
    removesOthers: isKnown,
    keepsNewer: !isKnown,
  })
  const left = isKnown ? await differingUploads(legacy.uploads, site.folders.uploads) : []
  if (left.length > 0)
    throw new Error(
      `uploads still differ, although nobody should write to them: ${left.slice(0, 10).join(', ')}`,
    )
  detail(`uploads that had changed meanwhile: ${copied} copied, ${removed} removed`)
}

async function startMaster(site: Site): Promise<void> {
  const imageId = await imageOf(site, site.release)
  if (imageId === undefined) throw new Error(`there is no image ${site.image}:${site.release}`)
  // From here on it may take something from visitors: no data is moved any more.
  await note(site, { hasServed: true })
  // Made beforehand, when nobody waited for it.
  await run(compose.start(site, 'strapi-master'))
  await alive(
    () => 'waiting for strapi-master',
    () => untilHealthy(site, 'strapi-master', imageId),
  )
  await smoke(site, 'strapi-master')
}

/** The legacy set-up serves again by itself, or a person is told. */
async function wentWrong(migration: Migration, error: unknown): Promise<Problem> {
  const { site, legacy, envFile } = migration
  await untilEngineAnswers()
  const log = await logTail(site, 'strapi-master')
  // What boots may change it yet.
  if ((await notes(site)).hasServed) await stopSlots(site).catch((failure: unknown) => warn(explain(failure)))
  const hasChanged = await isSchemaChanged(migration).catch(() => undefined)
  warn(`${interrupted.aborted ? 'interrupted' : explain(error)}\ngoing back to the legacy set-up`)
  try {
    await goBack(migration)
  } catch (failure) {
    return new Problem(
      exitCodes.degraded,
      `the switch did not go through, and the legacy set-up is not wholly back: ${explain(failure)}`,
      `Mend that, then: ${scriptCommand('migrate', envFile, '--rollback')}`,
      error,
    )
  }
  if (hasChanged !== false)
    return new Problem(
      exitCodes.degraded,
      `the switch did not go through; the legacy set-up serves again, but ${hasChanged ? 'the new Strapi had changed the database schema: what it dropped is gone there' : 'whether the new Strapi had changed the database schema, and dropped something, is not known'}${log ? `\n${log.trimEnd()}` : ''}`,
      `The data as it was before: ${setFolder(site, (await notes(site)).backup ?? '')}, by the commands of RECOVERY.md in it`,
      error,
    )
  return new Problem(
    interrupted.aborted ? exitCodes.interrupted : exitCodes.failed,
    `the switch did not go through; the legacy set-up serves again with all its data${log ? `\n${log.trimEnd()}` : ''}`,
    `Logs of the new containers: ${logsFolder(site)}\nThen: ${scriptCommand('migrate', envFile, `--from ${legacy.folder}`)}`,
    error,
  )
}

/** Since the legacy Strapi had made it; undefined when nobody can tell. */
async function isSchemaChanged(migration: Migration): Promise<boolean | undefined> {
  const { site } = migration
  const { schemaHash, hasServed } = await notes(site)
  if (!hasServed || !(await sharesData(migration))) return false
  const now = await readSchema(site)
  return schemaHash === undefined || now === undefined ? undefined : now.hash !== schemaHash
}
