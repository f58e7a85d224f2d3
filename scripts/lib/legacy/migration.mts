/** What is migrated, and how far it has come: told by what is, not by what was noted. */
import { resolve } from 'node:path'
import { parse } from 'dotenv'
import type { Finding } from '../checks.mts'
import { workerSees } from '../checks/folders.mts'
import { databaseNeeds, freeBytes, megabytes, needRoom } from '../data/room.mts'
import { folderBytes } from '../data/uploads.mts'
import * as engine from '../engine.mts'
import { readText, setValues } from '../envfile.mts'
import { isSameFolder, nearestFolder } from '../folders.mts'
import { missingSoftware } from '../install.mts'
import { isInstallable } from '../nginx.mts'
import { isFree } from '../ports.mts'
import { addToResult, detail, exitCodes, explain, Problem, warn } from '../report.mts'
import { exampleFile, loadSite, scriptCommand, stateDirOf, withEnvironment, type Site } from '../settings.mts'
import { observe } from '../slots.mts'
import { failureOf } from './containers.mts'
import { notes } from './journal.mts'
import {
  inStartOrder,
  isRunning,
  look,
  nameOf,
  retiredSuffix,
  type Legacy,
  type Service,
  type Unclear,
} from './look.mts'
import { legacyNginx, type LegacyNginx } from './nginx.mts'
import { expectedOutage } from './outage.mts'
import { planSettings, type Settings } from './settings.mts'
import { uploadProblems } from './uploads.mts'

/**
 * `legacy`: it is in service. `switching`: it is out of service, and the new Strapi has never been started. `served`: that one has,
 * and may have taken something from visitors: no data is moved any more.
 */
export type Stage = 'legacy' | 'switching' | 'served'

export interface Migration {
  envFile: string
  legacy: Legacy
  nginx: LegacyNginx
  /** As they will be written. */
  settings: Settings
  /** The new set-up; read again when its settings are written. */
  site: Site
  stage: Stage
  /** Services that stay as they are. */
  leave: string[]
}

/** @throws Problem (usage) that lists all that is not understood; nothing is changed */
export async function see(envFile: string, from: string, leave: string[]): Promise<Migration> {
  const folder = resolve(from)
  const noted = await notes({ stateDir: stateDirOf(envFile) })
  const legacy = await look(folder, leave, noted).catch(async (error: unknown): Promise<Unclear> => {
    // Without an engine there is nothing to be seen.
    if ((await missingSoftware()).length === 0) throw error
    return { problems: [] }
  })
  const own = parse((await readText(envFile)) ?? '')
  const values = withEnvironment({ ...parse((await readText(exampleFile)) ?? ''), ...own })
  const nginxOf = (address: string) =>
    legacyNginx((values.NGINX_COMMAND ?? '').split(/\s+/), address, {
      control: `127.0.0.1:${values.CONTROL_PORT}`,
      name: own.SERVER_NAME || undefined,
      hasTls: Boolean(own.TLS_CERTIFICATE),
    })
  if ('problems' in legacy) {
    if (noted.final) throw endedForGood(envFile, noted.at)
    const { problems, address, uploads } = legacy
    // Once it was switched, what runs here is ours.
    if (noted.policies) throw refusal(folder, [...problems, ...(await softwareProblems())])
    if (address !== undefined) problems.push(...(await nginxOf(address)).problems)
    if (uploads !== undefined) problems.push(...(await findingsOfUploads(uploads)))
    throw refusal(folder, [...problems, ...(await problemsOfSettings(envFile))])
  }
  const nginx = await nginxOf(legacy.address)
  // Somebody may have put the compose file back: `git pull` does.
  const isRetired =
    (noted.isSwitching && !isRunning(legacy.services.strapi)) ||
    legacy.composeFiles.every((path) => path.endsWith(retiredSuffix))
  const isOut = isRetired || Boolean(noted.hasServed)
  const settings = await planSettings(envFile, legacy, nginx, {
    isRetired: isOut,
    alsoWrong: async (site) =>
      isOut
        ? []
        : (
            await problemsOf({ legacy, nginx, site }).catch(
              // What is wrong already may keep the rest from being looked at.
              () => [],
            )
          ).map(({ problem, fix }) => `${problem}: ${fix}`),
  })
  // The containers of a site that this migration has not made say nothing.
  const hasServed = noted.hasServed || (isRetired && (await wasStarted(settings.site)))
  // LiveKit may still be ending: the engine takes its time for so many ports.
  const isEnding = (service: Service) =>
    hasServed &&
    service === legacy.services.livekit &&
    service.container.HostConfig.RestartPolicy.Name === 'no'
  const areRunning = inStartOrder(legacy).map((service) => isRunning(service) && !isEnding(service))
  await refuseSecondServer(settings.site, legacy, hasServed)
  if (hasServed && areRunning.some(Boolean)) await refuseBoth(settings.site, legacy)
  // What runs says more than a name: a way back may have ended half-way.
  const isInService = isRetired
    ? !hasServed && areRunning.every(Boolean)
    : !hasServed || areRunning.some(Boolean)
  const stage = isInService ? 'legacy' : hasServed ? 'served' : 'switching'
  return { envFile, legacy, nginx, settings, site: settings.site, stage, leave }
}

function endedForGood(envFile: string, at = ''): Problem {
  return new Problem(
    exitCodes.usage,
    `the migration was ended for good on ${at.slice(0, 10)}`,
    `Containers that are left of the legacy set-up: ${scriptCommand('migrate', envFile, '--finalize')}\nA state of the site from then: ${scriptCommand('data', envFile, 'list')}`,
  )
}

/** Somebody has started the legacy one by hand: on the same data, it may be destroyed. @throws Problem (degraded) */
async function refuseBoth(site: Site, legacy: Legacy): Promise<void> {
  const { master, slave } = await observe(site)
  if ([master, slave].every(({ status }) => status === 'absent' || status === 'stopped')) return
  const names = inStartOrder(legacy).filter(isRunning).map(nameOf).join(' ')
  throw new Problem(
    exitCodes.degraded,
    `both set-ups run: the new one serves, and somebody has started ${names} of the legacy one`,
    `At once, before they harm each other's data: docker update --restart no ${names} && docker stop ${names}`,
  )
}

/** @throws Problem (degraded) when both PostgreSQL work in one folder */
async function refuseSecondServer(site: Site, legacy: Legacy, hasServed: boolean): Promise<void> {
  const { postgresql } = legacy.services
  const [made] = await engine.serviceContainers(site.project, 'postgresql')
  const isShared = made?.Mounts.some(({ Source }) => isSameFolder(Source, legacy.database.folder))
  if (!made || !isShared || made.Id === postgresql.container.Id) return
  if (!isRunning({ container: made }) || !isRunning(postgresql)) return
  const [one, other] = hasServed ? [postgresql.container, made] : [made, postgresql.container]
  const [surplus, right] = [nameOf({ container: one }), nameOf({ container: other })]
  throw new Problem(
    exitCodes.degraded,
    `two PostgreSQL run in ${legacy.database.folder}: somebody has started ${surplus} beside ${right}`,
    `At once, before they destroy the data: docker update --restart no ${surplus} && docker stop ${surplus}`,
  )
}

/** Whether the new Strapi may have taken something from visitors. */
export async function wasStarted(site: Site): Promise<boolean> {
  const slots = await Promise.all(
    Object.values(site.slots).map(({ container }) => engine.container(container)),
  )
  return slots.some((found) => found !== undefined && found.State.Status !== 'created')
}

/** The plan in a few lines. */
export async function describe({ legacy, nginx, site, stage, settings }: Migration): Promise<void> {
  // What cannot be read is told with all that stands in the way.
  const uploads = await folderBytes(legacy.uploads).catch(() => undefined)
  const { database } = legacy
  const { backups, uploads: target, postgres } = site.folders
  const { outageMs, withMoveMs, launchMs } = await expectedOutage(legacy)
  const seconds = (ms: number) => `${Math.ceil(ms / 1000)} s`
  const free = async (folder: string) => megabytes(await freeBytes(await nearestFolder(folder)))
  detail(
    [
      `project ${legacy.project}: ${inStartOrder(legacy).map(nameOf).join(', ')}; Strapi answers at ${legacy.address}`,
      `application ${legacy.source}; uploads ${uploads === undefined ? 'of unknown size' : megabytes(uploads)}`,
      `PostgreSQL ${database.major ?? ''} in ${database.folder}${database.live ? `, ${database.name} of ${database.user} has ${megabytes(database.live.bytes)}` : ''}`,
      `nginx ${nginx.files.join(', ') || 'passes nobody to it by a file of its own'}`,
      `new: project ${site.project}, application ${site.source}, uploads ${site.folders.uploads}`,
      `free: ${await free(backups)} for the backup set, ${await free(target)} for uploads, ${await free(postgres)} for the database`,
      `expected outage: about ${seconds(outageMs)}, with ${launchMs === undefined ? '10 s for Strapi to start, since its log does not tell' : `${seconds(launchMs)} for Strapi to start, as its log tells`}; ${seconds(withMoveMs)} where the database cannot stay as it is`,
    ].join('\n'),
  )
  if (stage === 'legacy' && nginx.lost.length > 0)
    warn(`of the legacy nginx file this is not taken over: ${nginx.lost.join('; ')}`)
  if (stage === 'legacy' && settings.kept.length > 0)
    warn(
      `set here already to another value than in the legacy set-up, which stays: ${settings.kept.join(', ')}; take a line out to have the legacy value`,
    )
  addToResult({
    legacy: { project: legacy.project, uploadsBytes: uploads, databaseBytes: database.live?.bytes },
    expectedOutageMs: outageMs,
  })
}

/** @throws Problem (usage) that lists all that stands in the way; nothing is changed */
export async function needFit(migration: Migration): Promise<void> {
  const problems = await problemsOf(migration)
  if (problems.length > 0) throw refusal(migration.legacy.folder, problems)
}

type Planned = Pick<Migration, 'legacy' | 'nginx' | 'site'>

async function problemsOf({ legacy, nginx, site }: Planned): Promise<Finding[]> {
  const problems: Finding[] = [...nginx.problems]
  const add = (problem: string, fix: string) => problems.push({ problem, fix })
  for (const service of inStartOrder(legacy))
    if (!isRunning(service)) add(`${nameOf(service)} does not run`, `docker start ${nameOf(service)}`)
  const failure = await failureOf(legacy)
  if (failure)
    add(`the legacy Strapi is not healthy: ${failure}`, `docker logs ${nameOf(legacy.services.strapi)}`)
  if (site.project === legacy.project)
    add(
      `both set-ups would be the Compose project ${site.project}`,
      `Set COMPOSE_PROJECT_NAME in ${site.envFile} to another name.`,
    )
  const prefix = site.values.CONTAINER_PREFIX || 'bob-'
  for (const { container } of inStartOrder(legacy))
    if (
      [`${prefix}postgresql`, `${prefix}redis`, site.image].includes(
        container.Config.Image.replace(/:latest$/, ''),
      )
    )
      add(
        `both set-ups would have an image ${container.Config.Image}`,
        `Set CONTAINER_PREFIX and STRAPI_IMAGE in ${site.envFile} to other names.`,
      )
  if (isSameFolder(site.source, legacy.source))
    add(
      'STRAPI_SOURCE is the legacy application itself, which must stay as it is',
      `Set STRAPI_SOURCE in ${site.envFile} to a folder of its own; where it is empty, the application is copied there.`,
    )
  if (isSameFolder(site.folders.uploads, legacy.uploads))
    add(
      'UPLOADS_VOLUME is the legacy folder, which must stay as it is',
      `Set it in ${site.envFile} to another one.`,
    )
  if (isSameFolder(site.folders.postgres, legacy.database.folder))
    add(
      'POSTGRES_VOLUME is the folder that the legacy PostgreSQL works in',
      `Take it out of ${site.envFile} and of the environment: whether the data can stay is found out.`,
    )
  if (postgresqlOf(site) < (legacy.database.major ?? 0))
    add(
      `the data is of PostgreSQL ${legacy.database.major}, which ${site.values.POSTGRES_IMAGE} cannot read`,
      `Set POSTGRES_IMAGE in ${site.envFile} to one of PostgreSQL ${legacy.database.major} or newer.`,
    )
  problems.push(...(await findingsOfUploads(legacy.uploads, site.folders.uploads)))
  problems.push(...(await problemsOfNew(site, portOf(legacy.address))))
  const short = await roomProblem(legacy, site).catch(explain)
  if (short && !problems.some(({ problem }) => problem.includes(short)))
    add(short, 'Make room, or choose other folders.')
  return problems
}

async function findingsOfUploads(from: string, to = ''): Promise<Finding[]> {
  const problems = (await uploadProblems(from, to)).slice(0, 20)
  return problems.map((problem) => ({ problem, fix: 'Mend or remove it, then run this again.' }))
}

/** Where the legacy set-up itself is not understood: so that one round tells all. */
async function problemsOfSettings(envFile: string): Promise<Finding[]> {
  const text = (await readText(envFile)) ?? (await readText(exampleFile)) ?? ''
  const values = parse(text)
  // Those that it would have told.
  const untold = ['POSTGRES_PASSWORD', 'REDIS_PASSWORD'].filter((key) => !values[key])
  const told = setValues(text, Object.fromEntries(untold.map((key) => [key, 'of-the-legacy-set-up'])))
  try {
    const site = await loadSite(envFile, { text: told })
    return await problemsOfNew(site, portOf(site.slots['strapi-master'].address))
  } catch (error) {
    const software = await softwareProblems()
    return [...software, { problem: explain(error), fix: `Edit ${envFile}.` }]
  }
}

/** @param legacyPort which the legacy Strapi may hold */
async function problemsOfNew(site: Site, legacyPort: string | undefined): Promise<Finding[]> {
  const problems = await softwareProblems()
  const add = (problem: string, fix: string) => problems.push({ problem, fix })
  // Without an engine nothing runs.
  const slots = await observe(site).then(
    ({ master, slave }) => [master, slave],
    () => [],
  )
  if (slots.some(({ status }) => status !== 'absent' && status !== 'stopped')) {
    add(
      `a Strapi of the project ${site.project} runs already: ${site.envFile} is of a site that is live`,
      'Migrate with another --env-file, with names, folders and ports of its own in it.',
    )
    return problems
  }
  if (postgresqlOf(site) < 16)
    add('PostgreSQL 16 or newer is needed here', `Set POSTGRES_IMAGE in ${site.envFile} to one.`)
  const ports = {
    MASTER_PORT: site.slots['strapi-master'].address,
    SLAVE_PORT: site.slots['strapi-slave'].address,
    CONTROL_PORT: site.nginx.control,
  }
  for (const [key, address] of Object.entries(ports))
    if (portOf(address) !== legacyPort && !(await isFree(address)))
      add(`port ${address} (${key}) is taken`, `ss -ltnp 'sport = :${portOf(address)}'   shows by whom`)
  problems.push(...(await workerSees(site)))
  const obstacle = await isInstallable(site)
  if (obstacle) add(obstacle, 'nginx is the way of the visitors: it must be there before.')
  return problems
}

async function softwareProblems(): Promise<Finding[]> {
  return (await missingSoftware()).map(({ name, fix }) => ({ problem: `${name} is missing`, fix }))
}

function postgresqlOf({ values }: Site): number {
  return Number(/:(?:v)?(\d+)/.exec(values.POSTGRES_IMAGE ?? '')?.[1])
}

function portOf(address: string): string | undefined {
  return address.split(':').at(-1)
}

/** The set, the copy of the uploads, and a second database in case it has to go by dump and restore. */
async function roomProblem(legacy: Legacy, site: Site): Promise<string | undefined> {
  const uploads = await folderBytes(legacy.uploads)
  const copied = await folderBytes(site.folders.uploads).catch(() => 0)
  const database = legacy.database.live?.bytes ?? 0
  const { backup } = await notes(site)
  const wants = [
    { folder: site.folders.backups, bytes: backup ? 0 : uploads + database },
    { folder: site.folders.uploads, bytes: Math.max(0, uploads - copied) },
    { folder: site.folders.postgres, bytes: databaseNeeds(database) },
  ]
  const there = await Promise.all(
    wants.map(async ({ folder, bytes }) => ({ folder: await nearestFolder(folder), bytes })),
  )
  return await needRoom('the migration needs', there).then(
    () => undefined,
    (error: unknown) => explain(error),
  )
}

function refusal(folder: string, problems: Finding[]): Problem {
  const list = problems.map(({ problem, fix }) => `\n  - ${problem}\n    -> ${fix}`).join('')
  return new Problem(exitCodes.usage, `${folder} is not migrated; nothing was changed:${list}`)
}
