/** What deploy and setup refuse before anything changes, all of it at once, while visitors are served. No secret shows. */
import { chmod, mkdir, readdir, readFile, rename, rm, statfs, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { afterAll, afterEach, beforeAll, describe, expect, inject, onTestFinished, test, vi } from 'vitest'
import { removeOwnSite, type OwnSite } from '../example/site.mts'
import { run } from '../scripts/lib/command.mts'
import { compose } from '../scripts/lib/compose.mts'
import * as engine from '../scripts/lib/engine.mts'
import { getUrl } from '../scripts/lib/http.mts'
import { takeLock } from '../scripts/lib/lock.mts'
import { loadSite, projectRoot, type Site } from '../scripts/lib/settings.mts'
import { mustSucceed, tinySite, type Outcome, type TestSite } from './harness.mts'
import {
  appEnv,
  edit,
  everything,
  expectSecretsUnseen,
  freshSite,
  noteSecrets,
  said,
  script,
  watched,
} from './watched.mts'

describe('before anything is deployed', () => {
  let own: OwnSite
  beforeAll(async () => {
    own = await freshSite(18_250)
    await mustSucceed(script('setup', own.envFile))
    await noteSecrets(own.envFile, appEnv(own))
  })
  afterAll(() => removeOwnSite(own))

  test('a deploy names who holds its ports: a process, a container of somebody else', async () => {
    const { slots } = await loadSite(own.envFile)
    const [host, port] = slots['strapi-master'].address.split(':')
    const server = createServer()
    await new Promise<void>((resolve) => server.listen(Number(port), host, resolve))
    const name = `${own.project}-foreign`
    const image = inject('baseImages').REDIS_IMAGE ?? 'redis:7-alpine'
    const publish = ['--publish', `${slots['strapi-slave'].address}:80`]
    await run(['docker', 'run', '--detach', '--name', name, ...publish, image, 'sleep', '600'])
    onTestFinished(async () => {
      server.close()
      await run(['docker', 'rm', '--force', name])
    })
    await expectRefused(own, () => script('deploy', own.envFile), [
      `port ${port} of strapi-master is taken`,
      `port ${slots['strapi-slave'].address.split(':')[1]} of strapi-slave is taken by the container ${name}`,
    ])
  })

  test('an .env that is empty is not enough, and stays empty', async () => {
    const empty = join(own.folder, 'empty.env')
    await writeFile(empty, '', { mode: 0o600 })
    const before = await everything(own)
    for (const [name, ...options] of [['deploy'], ['setup', '--check']] as const) {
      const { code, stderr } = await script(name, empty, ...options)
      expect(code).toBe(2)
      expect(stderr).toMatch(/^ {2}- POSTGRES_PASSWORD is empty$[^]*^ {2}- REDIS_PASSWORD is empty$/m)
      expect(stderr).toContain('npx zx scripts/setup.mts')
    }
    expect(await everything(own)).toEqual(before)
  })

  test('an option that does not exist is refused by either script', async () => {
    for (const name of ['deploy', 'setup'] as const) {
      await expectRefused(own, () => script(name, own.envFile, '--frobnicate'), [])
      expect(said.at(-1)).toContain("Unknown option '--frobnicate'")
      expect(said.at(-1)).toContain('--help')
    }
  })

  test('a full disk leaves the .env as it was', async () => {
    const small = join(own.folder, 'small')
    await mkdir(small)
    await run(['mount', '-t', 'tmpfs', '-o', 'size=32k', 'tmpfs', small])
    onTestFinished(async () => {
      await run(['umount', small])
      await rm(small, { recursive: true })
    })
    const envFile = join(small, '.env')
    const text = (await readFile(own.envFile, 'utf8')).replace(/^KEEP_RELEASES=.*\n/m, '')
    await writeFile(envFile, text, { mode: 0o600 })
    const { bavail, bsize } = await statfs(small)
    await writeFile(join(small, 'rest'), Buffer.alloc((bavail - 1) * bsize))
    const { code, stderr } = await script('setup', envFile)
    expect(code).not.toBe(0)
    expect(stderr).toContain('no space left')
    expect(await readdir(small)).toEqual(['.env', 'rest'])
    expect(await readFile(envFile, 'utf8')).toBe(text)
  })
})

/** One message, exit code 2, exactly these findings, and nothing changed. */
async function expectRefused(
  own: OwnSite,
  attempt: () => Promise<Outcome>,
  says: (string | RegExp)[],
): Promise<void> {
  const before = await everything(own)
  const { code, stdout, stderr } = await attempt()
  expect(stderr.match(/^Error: /gm), stdout + stderr).toHaveLength(1)
  for (const one of says) expect(stderr).toMatch(one)
  expect(stderr.match(/^ {2}- /gm) ?? [], stderr).toHaveLength(says.length)
  expect(code).toBe(2)
  expect(await everything(own)).toEqual(before)
}

describe('while master serves', () => {
  let own: TestSite
  let site: Site
  let envText: string
  let appText: string

  beforeAll(async () => {
    own = await tinySite(18_230)
    await noteSecrets(own.envFile, appEnv(own))
    await mustSucceed(watched(script('deploy', own.envFile, '--json')))
    site = await loadSite(own.envFile)
    envText = await readFile(own.envFile, 'utf8')
    appText = await readFile(appEnv(own), 'utf8')
  })
  afterEach(async () => {
    await writeFile(own.envFile, envText)
    await writeFile(appEnv(own), appText)
    expect((await getUrl(`${own.url}/_health`)).status).toBe(204)
  })
  afterAll(() => removeOwnSite(own))

  const deploy = (...options: string[]) => script('deploy', own.envFile, ...options)

  test('a deploy lists all that is missing or unequal in both .env files', async () => {
    await edit(own.envFile, { UPLOADS_VOLUME: '', HEALTH_TIMEOUT: 'soon', MASTER_PORT: 'high' })
    await edit(appEnv(own), { APP_KEYS: '', DATABASE_NAME: 'other', DATABASE_HOST: '' })
    await expectRefused(own, deploy, [
      'UPLOADS_VOLUME is empty',
      'HEALTH_TIMEOUT is not a number',
      'MASTER_PORT is not a port: "high"',
      `APP_KEYS is missing in ${appEnv(own)}`,
      `DATABASE_NAME in ${appEnv(own)} differs from POSTGRES_DB`,
      `DATABASE_HOST is missing in ${appEnv(own)}`,
    ])
  })

  test('a deploy lists secrets that are short or stand in a manual', async () => {
    await edit(own.envFile, { REDIS_PASSWORD: 'short', POSTGRES_PASSWORD: 'monMotDePasse' })
    await edit(appEnv(own), {
      REDIS_PASSWORD: 'short',
      DATABASE_PASSWORD: 'monMotDePasse',
      ADMIN_JWT_SECRET: 'tobemodified',
      APP_KEYS: 'toBeModified1,toBeModified2',
    })
    await expectRefused(
      own,
      deploy,
      [
        'REDIS_PASSWORD in .* has less than 12 characters',
        'POSTGRES_PASSWORD in .* is a known example',
        'ADMIN_JWT_SECRET in .* is a known example',
        'APP_KEYS in .* is a known example',
        'APP_KEYS in .* is a known example',
      ].map((one) => new RegExp(one)),
    )
  })

  const settings = [
    {
      what: 'settings that Compose refuses',
      values: { STRAPI_HOST: 'nowhere' },
      says: [/the compose file is not valid: .*nowhere/s, /nginx does not run .* should be "nowhere:18232"/],
    },
    {
      what: 'an nginx that is not there',
      values: { NGINX_COMMAND: 'nginx-that-is-not-there' },
      says: ['nginx is missing ("nginx-that-is-not-there -v" fails)'],
    },
    {
      what: 'an application that is not there',
      values: { STRAPI_DOCKERFILE: '/nonexistent/Dockerfile' },
      says: ['STRAPI_DOCKERFILE names no file: /nonexistent/Dockerfile'],
    },
  ]
  test.each(settings)('a deploy refuses $what', async ({ values, says }) => {
    await edit(own.envFile, values)
    await expectRefused(own, deploy, says)
  })

  test('a deploy refuses STRAPI_VERSION in the environment, where it would beat .env', async () => {
    vi.stubEnv('STRAPI_VERSION', 'latest')
    onTestFinished(() => void vi.unstubAllEnvs())
    await expectRefused(own, deploy, ['STRAPI_VERSION is set in the environment'])
  })

  test('a deploy refuses .env files that every user can read', async () => {
    const paths = [own.envFile, appEnv(own)]
    for (const path of paths) await chmod(path, 0o644)
    onTestFinished(() => Promise.all(paths.map((path) => chmod(path, 0o600))).then(() => undefined))
    await expectRefused(
      own,
      deploy,
      paths.map((path) => `${path} can be read by every user`),
    )
  })

  test('a deploy refuses a disk that is nearly full', async () => {
    await run(['mount', '-t', 'tmpfs', '-o', 'size=20m', 'tmpfs', site.folders.postgres])
    onTestFinished(() => run(['umount', site.folders.postgres]).then(() => undefined))
    await expectRefused(own, deploy, [/0\.0 GB are free on the disk of \S+postgresql, at least 0\.1 GB/])
  })

  test("a deploy refuses a traffic folder that nginx's worker cannot see", async () => {
    const main = join(own.folder, 'nginx/nginx.conf')
    const text = await readFile(main, 'utf8')
    await writeFile(main, text.replace('user root;', 'user www-data;'))
    onTestFinished(() => writeFile(main, text))
    await chmod(own.folder, 0o700)
    await expectRefused(own, deploy, [
      `nginx's worker (www-data) cannot see TRAFFIC_DIR: ${own.folder} is closed to it`,
      `nginx's worker (www-data) cannot see UPLOADS_VOLUME: ${own.folder} is closed to it`,
    ])
  })

  test('a deploy refuses an nginx that does not run our configuration, and says how to install it', async () => {
    const away = join(own.folder, 'away.conf')
    await rename(site.nginx.confFile, away)
    await run([...site.nginx.command, '-s', 'reload'])
    const control = `http://${site.nginx.control}/upstream`
    await vi.waitFor(() => expect(getUrl(control)).rejects.toThrow('nothing listens'), 10_000)
    await expectRefused(own, deploy, ["nginx does not run this site's configuration"])
    expect(said.at(-1)).toContain(`npx zx scripts/setup.mts --env-file ${own.envFile}`)
    await rm(away)
    await mustSucceed(script('setup', own.envFile))
    expect((await getUrl(control)).body).toBe('master\n')
  })

  test('a deploy refuses to run beside strapi-dev, and says how to stop it', async () => {
    const image = `${own.project}-strapi`
    const { container } = site.slots['strapi-master']
    await run(['docker', 'tag', `${image}:${site.release}`, `${image}-dev`])
    await run(['docker', 'stop', container])
    try {
      await run(compose(site, '--profile', 'dev', 'up', '--detach', '--no-build', '--no-deps', 'strapi-dev'))
      await expectRefused(own, deploy, [])
      expect(said.at(-1)).toContain('strapi-dev is running and holds the port of strapi-master')
      const [command = ''] = /docker compose .* stop strapi-dev/.exec(said.at(-1) ?? '') ?? []
      await run(command.split(' '), { cwd: projectRoot })
      const [dev] = await engine.serviceContainers(own.project, 'strapi-dev')
      expect(dev?.State.Status).toBe('exited')
    } finally {
      await run(compose(site, '--profile', 'dev', 'rm', '--stop', '--force', 'strapi-dev'))
      await run(['docker', 'start', container])
      await vi.waitFor(async () => expect((await getUrl(`${own.url}/_health`)).status).toBe(204), 20_000)
    }
  })

  test('a container that was started by hand is not taken for a service', async () => {
    // An image that Compose built carries its labels into every container.
    const images = ['postgresql', 'redis'].map((name) => `${own.project}-${name}`)
    const names = images.map((image) => `${image}-by-hand`)
    onTestFinished(() => run(['docker', 'rm', '--force', ...names]).then(() => undefined))
    for (const image of images)
      await run([
        'docker',
        'run',
        '--detach',
        '--name',
        `${image}-by-hand`,
        '--entrypoint',
        'sleep',
        image,
        '600',
      ])
    await mustSucceed(deploy('--dry-run'))
  })

  test('either script tells who holds the lock, and changes nothing meanwhile', async () => {
    const lock = await takeLock(site.project, 'deploy --rollback')
    onTestFinished(() => lock.release())
    // Something that setup would add.
    await writeFile(own.envFile, envText.replace(/^# Releases that went well.*\nKEEP_RELEASES=.*\n/m, ''))
    const before = await everything(own)
    for (const name of ['deploy', 'setup'] as const) {
      const { code, stderr } = await script(name, own.envFile)
      expect(code).toBe(4)
      expect(stderr).toContain(
        `another run is in progress: "deploy --rollback", process ${process.pid}, since 20`,
      )
      expect(stderr).toContain('--wait')
    }
    expect(await everything(own)).toEqual(before)
  })

  test.each([
    ['Compose would expand', 'API_TOKEN_SALT=hunter2-${hunter2'],
    ['lacks its second quote', 'API_TOKEN_SALT="hunter2-hunter2'],
    ['has a key that is none', 'API_TOKEN!SALT=hunter2-hunter2'],
  ])('a line that %s is refused, and its value is not shown', async (_, line) => {
    await writeFile(appEnv(own), appText.replace(/^API_TOKEN_SALT=.*/m, line))
    const { code, stderr } = await deploy()
    expect(code).toBe(2)
    expect(stderr).toMatch(/API_TOKEN_SALT|the compose file is not valid|line \d+ of/)
    expect(stderr).not.toContain('hunter2')
  })

  test('a deploy that fails leaves master as it was, and so do a dry run and --status', async () => {
    const { master } = await own.observe()
    await own.behave({ exitAtOnce: true })
    const failed = await watched(deploy())
    expect([failed.code, failed.stderr]).toEqual([1, expect.stringContaining('master was not touched')])
    const dockerfile = join(own.folder, 'Dockerfile')
    await writeFile(dockerfile, 'FROM scratch\nCOPY missing /\n')
    await edit(own.envFile, { STRAPI_DOCKERFILE: dockerfile })
    expect((await deploy('--json')).code).toBe(1)
    for (const options of [['--status'], ['--status', '--json'], ['--dry-run']])
      await mustSucceed(deploy(...options))
    expect((await own.observe()).master).toEqual(master)
  })
})

test('secrets were shown by no run, and were in no command line', () => {
  expectSecretsUnseen(
    ['not ready', 'POSTGRES_PASSWORD', '"exitCode":0', '"exitCode":1'],
    ['build strapi-master', 'up --detach'],
  )
})
