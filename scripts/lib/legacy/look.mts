/** The legacy set-up as it is: its containers by Compose's labels, what they hold by their mounts. Nothing is changed here. */
import { existsSync } from 'node:fs'
import { readdir, readFile, realpath } from 'node:fs/promises'
import { basename, join, relative, resolve } from 'node:path'
import { parse as parseYaml } from 'yaml'
import type { Finding } from '../checks.mts'
import { ask } from '../command.mts'
import { query, type Server } from '../compose.mts'
import { databaseSize } from '../data/databases.mts'
import * as engine from '../engine.mts'
import { readEnv } from '../envfile.mts'
import { pause } from '../report.mts'
import type { Note } from './journal.mts'

/** Behind the name of a compose file that must not be used by mistake: it would start a second PostgreSQL on the same data. */
export const retiredSuffix = '.migrated'
/** In front of the name of a container that is out of service. */
export const retiredPrefix = 'legacy-'

export interface Service {
  /** In the compose file. */
  name: string
  container: engine.Container
  /** Restart policy for when it is in service; the container's own is off while it is not. */
  restart: string
}

export interface Legacy {
  /** Of its compose file. */
  folder: string
  /** By the names that they have now. */
  composeFiles: string[]
  project: string
  services: { strapi: Service; postgresql: Service; redis: Service; livekit?: Service | undefined }
  /** The application: mounted as a volume, built at each start. */
  source: string
  /** What it is told: its .env, and what the compose file gives its container. */
  application: Record<string, string>
  uploads: string
  /** host:port where Strapi answers. */
  address: string
  /** As the application uses it. */
  database: {
    name: string
    user: string
    password: string
    /** Role that the cluster was made by: a superuser. */
    owner: string
    /** PGDATA on this host. */
    folder: string
    /** A volume of the engine's own, which `docker volume prune` removes once its container is gone. */
    isVolume: boolean
    /** Undefined where it cannot be seen while it does not run. */
    major: number | undefined
    /** Undefined while it does not run. */
    live: { server: Server; bytes: number } | undefined
  }
  redis: { password: string }
  /** Its docker/.env. */
  settings: Record<string, string>
}

type Kind = keyof Legacy['services']
const kinds: [Kind, RegExp][] = [
  ['strapi', /strapi/i],
  ['postgresql', /postgres|^db$|database/i],
  ['redis', /redis/i],
  ['livekit', /livekit/i],
]

/** What is not understood, and what of the rest can be looked at all the same. */
export interface Unclear {
  problems: Finding[]
  address?: string | undefined
  uploads?: string | undefined
}

/**
 * @param leave services that stay as they are
 * @param noted when it was in service
 * @returns the set-up, or what stands in the way
 */
export async function look(
  folder: string,
  leave: string[],
  noted: Partial<Pick<Note, 'policies'>>,
): Promise<Legacy | Unclear> {
  const problems: Finding[] = []
  const add = (problem: string, fix: string) => problems.push({ problem, fix })
  const containers = await containersOf(folder)
  const files = await composeFilesOf(folder, containers)
  if (files.length === 0) {
    add(`${folder} holds no compose file`, 'Name the folder of the legacy docker-compose.yml with --from.')
    return { problems }
  }
  const isRetired = files.every((path) => path.endsWith(retiredSuffix))
  const policies = { ...(await restartPolicies(files)), ...noted.policies }
  const found: Partial<Record<Kind, Service>> = {}
  for (const container of containers) {
    const name = container.Config.Labels['com.docker.compose.service'] ?? ''
    if (leave.includes(name)) continue
    const kind = kinds.find(([, pattern]) => pattern.test(name))?.[0]
    const own = container.HostConfig.RestartPolicy.Name
    const restart = own !== 'no' && own !== '' ? own : (policies[name] ?? 'no')
    // The way back would take that off. Where there was a switch, it is ours.
    if (container.Name.startsWith(`/${retiredPrefix}`) && !isRetired && noted.policies === undefined)
      add(
        `the name of ${nameOf({ container })} is one that this migration gives to what is out of service`,
        `docker rename ${nameOf({ container })} old-${nameOf({ container }).slice(retiredPrefix.length)}`,
      )
    if (kind && !found[kind]) found[kind] = { name, container, restart }
    // Looked at before; what has come since is none of ours.
    else if (!isRetired)
      add(
        kind
          ? `two services look like ${kind}: ${found[kind]?.name} and ${name}`
          : `the service ${name} is not known`,
        `If it may stay as it is: --leave ${name}`,
      )
  }
  const { strapi, postgresql, redis, livekit } = found
  for (const [kind, service] of Object.entries({ strapi, postgresql, redis }))
    if (!service)
      add(
        `there is no container of a service ${kind} of ${folder}`,
        isRetired
          ? 'It was removed since the switch. The new set-up is not touched; the way back is a backup set.'
          : `Start the legacy set-up, so that it can be seen: cd ${folder} && docker compose up -d`,
      )
  const mounted = strapi?.container.Mounts.map(({ Source }) => Source).find((path) =>
    existsSync(join(path, 'package.json')),
  )
  const address = strapi && addressOf(strapi.container)
  const uploads =
    strapi &&
    (mountAt(strapi.container, '/public/uploads') ??
      (mounted && join(await realpath(mounted), 'public/uploads')))
  if (!strapi || !postgresql || !redis) return { problems, address, uploads }

  if (mounted === undefined || uploads === undefined) {
    add(
      `no folder with a package.json is mounted in ${nameOf(strapi)}`,
      'Only a set-up that mounts the whole project can be migrated; others by hand: docker/README.md.',
    )
    return { problems, address }
  }
  // A link would be copied as one.
  const source = await realpath(mounted)
  const application = { ...(await readEnv(join(source, '.env'))), ...(await givenTo(strapi.container)) }
  for (const key of ['DATABASE_URL', 'REDIS_URL'])
    if (application[key])
      add(
        `the application is told ${key}, which names hosts of the legacy set-up`,
        'Use the single values in its place (DATABASE_HOST …).',
      )
  const settings = (await readEnv(join(folder, '.env'))) ?? {}
  if (address === undefined) add(`${nameOf(strapi)} publishes no port`, 'nginx must reach it on this host.')
  // Out of service, it may just come up again after a power cut.
  const database = await databaseOf(postgresql.container, application, isRetired ? 60_000 : 0)
  if (typeof database === 'string') add(database, 'Mend that, or migrate by hand: docker/README.md.')
  const password = await redisPassword(redis, [settings.REDIS_PASSWORD, application.REDIS_PASSWORD])
  if (password === undefined)
    add(
      `the password of ${nameOf(redis)} is neither in /data/redis_password.txt nor in an .env, or it is not right`,
      `Look for it: docker exec ${nameOf(redis)} ls /data`,
    )
  if (problems.length > 0 || address === undefined || typeof database === 'string' || password === undefined)
    return { problems, address, uploads }
  return {
    folder,
    composeFiles: files,
    project: strapi.container.Config.Labels['com.docker.compose.project'] ?? '',
    services: { strapi, postgresql, redis, livekit },
    source,
    application,
    uploads,
    address,
    database,
    redis: { password },
    settings,
  }
}

export function nameOf({ container }: Pick<Service, 'container'>): string {
  return container.Name.slice(1)
}

export function isRunning({ container }: Pick<Service, 'container'>): boolean {
  return container.State.Status === 'running' || container.State.Status === 'restarting'
}

/** What Strapi needs comes before it; LiveKit serves browsers, and its many ports take time. */
export function inStartOrder({ services }: Legacy): Service[] {
  return [services.postgresql, services.redis, services.strapi, services.livekit].filter(
    (one) => one !== undefined,
  )
}

/** Those that the containers were made from, else those that Compose looks for; also by the name of one that is out of service. */
async function composeFilesOf(folder: string, containers: engine.Container[]): Promise<string[]> {
  const written = containers.map((one) => one.Config.Labels['com.docker.compose.project.config_files'])[0]
  // The first Compose wrote down what was typed, as seen from the folder.
  const paths = (written?.split(',') ?? []).map((path) => resolve(folder, path))
  const there = [...paths, ...paths.map((path) => `${path}${retiredSuffix}`)].filter((path) =>
    existsSync(path),
  )
  if (there.length > 0) return there
  const names: string[] = await readdir(folder).catch(() => [])
  const known = ['compose', 'docker-compose'].map((stem) =>
    ['', '.override'].flatMap((middle) =>
      ['.yaml', '.yml'].flatMap((end) =>
        ['', retiredSuffix].map((suffix) => `${stem}${middle}${end}${suffix}`),
      ),
    ),
  )
  const own = known.map((group) => group.filter((name) => names.includes(name)))
  return (own.find((group) => group.length > 0) ?? []).map((name) => join(folder, name))
}

/** Older versions of Compose did not write down the folder, and made the project's name from it. */
async function containersOf(folder: string): Promise<engine.Container[]> {
  const real = await realpath(folder).catch(() => folder)
  const found: engine.Container[] = []
  for (const one of await engine.composeContainers()) {
    const written = one.Config.Labels['com.docker.compose.project.working_dir']
    const project = one.Config.Labels['com.docker.compose.project'] ?? ''
    const isOwn =
      written === undefined
        ? project.replaceAll(/[-_]/g, '') ===
          basename(real)
            .toLowerCase()
            .replaceAll(/[^a-z0-9]/g, '')
        : (await realpath(written).catch(() => written)) === real
    if (isOwn) found.push(one)
  }
  return found
}

async function restartPolicies(files: string[]): Promise<Record<string, string>> {
  type File = { services?: Record<string, { restart?: string } | null> } | null
  const policies: Record<string, string> = {}
  for (const path of files) {
    const { services = {} } = (parseYaml(await readFile(path, 'utf8'), { merge: true }) as File) ?? {}
    for (const [name, service] of Object.entries(services))
      if (/^(always|unless-stopped|on-failure(:\d+)?)$/.test(service?.restart ?? ''))
        policies[name] = service?.restart ?? ''
  }
  return policies
}

/** Path on this host of what is mounted at a place that ends so. */
function mountAt(container: engine.Container, end: string): string | undefined {
  return container.Mounts.find(({ Destination }) => Destination.endsWith(end))?.Source
}

function addressOf({ HostConfig, Config }: engine.Container): string | undefined {
  const port = environmentOf(Config.Env).PORT ?? '1337'
  const published = Object.entries(HostConfig.PortBindings ?? {}).flatMap(([inside, bindings]) =>
    (bindings ?? []).map((binding) => ({ inside, ...binding })),
  )
  const binding = published.find(({ inside }) => inside === `${port}/tcp`) ?? published[0]
  if (!binding) return undefined
  const isEverywhere = ['', '0.0.0.0', '::'].includes(binding.HostIp)
  return `${isEverywhere ? '127.0.0.1' : binding.HostIp}:${binding.HostPort}`
}

async function databaseOf(
  container: engine.Container,
  application: Record<string, string>,
  patienceMs: number,
): Promise<Legacy['database'] | string> {
  const environment = environmentOf(container.Config.Env)
  const data = environment.PGDATA ?? '/var/lib/postgresql/data'
  // The innermost one: an image may have an anonymous volume below the mounted folder.
  const [mount] = container.Mounts.filter(({ Destination }) =>
    `${data}/`.startsWith(`${Destination}/`),
  ).toSorted((one, other) => other.Destination.length - one.Destination.length)
  if (!mount) return `nothing is mounted at ${data} of ${nameOf({ container })}`
  const folder = join(mount.Source, relative(mount.Destination, data))
  const version = Number.parseInt(await readFile(join(folder, 'PG_VERSION'), 'utf8').catch(() => ''))
  const owner = environment.POSTGRES_USER ?? 'postgres'
  const name = application.DATABASE_NAME || (environment.POSTGRES_DB ?? owner)
  const common = {
    name,
    user: application.DATABASE_USERNAME || owner,
    password: application.DATABASE_PASSWORD || (environment.POSTGRES_PASSWORD ?? ''),
    owner,
    folder,
    isVolume: mount.Type === 'volume',
    major: version >= 1 ? version : undefined,
  }
  if (container.State.Status !== 'running') return { ...common, live: undefined }
  if (!(version >= 10)) return `${folder} does not hold the data of a PostgreSQL from 10 on`
  const deadline = Date.now() + patienceMs
  do {
    for (const superuser of new Set(['postgres', owner])) {
      const server = { containerId: container.Id, superuser }
      const size = `${databaseSize(name)} WHERE (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)`
      const bytes = await ask(query(server, 'postgres', size))
      if (bytes?.trim()) return { ...common, live: { server, bytes: Number(bytes) } }
    }
    if (patienceMs > 0) await pause(500)
  } while (Date.now() < deadline)
  return `${nameOf({ container })} has no database ${name}, or its local socket lets neither postgres nor ${owner} in as a superuser without a password`
}

/** It makes its password up and writes it down beside its data; what answers is right. */
async function redisPassword(service: Service, others: (string | undefined)[]): Promise<string | undefined> {
  const folder = mountAt(service.container, '/data') ?? ''
  const written = await readFile(join(folder, 'redis_password.txt'), 'utf8').catch(() => undefined)
  const candidates = [written?.trim(), ...others].filter((one) => one !== undefined && one !== '')
  if (!isRunning(service)) return candidates[0]
  const ping = ['docker', 'exec', '--env=REDISCLI_AUTH', service.container.Id, 'redis-cli', '-e', 'ping']
  for (const password of candidates)
    if ((await ask(ping, { env: { REDISCLI_AUTH: password ?? '' } })) !== undefined) return password
  return undefined
}

/** What the compose file tells the application: the rest of its environment is its image's. */
async function givenTo({ Config, Image }: engine.Container): Promise<Record<string, string>> {
  const own = new Set((await engine.image(Image))?.Config.Env ?? [])
  const given = environmentOf(Config.Env.filter((line) => !own.has(line)))
  for (const name of ['HOST', 'PORT', 'NODE_ENV', 'CRON_ENABLED', 'PATH', 'HOSTNAME']) delete given[name]
  return given
}

function environmentOf(lines: string[]): Record<string, string> {
  return Object.fromEntries(
    lines.map((line): [string, string] => [
      line.slice(0, line.indexOf('=')),
      line.slice(line.indexOf('=') + 1),
    ]),
  )
}
