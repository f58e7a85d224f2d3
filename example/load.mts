// Impatient visitors in one process: they prove that no request was lost and none was executed twice.
//
// Open loop: every request is sent when it is due, however slow the answers are, and its time counts from
// then; a site that stalls shows as slow requests, not as fewer of them. Nothing is ever sent a second time,
// not even when a kept connection turns out to be dead: a visitor would have lost it too.
import { createHash, randomBytes } from 'node:crypto'
import { Agent, request as httpRequest } from 'node:http'
import type { IncomingMessage } from 'node:http'
import { Readable } from 'node:stream'
import { text as textOf } from 'node:stream/consumers'
import { setTimeout as sleep } from 'node:timers/promises'

export interface LoadOptions {
  /** For example http://127.0.0.1:8080; anything but loopback is refused. */
  url: string
  /** Host header. */
  host?: string
  /** Half of them on kept connections, half on fresh ones. */
  getsPerSecond: number
  /** What they ask for (one page of pings): answers JSON with a list as `data`. */
  getPath?: string
  /** Half of them on kept connections, half on fresh ones; each stores a token of its own. */
  postsPerSecond: number
  /** POSTs whose body arrives in pieces over `slowBodyMs` (8000). */
  slowBodiesPerSecond?: number
  slowBodyMs?: number
  /** GETs that are answered after `slowAnswerMs` (8000). */
  slowAnswersPerSecond?: number
  slowAnswerMs?: number
  /** POSTs of `uploadBytes` (20 MiB), answered with their length and SHA-256. */
  uploadsPerSecond?: number
  uploadBytes?: number
  /** Until a request must be answered in full (60,000); also how long `stop` tries to look up the tokens. */
  deadlineMs?: number
}

export interface Loss {
  kind: string
  /** Milliseconds from the start until it was known. */
  at: number
  /** Status or error; for a POST also whether its token was stored all the same. */
  why: string
}

export interface KindReport {
  sent: number
  ok: number
  /** Times of the good answers, from when the request was due until the answer was complete. */
  slowestMs: number
  p99Ms: number
  medianMs: number
}

export interface LoadReport {
  sent: number
  ok: number
  lost: Loss[]
  kinds: Record<string, KindReport>
  /** Longest time in which quick GETs waited and none was answered well. */
  longestGapMs: number
  /** How far the sending itself fell behind at worst: if much, this machine is too busy to judge the site. */
  latestMs: number
  /** By the header x-release, in order of appearance. */
  releases: { release: string; firstMs: number; lastMs: number; answers: number }[]
  /** Tokens of POSTs that were answered well but have no row. */
  notStored: string[]
  /** Tokens with more than one row, however their POST was answered. */
  storedTwice: string[]
  tokens: number
}

export interface Load {
  /** Lets what is under way end, then looks up every token. Rejects when that fails: half a proof is none. */
  stop(): Promise<LoadReport>
  readonly soFar: { sent: number; lost: number }
}

export interface HeldSocket {
  /** `atMs` after the socket was opened; `code` of the close frame, or 1006 when there was none. */
  closed: Promise<{ atMs: number; code: number }>
  echo(text: string): Promise<string>
  close(): void
}

interface Kind {
  name: string
  perSecond: number
  fresh?: boolean
  quick?: boolean
  visit: () => Visit
}

interface Visit {
  method: 'GET' | 'POST'
  path: string
  headers?: Record<string, string>
  body?: string | Readable
  token?: Token
  /** Looks at the answer's JSON. */
  isRight: (answer: unknown) => boolean
}

interface Token {
  name: string
  outcome: 'open' | 'good' | Loss
}

interface Answer {
  release?: string | undefined
  json?: unknown
  /** What is wrong with it; missing when it is right. */
  why?: string
}

const MAX_UNDER_WAY = 10_000
const TOKENS_PER_LOOKUP = 50

export function startLoad(options: LoadOptions): Load {
  const site = siteOf(options)
  const run = randomBytes(6).toString('hex')
  const tokens: Token[] = []
  const kinds = kindsOf(options, () => {
    const token: Token = { name: `${run}-${tokens.length}`, outcome: 'open' }
    tokens.push(token)
    return token
  })
  const turns = kinds.map((kind) => ({ kind, sent: 0, times: [] as number[], dueMs: dueAt(kind, 0) }))
  const lost: Loss[] = []
  const releases = new Map<string, LoadReport['releases'][number]>()
  const gap = gapMeter()
  const underWay = new Set<Promise<void>>()
  let latestMs = 0

  // So many kept connections that each is idle for about two seconds between requests, as a reader's are: a
  // site that drops idle visitors shows. The longest idle one goes first; when all are busy, one is added.
  const keptPerSecond = sum(kinds.map((kind) => (kind.fresh ? 0 : kind.perSecond)))
  const kept = Array.from({ length: Math.ceil(2 * keptPerSecond) }, () => site.connect())

  const startedAt = performance.now()
  const nowMs = (): number => performance.now() - startedAt
  const sentSoFar = (): number => sum(turns.map((turn) => turn.sent))
  let timer = setTimeout(sendDue, 0)

  function sendDue(): void {
    for (const turn of turns) {
      while (turn.dueMs <= nowMs()) {
        latestMs = Math.max(latestMs, nowMs() - turn.dueMs)
        const sending = send(turn.kind, turn.dueMs, turn.times).finally(() => underWay.delete(sending))
        underWay.add(sending)
        turn.sent += 1
        turn.dueMs = dueAt(turn.kind, turn.sent)
      }
    }
    const waitMs = Math.min(1000, ...turns.map((turn) => turn.dueMs - nowMs()))
    timer = setTimeout(sendDue, Math.max(1, waitMs))
  }

  async function send(kind: Kind, dueMs: number, times: number[]): Promise<void> {
    if (kind.quick) gap.sent(dueMs)
    const visit = kind.visit()
    const tooMany = underWay.size >= MAX_UNDER_WAY
    const agent = kind.fresh ? site.connect({ fresh: true }) : (kept.shift() ?? site.connect())
    const unsent: Answer = { why: `not sent: ${MAX_UNDER_WAY} under way` }
    const { release, why } = tooMany ? unsent : await site.ask(agent, visit)
    const endMs = nowMs()
    if (release !== undefined) noteRelease(release, Math.round(endMs))
    if (kind.quick) gap.ended(endMs, why === undefined)
    const loss = why === undefined ? undefined : { kind: kind.name, at: Math.round(endMs), why }
    if (loss) lost.push(loss)
    else times.push(endMs - dueMs)
    if (visit.token) visit.token.outcome = loss ?? 'good'
    if (!kind.fresh) kept.push(agent)
  }

  function noteRelease(release: string, atMs: number): void {
    const seen = releases.get(release) ?? { release, firstMs: atMs, lastMs: atMs, answers: 0 }
    releases.set(release, { ...seen, lastMs: atMs, answers: seen.answers + 1 })
  }

  async function report(): Promise<LoadReport> {
    clearTimeout(timer)
    await Promise.all(underWay)
    for (const agent of kept) agent.destroy()
    const rows = await site.countRows(tokens.map((token) => token.name))
    const stored = (token: Token): number => rows.get(token.name) ?? 0
    for (const token of tokens) {
      if (typeof token.outcome !== 'object') continue
      token.outcome.why += stored(token) > 0 ? ', but stored' : ', not stored'
    }
    return {
      sent: sentSoFar(),
      ok: sentSoFar() - lost.length,
      lost,
      kinds: Object.fromEntries(turns.map(({ kind, sent, times }) => [kind.name, summary(sent, times)])),
      longestGapMs: Math.round(gap.longestMs),
      latestMs: Math.round(latestMs),
      releases: [...releases.values()],
      notStored: names(tokens.filter((token) => token.outcome === 'good' && stored(token) === 0)),
      storedTwice: names(tokens.filter((token) => stored(token) > 1)),
      tokens: tokens.length,
    }
  }

  let stopped: Promise<LoadReport> | undefined
  return {
    stop: () => (stopped ??= report()),
    get soFar() {
      return { sent: sentSoFar(), lost: lost.length }
    },
  }
}

/** Three to six lines for a terminal. */
export function describe(report: LoadReport): string[] {
  const quick = Object.entries(report.kinds).filter(([name]) => name.startsWith('GET'))
  const worst = (figure: 'slowestMs' | 'p99Ms'): string =>
    count(Math.max(0, ...quick.map(([, kind]) => kind[figure])))
  const spans = report.releases.map(
    ({ release, firstMs, lastMs, answers }) =>
      `${release} (${count(answers)} answers, ${seconds(firstMs)}-${seconds(lastMs)} s)`,
  )
  const reasons = Map.groupBy(report.lost, ({ kind, why }) => `${kind}: ${why}`)
  const losses = [...reasons].toSorted(([, one], [, other]) => other.length - one.length)
  const span = (found: Loss[]): string => `${count(found.length)} x, at ${seconds(found[0]?.at ?? 0)} s first`
  return [
    `${count(report.lost.length)} of ${count(report.sent)} requests lost, ` +
      `${count(report.storedTwice.length)} of ${count(report.tokens)} POSTs executed twice, ` +
      `${count(report.notStored.length)} answered but not stored`,
    `slowest GET ${worst('slowestMs')} ms, p99 ${worst('p99Ms')} ms; ` +
      `longest gap between good answers ${count(report.longestGapMs)} ms`,
    `answered by ${spans.join(', then ') || 'no named release'}`,
    ...losses.slice(0, 2).map(([why, found]) => `lost ${why} (${span(found)})`),
    ...(losses.length > 2
      ? [`lost for other reasons: ${count(sum(losses.slice(2).map(([, found]) => found.length)))}`]
      : []),
  ]
}

/** A WebSocket on /ws. Rejects when the site refuses it. */
export async function openSocket(url: string): Promise<HeldSocket> {
  const { host } = loopback(url)
  const socket = new WebSocket(`ws://${host}/ws`)
  const waiting: PromiseWithResolvers<string>[] = []
  let openedAt = performance.now()
  const opened = Promise.withResolvers<void>()
  const closed = Promise.withResolvers<{ atMs: number; code: number }>()
  socket.addEventListener('open', () => {
    openedAt = performance.now()
    opened.resolve()
  })
  socket.addEventListener('message', ({ data }) => waiting.shift()?.resolve(String(data)))
  socket.addEventListener('close', ({ code }) => {
    const error = new Error(`The WebSocket was closed (${code})`)
    opened.reject(error)
    for (const echo of waiting.splice(0)) echo.reject(error)
    closed.resolve({ atMs: Math.round(performance.now() - openedAt), code })
  })
  await opened.promise
  return {
    closed: closed.promise,
    echo(text) {
      if (socket.readyState !== WebSocket.OPEN) return Promise.reject(new Error('The WebSocket is not open'))
      const echo = Promise.withResolvers<string>()
      waiting.push(echo)
      socket.send(text)
      return echo.promise
    },
    close: () => socket.close(),
  }
}

/** The requests that visitors make, with the answers that they expect. */
function kindsOf(options: LoadOptions, newToken: () => Token): Kind[] {
  const { getsPerSecond, postsPerSecond, slowBodiesPerSecond = 0, slowBodyMs = 8000 } = options
  const {
    slowAnswersPerSecond = 0,
    slowAnswerMs = 8000,
    uploadsPerSecond = 0,
    uploadBytes = 20 * 2 ** 20,
    getPath = '/api/pings?pagination[pageSize]=1',
  } = options

  const read = (): Visit => ({
    method: 'GET',
    path: getPath,
    isRight: (answer) => Array.isArray(at(answer, 'data')),
  })

  const readSlowly = (): Visit => ({
    method: 'GET',
    path: `/api/pings/slow?ms=${slowAnswerMs}`,
    isRight: (answer) => at(answer, 'ms') === slowAnswerMs,
  })

  const store = (slowly: boolean) => (): Visit => {
    const token = newToken()
    const body = JSON.stringify({ data: { token: token.name } })
    return {
      method: 'POST',
      path: '/api/pings',
      headers: { 'content-type': 'application/json', 'content-length': String(body.length) },
      body: slowly ? Readable.from(inPieces(body, slowBodyMs)) : body,
      token,
      isRight: (answer) => at(answer, 'data', 'token') === token.name,
    }
  }

  // Hashing 20 MiB for each upload would hold up all others: only the last bytes differ.
  const block = randomBytes(uploadsPerSecond > 0 ? uploadBytes - 16 : 0)
  const hash = createHash('sha256').update(block)
  const upload = (): Visit => {
    const tail = randomBytes(16)
    const sha256 = hash.copy().update(tail).digest('hex')
    return {
      method: 'POST',
      path: '/api/pings/echo',
      headers: { 'content-type': 'application/octet-stream', 'content-length': String(uploadBytes) },
      body: Readable.from(slices(block, tail)),
      isRight: (answer) => at(answer, 'bytes') === uploadBytes && at(answer, 'sha256') === sha256,
    }
  }

  const kinds: Kind[] = [
    { name: 'GET', perSecond: getsPerSecond / 2, quick: true, visit: read },
    { name: 'GET fresh', perSecond: getsPerSecond / 2, quick: true, fresh: true, visit: read },
    { name: 'POST', perSecond: postsPerSecond / 2, visit: store(false) },
    { name: 'POST fresh', perSecond: postsPerSecond / 2, fresh: true, visit: store(false) },
    { name: 'slow body', perSecond: slowBodiesPerSecond, fresh: true, visit: store(true) },
    { name: 'slow answer', perSecond: slowAnswersPerSecond, fresh: true, visit: readSlowly },
    { name: 'upload', perSecond: uploadsPerSecond, fresh: true, visit: upload },
  ]
  const wrong = kinds.find(({ perSecond }) => !(perSecond >= 0 && perSecond < Infinity))
  if (wrong) throw new Error(`Not a number of requests per second for ${wrong.name}: ${wrong.perSecond}`)
  return kinds.filter(({ perSecond }) => perSecond > 0)
}

async function* inPieces(text: string, durationMs: number): AsyncGenerator<Buffer> {
  const pieces = 10
  const cut = (piece: number): number => Math.round((piece * text.length) / pieces)
  for (let piece = 0; piece < pieces; piece++) {
    if (piece > 0) await sleep(durationMs / (pieces - 1))
    yield Buffer.from(text.slice(cut(piece), cut(piece + 1)))
  }
}

function* slices(block: Buffer, tail: Buffer): Generator<Buffer> {
  for (let start = 0; start < block.length; start += 2 ** 16) yield block.subarray(start, start + 2 ** 16)
  yield tail
}

/**
 * What is asked of the site, and nothing else: no retry, no redirect, no proxy. Not by `fetch`: that first looks whether an idle
 * connection was closed; the request of a visitor far away cannot know.
 */
function siteOf({ url, host, deadlineMs = 60_000 }: LoadOptions) {
  const { origin } = loopback(url)

  /** One visitor's connection, opened when it is needed. */
  function connect({ fresh = false } = {}): Agent {
    // 30 s of nginx's 75: age never ends a connection just when it is used.
    return fresh ? new Agent() : new Agent({ keepAlive: true, maxSockets: 1, timeout: 30_000 })
  }

  async function ask(agent: Agent, { method, path, headers, body, isRight }: Visit): Promise<Answer> {
    const deadline = new AbortController()
    const timer = setTimeout(() => deadline.abort(), deadlineMs)
    try {
      const answered = Promise.withResolvers<IncomingMessage>()
      const request = httpRequest(new URL(path, origin), {
        method,
        headers: { ...headers, ...(host === undefined ? {} : { host }) },
        agent,
        signal: deadline.signal,
      })
      request.on('response', answered.resolve).on('error', answered.reject)
      if (body instanceof Readable) body.pipe(request)
      else request.end(body)
      const answer = await answered.promise
      const release = answer.headers['x-release']?.toString()
      const text = await textOf(answer).catch((cause: unknown) => {
        throw new Error(`${answer.statusCode}, but the answer was cut`, { cause })
      })
      const status = answer.statusCode ?? 0
      if (status < 200 || status > 299) return { release, why: String(status) }
      const json: unknown = JSON.parse(text)
      return isRight(json) ? { release, json } : { release, why: `wrong body: ${text.slice(0, 80)}` }
    } catch (error) {
      return { why: deadline.signal.aborted ? `no answer within ${deadlineMs} ms` : reason(error) }
    } finally {
      clearTimeout(timer)
    }
  }

  /** Rows by token. This is no visitor: it may ask again. */
  async function countRows(tokens: string[]): Promise<Map<string, number>> {
    const rows = new Map<string, number>()
    const agent = connect()
    try {
      for (let start = 0; start < tokens.length; start += TOKENS_PER_LOOKUP) {
        const wanted = tokens.slice(start, start + TOKENS_PER_LOOKUP)
        for (let page = 1, pages = 1; page <= pages; page++) {
          const answer = await lookUp(agent, wanted, page)
          pages = Number(at(answer, 'meta', 'pagination', 'pageCount'))
          for (const row of list(at(answer, 'data'))) {
            const token = String(at(row, 'token'))
            rows.set(token, (rows.get(token) ?? 0) + 1)
          }
        }
      }
      return rows
    } finally {
      agent.destroy()
    }
  }

  async function lookUp(agent: Agent, tokens: string[], page: number): Promise<unknown> {
    const query = new URLSearchParams()
    for (const [index, token] of tokens.entries()) query.set(`filters[token][$in][${index}]`, token)
    query.set('sort', 'token') // or a row could slip from one page to another
    query.set('pagination[pageSize]', '100')
    query.set('pagination[page]', String(page))
    const visit: Visit = {
      method: 'GET',
      path: `/api/pings?${query.toString()}`,
      isRight: (answer) => Number.isInteger(at(answer, 'meta', 'pagination', 'pageCount')),
    }
    const until = performance.now() + deadlineMs
    for (;;) {
      const { json, why } = await ask(agent, visit)
      if (why === undefined) return json
      if (performance.now() > until) throw new Error(`The site does not say which POSTs it stored: ${why}`)
      await sleep(200)
    }
  }

  return { connect, ask, countRows }
}

/** Anywhere within its turn: the rate stays exact, and an even beat cannot step over a short outage. */
function dueAt({ perSecond }: Kind, turn: number): number {
  return ((turn + Math.random()) * 1000) / perSecond
}

/** Time without a good answer counts while requests wait, and after a bad answer until the next good one. */
function gapMeter() {
  let underWay = 0
  let since: number | undefined
  let longestMs = 0
  return {
    sent(atMs: number): void {
      underWay += 1
      since ??= atMs
    },
    ended(atMs: number, good: boolean): void {
      underWay -= 1
      longestMs = Math.max(longestMs, atMs - (since ?? atMs))
      if (good) since = underWay > 0 ? atMs : undefined
    },
    get longestMs() {
      return longestMs
    },
  }
}

function summary(sent: number, times: number[]): KindReport {
  const sorted = Float64Array.from(times).toSorted()
  const quantile = (share: number): number => Math.round(sorted[Math.ceil(sorted.length * share) - 1] ?? 0)
  return { sent, ok: times.length, slowestMs: quantile(1), p99Ms: quantile(0.99), medianMs: quantile(0.5) }
}

function loopback(url: string): URL {
  const parsed = URL.parse(url)
  const isLoopback = /^(localhost|127(\.\d+){3}|\[::1\])$/.test(parsed?.hostname ?? '')
  if (parsed?.protocol === 'http:' && isLoopback) return parsed
  throw new Error(`Load is for this machine only: expected http:// and a loopback address, not ${url}`)
}

function reason(error: unknown): string {
  return error instanceof Error ? error.message || error.name : String(error)
}

function at(value: unknown, ...keys: string[]): unknown {
  return keys.reduce<unknown>(
    (inner, key) => (typeof inner === 'object' && inner !== null ? Reflect.get(inner, key) : undefined),
    value,
  )
}

const list = (value: unknown): unknown[] => (Array.isArray(value) ? value : [])
const names = (tokens: Token[]): string[] => tokens.map(({ name }) => name)
const sum = (numbers: number[]): number => numbers.reduce((total, number) => total + number, 0)
const count = (number: number): string => number.toLocaleString('en')
const seconds = (ms: number): string => (ms / 1000).toFixed(1)
