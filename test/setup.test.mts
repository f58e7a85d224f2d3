/** setup.mts as an operator uses it: in a fresh checkout, and what it does to nginx. No secret shows. */

import {
  chown,
  cp,
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  rename,
  rm,
  rmdir,
  symlink,
  writeFile,
} from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { basename, dirname, join, relative } from 'node:path'
import { parse } from 'dotenv'
import {
  afterAll,
  afterEach,
  beforeAll,
  beforeEach,
  describe,
  expect,
  onTestFinished,
  test,
  vi,
} from 'vitest'
import { nginxPid, removeOwnSite, type OwnSite } from '../example/site.mts'
import { setValues } from '../scripts/lib/envfile.mts'
import { getUrl } from '../scripts/lib/http.mts'
import { render } from '../scripts/lib/nginx.mts'
import { appSecrets } from '../scripts/lib/secrets.mts'
import { exampleFile, loadSite, projectRoot, type Site } from '../scripts/lib/settings.mts'
import { differences } from '../scripts/lib/traffic.mts'
import { mustSucceed } from './harness.mts'
import {
  appEnv,
  edit,
  everything,
  expectSecretsUnseen,
  freshSite,
  modeOf,
  noteSecrets,
  ran,
  script,
  valuesOf,
  watched,
} from './watched.mts'

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

test('secrets were shown by no run, and were in no command line', () => {
  expectSecretsUnseen(['POSTGRES_PASSWORD'], ['setup.mts', 'nginx -c'])
})
