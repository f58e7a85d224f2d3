/** Every setting of a site, from one place: the environment beats .env, .env beats .env.example. */
import { basename, dirname, resolve } from 'node:path'
import { parse } from 'dotenv'
import { expandedKeys, readEnv, readText, unreadableLines } from './envfile.mts'
import { exitCodes, Problem } from './report.mts'

export type SlotName = 'strapi-master' | 'strapi-slave'

export interface Slot {
  name: SlotName
  /** Also the name of the Compose service. */
  container: string
  /** host:port on this host. */
  address: string
}

export interface Site {
  /** Folder of this project. */
  root: string
  envFile: string
  /** Where deploys and schemas are recorded; only saves time. */
  stateDir: string
  project: string
  /** Repository of the Strapi image; its tags are the releases. */
  image: string
  /** STRAPI_VERSION of .env: what `docker compose up -d` starts. */
  release: string
  source: string
  dockerfile: string
  folders: { uploads: string; postgres: string; backups: string; traffic: string }
  slots: Record<SlotName, Slot>
  nginx: {
    /** argv that nginx is run with. */
    command: string[]
    confFile: string
    serverName: string
    listen: string
    control: string
    accessLog: string
    tls: { certificate: string; key: string } | undefined
  }
  health: { intervalMs: number; timeoutMs: number; smokePaths: string[] }
  drainTimeoutMs: number
  keepReleases: number
  backupBeforeDeploy: boolean
  /** Backup sets that stay, by the newest of so many days, weeks and months. */
  keepSets: { daily: number; weekly: number; monthly: number }
  /** Where cron looks for files of its own. */
  cronDir: string
  /** How long a restore keeps what it replaced. */
  restoreKeepDays: number
  /** `dial` replaces the host of `url` when connecting. */
  probe: { url: string; dial: string | undefined }
  database: { name: string; user: string }
  /** Every value, by its name in .env. */
  values: Record<string, string>
}

export const projectRoot = resolve(import.meta.dirname, '../..')
export const composeFile = resolve(projectRoot, 'docker/docker-compose.yml')
export const exampleFile = resolve(projectRoot, 'docker/.env.example')

/**
 * @param envFile path as typed, relative to the current folder; default `docker/.env`
 * @throws Problem (usage) that lists everything missing or wrong
 */
export async function loadSite(
  envFile = resolve(projectRoot, 'docker/.env'),
  { text, alsoWrong }: { text?: string | undefined; alsoWrong?: (site: Site) => Promise<string[]> } = {},
): Promise<Site> {
  const path = resolve(envFile)
  text ??= await readSettings(path)
  const file = text === undefined ? undefined : parse(text)
  if (text === undefined || file === undefined) {
    throw new Problem(
      exitCodes.usage,
      `there is no ${path}`,
      `Write it with: ${scriptCommand('setup', path)}`,
    )
  }
  const example = (await readEnv(exampleFile)) ?? {}
  const values = withEnvironment({ ...example, ...file })

  const wrong = [
    ...unreadableLines(text).map(
      (line) => `line ${line} is not of the form KEY=value; a quote needs a second one`,
    ),
    ...expandedKeys(text).map(
      (key) =>
        `${key} holds a $ or #, which Compose and Strapi read differently: put the value in single quotes`,
    ),
    ...problemsOf(values),
  ]
  if (wrong.length > 0) {
    wrong.push(...((await alsoWrong?.(siteOf(path, values))) ?? []))
    const list = wrong.map((line) => `\n  - ${line}`).join('')
    throw new Problem(
      exitCodes.usage,
      `${path} needs attention:${list}`,
      `Edit it, then: ${scriptCommand('setup', path)}`,
    )
  }
  return siteOf(path, values)
}

/** @throws Problem (usage) when this user may not read it */
async function readSettings(path: string): Promise<string | undefined> {
  return await readText(path).catch((error: NodeJS.ErrnoException) => {
    if (error.code !== 'EACCES') throw error
    const advice = `Run this as its owner, or: ${asRoot(`chown $(id -un) ${path}`)}`
    throw new Problem(exitCodes.usage, `this user may not read ${path}`, advice, error)
  })
}

/** The values, those of this process's environment first. */
export function withEnvironment(values: Record<string, string>): Record<string, string> {
  return Object.fromEntries(Object.entries(values).map(([key, value]) => [key, process.env[key] ?? value]))
}

/** Beside the settings file. Two of them in one folder are two sites. */
export function stateDirOf(envFile: string): string {
  const name = basename(envFile)
  return resolve(dirname(envFile), name === '.env' ? '.state' : `.state-${name}`)
}

/** COMPOSE_PROJECT_NAME, also where the other settings are not complete yet. */
export async function projectOf(envFile: string): Promise<string> {
  const values = withEnvironment({ ...(await readEnv(exampleFile)), ...(await readEnv(envFile)) })
  return values.COMPOSE_PROJECT_NAME ?? ''
}

/** The command of one of our scripts for this settings file, as an operator types it in the project's folder. */
export function scriptCommand(
  script: 'deploy' | 'setup' | 'data' | 'migrate',
  envFile: string,
  options = '',
): string {
  const file = envFile === resolve(projectRoot, 'docker/.env') ? '' : ` --env-file ${envFile}`
  return `npx zx scripts/${script}.mts${file}${options ? ` ${options}` : ''}`
}

/** A command that needs root, as this user has to type it. */
export function asRoot(command: string): string {
  return process.getuid?.() === 0 ? command : `sudo ${command}`
}

/** `docker compose` for this settings file, as an operator types it in the project's folder. */
export function composeCommand(site: Site, rest: string): string {
  const file = site.envFile === resolve(projectRoot, 'docker/.env') ? '' : ` --env-file ${site.envFile}`
  return `docker compose -f docker/docker-compose.yml${file} ${rest}`
}

const required = [
  'STRAPI_SOURCE',
  'STRAPI_DOCKERFILE',
  'STRAPI_HOST',
  'UPLOADS_VOLUME',
  'POSTGRES_VOLUME',
  'BACKUP_DIR',
  'TRAFFIC_DIR',
  'ACCESS_LOG',
  'NGINX_CONF_DIR',
  'CRON_DIR',
  'NGINX_COMMAND',
  'POSTGRES_PASSWORD',
  'REDIS_PASSWORD',
  'STRAPI_VERSION',
]
const ports = ['MASTER_PORT', 'SLAVE_PORT', 'CONTROL_PORT']
const numbers = {
  HEALTH_INTERVAL: 0.1,
  HEALTH_TIMEOUT: 1,
  DRAIN_TIMEOUT: 0,
  KEEP_RELEASES: 1,
  KEEP_DAILY: 0,
  KEEP_WEEKLY: 0,
  KEEP_MONTHLY: 0,
  RESTORE_KEEP_DAYS: 0,
}
const names = ['NETWORK_NAME', 'POSTGRES_USER', 'POSTGRES_DB']

/** Everything wrong with the values themselves, one sentence each. */
export function problemsOf(values: Record<string, string>): string[] {
  const value = (key: string) => values[key] ?? ''
  const wrong: string[] = []
  const check = (fine: boolean, sentence: string) => {
    if (!fine) wrong.push(sentence)
  }
  for (const key of required) check(value(key) !== '', `${key} is empty`)
  for (const key of names) check(/^[\w][\w./-]*$/.test(value(key)), `${key} is not a name: "${value(key)}"`)
  check(
    /^[a-z0-9][a-z0-9_-]*$/.test(value('COMPOSE_PROJECT_NAME')),
    'COMPOSE_PROJECT_NAME may hold a-z, 0-9, _ and - only',
  )
  check(
    /^[a-z0-9][a-z0-9._/-]*$/.test(value('STRAPI_IMAGE')),
    `STRAPI_IMAGE is not a name: "${value('STRAPI_IMAGE')}"`,
  )
  for (const key of ports) {
    check(
      /^[1-9]\d{0,4}$/.test(value(key)) && Number(value(key)) < 65_536,
      `${key} is not a port: "${value(key)}"`,
    )
  }
  check(new Set(ports.map(value)).size === ports.length, `${ports.join(', ')} must be three different ports`)
  for (const [key, least] of Object.entries(numbers)) {
    check(
      value(key) !== '' && Number(value(key)) >= least,
      `${key} is not a number of at least ${least}: "${value(key)}"`,
    )
  }
  check(/^\S+$/.test(value('SERVER_NAME')), 'SERVER_NAME is empty or holds a space')
  check(/^([\w.:[\]]+:)?\d+$/.test(value('HTTP_LISTEN')), 'HTTP_LISTEN is neither a port nor address:port')
  check(
    (value('TLS_CERTIFICATE') === '') === (value('TLS_CERTIFICATE_KEY') === ''),
    'TLS_CERTIFICATE and TLS_CERTIFICATE_KEY belong together',
  )
  check(
    value('PROBE_URL') === '' ||
      (/^https?:\/\//.test(value('PROBE_URL')) && URL.canParse(value('PROBE_URL'))),
    `PROBE_URL is not a URL: "${value('PROBE_URL')}"`,
  )
  check(
    value('SMOKE_PATHS')
      .split(/\s+/)
      .every((path) => path === '' || path.startsWith('/')),
    'SMOKE_PATHS must each start with /',
  )
  check(
    value('BACKUP_PING_URL') === '' || /^https?:\/\/./.test(value('BACKUP_PING_URL')),
    'BACKUP_PING_URL is not a URL',
  )
  check(
    /^(on|off)$/.test(value('BACKUP_BEFORE_DEPLOY')),
    `BACKUP_BEFORE_DEPLOY is neither on nor off: "${value('BACKUP_BEFORE_DEPLOY')}"`,
  )
  for (const key of ['UPLOADS_VOLUME', 'TRAFFIC_DIR', 'BACKUP_DIR', 'POSTGRES_VOLUME', 'ACCESS_LOG']) {
    check(
      /^[\w@%+,./-]*$/.test(value(key)),
      `${key} may hold letters, digits and @%+,./- only: "${value(key)}"`,
    )
  }
  return wrong
}

function siteOf(envFile: string, values: Record<string, string>): Site {
  const value = (key: string) => values[key] ?? ''
  const folder = (key: string) => resolve(dirname(composeFile), value(key))
  const host = value('STRAPI_HOST') === '0.0.0.0' ? '127.0.0.1' : value('STRAPI_HOST')
  const slot = (name: SlotName, port: string): Slot => {
    return { name, container: `${value('CONTAINER_PREFIX')}${name}`, address: `${host}:${port}` }
  }
  const tls = value('TLS_CERTIFICATE')
    ? { certificate: value('TLS_CERTIFICATE'), key: value('TLS_CERTIFICATE_KEY') }
    : undefined
  const listen = value('HTTP_LISTEN')
  return {
    root: projectRoot,
    envFile,
    stateDir: stateDirOf(envFile),
    project: value('COMPOSE_PROJECT_NAME'),
    image: value('STRAPI_IMAGE'),
    release: value('STRAPI_VERSION'),
    source: folder('STRAPI_SOURCE'),
    dockerfile: resolve(folder('STRAPI_SOURCE'), value('STRAPI_DOCKERFILE')),
    folders: {
      uploads: folder('UPLOADS_VOLUME'),
      postgres: folder('POSTGRES_VOLUME'),
      backups: folder('BACKUP_DIR'),
      traffic: folder('TRAFFIC_DIR'),
    },
    slots: {
      'strapi-master': slot('strapi-master', value('MASTER_PORT')),
      'strapi-slave': slot('strapi-slave', value('SLAVE_PORT')),
    },
    nginx: {
      command: value('NGINX_COMMAND').split(/\s+/),
      confFile: resolve(folder('NGINX_CONF_DIR'), `${value('SERVER_NAME')}.conf`),
      serverName: value('SERVER_NAME'),
      listen,
      control: `127.0.0.1:${value('CONTROL_PORT')}`,
      accessLog: folder('ACCESS_LOG'),
      tls,
    },
    health: {
      intervalMs: Number(value('HEALTH_INTERVAL')) * 1000,
      timeoutMs: Number(value('HEALTH_TIMEOUT')) * 1000,
      smokePaths: value('SMOKE_PATHS')
        .split(/\s+/)
        .filter((path) => path !== ''),
    },
    drainTimeoutMs: Number(value('DRAIN_TIMEOUT')) * 1000,
    keepReleases: Number(value('KEEP_RELEASES')),
    backupBeforeDeploy: value('BACKUP_BEFORE_DEPLOY') === 'on',
    keepSets: {
      daily: Number(value('KEEP_DAILY')),
      weekly: Number(value('KEEP_WEEKLY')),
      monthly: Number(value('KEEP_MONTHLY')),
    },
    cronDir: folder('CRON_DIR'),
    restoreKeepDays: Number(value('RESTORE_KEEP_DAYS')),
    probe: value('PROBE_URL')
      ? { url: value('PROBE_URL'), dial: undefined }
      : {
          url: `${tls ? 'https' : 'http'}://${value('SERVER_NAME')}${tls ? '' : `:${listen.split(':').at(-1)}`}/_health`,
          dial: listen.includes(':') ? listen.slice(0, listen.lastIndexOf(':')) : '127.0.0.1',
        },
    database: { name: value('POSTGRES_DB'), user: value('POSTGRES_USER') },
    values,
  }
}
