/** The legacy set-up as it is: its containers by Compose's labels, what they hold by their mounts. Nothing is changed here. */
import { existsSync } from 'node:fs'
import { readdir, readFile, realpath } from 'node:fs/promises'
import { basename, join, relative } from 'node:path'
import { parse as parseYaml } from 'yaml'
import type { Finding } from '../checks.mts'
import { ask } from '../command.mts'
import { query, type Server } from '../compose.mts'
import { databaseSize } from '../data/databases.mts'
import * as engine from '../engine.mts'
import { readEnv } from '../envfile.mts'
import { explain } from '../report.mts'

/** Behind the name of a compose file that must not be used by mistake: it would start a second PostgreSQL on the same data. */
export const retiredSuffix = '.migrated'
/** In front of the name of a container that is out of service. */
export const retiredPrefix = 'legacy-'

export interface Service {
  /** In the compose file. */
  name: string
  container: engine.Container
  /** Policy of the compose file; the container's own is off while it is out of service. */
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
  uploads: string
  /** host:port where Strapi answers. */
  address: string
  database: {
    name: string
    user: string
    password: string
    /** PGDATA on this host. */
    folder: string
    major: number
    /** Undefined while it does not run. */
    live: { server: Server; bytes: number } | undefined
  }
  redis: { folder: string; password: string }
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

/**
 * @param leave services that stay as they are
 * @returns the set-up, or all that is not understood
 */
export async function look(folder: string, leave: string[]): Promise<Legacy | Finding[]> {
  const files = await composeFilesOf(folder)
  if (files.length === 0)
    return [
      {
        problem: `${folder} holds no compose file`,
        fix: 'Name the folder of the legacy docker-compose.yml with --from.',
      },
    ]
  const containers = await containersOf(folder)
  const found: Partial<Record<Kind, Service>> = {}
  const problems: Finding[] = []
  const restarts = await restartPolicies(files)
  for (const container of containers) {
    const name = container.Config.Labels['com.docker.compose.service'] ?? ''
    if (leave.includes(name)) continue
    const kind = kinds.find(([, pattern]) => pattern.test(name))?.[0]
    if (!kind || found[kind])
      problems.push({
        problem: kind
          ? `two services look like ${kind}: ${found[kind]?.name} and ${name}`
          : `the service ${name} is not known`,
        fix: `If it may stay as it is: --leave ${name}`,
      })
    else found[kind] = { name, container, restart: restarts[name] ?? 'no' }
  }
  const { strapi, postgresql, redis, livekit } = found
  for (const [kind, service] of Object.entries({ strapi, postgresql, redis }))
    if (!service)
      problems.push({
        problem: `there is no container of a service ${kind} of ${folder}`,
        fix: `Start the legacy set-up, so that it can be seen: cd ${folder} && docker compose up -d`,
      })
  if (!strapi || !postgresql || !redis) return problems

  const source = sourceOf(strapi.container)
  if (source === undefined)
    return [
      ...problems,
      {
        problem: `no folder with a package.json is mounted in ${nameOf(strapi)}`,
        fix: 'Only a set-up that mounts the whole project can be migrated; others: see docker/README.md.',
      },
    ]
  const address = addressOf(strapi.container)
  if (address === undefined)
    problems.push({
      problem: `${nameOf(strapi)} publishes no port`,
      fix: 'nginx must reach it on this host.',
    })
  const database = await databaseOf(postgresql.container)
  if (typeof database === 'string') problems.push({ problem: database, fix: 'See docker/README.md.' })
  const settings = (await readEnv(join(folder, '.env'))) ?? {}
  const cache = await redisOf(redis, settings.REDIS_PASSWORD || (await passwordIn(source)))
  if (typeof cache === 'string')
    problems.push({ problem: cache, fix: `Look for it: docker exec ${nameOf(redis)} ls /data` })
  if (
    problems.length > 0 ||
    address === undefined ||
    typeof database === 'string' ||
    typeof cache === 'string'
  )
    return problems
  const uploads =
    mounted(strapi.container, (at) => at.endsWith('/public/uploads')) ?? join(source, 'public/uploads')
  const project = strapi.container.Config.Labels['com.docker.compose.project'] ?? ''
  const services = { strapi, postgresql, redis, livekit }
  return {
    folder,
    composeFiles: files,
    project,
    services,
    source,
    uploads,
    address,
    database,
    redis: cache,
    settings,
  }
}

export function nameOf({ container }: Pick<Service, 'container'>): string {
  return container.Name.slice(1)
}

export function isRunning({ container }: Pick<Service, 'container'>): boolean {
  return container.State.Status === 'running' || container.State.Status === 'restarting'
}

/** Strapi last: what it needs comes before it. */
export function inStartOrder({ services }: Legacy): Service[] {
  return [services.postgresql, services.redis, services.livekit, services.strapi].filter(
    (one) => one !== undefined,
  )
}

/** The base file and the one that overrides it, as Compose looks for them. */
async function composeFilesOf(folder: string): Promise<string[]> {
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
  const real = await realpath(folder)
  const all = await engine.composeContainers()
  const ofFolder = (one: engine.Container) => {
    const written = one.Config.Labels['com.docker.compose.project.working_dir']
    if (written !== undefined) return written === folder || written === real
    const project = one.Config.Labels['com.docker.compose.project'] ?? ''
    return (
      project.replaceAll(/[-_]/g, '') ===
      basename(real)
        .toLowerCase()
        .replaceAll(/[^a-z0-9]/g, '')
    )
  }
  return all.filter(ofFolder)
}

async function restartPolicies(files: string[]): Promise<Record<string, string>> {
  type File = { services?: Record<string, { restart?: string } | null> } | null
  const policies: Record<string, string> = {}
  for (const path of files) {
    const { services = {} } = (parseYaml(await readFile(path, 'utf8'), { merge: true }) as File) ?? {}
    for (const [name, service] of Object.entries(services))
      if (service?.restart !== undefined) policies[name] = service.restart
  }
  return policies
}

/** Path on this host of what is mounted there. */
function mounted(container: engine.Container, isWanted: (at: string) => boolean): string | undefined {
  return container.Mounts.find(({ Destination }) => isWanted(Destination))?.Source
}

function sourceOf(container: engine.Container): string | undefined {
  return container.Mounts.map(({ Source }) => Source).find((path) => existsSync(join(path, 'package.json')))
}

function addressOf({ HostConfig }: engine.Container): string | undefined {
  const [binding] = Object.values(HostConfig.PortBindings ?? {}).flatMap((bindings) => bindings ?? [])
  if (!binding) return undefined
  const isEverywhere = ['', '0.0.0.0', '::'].includes(binding.HostIp)
  return `${isEverywhere ? '127.0.0.1' : binding.HostIp}:${binding.HostPort}`
}

async function databaseOf(container: engine.Container): Promise<Legacy['database'] | string> {
  const environment = environmentOf(container)
  const data = environment.PGDATA ?? '/var/lib/postgresql/data'
  const mount = container.Mounts.find(({ Destination }) => `${data}/`.startsWith(`${Destination}/`))
  if (!mount) return `no folder of this host is mounted at ${data} of ${nameOf({ container })}`
  const folder = join(mount.Source, relative(mount.Destination, data))
  const version = await readFile(join(folder, 'PG_VERSION'), 'utf8').catch((error: unknown) => explain(error))
  const major = Number.parseInt(version)
  if (!(major >= 10)) return `${folder} does not hold the data of a PostgreSQL from 10 on: ${version.trim()}`
  const user = environment.POSTGRES_USER ?? 'postgres'
  const name = environment.POSTGRES_DB ?? user
  const common = { name, user, password: environment.POSTGRES_PASSWORD ?? '', folder, major }
  if (container.State.Status !== 'running') return { ...common, live: undefined }
  for (const superuser of new Set(['postgres', user])) {
    const server = { containerId: container.Id, superuser }
    const size = `SELECT (${databaseSize(name).replace(/^SELECT /, '')}) WHERE (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)`
    const bytes = await ask(query(server, 'postgres', size))
    if (bytes?.trim()) return { ...common, live: { server, bytes: Number(bytes) } }
  }
  return `the local socket of ${nameOf({ container })} lets neither postgres nor ${user} in as a superuser without a password`
}

/** It makes its password up and writes it down beside its data. */
async function redisOf(service: Service, otherwise: string | undefined): Promise<Legacy['redis'] | string> {
  const folder = mounted(service.container, (at) => at === '/data')
  if (folder === undefined) return `nothing is mounted at /data of ${nameOf(service)}`
  const written = await readFile(join(folder, 'redis_password.txt'), 'utf8').catch(() => undefined)
  const password = written?.trim() || otherwise
  if (!password) return `the password of Redis is neither in ${folder}/redis_password.txt nor in an .env`
  if (!isRunning(service)) return { folder, password }
  const isRight = await ask(
    ['docker', 'exec', '--env=REDISCLI_AUTH', service.container.Id, 'redis-cli', '-e', 'ping'],
    {
      env: { REDISCLI_AUTH: password },
    },
  )
  return isRight === undefined
    ? `${nameOf(service)} does not answer to the password that was found`
    : { folder, password }
}

async function passwordIn(source: string): Promise<string | undefined> {
  return (await readEnv(join(source, '.env')))?.REDIS_PASSWORD
}

function environmentOf({ Config }: engine.Container): Record<string, string> {
  return Object.fromEntries(
    Config.Env.map((line): [string, string] => [
      line.slice(0, line.indexOf('=')),
      line.slice(line.indexOf('=') + 1),
    ]),
  )
}
