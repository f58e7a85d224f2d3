/** nginx with the shipped configuration, as visitors, uploads, a deploy and a dying slot meet it. */
import { createHash, randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { chmod, mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import {
  createServer,
  request as httpRequest,
  type ClientRequest,
  type IncomingHttpHeaders,
  type IncomingMessage,
  type Server,
} from 'node:http'
import { request as httpsRequest, type RequestOptions } from 'node:https'
import { networkInterfaces, tmpdir } from 'node:os'
import { join } from 'node:path'
import { buffer } from 'node:stream/consumers'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, inject, test, vi } from 'vitest'
import { openSocket } from '../example/load.mts'
import { nginxPid } from '../example/site.mts'
import { ask, run } from '../scripts/lib/command.mts'
import { create, start } from '../scripts/lib/compose.mts'
import * as engine from '../scripts/lib/engine.mts'
import { shippedFile } from '../scripts/lib/nginx.mts'
import { loadSite, type Site, type SlotName } from '../scripts/lib/settings.mts'
import { setAlone, setFlag } from '../scripts/lib/traffic.mts'
import { mustSucceed, resultOf, settingOf, tinySite, type TestSite } from './harness.mts'

let own: TestSite
let site: Site
/** Something that happens in a moment, on a machine that may be busy. */
const soon = { timeout: 20_000, interval: 50 }
/** What master and slave answer in x-release. */
const releases = { master: '', slave: '' }

beforeAll(async () => {
  own = await tinySite(18_220)
  await mustSucceed(own.run('deploy'))
  site = await loadSite(own.envFile)
  releases.master = (await settingOf(own, 'STRAPI_VERSION')) ?? ''
  releases.slave = String(resultOf(await mustSucceed(own.begin('deploy', ['--build-only']).outcome)).release)
  await run(create(site, 'strapi-slave'), { env: { STRAPI_VERSION: releases.slave } })
  await run(start(site, 'strapi-slave'))
  await slotAnswers('strapi-slave')
})
afterEach(async () => {
  await setFlag(site, 'strapi-master')
  await setAlone(site, false)
})
afterAll(() => own.remove())

interface Got {
  status: number
  headers: IncomingHttpHeaders
  body: string
}

interface Question extends RequestOptions {
  url?: string
  body?: Buffer
}

/** One request on a connection of its own; the path goes out as it is written here. */
async function get(path: string, { url = own.url, body, ...options }: Question = {}): Promise<Got> {
  const { hostname, port, protocol } = new URL(url)
  const send = protocol === 'https:' ? httpsRequest : httpRequest
  const request = send({ hostname, port, path, agent: false, ...options })
  request.end(body)
  return await answerTo(request)
}

/** @throws Error when the connection ends before the answer does */
async function answerTo(request: ClientRequest): Promise<Got> {
  const [response] = (await once(request, 'response')) as [IncomingMessage]
  const body = (await buffer(response)).toString()
  return { status: response.statusCode ?? 0, headers: response.headers, body }
}

const control = (path: string, host = '127.0.0.1') =>
  get(path, { url: `http://${host}:${site.nginx.control.split(':').at(-1)}` })

const releaseOf = async (answer: Promise<Got>): Promise<unknown> => (await answer).headers['x-release']

async function rowsOf(token: string): Promise<number> {
  const { body } = await get(`/api/pings?filters[token][$in][0]=${token}`)
  return (JSON.parse(body) as { data: unknown[] }).data.length
}

async function slotAnswers(slot: SlotName): Promise<void> {
  const url = `http://${site.slots[slot].address}`
  await vi.waitFor(async () => expect((await get('/_health', { url })).status).toBe(204), soon)
}

async function stopSlots(...slots: SlotName[]): Promise<void> {
  await run(['docker', 'stop', ...slots.map((slot) => site.slots[slot].container)])
}

async function startSlots(...slots: SlotName[]): Promise<void> {
  await run(['docker', 'start', ...slots.map((slot) => site.slots[slot].container)])
  for (const slot of slots) await slotAnswers(slot)
}

/** A request that a visitor has begun and not ended. */
interface UnderWay {
  /** Lets it end as it should. */
  end(): Promise<Got | undefined>
}

function slowBody(token: string): UnderWay {
  const body = JSON.stringify({ data: { token } })
  const { hostname, port } = new URL(own.url)
  const headers = { 'content-type': 'application/json', 'content-length': body.length }
  const request = httpRequest({ hostname, port, path: '/api/pings', method: 'POST', headers, agent: false })
  const answer = answerTo(request)
  answer.catch(() => undefined)
  request.write(body.slice(0, 5))
  return {
    end: () => {
      request.end(body.slice(5))
      return answer
    },
  }
}

function slowAnswer(ms: number): UnderWay {
  const answer = get(`/api/pings/slow?ms=${ms}`)
  answer.catch(() => undefined)
  return { end: () => answer }
}

async function webSocket(): Promise<UnderWay> {
  const socket = await openSocket(own.url)
  expect(await socket.echo('hello')).toBe('hello')
  return {
    end: async () => {
      socket.close()
      await socket.closed
      return undefined
    },
  }
}

async function reload(): Promise<void> {
  const before = await workers()
  await run([...site.nginx.command, '-s', 'reload'])
  await vi.waitFor(async () => {
    const fresh = (await workers()).filter((pid) => !before.includes(pid))
    expect(fresh.length).toBeGreaterThan(1)
  }, soon)
}

async function workers(): Promise<string[]> {
  const pid = await nginxPid(own)
  return (await readFile(`/proc/${pid}/task/${pid}/children`, 'utf8')).split(' ').filter(Boolean)
}

describe('the shipped file', () => {
  const name = 'bob.strapi-pro.com'
  let folder: string
  let image: string

  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), `${own.project}-shipped-`))
    await chmod(folder, 0o755)
    image = `${own.project}-nginx`
    const plain = await readFile(shippedFile, 'utf8')
    await writeFile(join(folder, 'plain.conf'), plain)
    await writeFile(join(folder, 'tls.conf'), plain.replaceAll('#tls# ', ''))
    await mkdir(join(folder, 'live', name), { recursive: true })
    const [key, certificate] = [
      join(folder, 'live', name, 'privkey.pem'),
      join(folder, 'live', name, 'fullchain.pem'),
    ]
    const subject = ['-subj', `/CN=${name}`, '-addext', `subjectAltName=DNS:${name}`, '-days', '2']
    const kind = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes']
    await run(['openssl', 'req', '-x509', ...kind, ...subject, '-keyout', key, '-out', certificate])
    await mkdir(join(folder, 'uploads'))
    await writeFile(join(folder, 'uploads/picture.svg'), '<svg/>')
    await buildNextRelease()
  })
  afterAll(async () => {
    await ask(['docker', 'rm', '--force', `${own.project}-nginx`])
    await ask(['docker', 'image', 'rm', '--force', image])
    await rm(folder, { recursive: true, force: true })
  })

  async function buildNextRelease(): Promise<void> {
    const isStandIn = inject('baseImages').NODE_IMAGE?.startsWith('bob-standin/')
    // Not the older one, which a migration comes from.
    const tags = isStandIn ? await engine.tags('bob-standin/debian') : []
    const found = tags.find(({ tag }) => tag !== 'bookworm')
    const base = isStandIn ? `bob-standin/debian:${found?.tag}` : 'debian:trixie-slim'
    const apt = 'apt-get -o Acquire::Retries=3'
    const packages = `${apt} update && ${apt} install --yes --no-install-recommends nginx`
    await mkdir(join(folder, 'image'))
    await writeFile(join(folder, 'image/Dockerfile'), `FROM ${base}\nRUN ${packages}\n`)
    await run(['docker', 'build', '--tag', image, join(folder, 'image')], { timeoutMs: 300_000 })
  }

  /** What `nginx -t` says, line by line. @throws Error when it refuses */
  async function tested(argv: string[]): Promise<string[]> {
    const lines: string[] = []
    await run(argv, { onLine: (line) => lines.push(line) })
    return lines
  }

  test.each(['plain', 'tls'])("passes this host's nginx -t without a warning (%s)", async (variant) => {
    // Only the log and the certificates are elsewhere: the host's own folders are not ours.
    const text = (await readFile(join(folder, `${variant}.conf`), 'utf8'))
      .replaceAll('/var/log/nginx/', `${folder}/`)
      .replaceAll('/etc/letsencrypt/', `${folder}/`)
    await writeFile(join(folder, `host-${variant}.conf`), text)
    const main = join(folder, `main-${variant}.conf`)
    const http = `http { include /etc/nginx/mime.types; include ${folder}/host-${variant}.conf; }`
    await writeFile(main, `pid ${folder}/pid;\nevents {}\n${http}\n`)
    const lines = await tested(['nginx', '-t', '-c', main, '-e', join(folder, 'error.log')])
    expect(lines).toContain(`nginx: configuration file ${main} test is successful`)
    expect(lines.filter((line) => line.includes('[warn]'))).toEqual([])
  })

  /** Options of `docker run` that put a variant and what it names where the file says. */
  const mounts = (variant: string): string[] => [
    '--volume',
    `${folder}/${variant}.conf:/etc/nginx/conf.d/${name}.conf:ro`,
    '--volume',
    `${folder}/live:/etc/letsencrypt/live:ro`,
    '--volume',
    `${folder}/uploads:/var/www/bob/uploads:ro`,
  ]

  test.each(['plain', 'tls'])('passes nginx -t of Debian 13 (%s)', async (variant) => {
    const [version] = await tested(['docker', 'run', '--rm', image, 'nginx', '-v'])
    expect(version).toMatch(/nginx\/1\.(2[6-9]|[3-9]\d)/)
    const lines = await tested(['docker', 'run', '--rm', ...mounts(variant), image, 'nginx', '-t'])
    expect(lines.join()).toContain('test is successful')
    // "http2 on", which is asked for instead, is an error in Debian 12.
    const others = lines.filter((line) => line.includes('[warn]') && !line.includes('http2'))
    expect(others).toEqual([])
  })

  test('answers HTTPS in its TLS variant, and sends plain HTTP there with 308', async () => {
    const container = ['docker', 'run', '--detach', '--name', `${own.project}-nginx`]
    await run([...container, ...mounts('tls'), image, 'nginx', '-g', 'daemon off;'])
    const format = '{{.NetworkSettings.IPAddress}}'
    const address = (await run(['docker', 'inspect', '--format', format, `${own.project}-nginx`])).trim()
    const secure = {
      url: `https://${address}`,
      servername: name,
      ca: await readFile(join(folder, 'live', name, 'fullchain.pem')),
      headers: { host: name },
    }
    const picture = await vi.waitFor(() => get('/uploads/picture.svg', secure), soon)
    expect([picture.status, picture.body]).toEqual([200, '<svg/>'])
    // No Strapi is there.
    expect((await get('/api/pings', secure)).status).toBe(502)

    const plain = { url: `http://${address}`, headers: { host: name } }
    for (const method of ['GET', 'POST']) {
      const { status, headers } = await get('/api/pings?sort=token', { ...plain, method })
      expect([status, headers.location]).toEqual([308, `https://${name}/api/pings?sort=token`])
    }
  })
})

describe('the flag', () => {
  test('moves the next request and leaves those under way where they are', async () => {
    expect(await releaseOf(get('/api/pings'))).toBe(releases.master)
    const onMaster = [slowAnswer(2500), slowBody('moved')]
    await vi.waitFor(async () => expect((await control('/idle/master')).status).toBe(409), soon)

    await setFlag(site, 'strapi-slave')
    expect(await releaseOf(get('/api/pings'))).toBe(releases.slave)
    expect((await control('/upstream')).body).toBe('slave\n')
    const onSlave = slowAnswer(1500)
    await vi.waitFor(async () => expect((await control('/idle/slave')).status).toBe(409), soon)

    await setFlag(site, 'strapi-master')
    expect(await releaseOf(get('/api/pings'))).toBe(releases.master)
    expect((await onSlave.end())?.headers['x-release']).toBe(releases.slave)
    for (const one of onMaster) expect((await one.end())?.headers['x-release']).toBe(releases.master)
    expect(await rowsOf('moved')).toBe(1)
  })

  test("is not hidden by an open_file_cache in the host's own nginx.conf", async () => {
    const main = join(own.folder, 'nginx/nginx.conf')
    const before = await readFile(main, 'utf8')
    // The same question where nothing switches the cache off, to see that it would hide the flag.
    const port = Number(new URL(own.url).port) + 4
    const cached = `server {
      listen 127.0.0.1:${port};
      set $slot master;
      if (-f ${site.folders.traffic}/slave) { set $slot slave; }
      return 200 $slot;
    }`
    const cache =
      'open_file_cache max=1000 inactive=60s; open_file_cache_valid 60s; open_file_cache_errors on;'
    await writeFile(main, before.replace(/^http \{$/m, `http {\n${cache}\n${cached}`))
    await reload()
    try {
      const twenty = <T,>(question: () => Promise<T>) => Promise.all(Array.from({ length: 20 }, question))
      const ours = () => releaseOf(get('/api/pings'))
      const theirs = async () => (await get('/', { url: `http://127.0.0.1:${port}` })).body
      expect(new Set(await twenty(ours))).toEqual(new Set([releases.master]))
      expect(new Set(await twenty(theirs))).toEqual(new Set(['master']))
      await setFlag(site, 'strapi-slave')
      expect(new Set(await twenty(ours))).toEqual(new Set([releases.slave]))
      expect((await control('/upstream')).body).toBe('slave\n')
      expect(await twenty(theirs)).toContain('master')
    } finally {
      await writeFile(main, before)
      await reload()
    }
  })
})

describe('the control server', () => {
  test.each([
    { what: 'a slow body', begin: () => Promise.resolve(slowBody('counted')) },
    { what: 'a slow answer', begin: () => Promise.resolve(slowAnswer(4000)) },
    { what: 'a WebSocket', begin: webSocket },
  ])('says that a slot is not idle while $what is under way, also after a reload', async ({ begin }) => {
    const idle = async (slot: string) => (await control(`/idle/${slot}`)).status
    expect([await idle('master'), await idle('slave')]).toEqual([200, 200])
    const underWay = await begin()
    await vi.waitFor(async () => expect(await idle('master')).toBe(409), soon)
    expect(await idle('slave')).toBe(200)
    await reload()
    expect(await Promise.all(Array.from({ length: 8 }, () => idle('master')))).toEqual(Array(8).fill(409))
    const answer = await underWay.end()
    if (answer) expect(answer.status).toBeLessThan(300)
    await vi.waitFor(async () => expect(await idle('master')).toBe(200), soon)
  })

  test('answers on loopback and nowhere else', async () => {
    expect((await control('/upstream')).body).toBe('master\n')
    const addresses = Object.values(networkInterfaces())
      .flatMap((one) => one ?? [])
      .filter((one) => !one.internal && one.family === 'IPv4')
      .map((one) => one.address)
    expect(addresses.length).toBeGreaterThan(0)
    for (const address of addresses)
      await expect(control('/upstream', address)).rejects.toThrow('ECONNREFUSED')
  })
})

describe('uploads', () => {
  const picture = randomBytes(1000)

  beforeAll(async () => {
    const { uploads } = site.folders
    await mkdir(join(uploads, 'folder'))
    await writeFile(join(uploads, 'picture.png'), picture)
    await writeFile(join(uploads, 'page.html'), '<script>alert(1)</script>')
    await writeFile(join(uploads, '.hidden'), 'secret')
    await writeFile(join(uploads, 'folder/.hidden'), 'secret')
  })

  test('come as they are, and can do nothing in the name of the site', async () => {
    for (const [name, type] of [
      ['picture.png', 'image/png'],
      ['page.html', 'text/html'],
    ]) {
      const { status, headers } = await get(`/uploads/${name}`)
      expect([status, headers['content-type']]).toEqual([200, type])
      expect(headers['x-content-type-options']).toBe('nosniff')
      expect(headers['content-security-policy']).toMatch(/default-src 'none'.*; sandbox$/)
      expect(headers['set-cookie']).toBeUndefined()
    }
    const { headers } = await get('/uploads/picture.png', { method: 'HEAD' })
    expect(headers['content-length']).toBe('1000')
  })

  test('can be read in parts, and asked for again only when they changed', async () => {
    const part = await get('/uploads/page.html', { headers: { range: 'bytes=1-6' } })
    expect([part.status, part.body, part.headers['content-range']]).toEqual([206, 'script', 'bytes 1-6/25'])
    const { etag } = (await get('/uploads/picture.png')).headers
    const again = await get('/uploads/picture.png', { headers: { 'if-none-match': etag ?? '' } })
    expect(again.status).toBe(304)
  })

  test.each([
    ['GET', '/uploads/.hidden', 404],
    ['GET', '/uploads/folder/.hidden', 404],
    ['GET', '/uploads/missing.png', 404],
    ['GET', '/uploads/', 403],
    ['GET', '/uploads/folder/', 403],
    ['GET', '/uploads/../.env', 404],
    ['GET', '/uploads/%2e%2e/.env', 404],
    ['GET', '/uploads/..%2f.env', 404],
    ['POST', '/uploads/picture.png', 405],
    ['PUT', '/uploads/new.png', 405],
    ['DELETE', '/uploads/picture.png', 405],
  ])('%s %s is answered %d, and gives nothing away', async (method, path, status) => {
    const found = await get(path, { method })
    expect(found.status).toBe(status)
    expect(found.body).not.toMatch(/secret|picture|PASSWORD/)
    expect((await get('/uploads/picture.png')).status).toBe(200)
  })

  test('stay up without Strapi', async () => {
    await stopSlots('strapi-master', 'strapi-slave')
    try {
      expect((await get('/api/pings')).status).toBe(502)
      expect((await get('/uploads/picture.png')).status).toBe(200)
    } finally {
      await startSlots('strapi-master', 'strapi-slave')
    }
  })

  test('of 20 MB arrive whole, of 251 MB are refused with 413', async () => {
    const body = randomBytes(20 * 2 ** 20)
    const { status, body: text } = await get('/api/pings/echo', { method: 'POST', body })
    const sha256 = createHash('sha256').update(body).digest('hex')
    expect([status, JSON.parse(text)]).toEqual([200, { bytes: body.length, sha256 }])

    const { hostname, port } = new URL(own.url)
    const headers = { 'content-length': 251 * 2 ** 20 }
    const request = httpRequest({ hostname, port, path: '/api/pings/echo', method: 'POST', headers })
    request.flushHeaders()
    expect((await answerTo(request)).status).toBe(413)
    request.destroy()
  })
})

describe('a slot that goes away', () => {
  test('costs no GET: the other one answers', async () => {
    await stopSlots('strapi-master')
    try {
      for (let times = 0; times < 20; times += 1) {
        expect(await get('/api/pings')).toMatchObject({
          status: 200,
          headers: { 'x-release': releases.slave },
        })
      }
    } finally {
      await startSlots('strapi-master')
    }
  })

  test('costs nobody anything when nginx has seen the other one fail before, and a slow request comes first', async () => {
    await stopSlots('strapi-master', 'strapi-slave')
    try {
      expect((await get('/api/pings')).status).toBe(502)
      await startSlots('strapi-slave')
      const slow = slowAnswer(1500)
      await vi.waitFor(async () => expect((await control('/idle/master')).status).toBe(409), soon)
      const statuses = await Promise.all(
        Array.from({ length: 50 }, async () => (await get('/api/pings')).status),
      )
      expect(new Set(statuses)).toEqual(new Set([200]))
      expect((await slow.end())?.status).toBe(200)
    } finally {
      await startSlots('strapi-master')
    }
  })

  test('is not replaced by one that boots or is about to be stopped', async () => {
    await setAlone(site, true)
    expect((await control('/upstream')).body).toBe('master_alone\n')
    expect(await releaseOf(get('/api/pings'))).toBe(releases.master)
    await stopSlots('strapi-master')
    try {
      expect((await get('/api/pings')).status).toBe(502)
      await setAlone(site, false)
      expect(await releaseOf(get('/api/pings'))).toBe(releases.slave)
    } finally {
      await startSlots('strapi-master')
    }
  })

  test('costs no POST whose body is still arriving: the other one stores it, once', async () => {
    const underWay = slowBody('under-way')
    await vi.waitFor(async () => expect((await control('/idle/master')).status).toBe(409), soon)
    await stopSlots('strapi-master')
    try {
      expect(await underWay.end()).toMatchObject({ status: 201, headers: { 'x-release': releases.slave } })
      expect(await rowsOf('under-way')).toBe(1)
    } finally {
      await startSlots('strapi-master')
    }
  })
})

describe('what Strapi gets from nginx', () => {
  /** Stand where the slots stood, and see the requests that nginx sends them. */
  const seen: Record<'master' | 'slave', { method: string; headers: IncomingHttpHeaders }[]> = {
    master: [],
    slave: [],
  }
  const servers: Server[] = []
  let masterDies = false

  beforeAll(async () => {
    await stopSlots('strapi-master', 'strapi-slave')
    for (const slot of ['master', 'slave'] as const) {
      const server = createServer((request, response) => {
        request.resume().on('end', () => {
          seen[slot].push({ method: request.method ?? '', headers: request.headers })
          if (slot === 'master' && masterDies) request.socket.destroy()
          else response.setHeader('x-release', releases[slot]).end('{}')
        })
      })
      const [host, port] = site.slots[`strapi-${slot}`].address.split(':')
      await new Promise<void>((resolve) => server.listen(Number(port), host, resolve))
      servers.push(server)
    }
  })
  beforeEach(async () => {
    masterDies = false
    // nginx has seen master fail, and may still leave it out.
    await vi.waitFor(async () => {
      seen.slave = []
      await get('/api/pings')
      expect(seen.slave).toEqual([])
    }, soon)
    seen.master = []
  })
  afterAll(async () => {
    for (const server of servers) {
      server.closeAllConnections()
      await new Promise((resolve) => server.close(resolve))
    }
  })

  test("is the visitor's own address, whatever the visitor claims", async () => {
    const forged = {
      'x-forwarded-for': '6.6.6.6',
      'x-real-ip': '6.6.6.6',
      'x-forwarded-proto': 'https',
      'x-forwarded-host': 'evil.example',
    }
    await get('/api/pings', { headers: { ...forged, host: 'bob.example' }, localAddress: '127.0.0.7' })
    expect(seen.master[0]?.headers).toMatchObject({
      'x-forwarded-for': '127.0.0.7',
      'x-real-ip': '127.0.0.7',
      'x-forwarded-proto': 'http',
      'x-forwarded-host': 'bob.example',
      host: 'bob.example',
    })
    expect(JSON.stringify(seen.master)).not.toMatch(/6\.6\.6\.6|evil/)
  })

  test('is a connection that ends with its request', async () => {
    await get('/api/pings')
    expect(seen.master[0]?.headers.connection).toBe('close')
  })

  test('is a POST once, also when the slot dies under it; a GET goes to the other slot', async () => {
    masterDies = true
    const lost = await get('/api/pings', { method: 'POST', body: Buffer.from('only once') })
    expect(lost.status).toBe(502)
    expect(seen.master.map(({ method }) => method)).toEqual(['POST'])
    expect(seen.slave).toEqual([])

    expect(await get('/api/pings')).toMatchObject({ status: 200, headers: { 'x-release': releases.slave } })
    expect(seen.master.map(({ method }) => method)).toEqual(['POST', 'GET'])
    expect(seen.slave.map(({ method }) => method)).toEqual(['GET'])
  })
})
