/** What a deploy costs: by our procedure and by the seed's, on one site, under one load. Also: --status and pictures. */
import { randomBytes } from 'node:crypto'
import { existsSync } from 'node:fs'
import { writeFile } from 'node:fs/promises'
import { loadavg, tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import { baseImages } from '../example/images.mts'
import { startLoad, type LoadOptions, type LoadReport } from '../example/load.mts'
import { removeOwnSite, writeOwnSite, type OwnSite } from '../example/site.mts'
import { run } from '../scripts/lib/command.mts'
import * as engine from '../scripts/lib/engine.mts'
import { getUrl } from '../scripts/lib/http.mts'
import * as report from '../scripts/lib/report.mts'
import { say, step } from '../scripts/lib/report.mts'
import { loadSite, projectRoot, type Site, type Slot } from '../scripts/lib/settings.mts'
import { seedProcedure } from './seed.mts'

const usage = `
Measures a deploy of the example site on this machine, by this project's procedure and by the seed's: about ten minutes.

  npm run bench:deploy   ports 18120 to 18124 must be free; removes all that it made`

const rounds = 3
const pictureBytes = 100_000
const visitors = { getsPerSecond: 50, postsPerSecond: 20 }
const slowBodies = { slowBodiesPerSecond: 1, slowBodyMs: 6000 }

await report.main(async () => {
  const { values: options } = parseArgs({
    args: report.scriptArguments(),
    options: { help: { type: 'boolean', short: 'h' } },
  })
  if (options.help) return say(usage.trim())
  const own = await newSite()
  try {
    await step('1/4', 'Deploy for the first time', async () => {
      await script(own, 'setup')
      await script(own, 'deploy')
    })
    const deploys = await step('2/4', `Deploy under load, ${rounds} rounds`, () => measureDeploys(own))
    const statusMs = await step('3/4', 'Ask for the status', () => measureStatus(own))
    const pictures = await step('4/4', 'Read pictures', () => measurePictures(own))
    print(deploys, statusMs, pictures)
  } finally {
    await removeOwnSite(own)
  }
})

async function newSite(): Promise<OwnSite> {
  const folder = join(tmpdir(), 'bob-bench')
  const application = join(projectRoot, 'example/strapi')
  const { settings } = await baseImages()
  // The seed's procedure makes none.
  const own = { ...settings, BACKUP_BEFORE_DEPLOY: 'off' }
  const place = { folder, project: 'bob-bench', port: 18_120, application, settings: own }
  // What a killed run left behind.
  if (existsSync(folder)) await removeOwnSite(await writeOwnSite(place))
  return await writeOwnSite(place)
}

interface Deploy {
  load: LoadReport
  /** Without its build and the two starts of the application. */
  beyondMs: number
  startsMs: number[]
}

interface Deploys {
  ours: Deploy[]
  /** Ours with no slow request open: there is nothing to wait for. */
  oursQuick: Deploy[]
  seed: Deploy[]
}

/** In turns, so that a busy minute of this machine does not fall on one of them alone. */
async function measureDeploys(own: OwnSite): Promise<Deploys> {
  const site = await loadSite(own.envFile)
  const seed = await seedProcedure(own)
  const deploys: Deploys = { ours: [], oursQuick: [], seed: [] }
  const ours = async () => stepSeconds(await script(own, 'deploy'), '1/7') * 1000
  for (let round = 1; round <= rounds; round += 1) {
    report.detail(`round ${round}`)
    deploys.ours.push(await measureDeploy(site, { url: own.url, ...visitors, ...slowBodies }, ours))
    deploys.oursQuick.push(await measureDeploy(site, { url: own.url, ...visitors }, ours))
    const release = String((await script(own, 'deploy', '--build-only')).at(-1)?.release)
    deploys.seed.push(
      await measureDeploy(site, { url: seed.url, ...visitors, ...slowBodies }, async () => {
        await seed.deploy(release)
        return 0
      }),
    )
  }
  return deploys
}

/** @param deploy answers how many milliseconds of it the build took */
async function measureDeploy(
  site: Site,
  options: LoadOptions,
  deploy: () => Promise<number>,
): Promise<Deploy> {
  const load = startLoad(options)
  const starts = watchStarts(site)
  try {
    await sleep(1000)
    const startedAt = performance.now()
    const buildMs = await deploy()
    const tookMs = performance.now() - startedAt
    await sleep(1000)
    const startsMs = await starts.stop()
    if (startsMs.length !== 2)
      throw new Error(`${startsMs.length} starts of the application were seen, not 2`)
    return { load: await load.stop(), beyondMs: tookMs - buildMs - sum(startsMs), startsMs }
  } finally {
    await Promise.allSettled([starts.stop(), load.stop()])
  }
}

/** How long the application takes from the start of a new container until /_health answers on the slot's port. */
function watchStarts(site: Site) {
  const stopping = new AbortController()
  const watch = async (slot: Slot): Promise<number[]> => {
    const old = (await engine.container(slot.container))?.State.StartedAt
    while (!stopping.signal.aborted) {
      await sleep(25)
      const state = (await engine.container(slot.container))?.State
      // The old container is not asked: a connection to it looks like a visitor's, and a deploy waits for those.
      if (state?.Status !== 'running' || state.StartedAt === old) continue
      const answer = await getUrl(`http://${slot.address}/_health`).catch((error: Error) => error)
      const answeredAt = Date.now()
      if (!(answer instanceof Error) && answer.status < 300) return [answeredAt - Date.parse(state.StartedAt)]
    }
    return []
  }
  const watching = Promise.all(Object.values(site.slots).map(watch))
  watching.catch(() => undefined) // `stop` throws it; until then nobody waits for it
  return {
    stop: async () => {
      stopping.abort()
      return (await watching).flat()
    },
  }
}

async function measureStatus(own: OwnSite): Promise<number[]> {
  const times: number[] = []
  for (let turn = 0; turn < 5; turn += 1) {
    const startedAt = performance.now()
    await script(own, 'deploy', '--status')
    times.push(performance.now() - startedAt)
  }
  return times
}

interface Pictures {
  nginx: number
  strapi: number
}

async function measurePictures(own: OwnSite): Promise<Pictures> {
  const { folders, slots } = await loadSite(own.envFile)
  await writeFile(join(folders.uploads, 'picture.jpg'), randomBytes(pictureBytes))
  return {
    nginx: await picturesPerSecond(own.url),
    strapi: await picturesPerSecond(`http://${slots['strapi-master'].address}`),
  }
}

/** For five seconds, 32 at once; the client runs on the same machine and takes its share of it. */
async function picturesPerSecond(origin: string): Promise<number> {
  const until = performance.now() + 5000
  let pictures = 0
  const read = async () => {
    while (performance.now() < until) {
      const response = await fetch(`${origin}/uploads/picture.jpg`)
      const { byteLength } = await response.arrayBuffer()
      if (!response.ok || byteLength !== pictureBytes)
        throw new Error(`${origin} answered ${response.status} with ${byteLength} bytes`)
      pictures += 1
    }
  }
  await Promise.all(Array.from({ length: 32 }, read))
  return pictures / 5
}

function print({ ours, oursQuick, seed }: Deploys, statusMs: number[], pictures: Pictures): void {
  const figure = (deploys: Deploy[], of: (deploy: Deploy) => number) => median(deploys.map(of))
  const slowest = ({ load }: Deploy) =>
    Math.max(...Object.entries(load.kinds).map(([name, kind]) => (name === 'slow body' ? 0 : kind.slowestMs)))
  const row = (title: string, of: (deploy: Deploy) => number, digits = 0) => [
    title,
    ...[ours, oursQuick, seed].map((deploys) => number(figure(deploys, of), digits)),
  ]
  const load = loadavg()
    .map((average) => average.toFixed(1))
    .join(' ')
  const lines = [
    ['', 'this', 'no slow request', 'the seed'],
    row('requests sent', (deploy) => deploy.load.sent),
    row('requests lost', (deploy) => deploy.load.lost.length),
    row('POSTs executed twice', (deploy) => deploy.load.storedTwice.length),
    row('slowest quick request, ms', slowest),
    row('longest gap, ms', (deploy) => deploy.load.longestGapMs),
    row('start of the application, s', (deploy) => sum(deploy.startsMs) / 2000, 1),
    row('beyond the build and two starts, s', (deploy) => deploy.beyondMs / 1000, 1),
  ]
  say(
    `\nMedians of ${rounds} deploys, ${visitors.getsPerSecond} GET/s and ${visitors.postsPerSecond} POST/s; load average ${load}`,
  )
  for (const [title = '', ...cells] of lines) {
    say(title.padEnd(36) + cells.map((cell) => cell.padStart(17)).join(''))
  }
  say(`\n--status: ${number(median(statusMs))} ms`)
  say(
    `pictures of 100 kB per second: ${number(pictures.nginx)} through nginx, ${number(pictures.strapi)} through Strapi`,
  )
}

/** Runs one of the project's scripts as an operator would, and returns its events. */
async function script(own: OwnSite, name: 'setup' | 'deploy', ...options: string[]): Promise<Event[]> {
  const path = join(projectRoot, `scripts/${name}.mts`)
  const argv = [process.execPath, path, '--env-file', own.envFile, '--json', ...options]
  const output = await run(argv, { timeoutMs: 3_600_000 })
  return output
    .split('\n')
    .filter((line) => line.startsWith('{'))
    .map((line) => JSON.parse(line) as Event)
}

interface Event {
  event: string
  step?: string
  seconds?: number
  release?: string
}

function stepSeconds(events: Event[], wanted: string): number {
  const seconds = events.find((one) => one.event === 'step-done' && one.step === wanted)?.seconds
  if (seconds === undefined) throw new Error(`the deploy had no step ${wanted}`)
  return seconds
}

function median(numbers: number[]): number {
  return numbers.toSorted((one, other) => one - other)[Math.floor(numbers.length / 2)] ?? Number.NaN
}

function sum(numbers: number[]): number {
  return numbers.reduce((total, one) => total + one, 0)
}

function number(value: number, digits = 0): string {
  return value.toLocaleString('en', { minimumFractionDigits: digits, maximumFractionDigits: digits })
}
