/** Sites of their own for the tests, the scripts run as an operator runs them, and ways to end them badly. */
import { spawn, type ChildProcess } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { statSync } from 'node:fs'
import {
  appendFile,
  mkdtemp,
  readdir,
  readFile,
  rename,
  stat,
  truncate,
  unlink,
  writeFile,
} from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { setTimeout as sleep } from 'node:timers/promises'
import { beforeEach, expect, inject } from 'vitest'
import { orphans, run } from '../scripts/lib/command.mts'
import { compose } from '../scripts/lib/compose.mts'
import * as engine from '../scripts/lib/engine.mts'
import { readEnv, readText, setValues, writeEnv } from '../scripts/lib/envfile.mts'
import { appSecrets } from '../scripts/lib/secrets.mts'
import { loadSite, projectRoot, type SlotName } from '../scripts/lib/settings.mts'
import { observe, type Observed } from '../scripts/lib/slots.mts'
import { removeOwnSite, writeOwnSite, type OwnSite } from '../example/site.mts'

// The tests of a file share a site: what fails after the first one fails because of it, and would bury it.
let hasFailed = false
beforeEach(({ skip, onTestFailed }) => {
  skip(hasFailed, 'a test before it has failed')
  onTestFailed(() => {
    hasFailed = true
  })
})

export interface Outcome {
  code: number | null
  stdout: string
  stderr: string
  /** With --json: all events. */
  events: Event[]
}

export interface Event {
  event: string
  message: string
  step?: string
  [key: string]: unknown
}

export interface Running {
  child: ChildProcess
  outcome: Promise<Outcome>
}

export type Script = 'deploy' | 'setup' | 'data' | 'migrate'

export interface TestSite extends OwnSite {
  /** Runs a script to its end. */
  run(script: Script, ...options: string[]): Promise<Outcome>
  /** Starts a script with --json; `onEvent` sees each event as it comes. */
  begin(script: Script, options: string[], onEvent?: (event: Event, child: ChildProcess) => void): Running
  observe(): Promise<Observed>
  set(values: Record<string, string>): Promise<void>
  /** What the tiny app of the next build does; {} is well-behaved. */
  behave(behaviour: Record<string, unknown>): Promise<void>
  containerId(slot: SlotName): Promise<string | undefined>
  remove(): Promise<void>
}

/** A site with the tiny app, set up, not deployed yet. Ports: `port` and the next five. */
export async function tinySite(port: number, settings: Record<string, string> = {}): Promise<TestSite> {
  const site = await newSite(port, join(projectRoot, 'test/tiny'), {
    STRAPI_DOCKERFILE: join(projectRoot, 'test/tiny/Dockerfile'),
    HEALTH_INTERVAL: '0.2',
    HEALTH_TIMEOUT: '20',
    DRAIN_TIMEOUT: '20',
    ...settings,
  })
  await writeFile(join(site.source, 'package.json'), '{ "name": "tiny" }\n')
  await writeFile(join(site.source, 'package-lock.json'), '{}\n')
  return await setUp(site)
}

/** A site with the example's real Strapi, set up, not deployed yet. */
export async function strapiSite(port: number, settings: Record<string, string> = {}): Promise<TestSite> {
  return await setUp(await newSite(port, join(projectRoot, 'example/strapi'), settings))
}

/** What cannot be set up leaves nothing behind. */
async function setUp(site: TestSite): Promise<TestSite> {
  const outcome = await site.run('setup')
  if (outcome.code === 0) return site
  await site.remove()
  throw new Error(`setup ended with exit code ${outcome.code}\n${outcome.stdout}\n${outcome.stderr}`)
}

/** Fails the test with what the script said. */
export async function mustSucceed(outcome: Promise<Outcome>): Promise<Outcome> {
  const { code, stdout, stderr, events } = await outcome
  if (code !== 0) throw new Error(`exit code ${code}\n${stdout}\n${stderr}`)
  return { code, stdout, stderr, events }
}

/** The last event of a run with --json. */
export function resultOf(outcome: Outcome): Event {
  const result = outcome.events.at(-1)
  if (result?.event !== 'result') throw new Error(`no result\n${outcome.stdout}\n${outcome.stderr}`)
  return result
}

async function newSite(
  port: number,
  application: string,
  settings: Record<string, string>,
): Promise<TestSite> {
  const project = `bob-test-${port}-${randomBytes(2).toString('hex')}`
  const folder = await mkdtemp(join(tmpdir(), `${project}-`))
  const own = await writeOwnSite({
    folder,
    project,
    port,
    application,
    settings: { ...inject('baseImages'), ...settings },
  })
  return testSite(own)
}

/** A site and what tests do to it. */
export function testSite(own: OwnSite): TestSite {
  const { project } = own
  const begin: TestSite['begin'] = (script, options, onEvent) =>
    start(own, script, ['--json', ...options], onEvent)
  return {
    ...own,
    begin,
    run: (script, ...options) => start(own, script, options).outcome,
    observe: async () => observe(await loadSite(own.envFile)),
    set: async (values) => writeEnv(own.envFile, setValues((await readText(own.envFile)) ?? '', values)),
    behave: (behaviour) => writeFile(join(own.source, 'behaviour.json'), JSON.stringify(behaviour)),
    containerId: async (slot) => (await engine.container(`${project}-${slot}`))?.Id,
    remove: () => removeOwnSite(own),
  }
}

function start(
  site: OwnSite,
  script: string,
  options: string[],
  onEvent?: (event: Event, child: ChildProcess) => void,
): Running {
  const argv = [join(projectRoot, `scripts/${script}.mts`), '--env-file', site.envFile, ...options]
  const child = spawn(process.execPath, argv, { stdio: ['ignore', 'pipe', 'pipe'], cwd: tmpdir() })
  const collected: Outcome = { code: null, stdout: '', stderr: '', events: [] }
  createInterface({ input: child.stdout }).on('line', (line) => {
    collected.stdout += `${line}\n`
    if (!options.includes('--json') || !line.startsWith('{')) return
    const event = JSON.parse(line) as Event
    collected.events.push(event)
    onEvent?.(event, child)
  })
  child.stderr.on('data', (part: Buffer) => (collected.stderr += part.toString()))
  const outcome = new Promise<Outcome>((resolve) =>
    child.on('close', (code) => resolve({ ...collected, code })),
  )
  return { child, outcome }
}

/** Names and ids of a project's containers that run: to see that something changed nothing. */
export async function containers(site: OwnSite): Promise<string[]> {
  const services = ['strapi-master', 'strapi-slave', 'postgresql', 'redis']
  const found = await Promise.all(services.map((service) => engine.serviceContainers(site.project, service)))
  return found
    .flat()
    .map((one) => `${one.Config.Labels['com.docker.compose.service']} ${one.Id} ${one.State.Status}`)
}

/** Value of a key in the site's .env. */
export async function settingOf(site: OwnSite, key: string): Promise<string | undefined> {
  return (await readEnv(site.envFile))?.[key]
}

export async function accessLog(site: OwnSite): Promise<string> {
  return await readFile(join(site.folder, 'nginx/access.log'), 'utf8')
}

/** Runs a deploy and does something to it a moment after a step has begun. */
export async function deployAnd(
  site: TestSite,
  stepNumber: string,
  delayMs: number,
  act: (pid: number) => Promise<void> | void,
): Promise<Outcome> {
  const acted: Promise<void>[] = []
  const running = site.begin('deploy', [], (event, child) => {
    if (event.event !== 'step' || event.step !== stepNumber) return
    acted.push(sleep(delayMs).then(() => act(child.pid ?? 0)))
  })
  const outcome = await running.outcome
  await Promise.all(acted)
  expect(acted.length, `step ${stepNumber} was reached`).toBe(1)
  return outcome
}

export const damages = ['a bit flipped', 'cut', 'longer', 'deleted', 'swapped'] as const

/** What may happen to files of a set; each of them gets it. */
export async function damage(folder: string, names: string[], how: (typeof damages)[number]): Promise<void> {
  for (const [at, name] of names.entries()) {
    const path = join(folder, name)
    if (how === 'a bit flipped') {
      const content = await readFile(path)
      const middle = Math.floor(content.length / 2)
      content[middle] = (content[middle] ?? 0) ^ 1
      await writeFile(path, content)
    } else if (how === 'cut') await truncate(path, (await stat(path)).size - 1)
    else if (how === 'longer') await appendFile(path, '0')
    else if (how === 'deleted') await unlink(path)
    else if (at % 2 === 0) {
      const other = join(folder, names[at + 1] ?? 'RECOVERY.md')
      await rename(path, join(folder, 'aside'))
      await rename(other, path)
      await rename(join(folder, 'aside'), other)
    }
  }
}

/** Passwords of its services, keys of its application. */
export async function secretsOf(site: OwnSite): Promise<string[]> {
  const services = await readEnv(site.envFile)
  const application = await readEnv(join(site.source, '.env'))
  const passwords = ['POSTGRES_PASSWORD', 'REDIS_PASSWORD'].map((key) => services?.[key])
  return [...passwords, ...appSecrets.map((key) => application?.[key])].filter((one) => one !== undefined)
}

/** Nobody sees them: not in what a script says, not in the list of processes while it runs, not in files that others may read. */
export async function expectUnseen(
  site: OwnSite,
  secrets: string[],
  running: () => Promise<Outcome>,
): Promise<Outcome> {
  const ending = new AbortController()
  let looks = 0
  const looking = (async () => {
    for (; !ending.signal.aborted; looks += 1) {
      const processes = await run(['ps', '-eo', 'args'])
      for (const secret of secrets) expect(processes).not.toContain(secret)
    }
  })()
  const outcome = await running().finally(() => ending.abort())
  await looking
  expect(looks).toBeGreaterThan(5)
  for (const secret of secrets) expect(outcome.stdout + outcome.stderr).not.toContain(secret)
  for await (const path of readableByOthers(site.folder)) {
    const content = await readFile(path, 'latin1')
    for (const secret of secrets) expect(content.includes(secret), `${path} shows a secret`).toBe(false)
  }
  return outcome
}

async function* readableByOthers(folder: string): AsyncGenerator<string> {
  for (const entry of await readdir(folder, { withFileTypes: true })) {
    const path = join(folder, entry.name)
    const mode = statSync(path, { throwIfNoEntry: false })?.mode ?? 0
    if (entry.isDirectory() && (mode & 0o001) !== 0) yield* readableByOthers(path)
    else if (entry.isFile() && (mode & 0o004) !== 0) yield path
  }
}

/** Master serves this release alone, and nothing is left behind. */
export async function expectWhole(site: TestSite, release: unknown): Promise<void> {
  const { master, slave, flag, pinned } = await site.observe()
  expect({ master: master.status, release: master.release, flag, pinned }).toEqual({
    master: 'healthy',
    release,
    flag: 'strapi-master',
    pinned: release,
  })
  expect(['absent', 'stopped']).toContain(slave.status)
  expect(await orphans(site.project)).toEqual([])
  const before = await containers(site)
  await run(compose(await loadSite(site.envFile), 'up', '--detach'))
  expect(await containers(site)).toEqual(before)
}
