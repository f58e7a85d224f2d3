/** setup.mts as an operator uses it, what both scripts refuse before anything changes, and that no secret shows. */
import { spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import {
  chmod,
  chown,
  cp,
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  rename,
  rm,
  rmdir,
  stat,
  statfs,
  symlink,
  writeFile,
} from 'node:fs/promises'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { basename, dirname, join, relative } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { parse } from 'dotenv'
import {
  afterAll,
  afterEach,
  beforeAll,
  beforeEach,
  describe,
  expect,
  inject,
  onTestFinished,
  test,
  vi,
} from 'vitest'
import { nginxPid, removeOwnSite, writeOwnSite, type OwnSite } from '../example/site.mts'
import { run } from '../scripts/lib/command.mts'
import { compose } from '../scripts/lib/compose.mts'
import * as engine from '../scripts/lib/engine.mts'
import { setValues } from '../scripts/lib/envfile.mts'
import { getUrl } from '../scripts/lib/http.mts'
import { takeLock } from '../scripts/lib/lock.mts'
import { render } from '../scripts/lib/nginx.mts'
import { appSecrets } from '../scripts/lib/secrets.mts'
import { exampleFile, loadSite, projectRoot, type Site } from '../scripts/lib/settings.mts'
import { differences } from '../scripts/lib/traffic.mts'
import { mustSucceed, tinySite, type Outcome, type TestSite } from './harness.mts'

/** Everything that a script of this file wrote on either stream. */
const said: string[] = []
/** Every command line of this host while a script made or used secrets. */
const seen = new Set<string>()
/** Those secrets. */
const secrets = new Set<string>()

/** Runs one of the scripts to its end, and remembers what it said. */
async function script(name: 'deploy' | 'setup', envFile: string, ...options: string[]): Promise<Outcome> {
  return await ran(join(projectRoot, `scripts/${name}.mts`), '--env-file', envFile, ...options)
}

async function ran(...argv: string[]): Promise<Outcome> {
  const child = spawn(process.execPath, argv, { stdio: ['ignore', 'pipe', 'pipe'], cwd: tmpdir() })
  const outcome: Outcome = { code: null, stdout: '', stderr: '', events: [] }
  child.stdout.on('data', (part: Buffer) => (outcome.stdout += part.toString()))
  child.stderr.on('data', (part: Buffer) => (outcome.stderr += part.toString()))
  const [code] = (await once(child, 'close')) as [number | null]
  said.push(outcome.stdout, outcome.stderr)
  return { ...outcome, code }
}

/** Sees the command lines of this host while a script runs, so those of its children. */
async function watched<T>(outcome: Promise<T>): Promise<T> {
  const over = outcome.then(() => true)
  do {
    for (const line of await commandLines()) seen.add(line)
  } while (!(await Promise.race([over, sleep(10, false)])))
  return await outcome
}

async function commandLines(): Promise<string[]> {
  const processes = (await readdir('/proc')).filter((name) => /^\d+$/.test(name))
  const read = (pid: string) => readFile(`/proc/${pid}/cmdline`, 'utf8').catch(() => '')
  return (await Promise.all(processes.map(read))).map((line) => line.replaceAll('\0', ' ').trim())
}

/** Files of a site with owner, mode and content, its containers, and its images: to see that something changed nothing. */
async function everything(own: OwnSite, ...moreFolders: string[]): Promise<string[]> {
  const files = await Promise.all([own.folder, ...moreFolders].map(filesOf))
  const label = `label=com.docker.compose.project=${own.project}`
  const list = ['docker', 'ps', '--all', '--no-trunc', '--format', '{{.ID}} {{.State}}', '--filter', label]
  const containers = (await run(list)).split('\n')
  const images = (await engine.tags(`${own.project}-strapi`)).map(({ tag, id }) => `${tag} ${id}`)
  return [...files.flat(), ...containers, ...images].toSorted()
}

async function filesOf(folder: string): Promise<string[]> {
  // What a running database, visitors and nginx write at any time.
  const isAlive = /^(postgresql|uploads)\/|^nginx\/(\w+\.log|client_body|proxy|fastcgi|uwsgi|scgi)/
  const names = (await readdir(folder, { recursive: true })).filter((name) => !isAlive.test(name))
  const lines = names.map(async (name) => {
    const found = await stat(join(folder, name))
    const content = found.isFile() ? await readFile(join(folder, name), 'utf8') : ''
    return [folder, name, found.mode.toString(8), found.uid, content].join(' ')
  })
  return await Promise.all(lines)
}

/** A folder with the tiny app, and the settings of a site that was never set up. */
async function freshSite(port: number, folder?: string): Promise<OwnSite> {
  const project = `bob-test-${port}-${randomBytes(2).toString('hex')}`
  const settings = { ...inject('baseImages'), STRAPI_DOCKERFILE: join(projectRoot, 'test/tiny/Dockerfile') }
  const application = join(projectRoot, 'test/tiny')
  const place = folder ?? (await mkdtemp(join(tmpdir(), `${project}-`)))
  const own = await writeOwnSite({ folder: place, project, port, application, settings })
  await writeFile(join(own.source, 'package.json'), '{ "name": "tiny" }\n')
  await writeFile(join(own.source, 'package-lock.json'), '{}\n')
  return own
}

async function modeOf(path: string): Promise<string> {
  const { mode, uid } = await stat(path)
  return `${(mode & 0o7777).toString(8)} ${uid}`
}

async function valuesOf(path: string): Promise<Record<string, string>> {
  return parse(await readFile(path, 'utf8'))
}

async function edit(path: string, values: Record<string, string>): Promise<void> {
  await writeFile(path, setValues(await readFile(path, 'utf8'), values))
}

const appEnv = (own: OwnSite): string => join(own.source, '.env')

/** Learns the secrets of a site, to look for them in all that was said. */
async function noteSecrets(...envFiles: string[]): Promise<void> {
  const keys = ['POSTGRES_PASSWORD', 'REDIS_PASSWORD', 'LIVEKIT_API_SECRET', ...appSecrets]
  for (const values of await Promise.all(envFiles.map(valuesOf))) {
    for (const secret of keys.flatMap((key) => (values[key] ?? '').split(','))) {
      if (secret.length >= 8) secrets.add(secret)
    }
  }
}

describe('setup in a fresh checkout', () => {
  /** Holds the checkout, and everything else of the site. */
  let folder: string
  let checkout: string
  let own: OwnSite
  let envFile: string
  let appFile: string
  /** Settings that keep this site apart from others. The environment gives them, so that there need not be any file. */
  let apart: [string, string][]
  /** Both .env files after the first run. */
  let text: string
  let appText: string
  const everythingHere = () => everything(own, checkout)
  const setup = (...options: string[]) => ran(join(checkout, 'scripts/setup.mts'), ...options)

  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), 'bob-test-18240-'))
    checkout = join(folder, 'checkout')
    for (const name of ['scripts', 'docker', 'nginx', 'package.json'])
      await cp(join(projectRoot, name), join(checkout, name), { recursive: true, verbatimSymlinks: true })
    await symlink(join(projectRoot, 'node_modules'), join(folder, 'node_modules'))
    envFile = join(checkout, 'docker/.env')
    appFile = join(checkout, 'strapi/.env')
    await rm(envFile, { force: true })

    own = await freshSite(18_240, join(folder, 'site'))
    await rename(own.source, dirname(appFile))
    await writeFile(
      `${appFile}.example`,
      '# Ours.\nGREETING="bonjour à tous" # on every page\n\n# Secrets.\nADMIN_JWT_SECRET=tobemodified\nAPP_KEYS=\n',
    )
    const example = await valuesOf(exampleFile)
    const isItsOwn = ([key, value]: [string, string]) =>
      value !== example[key] && !/^(STRAPI_(SOURCE|VOLUME|DOCKERFILE)|(NODE|POSTGRES|REDIS)_IMAGE)$/.test(key)
    apart = Object.entries(await valuesOf(own.envFile)).filter(isItsOwn)
    await rm(own.envFile)
    await rmdir(join(own.folder, 'nginx/conf.d'))
  })
  beforeEach(() => {
    for (const [key, value] of apart) vi.stubEnv(key, value)
  })
  afterEach(() => vi.unstubAllEnvs())
  afterAll(async () => {
    const pid = await nginxPid(own)
    if (pid !== undefined) process.kill(pid, 'SIGTERM')
    await rm(folder, { recursive: true })
  })

  test('says with --dry-run all that it would do, and does nothing', async () => {
    const before = await everythingHere()
    const { stdout } = await setup('--dry-run')
    for (const path of [envFile, appFile]) expect(stdout).toMatch(new RegExp(`would write .*${path}`))
    for (const name of ['uploads', 'traffic', 'backups', 'postgresql'])
      expect(stdout).toContain(`would make ${join(own.folder, name)}`)
    expect(stdout).toContain(`would install ${join(own.folder, 'nginx/conf.d/127.0.0.1.conf')}`)
    expect(await everythingHere()).toEqual(before)
  })

  test('says with --check what is missing, and does nothing', async () => {
    const before = await everythingHere()
    const { code, stderr } = await setup('--check')
    expect(code).toBe(2)
    expect(stderr).toContain(`there is no ${envFile}`)
    expect(stderr).toContain('npx zx scripts/setup.mts')
    expect(await everythingHere()).toEqual(before)
  })

  test('makes a host ready in one run', async () => {
    const { stdout } = await mustSucceed(watched(setup()))
    expect(stdout).toContain('This host is ready. Next: npx zx scripts/deploy.mts')
    await noteSecrets(envFile, appFile)
    text = await readFile(envFile, 'utf8')
    appText = await readFile(appFile, 'utf8')
  })

  test('writes what the example says, its comments and order, with secrets that nobody knows', async () => {
    const generated = ['POSTGRES_PASSWORD', 'REDIS_PASSWORD', 'LIVEKIT_API_SECRET']
    const secret = new RegExp(`^(${generated.join('|')})=.*`, 'gm')
    expect(text.replaceAll(secret, '$1=')).toBe(await readFile(exampleFile, 'utf8'))
    const [values, application] = [parse(text), parse(appText)]
    const made = [...generated.map((key) => values[key]), ...appSecrets.map((key) => application[key])]
    for (const one of made) expect(one).toMatch(/^[\w,-]{43,}$/)
    expect(new Set(made).size).toBe(made.length)
    expect(application.APP_KEYS?.split(',')).toHaveLength(4)
  })

  test("keeps what the application's own example says", () => {
    expect(appText).toContain('# Ours.\nGREETING="bonjour à tous" # on every page\n\n# Secrets.\n')
    expect(parse(appText).GREETING).toBe('bonjour à tous')
  })

  test('writes what must be equal equally, for its owner alone', async () => {
    const values = parse(text)
    expect(parse(appText)).toMatchObject({
      DATABASE_CLIENT: 'postgres',
      DATABASE_HOST: 'postgresql',
      DATABASE_PORT: '5432',
      DATABASE_NAME: values.POSTGRES_DB,
      DATABASE_USERNAME: values.POSTGRES_USER,
      DATABASE_PASSWORD: values.POSTGRES_PASSWORD,
      REDIS_HOST: 'redis',
      REDIS_PORT: '6379',
      REDIS_PASSWORD: values.REDIS_PASSWORD,
    })
    expect([await modeOf(envFile), await modeOf(appFile)]).toEqual(['600 0', '600 0'])
  })

  test('makes the folders with the owners that their users need', async () => {
    const folders = ['uploads', 'traffic', 'backups', 'backups/.incoming', 'postgresql']
    const modes = await Promise.all(folders.map((name) => modeOf(join(own.folder, name))))
    expect(modes).toEqual(['755 1000', '755 0', '711 0', '700 0', '700 0'])
  })

  test('installs an nginx configuration that is live', async () => {
    const { nginx } = await loadSite(envFile)
    expect((await getUrl(`http://${nginx.control}/upstream`)).body).toBe('master\n')
    const config = JSON.parse((await getUrl(`http://${nginx.control}/config`)).body)
    expect(config).toMatchObject({ uploads: join(own.folder, 'uploads'), site: '127.0.0.1' })
  })

  test('does not change one byte in a second run', async () => {
    const before = await everythingHere()
    const { stdout } = await mustSucceed(setup())
    expect(stdout).toContain(`${envFile} is complete`)
    expect(await everythingHere()).toEqual(before)
  })

  test('says with --check that all is well, and does nothing', async () => {
    const before = await everythingHere()
    const { stdout } = await mustSucceed(setup('--check'))
    expect(stdout).toContain('This host is ready.')
    expect(await everythingHere()).toEqual(before)
  })

  test('adds a setting that is new in the example in its place, with its comment', async () => {
    const example = join(checkout, 'docker/.env.example')
    const [before, added] = [await readFile(example, 'utf8'), '# Said once.\nNEW_SETTING=12\n']
    await writeFile(example, before.replace(/^# Releases that went well/m, `${added}$&`))
    onTestFinished(() => writeFile(example, before))
    await mustSucceed(setup())
    expect(await readFile(envFile, 'utf8')).toBe(text.replace(/^# Releases that went well/m, `${added}$&`))
  })

  test('keeps every value that is there, however it is written', async () => {
    const mine = text
      .replace(/^POSTGRES_PASSWORD=.*/m, "POSTGRES_PASSWORD='my own $ecret, with #'   # since 2019")
      .replace(/^KEEP_RELEASES=.*/m, 'export KEEP_RELEASES = 7')
      .replace(/^# --- nginx.*/m, '# My own words.\nMINE=1\n\n$&')
    const theirs = appText.replace(/^DATABASE_PASSWORD=.*/m, "DATABASE_PASSWORD='my own $ecret, with #'")
    await writeFile(envFile, mine)
    await writeFile(appFile, theirs)
    await mustSucceed(setup())
    await noteSecrets(envFile, appFile)
    expect(await readFile(envFile, 'utf8')).toBe(mine)
    expect(await readFile(appFile, 'utf8')).toBe(theirs)
  })

  test('takes a password that the application has already', async () => {
    await writeFile(envFile, setValues(text, { POSTGRES_PASSWORD: '' }))
    await writeFile(appFile, setValues(appText, { DATABASE_PASSWORD: 'of-the-application-alone' }))
    await mustSucceed(setup())
    await noteSecrets(envFile, appFile)
    expect((await valuesOf(envFile)).POSTGRES_PASSWORD).toBe('of-the-application-alone')
  })

  test.each([
    ['an absolute path', (path: string) => path],
    ['a path relative to docker/', (path: string) => relative(join(checkout, 'docker'), path)],
  ])('makes up no password for a database that is there (%s)', async (_, written) => {
    const data = join(own.folder, 'postgresql')
    await writeFile(join(data, 'PG_VERSION'), '16\n')
    vi.stubEnv('POSTGRES_VOLUME', undefined)
    await writeFile(envFile, setValues(text, { POSTGRES_PASSWORD: '', POSTGRES_VOLUME: written(data) }))
    await rm(appFile, { force: true })
    const { code, stdout, stderr } = await setup()
    expect((await valuesOf(envFile)).POSTGRES_PASSWORD).toBe('')
    expect(code).toBe(2)
    expect(stdout).toContain('holds a database: put its password into POSTGRES_PASSWORD')
    expect(stderr).toContain('POSTGRES_PASSWORD is empty')
  })
})

describe('setup and nginx', () => {
  let own: OwnSite
  let site: Site
  let installed: string
  const broken = () => join(dirname(site.nginx.confFile), 'other.conf')

  beforeAll(async () => {
    own = await freshSite(18_246)
    await mustSucceed(script('setup', own.envFile))
    await noteSecrets(own.envFile, appEnv(own))
    site = await loadSite(own.envFile)
    installed = await readFile(site.nginx.confFile, 'utf8')
  })
  afterEach(async () => {
    await rm(broken(), { force: true })
    await edit(own.envFile, { UPLOADS_VOLUME: site.folders.uploads })
    await mustSucceed(script('setup', own.envFile, '--replace-nginx'))
  })
  afterAll(() => removeOwnSite(own))

  const controlConfig = async () => (await getUrl(`http://${site.nginx.control}/config`)).body

  test('puts the old file back, byte for byte, when nginx refuses, and says why', async () => {
    const running = await controlConfig()
    await writeFile(broken(), 'server { nonsense on; }\n')
    await mkdir(join(own.folder, 'moved'))
    await edit(own.envFile, { UPLOADS_VOLUME: join(own.folder, 'moved') })
    const { code, stderr } = await script('setup', own.envFile)
    expect(code).toBe(2)
    expect(stderr).toContain('nginx refuses the configuration; the old one is back in place')
    expect(stderr).toContain('unknown directive "nonsense"')
    expect(await readFile(site.nginx.confFile, 'utf8')).toBe(installed)
    expect(await controlConfig()).toBe(running)
    expect(running).toContain(site.folders.uploads)
  })

  test('leaves no file where there was none, when nginx refuses', async () => {
    await writeFile(broken(), 'server { nonsense on; }\n')
    await rm(site.nginx.confFile)
    await rm(`${site.nginx.confFile}.previous`, { force: true })
    const { code, stderr } = await script('setup', own.envFile, '--replace-nginx')
    expect(code).toBe(2)
    expect(stderr).toContain('unknown directive "nonsense"')
    expect(await readdir(dirname(site.nginx.confFile))).toEqual(['other.conf'])
  })

  test('takes a changed setting over', async () => {
    const moved = join(own.folder, 'other-uploads')
    await mkdir(moved)
    await chown(moved, 1000, 1000)
    await edit(own.envFile, { UPLOADS_VOLUME: moved })
    await mustSucceed(script('setup', own.envFile))
    expect(await controlConfig()).toContain(`"uploads":"${moved}"`)
  })

  test('puts the file of an earlier SERVER_NAME aside, and back when nginx refuses the new one', async () => {
    const other = join(dirname(site.nginx.confFile), 'other.example.conf')
    await rm(`${site.nginx.confFile}.previous`, { force: true })
    await edit(own.envFile, { SERVER_NAME: 'other.example' })
    await writeFile(broken(), 'server { nonsense on; }\n')
    expect((await script('setup', own.envFile)).stderr).toContain('unknown directive "nonsense"')
    expect((await readdir(dirname(other))).toSorted()).toEqual([basename(site.nginx.confFile), 'other.conf'])

    await rm(broken())
    const { stdout } = await mustSucceed(script('setup', own.envFile))
    expect(stdout).toContain(`it is kept as ${site.nginx.confFile}.previous`)
    expect(await controlConfig()).toContain('"site":"other.example"')
    expect((await readdir(dirname(other))).toSorted()).toEqual([
      `${basename(site.nginx.confFile)}.previous`,
      'other.example.conf',
    ])
    await edit(own.envFile, { SERVER_NAME: site.nginx.serverName })
    await mustSucceed(script('setup', own.envFile))
    await rm(`${other}.previous`)
  })

  describe('a file that was edited by hand', () => {
    const edited = () => `${installed}# edited by hand\n`
    beforeEach(() => writeFile(site.nginx.confFile, edited()))

    test('is kept, and named', async () => {
      const { stdout } = await mustSucceed(script('setup', own.envFile))
      expect(stdout).toContain(`${site.nginx.confFile} differs from the shipped configuration`)
      expect(stdout).toContain('--replace-nginx')
      expect(await readFile(site.nginx.confFile, 'utf8')).toBe(edited())
    })

    test('is kept also when nginx has to be started', async () => {
      const pid = await nginxPid(own)
      expect(pid).toBeGreaterThan(0)
      process.kill(pid ?? 0, 'SIGTERM')
      await vi.waitFor(async () => expect(await nginxPid(own)).toBeUndefined(), 10_000)
      await mustSucceed(script('setup', own.envFile))
      expect(await differences(site)).toEqual([])
      expect(await readFile(site.nginx.confFile, 'utf8')).toBe(edited())
    })

    test('is replaced with --replace-nginx, and kept as .previous', async () => {
      await mustSucceed(script('setup', own.envFile, '--replace-nginx'))
      expect(await readFile(site.nginx.confFile, 'utf8')).toBe(await render(site))
      expect(await readFile(`${site.nginx.confFile}.previous`, 'utf8')).toBe(edited())
      expect(await differences(site)).toEqual([])
    })
  })
})

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

describe('secrets', () => {
  const showsSecret = (line: string) => [...secrets].some((secret) => line.includes(secret))

  test('were shown by no script, whatever happened', () => {
    for (const part of ['POSTGRES_PASSWORD', '"exitCode":0', '"exitCode":1', 'not ready'])
      expect(said.join('')).toContain(part)
    expect(secrets.size).toBeGreaterThan(20)
    expect(said.flatMap((text) => text.split('\n')).filter(showsSecret)).toEqual([])
  })

  test('were in no command line', () => {
    for (const part of ['setup.mts', 'build strapi-master', 'up --detach', 'nginx -c'])
      expect([...seen].join('\n')).toContain(part)
    expect([...seen].filter(showsSecret)).toEqual([])
  })
})
