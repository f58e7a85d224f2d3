/** What backup and restore cost, each beside the plain command that does the same, on data that this makes. */
import { randomBytes } from 'node:crypto'
import { existsSync } from 'node:fs'
import { mkdir, readFile, rm, writeFile } from 'node:fs/promises'
import { spawn } from 'node:child_process'
import { loadavg, tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import { baseImages } from '../example/images.mts'
import { startLoad } from '../example/load.mts'
import { removeOwnSite, writeOwnSite, type OwnSite } from '../example/site.mts'
import { run } from '../scripts/lib/command.mts'
import { query } from '../scripts/lib/compose.mts'
import { healthyPostgresql } from '../scripts/lib/data/backup.mts'
import { listSets, setFolder } from '../scripts/lib/data/sets.mts'
import { archiveUploads } from '../scripts/lib/data/uploads.mts'
import * as report from '../scripts/lib/report.mts'
import { say, step } from '../scripts/lib/report.mts'
import { loadSite, projectRoot, type Site } from '../scripts/lib/settings.mts'

const usage = `
Measures backup and restore of the example site on this machine, beside tar, pg_dump and pg_restore: about fifteen minutes.

  npm run bench:data   ports 18160 to 18164 must be free; needs 8 GB; removes all that it made

  --reads N   what visitors ask the database in a second during restore and undo (default 200), one question each; with more
              than Strapi can answer beside a restore, the gap that is measured is that of a queue`

const rounds = 4
const files = { count: 12_000, bytes: 1_000_000_000 / 12_000 }
const databaseBytes = 500_000_000
const hour = { timeoutMs: 3_600_000 }

await report.main(async () => {
  const { values: options } = parseArgs({
    args: report.scriptArguments(),
    options: { reads: { type: 'string', default: '200' }, help: { type: 'boolean', short: 'h' } },
  })
  if (options.help) return say(usage.trim())
  const reads = Number(options.reads)
  const own = await newSite()
  try {
    await step('1/6', 'Deploy the example, make uploads and rows', async () => {
      await script(own, 'setup')
      await script(own, 'deploy')
    })
    const site = await loadSite(own.envFile)
    const container = (await healthyPostgresql(site)) ?? ''
    await makeRows(site, container)
    await makeFiles(site, 0, files.count, files.bytes)
    // Each figure as soon as there is one: the next step may fail on a machine that is too slow for it.
    await step('2/6', `Archive the uploads, ${rounds} rounds`, async () =>
      say(describeArchives(await measureArchives(site))),
    )
    await step('3/6', `Dump the database, ${rounds} rounds`, async () =>
      say(describeDumps(await measureDumps(own, site, container))),
    )
    await step('4/6', `Restore the database, ${rounds} rounds`, async () =>
      say(describeRestores(await measureRestores(own, site, container))),
    )
    await step('5/6', 'Watch the memory', async () => say(describeMemory(await measureMemory(own, site))))
    await step('6/6', `Restore and undo under ${reads} reads a second, ${rounds} rounds`, async () =>
      say(describeGaps(await measureGaps(own, reads))),
    )
    say(`medians of ${rounds}, load of this machine at the end ${loadavg()[0]?.toFixed(1)}`)
  } finally {
    await removeOwnSite(own)
  }
})

async function newSite(): Promise<OwnSite> {
  const folder = join(tmpdir(), 'bob-bench-data')
  const application = join(projectRoot, 'example/strapi')
  const { settings } = await baseImages()
  const place = { folder, project: 'bob-bench-data', port: 18_160, application, settings }
  // What a killed run left behind.
  if (existsSync(folder)) await removeOwnSite(await writeOwnSite(place))
  return await writeOwnSite(place)
}

/** Rows that do not compress: a fifth in an indexed column of their own. */
async function makeRows(site: Site, container: string): Promise<void> {
  const bytes = 1000
  const noise = `(SELECT string_agg(encode(sha512((n::text || ':' || k || random())::bytea), 'base64'), '') FROM generate_series(1, 11) AS k)`
  const sql = `CREATE TABLE ballast AS SELECT n AS id, md5(random()::text) AS token, ${noise} AS body
    FROM generate_series(1, ${Math.round(databaseBytes / (1.15 * bytes))}) AS n;
    ALTER TABLE ballast ADD PRIMARY KEY (id); CREATE INDEX ON ballast (token); ALTER TABLE ballast OWNER TO "${site.database.user}"`
  await run(query(container, site.database.name, sql), hour)
}

async function makeFiles(site: Site, from: number, to: number, bytes: number): Promise<void> {
  await mkdir(site.folders.uploads, { recursive: true })
  for (let number = from; number < to; number += 1)
    await writeFile(join(site.folders.uploads, `picture_${number}.jpg`), randomBytes(Math.round(bytes)))
}

interface Times {
  ours: number[]
  plain: number[]
  other?: number[]
  /** Of ours, what the plain command does. */
  same?: number[]
}

/** With nothing left to write of what was measured before. */
async function timed(action: () => Promise<unknown>): Promise<number> {
  await run(['sync'], hour)
  const startedAt = performance.now()
  await action()
  return performance.now() - startedAt
}

/** Now this one first, now the other: the second finds another cache, another checkpoint. */
async function inTurn(round: number, one: () => Promise<void>, other: () => Promise<void>): Promise<void> {
  for (const action of round % 2 === 0 ? [one, other] : [other, one]) await action()
}

async function measureArchives(site: Site): Promise<Times> {
  const folder = join(site.folders.backups, 'bench')
  const times = { ours: [] as number[], plain: [] as number[], other: [] as number[] }
  for (let round = 0; round < rounds; round += 1) {
    await mkdir(folder)
    const tar = (options: string, name: string) => () =>
      run(['tar', options, join(folder, name), '-C', site.folders.uploads, '.'], hour)
    const ours = async () => {
      await using archive = archiveUploads(
        site.folders.uploads,
        join(folder, 'uploads.tar'),
        join(folder, 'uploads.jsonl'),
      )
      await archive.pass()
      await archive.pass()
      await archive.settle()
      await archive.close([])
    }
    await inTurn(
      round,
      async () => void times.plain.push(await timed(tar('-cf', 'plain.tar'))),
      async () => void times.ours.push(await timed(ours)),
    )
    times.other.push(await timed(tar('-czf', 'plain.tar.gz')))
    await rm(folder, { recursive: true })
  }
  return times
}

/** Ours: the dump alone, as the events tell; other: the whole command, which reads everything back. */
async function measureDumps(own: OwnSite, site: Site, container: string): Promise<Times> {
  const times = { ours: [] as number[], plain: [] as number[], other: [] as number[] }
  const dump = [
    'docker',
    'exec',
    '--user=postgres',
    container,
    'pg_dump',
    '--format=custom',
    '--compress=zstd',
  ]
  for (let round = 0; round < rounds; round += 1) {
    const plain = () => run([...dump, '--file=/backup/bench.dump', '--dbname', site.database.name], hour)
    const whole = async () => {
      const events = await script(own, 'data', 'backup', '--only', 'database', '--json')
      const at = (message: string) => Date.parse(events.find((event) => event.message === message)?.at ?? '')
      times.ours.push(at('dumping roles.sql') - at('dumping database.dump'))
    }
    await inTurn(
      round,
      async () => void times.plain.push(await timed(plain)),
      async () => void times.other.push(await timed(whole)),
    )
    await run(['docker', 'exec', container, 'rm', '/backup/bench.dump'])
  }
  return times
}

/** Ours: from the empty database to counted rows, the server's statistics included; other: the whole command. */
async function measureRestores(own: OwnSite, site: Site, container: string): Promise<Times> {
  const times = {
    ours: [] as number[],
    plain: [] as number[],
    other: [] as number[],
    same: [] as number[],
  }
  const set = (await listSets(site)).at(-1) ?? ''
  await run(['docker', 'cp', join(setFolder(site, set), 'database.dump'), `${container}:/tmp/bench.dump`])
  await run(['docker', 'exec', container, 'chmod', '644', '/tmp/bench.dump'])
  const sql = (text: string) => run(query(container, 'postgres', text), hour)
  for (let round = 0; round < rounds; round += 1) {
    const plain = async () => {
      await sql(`CREATE DATABASE bench OWNER "${site.database.user}" TEMPLATE template0`)
      const restore = ['pg_restore', '-j2', '--dbname=bench', '/tmp/bench.dump']
      await run(['docker', 'exec', '--user=postgres', container, ...restore], hour)
    }
    const whole = async () => {
      const events = await script(own, 'data', 'restore', set, '--only', 'database', '--yes', '--json')
      const done = events.find(({ event, step: at }) => event === 'step-done' && at === '2/6')
      times.ours.push(1000 * Number(done?.seconds))
      const at = (one: Event | undefined) => Date.parse(String(one?.at))
      const began = events.find(({ event, step: number }) => event === 'step' && number === '2/6')
      const counting = events.find(({ message }) => message === 'counting its rows, making statistics')
      times.same.push(at(counting) - at(began))
    }
    await inTurn(
      round,
      async () => {
        times.plain.push(await timed(plain))
        await sql('DROP DATABASE bench')
      },
      async () => {
        times.other.push(await timed(whole))
        await script(own, 'data', 'undo', '--yes')
        await dropKept(container)
      },
    )
  }
  return times
}

async function dropKept(container: string): Promise<void> {
  const names = await run(
    query(container, 'postgres', "SELECT datname FROM pg_database WHERE datname LIKE '%_undone_%'"),
  )
  for (const name of names.trim().split('\n'))
    await run(query(container, 'postgres', `DROP DATABASE "${name}"`))
}

interface Gaps {
  /** A second. */
  reads: number
  /** The same visitors, nothing else going on. */
  aloneMs: number[]
  restoreMs: number[]
  undoMs: number[]
  failed: number
  sent: number
}

async function measureGaps(own: OwnSite, reads: number): Promise<Gaps> {
  const gaps: Gaps = { reads, aloneMs: [], restoreMs: [], undoMs: [], failed: 0, sent: 0 }
  await script(own, 'data', 'backup', '--only', 'database')
  for (let round = 0; round < rounds; round += 1) {
    for (const [action, into] of [
      [() => sleep(5000), gaps.aloneMs],
      [() => script(own, 'data', 'restore', '--only', 'database', '--yes'), gaps.restoreMs],
      [() => script(own, 'data', 'undo', '--yes'), gaps.undoMs],
    ] as const) {
      const load = startLoad({
        url: own.url,
        getsPerSecond: reads,
        postsPerSecond: 0,
        getPath: '/api/pings/newest',
      })
      try {
        await sleep(1000)
        await action()
        await sleep(1000)
      } finally {
        const { longestGapMs, sent, lost } = await load.stop()
        into.push(longestGapMs)
        if (into !== gaps.aloneMs) gaps.sent += sent
        if (into !== gaps.aloneMs) gaps.failed += lost.length
      }
    }
  }
  return gaps
}

interface Memory {
  few: number[]
  many: number[]
}

async function measureMemory(own: OwnSite, site: Site): Promise<Memory> {
  const few: number[] = []
  const many: number[] = []
  for (let round = 0; round < rounds; round += 1) few.push(await peakMemory(own))
  await makeFiles(site, files.count, 10 * files.count, 1000)
  for (let round = 0; round < rounds; round += 1) many.push(await peakMemory(own))
  return { few, many }
}

/** @returns peak of the resident memory of a backup of everything, in bytes */
async function peakMemory(own: OwnSite): Promise<number> {
  const argv = [join(projectRoot, 'scripts/data.mts'), '--env-file', own.envFile]
  const child = spawn(process.execPath, argv, { stdio: 'ignore' })
  const ended = new Promise<number | null>((resolve) => child.on('close', resolve))
  let peak = 0
  const timer = setInterval(() => {
    void readFile(`/proc/${child.pid}/status`, 'utf8').then(
      (text) => (peak = Math.max(peak, 1024 * Number(/VmHWM:\s*(\d+)/.exec(text)?.[1] ?? 0))),
      () => undefined,
    )
  }, 20)
  const code = await ended
  clearInterval(timer)
  if (code !== 0) throw new Error(`the backup ended with exit code ${code}`)
  return peak
}

interface Event {
  event: string
  at: string
  message: string
  step?: string
  seconds?: number
}

/** @returns the events, with --json */
async function script(own: OwnSite, name: string, ...options: string[]): Promise<Event[]> {
  const argv = [
    process.execPath,
    join(projectRoot, `scripts/${name}.mts`),
    ...options,
    '--env-file',
    own.envFile,
  ]
  const lines = (await run(argv, hour)).split('\n').filter((line) => line.startsWith('{'))
  return lines.map((line) => JSON.parse(line) as Event)
}

function seconds(times: number[]): string {
  return `${(median(times) / 1000).toFixed(1)} s`
}

function ratio(one: number[], other: number[]): string {
  return (median(one) / median(other)).toFixed(2)
}

function describeArchives({ ours, plain, other = [] }: Times): string {
  return `uploads archive with all sums   ${seconds(ours)}   ${ratio(ours, plain)} x tar -cf (${seconds(plain)})   tar -czf takes ${ratio(other, ours)} x (${seconds(other)})`
}

function describeDumps({ ours, plain, other = [] }: Times): string {
  return `dump of the database            ${seconds(ours)}   ${ratio(ours, plain)} x pg_dump (${seconds(plain)})   the whole command, read back, ${seconds(other)}`
}

function describeRestores({ ours, plain, other = [], same = [] }: Times): string {
  return `restore of the database         ${seconds(same)}   ${ratio(same, plain)} x pg_restore -j2 (${seconds(plain)})   with rows counted and statistics ${seconds(ours)} (${ratio(ours, plain)})   the whole command ${seconds(other)}`
}

function describeMemory({ few, many }: Memory): string {
  const mega = (bytes: number[]) => `${(median(bytes) / 1e6).toFixed(0)} MB`
  return `peak memory                     ${mega(few)}, with ten times as many files ${mega(many)} (${ratio(many, few)})`
}

function describeGaps({ reads, aloneMs, restoreMs, undoMs, failed, sent }: Gaps): string {
  const ms = (times: number[]) => `${Math.round(median(times))} ms`
  return `longest gap at ${reads} reads/s, restore ${ms(restoreMs)}, undo ${ms(undoMs)}, neither ${ms(aloneMs)}; ${failed} of ${sent} requests failed in ${2 * rounds} swaps`
}

function median(values: number[]): number {
  return values.toSorted((one, other) => one - other)[Math.floor(values.length / 2)] ?? Number.NaN
}
