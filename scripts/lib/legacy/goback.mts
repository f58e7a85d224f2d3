/** The legacy set-up in service again, the new one out of it: by itself when a switch fails, or because somebody wants it. */
import { existsSync } from 'node:fs'
import { stat } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { ask, run } from '../command.mts'
import { makeBackup } from '../data/backup.mts'
import { parts } from '../data/manifest.mts'
import * as engine from '../engine.mts'
import { strangerOnData } from '../folders.mts'
import { alive, detail, explain, warn } from '../report.mts'
import type { Site } from '../settings.mts'
import * as containers from './containers.mts'
import { note, notes } from './journal.mts'
import { inStartOrder } from './look.mts'
import { wasStarted, type Migration } from './migration.mts'
import {
  newContainers,
  removeNew,
  sharesData,
  startPostgresql,
  stopNew,
  stopSlots,
  writeDatabaseFolder,
} from './newsetup.mts'
import { restoreNginx } from './nginx.mts'
import { freshDatabaseFolder } from './settings.mts'
import { copyUploads, endCopy } from './uploads.mts'

/**
 * Out of service: everything new. In service: everything legacy, seen to answer. Repeated, it goes on; not stopped by an
 * interruption.
 * @throws Error with all that did not go well, at the end
 */
export async function goBack(migration: Migration): Promise<void> {
  for (let attemptsLeft = 3; ; attemptsLeft--) {
    try {
      return await bringAllBack(migration)
    } catch (error) {
      // The engine may have been restarted in the middle of that.
      const isOfEngine = /docker daemon|docker API|container engine|error during connect|EOF|ECONN/.test(
        explain(error),
      )
      if (attemptsLeft === 1 || (!isOfEngine && (await isEngineUp()))) throw error
      await untilEngineAnswers()
    }
  }
}

/** For a minute. An interruption does not end that: nothing comes back without it. */
export async function untilEngineAnswers(): Promise<void> {
  await alive(
    () => 'waiting for the engine',
    async () => {
      for (const deadline = Date.now() + 60_000; Date.now() < deadline && !(await isEngineUp());)
        await sleep(500)
    },
  )
}

async function isEngineUp(): Promise<boolean> {
  return await engine.version().then(
    () => true,
    () => false,
  )
}

async function bringAllBack(migration: Migration): Promise<void> {
  const { site, legacy } = migration
  const failures: string[] = []
  const tolerate = async (action: Promise<unknown>) =>
    await action.catch((error: unknown) => void failures.push(explain(error)))
  const isShared = await sharesData(migration)
  const noted = await notes(site)
  const hasServed = noted.hasServed || (await wasStarted(site))
  // Without the journal, and without its containers, nobody knows whether the new Strapi has served.
  const mayHaveServed = hasServed || (migration.stage === 'switching' && noted.policies === undefined)
  detail('stopping the new set-up')
  await keepLogs(site).catch((error: unknown) => warn(explain(error)))
  const { back, areUploadsBack } = noted
  if (hasServed) await stopSlots(site)
  if (mayHaveServed && isShared && !areUploadsBack) await tolerate(copyUploadsBack(migration, hasServed))
  // Its own database can be dumped when visitors are served again.
  const isToKeep = hasServed && !isShared && back?.set === undefined
  // A full disk, too, must not keep visitors from the legacy set-up.
  if (!back) await tolerate(note(site, { back: {} }))
  const kept = isToKeep ? ['postgresql'] : []
  await stopNew(site, [...kept, 'livekit'])
  if (isShared) {
    const stranger = await strangerOnData(
      legacy.database.folder,
      inStartOrder(legacy).map(({ container }) => container.Id),
    )
    if (stranger !== undefined)
      throw new Error(`${stranger} works in ${legacy.database.folder}; stop it first`)
    await tolerate(freshDatabaseFolder(legacy).then((folder) => writeDatabaseFolder(migration, folder)))
    const { dataOwner } = await notes(site)
    if (dataOwner) await tolerate(run(['chown', '-R', dataOwner, legacy.database.folder]))
  }
  detail('starting the legacy set-up')
  await containers.bringBack(legacy, noted.networks)
  await tolerate(restoreNginx(site))
  detail('waiting for the legacy Strapi')
  await containers.untilServing(legacy)
  if (legacy.services.livekit) {
    detail('LiveKit, too')
    await tolerate(stopNew(site, kept).then(() => containers.bringLiveKitBack(legacy, noted.networks)))
  }
  if (isToKeep) await tolerate(keepWhatItTook(site))
  await stopNew(site)
  if (failures.length > 0) throw new Error(failures.join('; '))
  await containers.bringFilesBack(legacy)
  await note(site, { isSwitching: false, hasServed: false, back: null, areUploadsBack: false })
  migration.stage = 'legacy'
  await removeNew(site)
}

/** Both use one database, and its rows refer to them. What is older there is in the set that was made before. */
async function copyUploadsBack({ site, legacy }: Migration, hasServed: boolean): Promise<void> {
  if (!existsSync(site.folders.uploads)) return
  const { strapi } = legacy.services
  const isStrapiUp = (await containers.runningServices(legacy)).some(({ name }) => name === strapi.name)
  const { uid, gid } = await stat(legacy.uploads)
  const { copied } = await copyUploads(
    site.folders.uploads,
    legacy.uploads,
    { uid, gid },
    // A legacy Strapi that runs already, or was the last that did, may have changed them since.
    { removesOthers: false, keepsNewer: isStrapiUp || !hasServed },
  )
  await endCopy(legacy.uploads)
  await note(site, { areUploadsBack: true })
  if (copied > 0) detail(`${copied} uploads copied back`)
}

/** Visitors may have been there between its start and its end; who interrupts now means the switch. */
async function keepWhatItTook(site: Site): Promise<void> {
  const [postgresql] = await engine.serviceContainers(site.project, 'postgresql')
  if (!postgresql) {
    await note(site, { isUnsaved: true, areUploadsUnsaved: true })
    return warn(`there is no set: PostgreSQL has no container; its data stays in ${site.folders.postgres}`)
  }
  await startPostgresql(postgresql)
  const { name } = await makeBackup(site, [...parts], { signal: new AbortController().signal })
  await note(site, { back: { set: name } })
  warn(`what the new Strapi may have taken from visitors is in the set ${name}`)
}

export function logsFolder(site: Site): string {
  return join(site.stateDir, 'logs')
}

/** Their containers are removed, and somebody will want to know. */
async function keepLogs(site: Site): Promise<void> {
  await run(['mkdir', '--parents', '--mode=700', logsFolder(site)])
  for (const { Id, Name, State } of await newContainers(site))
    if (State.Status !== 'created')
      await ask([
        'sh',
        '-c',
        'umask 077; exec docker logs "$1" > "$0" 2>&1',
        join(logsFolder(site), `${Name.slice(1)}.log`),
        Id,
      ])
}
