/** A whole site of its own beside whatever else runs on this host: settings, nginx, folders, names. For the trial and the tests. */
import { cp, mkdir, readFile, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { ask, run } from '../scripts/lib/command.mts'
import { compose } from '../scripts/lib/compose.mts'
import * as engine from '../scripts/lib/engine.mts'
import { setValues } from '../scripts/lib/envfile.mts'
import { exampleFile, loadSite, projectRoot } from '../scripts/lib/settings.mts'

export interface OwnSite {
  /** Holds everything of the site; removed with it. */
  folder: string
  envFile: string
  /** The copy of the application that its image is built from. */
  source: string
  /** What visitors ask. */
  url: string
  project: string
}

export interface OwnSiteOptions {
  folder: string
  /** Compose project, and the beginning of every other name. */
  project: string
  /** nginx listens here on 127.0.0.1; the next three ports are its control server, master and slave. */
  port: number
  /** Application that is copied. */
  application: string
  /** Instead of docker/strapi/Dockerfile. */
  dockerfile?: string
  /** Further settings for its .env. */
  settings?: Record<string, string>
}

/** Writes its files. What is there already stays, so that a second run goes on where the first one was. */
export async function writeOwnSite(options: OwnSiteOptions): Promise<OwnSite> {
  const { folder, project, port } = options
  const site = {
    folder,
    project,
    envFile: join(folder, '.env'),
    source: join(folder, 'strapi'),
    url: `http://127.0.0.1:${port}`,
  }
  await mkdir(join(folder, 'nginx/conf.d'), { recursive: true })
  if ((await ask(['test', '-e', site.source])) === undefined) {
    const isBuilt = /\/(node_modules|dist|build|\.cache|\.tmp|\.env)$/
    await cp(options.application, site.source, { recursive: true, filter: (path) => !isBuilt.test(path) })
  }
  await writeFile(join(folder, 'nginx/nginx.conf'), nginxMain(folder))
  if ((await ask(['test', '-e', site.envFile])) === undefined) {
    await writeFile(site.envFile, setValues(await readFile(exampleFile, 'utf8'), settingsOf(options, site)), {
      mode: 0o600,
    })
  }
  return site
}

function settingsOf(options: OwnSiteOptions, site: OwnSite): Record<string, string> {
  const { folder, project, port } = options
  return {
    STRAPI_SOURCE: site.source,
    STRAPI_VOLUME: site.source,
    STRAPI_DOCKERFILE: options.dockerfile ?? join(projectRoot, 'docker/strapi/Dockerfile'),
    UPLOADS_VOLUME: join(folder, 'uploads'),
    POSTGRES_VOLUME: join(folder, 'postgresql'),
    BACKUP_DIR: join(folder, 'backups'),
    TRAFFIC_DIR: join(folder, 'traffic'),
    MASTER_PORT: String(port + 2),
    SLAVE_PORT: String(port + 3),
    SERVER_NAME: '127.0.0.1',
    HTTP_LISTEN: `127.0.0.1:${port}`,
    CONTROL_PORT: String(port + 1),
    NGINX_CONF_DIR: join(folder, 'nginx/conf.d'),
    NGINX_COMMAND: `nginx -c ${join(folder, 'nginx/nginx.conf')} -e ${join(folder, 'nginx/error.log')}`,
    ACCESS_LOG: join(folder, 'nginx/access.log'),
    COMPOSE_PROJECT_NAME: project,
    COMPOSE_PROFILES: '',
    CONTAINER_PREFIX: `${project}-`,
    NETWORK_NAME: `${project}-network`,
    STRAPI_IMAGE: `${project}-strapi`,
    ...options.settings,
  }
}

/** Workers run as root, since nobody else may enter a folder under /root; it serves this machine alone. */
function nginxMain(folder: string): string {
  const own = join(folder, 'nginx')
  const temporary = ['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi']
  return `user root;
worker_processes 2;
pid ${own}/nginx.pid;
error_log ${own}/error.log;
events { worker_connections 4096; }
http {
  include /etc/nginx/mime.types;
  default_type application/octet-stream;
  access_log off;
${temporary.map((name) => `  ${name}_temp_path ${own}/${name};`).join('\n')}
  include ${own}/conf.d/*.conf;
}
`
}

/** Process id of its nginx, or undefined. */
export async function nginxPid(site: OwnSite): Promise<number | undefined> {
  const pid = Number(await readFile(join(site.folder, 'nginx/nginx.pid'), 'utf8').catch(() => ''))
  const command = pid > 0 ? await readFile(`/proc/${pid}/cmdline`, 'utf8').catch(() => '') : ''
  return command.includes('nginx') ? pid : undefined
}

/** Removes everything that the site made: containers, images, network, volumes, nginx, the folder. */
export async function removeOwnSite(site: OwnSite): Promise<void> {
  const pid = await nginxPid(site)
  if (pid !== undefined) process.kill(pid, 'SIGTERM')
  const settings = await loadSite(site.envFile).catch(() => undefined)
  if (settings) {
    await run(compose(settings, '--profile', '*', 'down', '--volumes', '--remove-orphans', '--timeout', '5'))
    const images = [
      settings.image,
      `${settings.image}-dev`,
      `${site.project}-postgresql`,
      `${site.project}-redis`,
    ]
    for (const { repository, tag } of (await Promise.all(images.map(tagsOf))).flat()) {
      await run(['docker', 'image', 'rm', '--force', `${repository}:${tag}`])
    }
  }
  await rm(site.folder, { recursive: true, force: true })
}

async function tagsOf(repository: string): Promise<{ repository: string; tag: string }[]> {
  return (await engine.tags(repository)).map(({ tag }) => ({ repository, tag }))
}
