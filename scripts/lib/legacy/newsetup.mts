/** The containers of the new set-up, and the data that its PostgreSQL works on. */
import { setRestart } from '../booting.mts'
import { run } from '../command.mts'
import * as engine from '../engine.mts'
import { readText, setValues, writeEnv } from '../envfile.mts'
import { isSameFolder, strangerOnData } from '../folders.mts'
import { loadSite, type Site } from '../settings.mts'
import { untilReady } from './database.mts'
import { isRunning } from './look.mts'
import type { Migration } from './migration.mts'

/** Whether the new PostgreSQL works in the folder of the legacy one: as its container was made. */
export async function sharesData({ site, legacy }: Migration): Promise<boolean> {
  const [made] = await engine.serviceContainers(site.project, 'postgresql')
  const folders = made ? made.Mounts.map(({ Source }) => Source) : [site.folders.postgres]
  return folders.some((folder) => isSameFolder(folder, legacy.database.folder))
}

/** @throws Error when somebody else works with its data, or it does not become ready */
export async function startPostgresql({ Id, Mounts }: engine.Container): Promise<void> {
  const data = Mounts.find(({ Destination }) => Destination === '/var/lib/postgresql/data')?.Source ?? ''
  const stranger = await strangerOnData(data, [Id])
  if (stranger !== undefined)
    throw new Error(`${stranger} works in ${data}: a second PostgreSQL would destroy it`)
  await run(['docker', 'start', Id])
  await untilReady(Id, ['pg_isready', '--quiet', '--host=127.0.0.1'])
}

/** Only now: as long as the legacy PostgreSQL ran there, no `up` by hand may have started a second one. */
export async function writeDatabaseFolder(migration: Migration, folder: string): Promise<void> {
  const { envFile } = migration
  await writeEnv(envFile, setValues((await readText(envFile)) ?? '', { POSTGRES_VOLUME: folder }))
  migration.site = await loadSite(envFile)
}

export async function madeContainer(site: Site, service: string): Promise<engine.Container> {
  const [found] = await engine.serviceContainers(site.project, service)
  if (!found) throw new Error(`${service} has no container: it is made in the step before`)
  return found
}

export async function stopSlots(site: Site): Promise<void> {
  for (const { container } of Object.values(site.slots)) {
    const found = await engine.container(container)
    if (found && isRunning({ container: found })) await run(['docker', 'stop', container])
  }
}

const newServices = ['strapi-slave', 'strapi-master', 'livekit', 'redis', 'postgresql']

export async function newContainers(site: Site): Promise<engine.Container[]> {
  return (
    await Promise.all(newServices.map((service) => engine.serviceContainers(site.project, service)))
  ).flat()
}

/**
 * PostgreSQL gets the time to end well; LiveKit would wait for the last call. One that the engine starts again and again would
 * not stay stopped.
 */
export async function stopNew(site: Site, butFor: string[] = []): Promise<void> {
  for (const { Id, State, Config } of await newContainers(site)) {
    const service = Config.Labels['com.docker.compose.service'] ?? ''
    if (State.Status === 'created' || State.Status === 'exited' || butFor.includes(service)) continue
    await setRestart(Id, 'no')
    await run(['docker', 'stop', '--time', service === 'livekit' ? '10' : '60', Id])
  }
}

/** Containers only: volumes and folders stay. */
export async function removeNew(site: Site): Promise<void> {
  for (const { Id } of await newContainers(site)) await run(['docker', 'rm', '--force', Id])
}
