/** The images of the new set-up, and its containers, ready to be started in the switch. */
import { createHash } from 'node:crypto'
import { join } from 'node:path'
import { build, pin } from '../actions.mts'
import { usesLiveKit } from '../checks/settings.mts'
import { run } from '../command.mts'
import * as compose from '../compose.mts'
import { serviceFiles } from '../data/config.mts'
import * as engine from '../engine.mts'
import { isSameFolder } from '../folders.mts'
import { newReleaseName } from '../releases.mts'
import { alive, detail, exitCodes, Problem, warn } from '../report.mts'
import { projectRoot } from '../settings.mts'
import { reasonToDump, sortingOf, usedLocales } from './database.mts'
import { digestOf } from './digest.mts'
import { note, notes } from './journal.mts'
import type { Migration } from './migration.mts'
import { removeNew, sharesData, startPostgresql } from './newsetup.mts'
import { redisMajor } from './redis.mts'
import { freshDatabaseFolder } from './settings.mts'

/** What it was made from has not changed since, and it is there. Without the journal nobody knows: then the engine's cache saves time. */
export async function isBuilt(migration: Migration): Promise<boolean> {
  const { site } = migration
  const { built } = await notes(site)
  if (!built || built !== `${await ingredients(migration)} ${await sharesData(migration)}`) return false
  return (await notPrepared(migration)).length === 0
}

export async function buildAll(migration: Migration): Promise<void> {
  const { site } = migration
  // As it is before: who edits something meanwhile has it built again.
  const from = await ingredients(migration)
  const release = await newReleaseName(site)
  await build(site, release)
  await pin(site, release)
  await alive(
    () => 'building PostgreSQL and Redis',
    () => run(compose.buildServices(site), { timeoutMs: 3_600_000, env: { DOCKER_BUILDKIT: '1' } }),
  )
  const reason = await reasonNotToShare(migration)
  detail(
    reason === undefined
      ? 'the new PostgreSQL takes the data over as it is'
      : `${reason}: the database goes to ${site.folders.postgres} by dump and restore; the old one is kept`,
  )
  await refuseOlderRedis(migration)
  if (reason !== undefined) await warnOfOthers(migration)
  await makeContainers(migration, reason === undefined)
  await note(site, { built: `${from} ${reason === undefined}` })
}

/** Files, settings but for the release that a build itself writes there, and whose data it is made for. */
async function ingredients({ site, legacy }: Migration): Promise<string> {
  const { source, dockerfile } = site
  const docker = join(projectRoot, 'docker')
  const files = (await serviceFiles(docker)).map(([, path]) => path)
  const own = await digestOf([source, dockerfile, join(docker, 'docker-compose.yml'), ...files], {
    skipped: [join(source, 'node_modules'), join(source, '.git'), site.folders.uploads],
  })
  const { database, services } = legacy
  const values = Object.entries(site.values).filter(([key]) => key !== 'STRAPI_VERSION')
  const settings = createHash('sha256').update(JSON.stringify(values)).digest('hex')
  const images = [services.postgresql.container.Image, services.redis.container.Image]
  return [own, settings, database.folder, ...images].join(' ')
}

/** Each service has a container of the image that is there under its name now, and what would collide does not run. */
export async function notPrepared(migration: Migration): Promise<string[]> {
  const { site } = migration
  const wrong: string[] = []
  const isShared = await sharesData(migration)
  const services = ['postgresql', 'redis', 'strapi-master', ...(usesLiveKit(site) ? ['livekit'] : [])]
  for (const service of services) {
    const [made] = await engine.serviceContainers(site.project, service)
    const { Image: id, Config, State } = made ?? {}
    if (Config === undefined) wrong.push(`${service} has no container`)
    else if ((await engine.image(Config.Image))?.Id !== id) wrong.push(`${service} is not of ${Config.Image}`)
    else if (service === 'strapi-master' && Config.Image !== `${site.image}:${site.release}`)
      wrong.push(`strapi-master is of ${Config.Image}, not of ${site.release}`)
    // In a folder of its own, PostgreSQL runs already.
    else if ((isShared || service !== 'postgresql') && State?.Status !== 'created')
      wrong.push(`${service} was started`)
    for (const network of Object.keys(made?.NetworkSettings.Networks ?? {}))
      if (!(await engine.network(network))) wrong.push(`the network ${network} of ${service} is gone`)
  }
  return wrong
}

async function refuseOlderRedis({ site, legacy }: Migration): Promise<void> {
  const [from, to] = await Promise.all([
    redisMajor(legacy.services.redis.container.Image),
    redisMajor(`${site.values.CONTAINER_PREFIX || 'bob-'}redis`),
  ])
  if (!(to < from)) return
  throw new Problem(
    exitCodes.usage,
    `the data is of Redis ${from}, and ${site.values.REDIS_IMAGE} is Redis ${to}; visitors are served as before`,
    `Set REDIS_IMAGE in ${site.envFile} to one of Redis ${from} or newer.`,
  )
}

/** A dump is of one database. */
async function warnOfOthers({ legacy: { database } }: Migration): Promise<void> {
  if (!database.live) return
  const sql = `SELECT datname FROM pg_database WHERE NOT datistemplate AND datname <> 'postgres' ORDER BY 1`
  const names = (await run(compose.query(database.live.server, 'postgres', sql))).trim().split('\n')
  const others = names.filter((name) => name !== database.name)
  if (others.length > 0)
    warn(`PostgreSQL also holds ${others.join(', ')}, which stays behind: dump and restore it by hand`)
}

/** The order of texts, and who owns what, must not change under the data. @throws Problem when there is no way at all */
async function reasonNotToShare({ site, legacy }: Migration): Promise<string | undefined> {
  const { database } = legacy
  const [from, to, used] = await Promise.all([
    sortingOf(legacy.services.postgresql.container.Image),
    sortingOf(`${site.values.CONTAINER_PREFIX || 'bob-'}postgresql`),
    usedLocales(legacy),
  ])
  if (to.major < from.major)
    throw new Problem(
      exitCodes.usage,
      `the data is of PostgreSQL ${from.major}, and ${site.values.POSTGRES_IMAGE} is PostgreSQL ${to.major}; visitors are served as before`,
      `Set POSTGRES_IMAGE in ${site.envFile} to one of PostgreSQL ${from.major} or newer.`,
    )
  if (database.isVolume) return 'the data is in a volume of the engine, not in a folder'
  if (site.database.name !== database.name || site.database.user !== database.user)
    return 'Strapi gets a database and a user of its own'
  if (!isSameFolder(site.folders.postgres, await freshDatabaseFolder(legacy)))
    return 'POSTGRES_VOLUME is another folder'
  return reasonToDump(from, to, used)
}

/** All of them, as the settings are now; none is started, but PostgreSQL in a folder of its own. */
async function makeContainers({ site, legacy }: Migration, isShared: boolean): Promise<void> {
  await removeNew(site)
  const volume = isShared ? { POSTGRES_VOLUME: legacy.database.folder } : undefined
  const env = { STRAPI_VERSION: site.release, ...volume }
  await run(compose.create(site, 'strapi-master'), { env })
  // Its image may have to come from far away: not while calls are off.
  if (usesLiveKit(site))
    await alive(
      () => 'fetching the image of LiveKit',
      () => run(compose.createLiveKit(site), { env, timeoutMs: 1_800_000 }),
    )
  if (isShared) return
  const [postgresql] = await engine.serviceContainers(site.project, 'postgresql')
  if (postgresql) await startPostgresql(postgresql)
}
