/** Proof that a move lost nobody: what nginx's access log says visitors got, and what our own probes got meanwhile. */
import { createReadStream } from 'node:fs'
import { open, stat } from 'node:fs/promises'
import { createInterface } from 'node:readline'
import { setTimeout as sleep } from 'node:timers/promises'
import { getUrl } from './http.mts'
import type { Site } from './settings.mts'

export interface Figures {
  /** Requests of visitors that ended meanwhile; undefined when the access log could not be read. */
  requests: number | undefined
  /** Of them: answered 502, 503 or 504, or cut off when a slot was stopped. */
  failed: number
  /** Of them: other answers of 500 and above, given by the application itself. */
  applicationErrors: number
  /** WebSockets that the end of a slot ended. */
  webSocketsEnded: number
  probes: number
  probesFailed: number
  slowestProbeMs: number
  /** Why the first failed probe failed. */
  firstProbeFailure: string | undefined
}

/** One line of the access log, as far as it matters here. */
export interface LogLine {
  status: number
  /** host:port that answered; empty when nginx answered itself. */
  upstream: string
  /** Unix time in milliseconds. */
  endedAt: number
  startedAt: number
  complete: boolean
  userAgent: string
}

/** A slot that was stopped although requests were left on it. */
export interface Cut {
  address: string
  at: number
}

export interface Proof {
  /** Says that a slot is about to be stopped with requests left on it. */
  cut(address: string): void
  stop(): Promise<Figures>
}

const userAgent = 'strapi-blue-green-probe'
const probeEveryMs = 100
const tail =
  /"([^"]*)" upstream="([^"]*)" upstream_status="[^"]*" ended=([\d.]+) took=([\d.]+) complete="(OK|)"$/

/** Reads a line of the log format in nginx/*.conf, or undefined. */
export function parseLine(line: string): LogLine | undefined {
  const found = tail.exec(line)
  // The status stands behind the request, in which nginx escapes quotes.
  const status = /" (\d{3}) /.exec(line)?.[1]
  if (!found || status === undefined) return undefined
  const [, agent = '', upstream = '', ended = '', took = '', complete = ''] = found
  const endedAt = Math.round(Number(ended) * 1000)
  return {
    status: Number(status),
    upstream: upstream === '-' ? '' : (upstream.split(/,? :? ?/).at(-1) ?? ''),
    endedAt,
    startedAt: endedAt - Math.round(Number(took) * 1000),
    complete: complete === 'OK',
    userAgent: agent,
  }
}

/** What visitors got, from the lines of the log and the slots that were cut. */
export function countLines(
  lines: Iterable<LogLine>,
  cuts: Cut[],
): Pick<Figures, 'failed' | 'applicationErrors' | 'webSocketsEnded'> & { requests: number } {
  const counted = { requests: 0, failed: 0, applicationErrors: 0, webSocketsEnded: 0 }
  for (const line of lines) {
    if (line.userAgent === userAgent) continue
    counted.requests += 1
    // A slot's connections end within the time that its stop takes.
    const wasCut = cuts.some(
      (cut) =>
        line.upstream === cut.address &&
        line.startedAt <= cut.at &&
        line.endedAt >= cut.at &&
        line.endedAt < cut.at + 15_000,
    )
    if (line.status === 101) counted.webSocketsEnded += wasCut ? 1 : 0
    else if (line.status >= 502 && line.status <= 504) counted.failed += 1
    // nginx calls an answer that its upstream broke off complete; a visitor who left (499) was not cut by us.
    else if (wasCut && line.status !== 499) counted.failed += 1
    else if (line.status >= 500) counted.applicationErrors += 1
  }
  return counted
}

/** Starts counting and probing. */
export async function startProof(site: Site): Promise<Proof> {
  const readable = await isReadable(site.nginx.accessLog)
  const from = readable ? await stat(site.nginx.accessLog).catch(() => undefined) : undefined
  const cuts: Cut[] = []
  const probing = startProbing(site)
  return {
    cut: (address) => void cuts.push({ address, at: Date.now() }),
    stop: async () => {
      const probes = await probing.stop()
      // The deploy has gone well: a log that cannot be read must not turn it into a failure.
      const lines = from ? await linesSince(site.nginx.accessLog, from).catch(() => undefined) : undefined
      const counted = countLines(lines ?? [], cuts)
      return { ...counted, requests: lines ? counted.requests : undefined, ...probes }
    },
  }
}

function startProbing(site: Site) {
  const found = {
    probes: 0,
    probesFailed: 0,
    slowestProbeMs: 0,
    firstProbeFailure: undefined as string | undefined,
  }
  const stopping = new AbortController()
  const underWay = new Set<Promise<void>>()
  const probe = async () => {
    found.probes += 1
    const question = { dial: site.probe.dial, headers: { 'user-agent': userAgent }, timeoutMs: 10_000 }
    const startedAt = performance.now()
    const failure = await getUrl(site.probe.url, question).then(
      ({ status }) => (status < 400 ? undefined : `${site.probe.url} answered ${status}`),
      (error: unknown) => (error instanceof Error ? error.message : String(error)),
    )
    found.slowestProbeMs = Math.max(found.slowestProbeMs, Math.round(performance.now() - startedAt))
    if (failure === undefined) return
    found.probesFailed += 1
    found.firstProbeFailure ??= failure
  }
  const loop = (async () => {
    while (!stopping.signal.aborted) {
      const one = probe().finally(() => underWay.delete(one))
      underWay.add(one)
      await sleep(probeEveryMs)
    }
  })()
  return {
    stop: async () => {
      stopping.abort()
      await loop
      await Promise.all(underWay)
      return found
    },
  }
}

/** Lines written since; when the log was rotated meanwhile, the rest of the old file comes first. */
async function linesSince(path: string, from: { ino: number; size: number }): Promise<LogLine[] | undefined> {
  const now = await stat(path).catch(() => undefined)
  if (!now) return undefined
  const lines: LogLine[] = []
  if (now.ino === from.ino) {
    // Emptied meanwhile: what was in it is gone.
    if (now.size < from.size) return undefined
    await readFrom(path, from.size, lines)
  } else {
    const rotated = await stat(`${path}.1`).catch(() => undefined)
    if (rotated?.ino !== from.ino) return undefined
    await readFrom(`${path}.1`, from.size, lines)
    await readFrom(path, 0, lines)
  }
  return lines
}

async function readFrom(path: string, start: number, into: LogLine[]): Promise<void> {
  for await (const text of createInterface({ input: createReadStream(path, { start }) })) {
    const line = parseLine(text)
    if (line) into.push(line)
  }
}

/** Whether this process may read the log; deploys as another user than root need the group that owns it. */
export async function isReadable(path: string): Promise<boolean> {
  return await open(path, 'r').then(
    async (file) => {
      await file.close()
      return true
    },
    () => false,
  )
}

/** "0 of 12,431 visitors' requests failed; 0 of 231 probes failed, slowest 19 ms" */
export function describeFigures(figures: Figures): string {
  const number = (value: number) => value.toLocaleString('en')
  const parts: string[] = []
  if (figures.requests === undefined) parts.push('visitors not counted: the access log could not be read')
  else parts.push(`${number(figures.failed)} of ${number(figures.requests)} visitors' requests failed`)
  if (figures.applicationErrors > 0)
    parts.push(`${number(figures.applicationErrors)} more were answered 5xx by Strapi itself`)
  if (figures.webSocketsEnded > 0) parts.push(`${number(figures.webSocketsEnded)} WebSockets were ended`)
  parts.push(
    `${number(figures.probesFailed)} of ${number(figures.probes)} probes failed, slowest ${figures.slowestProbeMs} ms`,
  )
  if (figures.firstProbeFailure) parts.push(`the first: ${figures.firstProbeFailure}`)
  return parts.join('; ')
}
