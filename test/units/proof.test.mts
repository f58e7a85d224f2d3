import { appendFile, readFile, rename, writeFile } from 'node:fs/promises'
import { createServer } from 'node:http'
import { once } from 'node:events'
import { join } from 'node:path'
import { describe, expect, onTestFinished, test } from 'vitest'
import { countLines, describeFigures, parseLine, startProof } from '../../scripts/lib/proof.mts'
import type { Figures, LogLine } from '../../scripts/lib/proof.mts'
import { shippedFile } from '../../scripts/lib/nginx.mts'
import { newFolder, siteWith } from './site.mts'

const master = '127.0.0.1:1337'
const slave = '127.0.0.1:1338'
const ended = 1_795_419_610_000

/** The log format as it is shipped, with these values in it. */
const format = [
  ...(/log_format bob([^;]*);/.exec(await readFile(shippedFile, 'utf8'))?.[1] ?? '').matchAll(/'([^']*)'/g),
]
  .map((part) => part[1])
  .join('')
function logged(values: Record<string, string>): string {
  const usual = {
    remote_addr: '203.0.113.7',
    remote_user: '-',
    time_local: '23/Nov/2026:07:40:10 +0000',
    request: 'GET / HTTP/1.1',
    status: '200',
    body_bytes_sent: '3',
    http_referer: '-',
    http_user_agent: 'curl/7.88.1',
    upstream_addr: master,
    upstream_status: '200',
    msec: '1795419610.000',
    request_time: '1.250',
    request_completion: 'OK',
  }
  return format.replaceAll(/\$(\w+)/g, (_, name: string) => ({ ...usual, ...values })[name] ?? '-')
}

describe('a line of the access log', () => {
  test('as nginx wrote it is read', () => {
    const line =
      '127.0.0.1 - - [23/Nov/2026:07:40:34 +0000] "GET /ws HTTP/1.1" 101 0 "-" "curl/7.88.1" upstream="127.0.0.1:18412" upstream_status="101" ended=1795419634.075 took=0.302 complete="OK"'
    expect(parseLine(line)).toEqual({
      status: 101,
      upstream: '127.0.0.1:18412',
      endedAt: 1_795_419_634_075,
      startedAt: 1_795_419_633_773,
      complete: true,
      userAgent: 'curl/7.88.1',
    })
  })

  test.each<[string, Record<string, string>, Partial<LogLine>]>([
    ['of the shipped format', {}, { status: 200, upstream: master, endedAt: ended, startedAt: ended - 1250 }],
    ['of a request that was not answered whole', { request_completion: '' }, { complete: false }],
    [
      'of a request that slave answered after master',
      { upstream_addr: `${master}, ${slave}` },
      { upstream: slave },
    ],
    [
      'of a request that was passed on internally',
      { upstream_addr: `${master} : ${slave}` },
      { upstream: slave },
    ],
    ['of a request that found no slot', { upstream_addr: 'bob_master', status: '502' }, { status: 502 }],
    ['of a picture, which nginx answered itself', { upstream_addr: '-' }, { upstream: '' }],
  ])('%s is read', (_, values, expected) => {
    expect(parseLine(logged(values))).toMatchObject(expected)
  })

  // As nginx wrote them: it escapes quotes and backslashes of visitors.
  test.each<[string, Record<string, string>, Partial<LogLine>]>([
    [
      'a user agent that looks like the end of a line',
      {
        http_user_agent:
          'x\\x22 upstream=\\x22127.0.0.1:1338\\x22 upstream_status=\\x22200\\x22 ended=1.0 took=0 complete=\\x22OK\\x22',
      },
      { status: 200, upstream: master, endedAt: ended },
    ],
    [
      'a user agent like the probe of a deploy',
      { http_user_agent: 'strapi-blue-green-probe\\x22' },
      { status: 200 },
    ],
    ['a user agent that ends in a backslash', { http_user_agent: 'a\\x5C', status: '502' }, { status: 502 }],
    [
      'a request with a status in it',
      { request: 'GET /\\x22 200 5 HTTP/1.1', status: '400' },
      { status: 400 },
    ],
    ['a request that is no HTTP', { request: '\\x16\\x03\\x01\\x22 200 5', status: '400' }, { status: 400 }],
    [
      'a user name with a status in it',
      { remote_user: 'us\\x22er\\x22 200 ', status: '502' },
      { status: 502 },
    ],
    ['a referer with a status in it', { http_referer: '\\x22 200 5', status: '502' }, { status: 502 }],
  ])('cannot be forged by %s', (_, values, expected) => {
    const line = parseLine(logged(values))
    expect(line).toMatchObject(expected)
    expect(countLines(line ? [line] : [], []).requests).toBe(1)
  })

  test.each([
    ['of another format', '127.0.0.1 - - [23/Nov/2026:07:40:34 +0000] "GET / HTTP/1.1" 200 3 "-" "curl"'],
    ['that was cut', logged({}).slice(0, -5)],
    ['that is empty', ''],
  ])('%s is left out', (_, line) => {
    expect(parseLine(line)).toBeUndefined()
  })
})

describe('what visitors got', () => {
  const good: LogLine = {
    status: 200,
    upstream: master,
    startedAt: ended - 1000,
    endedAt: ended,
    complete: true,
    userAgent: 'curl',
  }
  const cut = { address: master, at: ended - 100 }
  const socket = { ...good, status: 101 }
  const none = { failed: 0, applicationErrors: 0, webSocketsEnded: 0 }

  test.each<[string, Partial<LogLine>, Partial<typeof none>]>([
    ['200 is fine', {}, {}],
    ['404 is fine', { status: 404 }, {}],
    ['499, the visitor left, is no failure', { status: 499, complete: false }, {}],
    ['500 is an error of Strapi', { status: 500 }, { applicationErrors: 1 }],
    ['501 is an error of Strapi', { status: 501 }, { applicationErrors: 1 }],
    ['502 is a failure', { status: 502 }, { failed: 1 }],
    ['503 is a failure', { status: 503 }, { failed: 1 }],
    ['504 is a failure', { status: 504 }, { failed: 1 }],
    ['505 is an error of Strapi', { status: 505 }, { applicationErrors: 1 }],
    ['a visitor who left half-way is no failure', { complete: false }, {}],
    ['a WebSocket that ended by itself is fine', { status: 101 }, {}],
  ])('%s', (_, line, expected) => {
    expect(countLines([{ ...good, ...line }], [])).toEqual({ requests: 1, ...none, ...expected })
  })

  test.each<[string, LogLine, Partial<typeof none>]>([
    ['an answer that broke off is a failure', { ...good, complete: false }, { failed: 1 }],
    ['502 is one failure, not two', { ...good, status: 502, complete: false }, { failed: 1 }],
    ['a WebSocket was ended', socket, { webSocketsEnded: 1 }],
    ['a WebSocket on the other slot was not', { ...socket, upstream: slave }, {}],
    ['a WebSocket that ended before was not', { ...socket, endedAt: cut.at - 1 }, {}],
    ['a WebSocket that began afterwards was not', { ...socket, startedAt: cut.at + 1 }, {}],
    ['a WebSocket that ended much later was not', { ...socket, endedAt: cut.at + 15_000 }, {}],
  ])('when its slot was stopped under it, %s', (_, line, expected) => {
    expect(countLines([line], [cut])).toEqual({ requests: 1, ...none, ...expected })
  })

  test('an answer that its slot broke off after 3 of 100 bytes is a failure, although nginx calls the request complete', () => {
    const line = parseLine(
      '127.0.0.1 - - [23/Nov/2026:07:40:33 +0000] "GET /cut HTTP/1.1" 200 3 "-" "curl/7.88.1" upstream="127.0.0.1:18412" upstream_status="200" ended=1795419633.743 took=0.111 complete="OK"',
    )
    expect(
      countLines(line ? [line] : [], [{ address: '127.0.0.1:18412', at: 1_795_419_633_700 }]),
    ).toMatchObject({
      requests: 1,
      failed: 1,
    })
  })

  test('does not count the probes of a deploy', () => {
    const lines = [good, { ...good, userAgent: 'strapi-blue-green-probe', status: 502 }]
    expect(countLines(lines, [])).toEqual({ requests: 1, ...none })
  })

  test('adds up', () => {
    const lines = [good, good, { ...good, status: 500 }, { ...good, status: 502 }, { ...good, status: 504 }]
    expect(countLines(lines, [])).toEqual({
      requests: 5,
      failed: 2,
      applicationErrors: 1,
      webSocketsEnded: 0,
    })
  })
})

describe('the count of a deploy', () => {
  async function counted(meanwhile: (log: string) => Promise<unknown>, status = 200): Promise<Figures> {
    const log = join(await newFolder(), 'access.log')
    await writeFile(log, `${logged({ status: '502' })}\n`)
    const server = createServer((_, response) => response.writeHead(status).end())
    await once(server.listen(0, '127.0.0.1'), 'listening')
    onTestFinished(() => void server.close())
    const address = server.address()
    const port = typeof address === 'object' ? address?.port : ''
    const proof = await startProof(
      await siteWith({ ACCESS_LOG: log, PROBE_URL: `http://127.0.0.1:${port}/_health` }),
    )
    await meanwhile(log)
    return await proof.stop()
  }
  const lines = (count: number) => `${logged({})}\n`.repeat(count)

  test.each<[string, (log: string) => Promise<unknown>, number | undefined]>([
    ['is what was logged since it began', (log) => appendFile(log, lines(3)), 3],
    ['is nothing when nobody came', async () => undefined, 0],
    [
      'goes on in the new log when the old one was rotated',
      async (log) => {
        await appendFile(log, lines(2))
        await rename(log, `${log}.1`)
        await writeFile(log, lines(3))
      },
      5,
    ],
    [
      'is not known when the log of the beginning is gone',
      async (log) => {
        await rename(log, `${log}.gone`)
        await writeFile(log, lines(3))
      },
      undefined,
    ],
    ['is not known when the log was emptied meanwhile', (log) => writeFile(log, ''), undefined],
  ])('%s', async (_, meanwhile, requests) => {
    expect(await counted(meanwhile)).toMatchObject({ requests, failed: 0, probesFailed: 0 })
  })

  test('says why the first probe failed', async () => {
    const figures = await counted(async () => undefined, 503)
    expect(figures.probes).toBeGreaterThan(0)
    expect(figures.probesFailed).toBe(figures.probes)
    expect(figures.firstProbeFailure).toMatch(/^http:.* answered 503$/)
  })
})

const clean: Figures = {
  requests: 12_431,
  failed: 0,
  applicationErrors: 0,
  webSocketsEnded: 0,
  probes: 231,
  probesFailed: 0,
  slowestProbeMs: 19,
  firstProbeFailure: undefined,
}
test.each<[Partial<Figures>, string]>([
  [{}, "0 of 12,431 visitors' requests failed; 0 of 231 probes failed, slowest 19 ms"],
  [{ failed: 1234 }, "1,234 of 12,431 visitors' requests failed; 0 of 231 probes failed, slowest 19 ms"],
  [
    { applicationErrors: 2, webSocketsEnded: 3 },
    "0 of 12,431 visitors' requests failed; 2 more were answered 5xx by Strapi itself; 3 WebSockets were ended; 0 of 231 probes failed, slowest 19 ms",
  ],
  [
    { probesFailed: 1, firstProbeFailure: '/_health answered 503' },
    "0 of 12,431 visitors' requests failed; 1 of 231 probes failed, slowest 19 ms; the first: /_health answered 503",
  ],
  [
    { requests: undefined },
    'visitors not counted: the access log could not be read; 0 of 231 probes failed, slowest 19 ms',
  ],
])('with %o the operator reads: %s', (figures, sentence) => {
  expect(describeFigures({ ...clean, ...figures })).toBe(sentence)
})
