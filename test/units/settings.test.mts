import { readFile } from 'node:fs/promises'
import { join, relative } from 'node:path'
import { parse } from 'dotenv'
import { describe, expect, onTestFinished, test, vi } from 'vitest'
import { exitCodes } from '../../scripts/lib/report.mts'
import {
  composeCommand,
  composeFile,
  exampleFile,
  loadSite,
  problemsOf,
  projectRoot,
  scriptCommand,
  stateDirOf,
} from '../../scripts/lib/settings.mts'
import { newFolder, passwords, siteOf, siteWith } from './site.mts'

const good = { ...parse(await readFile(exampleFile, 'utf8')), ...passwords }

describe('an operator is told what is wrong', () => {
  test('not with .env.example and two passwords', () => {
    expect(problemsOf(good)).toEqual([])
  })

  test.each([
    ['UPLOADS_VOLUME', '', 'UPLOADS_VOLUME is empty'],
    ['POSTGRES_VOLUME', '', 'POSTGRES_VOLUME is empty'],
    ['POSTGRES_PASSWORD', '', 'POSTGRES_PASSWORD is empty'],
    ['REDIS_PASSWORD', '', 'REDIS_PASSWORD is empty'],
    ['STRAPI_VERSION', '', 'STRAPI_VERSION is empty'],
    ['MASTER_PORT', 'http', 'MASTER_PORT is not a port: "http"'],
    ['MASTER_PORT', '65536', 'MASTER_PORT is not a port: "65536"'],
    ['MASTER_PORT', '-1', 'MASTER_PORT is not a port: "-1"'],
    ['MASTER_PORT', '0', 'MASTER_PORT is not a port: "0"'],
    ['SLAVE_PORT', '1337', 'MASTER_PORT, SLAVE_PORT, CONTROL_PORT must be three different ports'],
    ['HEALTH_INTERVAL', '0', 'HEALTH_INTERVAL is not a number of at least 0.1: "0"'],
    ['HEALTH_TIMEOUT', '3m', 'HEALTH_TIMEOUT is not a number of at least 1: "3m"'],
    ['DRAIN_TIMEOUT', '', 'DRAIN_TIMEOUT is not a number of at least 0: ""'],
    ['KEEP_RELEASES', '0', 'KEEP_RELEASES is not a number of at least 1: "0"'],
    ['POSTGRES_DB', 'B o B', 'POSTGRES_DB is not a name: "B o B"'],
    ['NETWORK_NAME', '-x', 'NETWORK_NAME is not a name: "-x"'],
    ['STRAPI_IMAGE', 'bob:latest', 'STRAPI_IMAGE is not a name: "bob:latest"'],
    // Compose takes lower-case project names only, the engine lower-case image names only.
    ['COMPOSE_PROJECT_NAME', 'BoB', 'COMPOSE_PROJECT_NAME may hold a-z, 0-9, _ and - only'],
    ['STRAPI_IMAGE', 'BoB', 'STRAPI_IMAGE is not a name: "BoB"'],
    ['SERVER_NAME', 'a.com b.com', 'SERVER_NAME is empty or holds a space'],
    ['HTTP_LISTEN', 'http', 'HTTP_LISTEN is neither a port nor address:port'],
    ['HTTP_LISTEN', '127.0.0.1:', 'HTTP_LISTEN is neither a port nor address:port'],
    ['TLS_CERTIFICATE', '/a.pem', 'TLS_CERTIFICATE and TLS_CERTIFICATE_KEY belong together'],
    ['TLS_CERTIFICATE_KEY', '/a.key', 'TLS_CERTIFICATE and TLS_CERTIFICATE_KEY belong together'],
    ['PROBE_URL', '/_health', 'PROBE_URL is not a URL: "/_health"'],
    ['PROBE_URL', 'bob.example.com:8080/_health', 'PROBE_URL is not a URL: "bob.example.com:8080/_health"'],
    ['SMOKE_PATHS', '/admin/init api', 'SMOKE_PATHS must each start with /'],
    ['TRAFFIC_DIR', '/srv/a b', 'TRAFFIC_DIR may hold letters, digits and @%+,./- only: "/srv/a b"'],
    ['ACCESS_LOG', '/a;b', 'ACCESS_LOG may hold letters, digits and @%+,./- only: "/a;b"'],
  ])('about %s=%s: %s', (key, value, sentence) => {
    expect(problemsOf({ ...good, [key]: value })).toEqual([sentence])
  })

  // Compose takes its own default for them, or the current folder is taken: not what the operator sees.
  test.each([
    'STRAPI_SOURCE',
    'STRAPI_DOCKERFILE',
    'STRAPI_HOST',
    'BACKUP_DIR',
    'TRAFFIC_DIR',
    'ACCESS_LOG',
    'NGINX_CONF_DIR',
    'NGINX_COMMAND',
  ])('about an empty %s', (key) => {
    expect(problemsOf({ ...good, [key]: '' })).toEqual([`${key} is empty`])
  })

  test.each([
    ['HTTP_LISTEN', '8080'],
    ['HTTP_LISTEN', '127.0.0.1:8080'],
    ['HTTP_LISTEN', '[::1]:8080'],
    ['DRAIN_TIMEOUT', '0'],
    ['HEALTH_INTERVAL', '0.2'],
    ['KEEP_RELEASES', '1'],
    ['PROBE_URL', 'https://bob.example.com/_health?probe=1'],
    ['SMOKE_PATHS', ''],
    ['SMOKE_PATHS', '/admin/init /api/pings'],
    ['STRAPI_IMAGE', 'example.com/team/bob-strapi'],
    ['COMPOSE_PROJECT_NAME', 'bob-2_b'],
    ['UPLOADS_VOLUME', '../uploads'],
  ])('not about %s=%s', (key, value) => {
    expect(problemsOf({ ...good, [key]: value })).toEqual([])
  })

  test('everything at once, with the file and the command that comes next', async () => {
    const text = 'POSTGRES_PASSWORD=pa$word\nMASTER_PORT=0x\nKEEP_RELEASES=none\nSERVER_NAME=\n'
    await expect(siteOf(text)).rejects.toMatchObject({
      code: exitCodes.usage,
      message: expect.stringMatching(
        /^\/.*\/\.env needs attention:\n {2}- POSTGRES_PASSWORD holds a \$.*\n {2}- REDIS_PASSWORD is empty\n {2}- MASTER_PORT .*\n {2}- KEEP_RELEASES .*\n {2}- SERVER_NAME .*$/,
      ),
      advice: expect.stringMatching(/^Edit it, then: npx zx scripts\/setup\.mts --env-file \/.*\/\.env$/),
    })
  })

  test('when there is no .env yet, how to write it', async () => {
    const path = join(await newFolder(), '.env')
    await expect(loadSite(path)).rejects.toMatchObject({
      code: exitCodes.usage,
      message: `there is no ${path}`,
      advice: `Write it with: npx zx scripts/setup.mts --env-file ${path}`,
    })
  })
})

describe('a value comes from', () => {
  test.each([
    ['.env.example, when nobody says anything', undefined, undefined, 60_000],
    ['.env, before .env.example', '20', undefined, 20_000],
    ['the environment, before .env', '20', '5', 5000],
    ['the environment, before .env.example', undefined, '5', 5000],
  ])('%s', async (_, inFile, inEnvironment, expected) => {
    vi.stubEnv('DRAIN_TIMEOUT', inEnvironment)
    onTestFinished(() => void vi.unstubAllEnvs())
    const site = await siteWith(inFile === undefined ? {} : { DRAIN_TIMEOUT: inFile })
    expect(site.drainTimeoutMs).toBe(expected)
  })

  test('.env.example or from the compose file alike, when .env leaves it out', async () => {
    const text = await readFile(composeFile, 'utf8')
    const example = parse(await readFile(exampleFile, 'utf8'))
    const defaults = [...text.matchAll(/\$\{(\w+):-([^}]*)\}/g)]
      .map(([, key = '', value = '']) => [key, value] as const)
      // Its other default names the images of PostgreSQL and Redis.
      .filter(([key, value]) => !(key === 'CONTAINER_PREFIX' && value === 'bob-'))
    expect(defaults.length).toBeGreaterThan(30)
    expect(defaults.filter(([key, value]) => example[key] !== value)).toEqual([])
  })
})

describe('a relative path', () => {
  test.each<[string, (site: Awaited<ReturnType<typeof siteWith>>) => string, string]>([
    ['STRAPI_SOURCE', (site) => site.source, '../x'],
    ['UPLOADS_VOLUME', (site) => site.folders.uploads, '../x'],
    ['POSTGRES_VOLUME', (site) => site.folders.postgres, './x'],
    ['BACKUP_DIR', (site) => site.folders.backups, '../x'],
    ['TRAFFIC_DIR', (site) => site.folders.traffic, '../x'],
    ['ACCESS_LOG', (site) => site.nginx.accessLog, '../x'],
    ['NGINX_CONF_DIR', (site) => join(site.nginx.confFile, '..'), '../x'],
  ])(
    'in %s is relative to docker/, as .env.example says, wherever a script is started',
    async (key, of, path) => {
      expect(of(await siteWith({ [key]: path }))).toBe(join(projectRoot, 'docker', path))
    },
  )

  test('in STRAPI_DOCKERFILE is relative to STRAPI_SOURCE, as for Compose', async () => {
    const site = await siteWith({ STRAPI_SOURCE: '/srv/bob/strapi', STRAPI_DOCKERFILE: '../Dockerfile' })
    expect(site.dockerfile).toBe('/srv/bob/Dockerfile')
  })

  test('in --env-file is relative to the current folder', async () => {
    const { envFile } = await siteWith()
    expect((await loadSite(relative(process.cwd(), envFile))).envFile).toBe(envFile)
  })
})

test('two settings files in one folder have a state each', () => {
  expect(['.env', 'b.env'].map((name) => stateDirOf(join('/srv', name)))).toEqual([
    '/srv/.state',
    '/srv/.state-b.env',
  ])
})

test.each([
  ['127.0.0.1', '127.0.0.1:1337'],
  ['0.0.0.0', '127.0.0.1:1337'],
  ['10.0.0.7', '10.0.0.7:1337'],
])('with STRAPI_HOST=%s a deploy and nginx reach master at %s', async (host, address) => {
  expect((await siteWith({ STRAPI_HOST: host })).slots['strapi-master'].address).toBe(address)
})

const certificate = { TLS_CERTIFICATE: '/c.pem', TLS_CERTIFICATE_KEY: '/c.key' }
test.each([
  ['port 80', {}, 'http://bob.strapi-pro.com:80/_health', '127.0.0.1'],
  ['port 8080', { HTTP_LISTEN: '8080' }, 'http://bob.strapi-pro.com:8080/_health', '127.0.0.1'],
  ['10.0.0.7:81', { HTTP_LISTEN: '10.0.0.7:81' }, 'http://bob.strapi-pro.com:81/_health', '10.0.0.7'],
  ['[::1]:8080', { HTTP_LISTEN: '[::1]:8080' }, 'http://bob.strapi-pro.com:8080/_health', '[::1]'],
  ['HTTPS', certificate, 'https://bob.strapi-pro.com/_health', '127.0.0.1'],
  ['PROBE_URL', { PROBE_URL: 'https://example.com/x' }, 'https://example.com/x', undefined],
])('a deploy probes a site on %s as a visitor would', async (_, settings, url, dial) => {
  expect((await siteWith(settings)).probe).toEqual({ url, dial })
})

test('the commands that an operator is told name the settings file when it is not docker/.env', async () => {
  const site = await siteWith()
  const standard = { ...site, envFile: join(projectRoot, 'docker/.env') }
  expect(scriptCommand('deploy', standard.envFile, '--status')).toBe('npx zx scripts/deploy.mts --status')
  expect(scriptCommand('setup', '/srv/.env')).toBe('npx zx scripts/setup.mts --env-file /srv/.env')
  expect(composeCommand(standard, 'ps')).toBe('docker compose -f docker/docker-compose.yml ps')
  expect(composeCommand({ ...site, envFile: '/srv/.env' }, 'ps')).toBe(
    'docker compose -f docker/docker-compose.yml --env-file /srv/.env ps',
  )
})
