/** A legacy set-up beside a new one that is still to come: what `migrate.mts` begins with. */
import { randomBytes } from 'node:crypto'
import { cp, mkdir, readFile, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { run } from '../scripts/lib/command.mts'
import { parse } from 'dotenv'
import { projectRoot } from '../scripts/lib/settings.mts'
import { removeOwnSite, writeOwnSite, type OwnSite, type OwnSiteOptions } from './site.mts'

export interface LegacySite {
  /** The new set-up: its settings, and nginx, which serves the legacy one for now. */
  own: OwnSite
  /** Of the legacy compose file. */
  folder: string
  project: string
  source: string
  uploads: string
  /** In front of its containers' names. */
  prefix: string
}

/** Writes both; the application of the new one is still to be copied, its database is to be taken over. */
export async function writeLegacySite(options: OwnSiteOptions): Promise<LegacySite> {
  const own = await writeOwnSite({
    ...options,
    settings: {
      POSTGRES_VOLUME: '/var/www/bob/data/postgresql',
      SERVER_NAME: 'bob.strapi-pro.com',
      ...options.settings,
    },
  })
  await rm(own.source, { recursive: true })
  const place = join(options.folder, 'legacy')
  const site: LegacySite = {
    own,
    folder: join(place, 'docker'),
    project: `${options.project}-old`,
    source: join(place, 'strapi'),
    uploads: join(place, 'strapi/public/uploads'),
    prefix: `${options.project}-`,
  }
  const isBuilt = /\/(node_modules|dist|build|\.cache|\.tmp|\.env)$/
  await cp(options.application, site.source, { recursive: true, filter: (path) => !isBuilt.test(path) })
  await cp(join(projectRoot, 'example/legacy'), site.folder, { recursive: true })
  await mkdir(site.uploads, { recursive: true })
  await writeFile(join(site.folder, '.env'), dockerEnv(options, site), { mode: 0o600 })
  await writeFile(
    join(site.source, '.env'),
    applicationEnv(parse(await readFile(join(site.folder, '.env'), 'utf8'))),
  )
  const shipped = await readFile(join(site.folder, 'nginx/bob.strapi-pro.com.conf'), 'utf8')
  await writeFile(
    join(own.folder, 'nginx/conf.d/legacy.conf'),
    shipped.replace('listen 80', `listen 127.0.0.1:${options.port}`).replace(':1337', `:${options.port + 2}`),
  )
  return site
}

function dockerEnv({ project, port, settings = {} }: OwnSiteOptions, site: LegacySite): string {
  const values = {
    STRAPI_VOLUME: site.source,
    STRAPI_HOST: '127.0.0.1',
    STRAPI_PORT: String(port + 2),
    POSTGRES_VOLUME: join(site.folder, '../data/postgresql'),
    POSTGRES_USER: 'BoB',
    POSTGRES_PASSWORD: randomBytes(16).toString('hex'),
    POSTGRES_DB: 'BoB',
    LIVEKIT_EXTERNAL_IP: '192.0.2.1',
    COMPOSE_PROJECT_NAME: site.project,
    CONTAINER_PREFIX: site.prefix,
    NETWORK_NAME: `${project}-network`,
    ...Object.fromEntries(
      ['NODE_IMAGE', 'POSTGRES_IMAGE', 'REDIS_IMAGE'].flatMap((key) =>
        settings[key] ? [[key, settings[key]]] : [],
      ),
    ),
  }
  const lines = Object.entries(values).map(([key, value]) => `${key}=${value}`)
  return `# The operators' own remark, which stays.\n${lines.join('\n')}\n`
}

function applicationEnv(docker: Record<string, string>): string {
  const secret = () => randomBytes(24).toString('base64url')
  return `# Of the legacy application.
DATABASE_CLIENT=postgres
DATABASE_HOST=postgresql
DATABASE_PORT=5432
DATABASE_NAME=${docker.POSTGRES_DB}
DATABASE_USERNAME=${docker.POSTGRES_USER}
DATABASE_PASSWORD=${docker.POSTGRES_PASSWORD}
REDIS_HOST=redis
REDIS_PORT=6379
REDIS_PASSWORD=
APP_KEYS=${secret()},${secret()}
API_TOKEN_SALT=${secret()}
ADMIN_JWT_SECRET=${secret()}
TRANSFER_TOKEN_SALT=${secret()}
JWT_SECRET=${secret()}
ENCRYPTION_KEY=${secret()}
`
}

/** `docker compose …` in the legacy folder, as its operators type it. */
export async function legacyCompose(site: LegacySite, ...rest: string[]): Promise<string> {
  return await run(['docker', 'compose', ...rest], {
    cwd: site.folder,
    timeoutMs: 1_200_000,
    env: { DOCKER_BUILDKIT: '1' },
  })
}

/** nginx of the host, with the legacy site. */
export async function startNginx({ own }: LegacySite): Promise<void> {
  const file = join(own.folder, 'nginx/nginx.conf')
  await run(['nginx', '-c', file, '-e', join(own.folder, 'nginx/error.log')], { daemon: true })
}

/** By Compose's labels: its files may be gone, or have another name. */
export async function removeLegacySite({ own, project }: LegacySite): Promise<void> {
  const label = `label=com.docker.compose.project=${project}`
  for (const [kind, list, remove] of [
    ['container', ['ls', '--all'], ['rm', '--force', '--volumes']],
    ['volume', ['ls'], ['rm']],
    ['network', ['ls'], ['rm']],
    ['image', ['ls'], ['rm', '--force']],
  ] as const) {
    const found = (await run(['docker', kind, ...list, '--quiet', '--filter', label])).trim()
    if (found) await run(['docker', kind, ...remove, ...new Set(found.split('\n'))])
  }
  await removeOwnSite(own)
}
