// Stand-in for Strapi in the kill and failure matrix: boots in a moment, the same to nginx and to a deploy.
//
// Like Strapi it listens only when its boot is over, answers /_health with 204, marks every answer with
// x-release and drains nothing: SIGTERM destroys every open socket. Its table is a file in the uploads
// volume, which both slots share. behaviour.json, baked into the image, makes it a bad release (see
// Behaviour). Node's own modules only, so that the image builds without a network.
import { createHash, randomBytes } from 'node:crypto'
import {
  appendFileSync,
  closeSync,
  fstatSync,
  openSync,
  readFileSync,
  readSync,
  rmSync,
  writeFileSync,
} from 'node:fs'
import { createServer } from 'node:http'
import { buffer, json } from 'node:stream/consumers'
import { setTimeout as sleep } from 'node:timers/promises'

/**
 * @typedef {object} Behaviour
 * @property {number} [bootMs] Until it listens; 300 by default.
 * @property {boolean} [neverHealthy] The boot never ends.
 * @property {boolean} [exitAtOnce] Exits with 1 instead of booting.
 * @property {number} [exitAfterMs] Exits with 1 that long after its start, booted or not.
 * @property {number} [smokeStatus] What /admin/init answers instead of 200.
 * @property {'master' | 'slave'} [onlyOn] Limits all of this to one slot: CRON_ENABLED is true on master.
 */

const { HOST = '0.0.0.0', PORT = '1337', RELEASE = '', CRON_ENABLED = 'true' } = process.env
const slot = CRON_ENABLED === 'true' ? 'master' : 'slave'
const table = new URL('./public/uploads/.pings', import.meta.url)

/** @type {Behaviour} */
const asked = JSON.parse(readFileSync(new URL('./behaviour.json', import.meta.url), 'utf8'))
const behaviour = (asked.onlyOn ?? slot) === slot ? asked : {}

// --- The table: one line a row, appended with one write, so that two containers never mix theirs --------

/** @type {Map<string, object[]>} */
const rowsByToken = new Map()
const rows = []
let readBytes = 0

function insert(token) {
  const row = { token, release: RELEASE, createdAt: new Date().toISOString() }
  appendFileSync(table, `${JSON.stringify(row)}\n`)
  return row
}

/** Reads what either slot appended since the last time. */
function refresh() {
  const file = openSync(table, 'a+')
  try {
    const { size } = fstatSync(file)
    if (size < readBytes) {
      rows.length = readBytes = 0
      rowsByToken.clear()
    }
    const added = Buffer.alloc(size - readBytes)
    const length = readSync(file, added, 0, added.length, readBytes)
    const end = added.subarray(0, length).lastIndexOf('\n') + 1
    for (const line of added.toString('utf8', 0, end).split('\n').slice(0, -1)) {
      const row = { id: rows.length + 1, ...JSON.parse(line) }
      rows.push(row)
      rowsByToken.set(row.token, [...(rowsByToken.get(row.token) ?? []), row])
    }
    readBytes += end
  } finally {
    closeSync(file)
  }
}

// --- Routes, with the shapes of Strapi's REST API ----------------------------------------------------------

const routes = {
  'GET /_health': (request, response) => response.writeHead(204).end(),
  'GET /admin/init': (request, response) =>
    send(response, behaviour.smokeStatus ?? 200, { data: { hasAdmin: true } }),
  'GET /admin': (request, response) => send(response, 200, {}),
  'GET /api/pings': find,
  'POST /api/pings': create,
  'GET /api/pings/slow': slow,
  'POST /api/pings/echo': echo,
  'POST /api/upload': upload,
}

function find(request, response, query) {
  refresh()
  const tokens = [...query].flatMap(([key, value]) =>
    /^filters\[token\]\[\$in\]\[\d+\]$/.test(key) ? [value] : [],
  )
  const found = tokens.length > 0 ? tokens.flatMap((token) => rowsByToken.get(token) ?? []) : rows
  const page = Number(query.get('pagination[page]') ?? 1)
  const pageSize = Math.min(100, Number(query.get('pagination[pageSize]') ?? 25))
  const data = found.slice((page - 1) * pageSize, page * pageSize)
  const pagination = { page, pageSize, pageCount: Math.ceil(found.length / pageSize), total: found.length }
  send(response, 200, { data, meta: { pagination } })
}

async function create(request, response) {
  const { data } = await json(request)
  send(response, 201, { data: insert(data.token), meta: {} })
}

async function slow(request, response, query) {
  const ms = Math.min(30_000, Number(query.get('ms')))
  await sleep(ms)
  send(response, 200, { ms })
}

async function echo(request, response) {
  const hash = createHash('sha256')
  let bytes = 0
  for await (const part of request) {
    bytes += part.length
    hash.update(part)
  }
  send(response, 200, { bytes, sha256: hash.digest('hex') })
}

/** One file, whatever it is called; its name is its id. */
async function upload(request, response) {
  const body = await buffer(request)
  const [head] = body.toString('latin1').split('\r\n', 1)
  const from = body.indexOf('\r\n\r\n') + 4
  const id = randomBytes(5).toString('hex')
  writeFileSync(
    new URL(`./public/uploads/file_${id}.png`, import.meta.url),
    body.subarray(from, body.indexOf(`\r\n${head}`, from)),
  )
  send(response, 201, [{ id, url: `/uploads/file_${id}.png` }])
}

function removeUpload(response, id) {
  rmSync(new URL(`./public/uploads/file_${id}.png`, import.meta.url))
  send(response, 200, {})
}

function send(response, status, body) {
  response.writeHead(status, { 'content-type': 'application/json' }).end(JSON.stringify(body))
}

function sendError(response, status, message) {
  send(response, status, { data: null, error: { status, message } })
}

async function answer(request, response) {
  response.setHeader('x-release', RELEASE)
  const { pathname, searchParams } = new URL(request.url, 'http://localhost')
  const [, id] = /^\/api\/upload\/files\/([0-9a-f]+)$/.exec(pathname) ?? []
  if (id && request.method === 'DELETE') return removeUpload(response, id)
  const route = routes[`${request.method} ${pathname}`]
  if (!route) return sendError(response, 404, 'Not Found')
  try {
    await route(request, response, searchParams)
  } catch (error) {
    console.error(error)
    if (!response.headersSent) sendError(response, error instanceof SyntaxError ? 400 : 500, error.message)
  }
}

const server = createServer((request, response) => void answer(request, response))

// --- /ws echoes text of up to 125 bytes and answers pings: all that holding a socket needs (RFC 6455) ------

const TEXT = 0x81
const CLOSE = 0x88
const PING = 0x89
const PONG = 0x8a

server.on('upgrade', (request, socket, head) => {
  socket.on('error', () => socket.destroy())
  if (request.url !== '/ws') {
    socket.end(`HTTP/1.1 404 Not Found\r\nconnection: close\r\nx-release: ${RELEASE}\r\n\r\n`)
    return
  }
  const key = `${request.headers['sec-websocket-key']}258EAFA5-E914-47DA-95CA-C5AB0DC85B11`
  const accept = createHash('sha1').update(key).digest('base64')
  socket.write(
    'HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n' +
      `sec-websocket-accept: ${accept}\r\nx-release: ${RELEASE}\r\n\r\n`,
  )
  let received = Buffer.alloc(0)
  const read = (part) => {
    received = Buffer.concat([received, part])
    for (let frame = firstFrame(received); frame; frame = firstFrame(received)) {
      received = received.subarray(frame.size)
      respond(socket, frame)
    }
  }
  read(head)
  socket.on('data', read)
})

/** A client's frame (opcode, length with the mask bit, four bytes of mask, payload), when it is complete. */
function firstFrame(bytes) {
  if (bytes.length < 6) return undefined
  const length = bytes[1] & 0x7f
  if (length > 125) return { opcode: CLOSE, payload: Buffer.alloc(0), size: bytes.length }
  if (bytes.length < 6 + length) return undefined
  const mask = bytes.subarray(2, 6)
  const payload = bytes.subarray(6, 6 + length).map((byte, index) => byte ^ mask[index % 4])
  return { opcode: bytes[0], payload, size: 6 + length }
}

function respond(socket, { opcode, payload }) {
  const reply = { [TEXT]: TEXT, [PING]: PONG, [CLOSE]: CLOSE }[opcode]
  if (reply !== undefined) socket.write(Buffer.concat([Buffer.from([reply, payload.length]), payload]))
  if (opcode === CLOSE) socket.end()
}

// --- Life --------------------------------------------------------------------------------------------------

const sockets = new Set()
server.on('connection', (socket) => {
  sockets.add(socket)
  socket.once('close', () => sockets.delete(socket))
})

process.once('SIGTERM', () => {
  for (const socket of sockets) socket.destroy()
  process.exit(0)
})

function fail() {
  console.error(`Release ${RELEASE} exits, as its behaviour.json wants`)
  process.exit(1)
}

console.log(`Release ${RELEASE} boots as ${slot}`)
if (behaviour.exitAtOnce) fail()
if (behaviour.exitAfterMs !== undefined) setTimeout(fail, behaviour.exitAfterMs)
await sleep(behaviour.neverHealthy ? 2 ** 31 - 1 : (behaviour.bootMs ?? 300))
server.listen(Number(PORT), HOST, () => console.log(`Release ${RELEASE} listens on ${HOST}:${PORT}`))
if (slot === 'master') setInterval(() => console.log(`[CRON] release ${RELEASE}`), 1000)
