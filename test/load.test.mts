import { createHash } from 'node:crypto'
import { once } from 'node:events'
import { createServer } from 'node:http'
import type { IncomingMessage, ServerResponse } from 'node:http'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterAll, describe, expect, test } from 'vitest'
import { WebSocketServer } from 'ws'
import { describe as linesOf, openSocket, startLoad } from '../example/load.mts'
import type { LoadOptions, LoadReport } from '../example/load.mts'

type Fault =
  | 'reset'
  | '502'
  | 'wrong body'
  | 'page of HTML'
  | 'cut body'
  | 'cut chunks'
  | 'no answer'
  | 'not stored'
  | 'stored twice'
  | 'stored three times'
  | 'stored, then reset'

interface Seen {
  method: 'GET' | 'POST'
  /** Of this method, from 1. */
  nth: number
  nthOnConnection: number
}

const ends: (() => void)[] = []
afterAll(() => {
  for (const end of ends) end()
})

/** A small site on loopback; `faultOf` says what goes wrong with a request. */
async function startSite(faultOf: (seen: Seen) => Fault | undefined = () => undefined) {
  const site = {
    url: '',
    rows: [] as string[],
    faultyTokens: [] as string[],
    seen: { GET: 0, POST: 0 },
    mostPieces: 0,
    mostOnConnection: 0,
    closing: 0,
    release: 'r1',
    holdMs: 0,
    lookUpStatus: 200,
  }
  const { rows, seen } = site
  const perConnection = new WeakMap<object, number>()

  async function serve(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const { pathname, searchParams } = new URL(request.url ?? '/', 'http://localhost')
    const send = (status: number, body: unknown): unknown =>
      response.writeHead(status, { 'x-release': site.release }).end(JSON.stringify(body))

    const tokens = [...searchParams].flatMap(([key, value]) => (key.startsWith('filters') ? [value] : []))
    if (tokens.length > 0) {
      const found = rows.filter((row) => tokens.includes(row)).toSorted()
      const [page, size] = [Number(searchParams.get('pagination[page]')), 100]
      const data = found.slice((page - 1) * size, page * size).map((token) => ({ token }))
      return void send(site.lookUpStatus, {
        data,
        meta: { pagination: { pageCount: Math.ceil(found.length / size) } },
      })
    }

    const method = request.method === 'POST' ? 'POST' : 'GET'
    const nth = (seen[method] += 1)
    const nthOnConnection = (perConnection.get(request.socket) ?? 0) + 1
    perConnection.set(request.socket, nthOnConnection)
    site.mostOnConnection = Math.max(site.mostOnConnection, nthOnConnection)
    if (request.headers.connection === 'close') site.closing += 1
    const parts: Buffer[] = []
    for await (const part of request) parts.push(part)
    site.mostPieces = Math.max(site.mostPieces, parts.length)
    const body = Buffer.concat(parts)
    if (site.holdMs > 0) await sleep(site.holdMs)
    if (pathname === '/api/pings/slow') {
      const ms = Number(searchParams.get('ms'))
      await sleep(ms)
      return void send(200, { ms })
    }
    if (pathname === '/api/pings/echo') {
      return void send(200, { bytes: body.length, sha256: createHash('sha256').update(body).digest('hex') })
    }

    const token = /"token":"([^"]+)"/.exec(body.toString())?.[1] ?? ''
    const fault = faultOf({ method, nth, nthOnConnection })
    if (fault) site.faultyTokens.push(token)
    if (method === 'POST' && (!fault || fault.startsWith('stored'))) rows.push(token)
    if (fault === 'stored twice') rows.push(token)
    if (fault === 'stored three times') rows.push(token, token)
    if (fault === 'reset' || fault === 'stored, then reset') return void request.socket.resetAndDestroy()
    if (fault === '502') return void send(502, {})
    if (fault === 'wrong body') return void send(200, { data: null })
    if (fault === 'page of HTML') return void response.end('<html>')
    if (fault === 'cut body' || fault === 'cut chunks') {
      response.writeHead(200, fault === 'cut body' ? { 'content-length': 100 } : {}).write('{"data":[]}')
      return void setTimeout(() => request.socket.destroy(), 20)
    }
    if (fault === 'no answer') return
    send(method === 'POST' ? 201 : 200, { data: method === 'POST' ? { token } : [] })
  }

  const server = createServer((request, response) => {
    serve(request, response).catch((error: unknown) =>
      response.destroy(error instanceof Error ? error : undefined),
    )
  })
  const sockets = new WebSocketServer({ server, path: '/ws' })
  sockets.on('connection', (socket) => {
    socket.on('message', (data: Buffer) => {
      const text = data.toString()
      if (text === 'go away') socket.close(1001)
      else if (text === 'die') socket.terminate()
      else socket.send(text)
    })
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const address = server.address()
  site.url = `http://127.0.0.1:${typeof address === 'object' ? address?.port : ''}`
  ends.push(() => {
    server.closeAllConnections()
    server.close()
  })
  return site
}

async function loadFor(ms: number, options: LoadOptions): Promise<LoadReport> {
  const load = startLoad(options)
  await sleep(ms)
  return load.stop()
}

function three(method: 'GET' | 'POST', fault: Fault) {
  return (seen: Seen): Fault | undefined =>
    seen.method === method && [5, 15, 25].includes(seen.nth) ? fault : undefined
}

const none = { lost: [], notStored: [], storedTwice: [] }

describe.concurrent('a site that answers well', () => {
  test('loses nothing, and every kind of request was really made', async () => {
    const site = await startSite()
    const report = await loadFor(1000, {
      url: site.url,
      getsPerSecond: 60,
      postsPerSecond: 40,
      slowBodiesPerSecond: 4,
      // Nine pauses of 50 ms, which Node keeps.
      slowBodyMs: 450,
      slowAnswersPerSecond: 4,
      slowAnswerMs: 400,
      uploadsPerSecond: 4,
      uploadBytes: 2 ** 20,
    })
    expect(report).toMatchObject({ ...none, ok: report.sent })
    const atLeast = {
      GET: 25,
      'GET fresh': 25,
      POST: 15,
      'POST fresh': 15,
      'slow body': 3,
      'slow answer': 3,
      upload: 3,
    }
    expect(Object.keys(report.kinds)).toEqual(Object.keys(atLeast))
    for (const [name, count] of Object.entries(atLeast)) {
      expect(report.kinds[name]?.ok, name).toBeGreaterThanOrEqual(count)
      expect(report.kinds[name]?.ok, name).toBe(report.kinds[name]?.sent)
    }
    expect(report.kinds['slow answer']?.medianMs).toBeGreaterThanOrEqual(399)
    expect(report.kinds['slow body']?.medianMs).toBeGreaterThanOrEqual(449)
    expect(site.mostPieces).toBeGreaterThan(5)
    expect(site.rows.toSorted()).toEqual([...new Set(site.rows)].toSorted())
    expect(site.rows).toHaveLength(report.tokens)
  })

  test('sees half of the visitors come back on the same connection, two seconds later', async () => {
    const site = await startSite()
    const report = await loadFor(2700, { url: site.url, getsPerSecond: 20, postsPerSecond: 0 })
    expect(report).toMatchObject(none)
    expect(site.mostOnConnection).toBe(2)
    expect(site.closing).toBe(report.kinds['GET fresh']?.sent)
  })

  test('is asked at the same rate while it stalls, and the stall shows', async () => {
    const site = await startSite()
    const load = startLoad({ url: site.url, getsPerSecond: 100, postsPerSecond: 100 })
    await sleep(200)
    site.holdMs = 500
    const before = load.soFar.sent
    await sleep(500)
    const during = load.soFar.sent - before
    site.holdMs = 0
    const report = await load.stop()
    expect(during).toBeGreaterThan(85)
    expect(report).toMatchObject(none)
    expect(report.kinds.GET?.slowestMs).toBeGreaterThan(450)
    expect(report.longestGapMs).toBeGreaterThan(400)
    expect(report.longestGapMs).toBeLessThan(2000)
  })

  test('shows its releases in order of appearance', async () => {
    const site = await startSite()
    const load = startLoad({ url: site.url, getsPerSecond: 50, postsPerSecond: 0 })
    await sleep(300)
    site.release = 'r2'
    await sleep(300)
    const { releases, sent } = await load.stop()
    expect(releases.map(({ release }) => release)).toEqual(['r1', 'r2'])
    expect(releases.map(({ answers }) => answers).reduce((sum, answers) => sum + answers)).toBe(sent)
    expect(releases[1]?.firstMs).toBeGreaterThan(250)
  })
})

describe.concurrent('a site that fails three requests', () => {
  test.each<{ method: 'GET' | 'POST'; fault: Fault; why: RegExp }>([
    { method: 'GET', fault: 'reset', why: /^read ECONNRESET$/ },
    { method: 'GET', fault: '502', why: /^502$/ },
    { method: 'GET', fault: 'wrong body', why: /^wrong body: \{"data":null\}$/ },
    { method: 'GET', fault: 'page of HTML', why: /not valid JSON/ },
    { method: 'GET', fault: 'cut body', why: /^200, but the answer was cut$/ },
    { method: 'GET', fault: 'cut chunks', why: /^200, but the answer was cut$/ },
    { method: 'GET', fault: 'no answer', why: /^no answer within 2000 ms$/ },
    { method: 'POST', fault: 'reset', why: /^read ECONNRESET, not stored$/ },
    { method: 'POST', fault: '502', why: /^502, not stored$/ },
    { method: 'POST', fault: 'wrong body', why: /^wrong body: .*, not stored$/ },
    { method: 'POST', fault: 'stored, then reset', why: /^read ECONNRESET, but stored$/ },
  ])('has lost just these: $method, $fault', async ({ method, fault, why }) => {
    const site = await startSite(three(method, fault))
    const report = await loadFor(600, {
      url: site.url,
      getsPerSecond: 60,
      postsPerSecond: 60,
      deadlineMs: 2000,
    })
    expect(report.lost.map((loss) => loss.why)).toEqual([1, 2, 3].map(() => expect.stringMatching(why)))
    expect(report.lost.every(({ kind }) => kind.startsWith(method))).toBe(true)
    expect(report).toMatchObject({ ok: report.sent - 3, notStored: [], storedTwice: [] })
    expect(site.seen.GET + site.seen.POST, 'nothing is sent again').toBe(report.sent)
  })

  test('has lost what it resets on connections that were idle before', async () => {
    let resets = 0
    const site = await startSite(({ nthOnConnection }) =>
      nthOnConnection > 1 && resets++ < 3 ? 'reset' : undefined,
    )
    const report = await loadFor(2700, { url: site.url, getsPerSecond: 20, postsPerSecond: 0 })
    expect(report.lost.map(({ kind, why }) => `${kind}: ${why}`)).toEqual(
      Array(3).fill('GET: read ECONNRESET'),
    )
    expect(site.seen.GET, 'nothing is sent again').toBe(report.sent)
  })
})

describe.concurrent('a site that lies about three POSTs', () => {
  test('is caught when it did not store them', async () => {
    const site = await startSite(three('POST', 'not stored'))
    const report = await loadFor(600, { url: site.url, getsPerSecond: 10, postsPerSecond: 60 })
    expect(site.faultyTokens).toHaveLength(3)
    expect(report).toMatchObject({ ...none, ok: report.sent, notStored: site.faultyTokens })
  })

  test('is caught when it stored them twice', async () => {
    const site = await startSite(three('POST', 'stored twice'))
    const report = await loadFor(600, { url: site.url, getsPerSecond: 10, postsPerSecond: 60 })
    expect(site.faultyTokens).toHaveLength(3)
    expect(report).toMatchObject({ ...none, ok: report.sent, storedTwice: site.faultyTokens })
  })

  test('is caught when there are more rows than one page shows', async () => {
    const site = await startSite(({ method }) => (method === 'POST' ? 'stored three times' : undefined))
    const report = await loadFor(600, { url: site.url, getsPerSecond: 0, postsPerSecond: 150 })
    expect(report.tokens).toBeGreaterThan(50)
    expect(report.storedTwice).toHaveLength(report.tokens)
  })

  test('gets no report when it does not say what it stored', async () => {
    const site = await startSite()
    site.lookUpStatus = 500
    const load = startLoad({ url: site.url, getsPerSecond: 0, postsPerSecond: 50, deadlineMs: 300 })
    await sleep(100)
    await expect(load.stop()).rejects.toThrow('The site does not say which POSTs it stored: 500')
  })
})

describe.concurrent('a site that is away', () => {
  test('has lost everything, uploads and slow bodies too', async () => {
    const report = await loadFor(500, {
      url: 'http://127.0.0.1:1',
      getsPerSecond: 100,
      postsPerSecond: 0,
      uploadsPerSecond: 10,
      uploadBytes: 2 ** 20,
    })
    expect(report.sent).toBeGreaterThan(40)
    expect(report.lost).toHaveLength(report.sent)
    expect(report.lost[0]?.why).toBe('connect ECONNREFUSED 127.0.0.1:1')
    expect(report.longestGapMs).toBeGreaterThan(400)
  })
})

describe.concurrent('a WebSocket', () => {
  test('echoes, and tells when and how it was closed', async () => {
    const site = await startSite()
    const socket = await openSocket(site.url)
    expect(await Promise.all([socket.echo('one'), socket.echo('two')])).toEqual(['one', 'two'])
    await sleep(200)
    await expect(socket.echo('go away')).rejects.toThrow('The WebSocket was closed (1001)')
    const { atMs, code } = await socket.closed
    expect(code).toBe(1001)
    expect(atMs).toBeGreaterThanOrEqual(195)
    await expect(socket.echo('again')).rejects.toThrow('The WebSocket is not open')
  })

  test('that was cut has no close frame', async () => {
    const site = await startSite()
    const socket = await openSocket(site.url)
    await expect(socket.echo('die')).rejects.toThrow('The WebSocket was closed (1006)')
    expect((await socket.closed).code).toBe(1006)
  })

  test('that is refused is an error', async () => {
    await expect(openSocket('http://127.0.0.1:1')).rejects.toThrow('The WebSocket was closed (1006)')
  })
})

describe('the options', () => {
  const wrong = [
    'http://example.com',
    'http://127.0.0.1.example.com',
    'http://10.0.0.1:8080',
    'https://127.0.0.1',
    'nonsense',
  ]
  test.each(wrong)('%s is refused: load is for this machine only', async (url) => {
    const sentence = `Load is for this machine only: expected http:// and a loopback address, not ${url}`
    expect(() => startLoad({ url, getsPerSecond: 1, postsPerSecond: 1 })).toThrow(sentence)
    await expect(openSocket(url)).rejects.toThrow(sentence)
  })

  test('a rate that is not a number is refused: it would send nothing and lose nothing', () => {
    const options = { url: 'http://127.0.0.1:1', getsPerSecond: Number('many'), postsPerSecond: 1 }
    expect(() => startLoad(options)).toThrow('Not a number of requests per second for GET: NaN')
  })
})

describe('the lines for a terminal', () => {
  const kind = { sent: 6000, ok: 6000, slowestMs: 41, p99Ms: 9, medianMs: 2 }
  const good: LoadReport = {
    ...none,
    sent: 12431,
    ok: 12431,
    kinds: { GET: kind, 'GET fresh': { ...kind, p99Ms: 8 }, 'slow body': { ...kind, slowestMs: 8003 } },
    longestGapMs: 44,
    latestMs: 3,
    releases: [
      { release: 'r1', firstMs: 8, lastMs: 12_340, answers: 6000 },
      { release: 'r2', firstMs: 12_290, lastMs: 30_110, answers: 6431 },
    ],
    tokens: 2310,
  }

  test('say that nothing was lost', () => {
    expect(linesOf(good)).toEqual([
      '0 of 12,431 requests lost, 0 of 2,310 POSTs executed twice, 0 answered but not stored',
      'slowest GET 41 ms, p99 9 ms; longest gap between good answers 44 ms',
      'answered by r1 (6,000 answers, 0.0-12.3 s), then r2 (6,431 answers, 12.3-30.1 s)',
    ])
  })

  test('name the most frequent losses', () => {
    const lost = ['502', 'read ECONNRESET', '502', 'other side closed'].map((why, at) => ({
      kind: 'GET',
      at: at * 1000,
      why,
    }))
    expect(linesOf({ ...good, lost }).slice(3)).toEqual([
      'lost GET: 502 (2 x, at 0.0 s first)',
      'lost GET: read ECONNRESET (1 x, at 1.0 s first)',
      'lost for other reasons: 1',
    ])
  })
})
