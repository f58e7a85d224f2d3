/** One script at a time per site. The lock is an abstract Unix socket: the kernel takes it back when its process dies. */
import { connect, createServer, type Server } from 'node:net'
import { exitCodes, pause, Problem } from './report.mts'

export interface Holder {
  pid: number
  /** What it does, as typed. */
  command: string
  since: string
}

export interface Lock {
  release(): void
}

/**
 * Takes the lock of a site, waiting for `waitMs` if it is held.
 * @throws Problem (locked) that says who holds it, since when, doing what
 */
export async function takeLock(project: string, command: string, waitMs = 0): Promise<Lock> {
  const deadline = Date.now() + waitMs
  for (;;) {
    const server = await listen(project, { pid: process.pid, command, since: new Date().toISOString() })
    if (server) return { release: () => server.close() }
    if (Date.now() >= deadline) {
      const holder = await lockHolder(project)
      // Gone between the two questions.
      if (holder === undefined) continue
      throw new Problem(exitCodes.locked, describeHolder(holder), 'Wait for it, or add: --wait 30m')
    }
    await pause(Math.min(500, Math.max(1, deadline - Date.now())))
  }
}

/** One `verify --deep` at a time; not the lock of the site, since a deploy need not wait for it. */
export function verifyLock({ project }: { project: string }): string {
  return `${project}/verify`
}

export function describeHolder(holder: Holder): string {
  return `another run is in progress: "${holder.command}", process ${holder.pid || 'unknown'}, since ${holder.since ? `${holder.since.slice(0, 19).replace('T', ' ')} UTC` : 'unknown'}`
}

/** Who holds the lock, or undefined. */
export async function lockHolder(project: string): Promise<Holder | undefined> {
  return await new Promise((resolve) => {
    const socket = connect({ path: nameOf(project) })
    let text = ''
    socket.setEncoding('utf8')
    socket.setTimeout(1000, () => socket.destroy(new Error('no answer')))
    socket.on('data', (part: string) => (text += part))
    const unknown = { pid: 0, command: 'a process that does not answer', since: '' }
    // It may be killed before it has said who it is.
    socket.on('end', () => resolve(text.endsWith('}') ? (JSON.parse(text) as Holder) : unknown))
    socket.on('error', (error) => {
      const free = 'code' in error && error.code === 'ECONNREFUSED'
      resolve(free ? undefined : unknown)
    })
  })
}

function listen(project: string, holder: Holder): Promise<Server | undefined> {
  return new Promise((resolve, reject) => {
    const server = createServer((socket) => {
      socket.on('error', () => socket.destroy())
      socket.end(JSON.stringify(holder))
    })
    server.on('error', (error) =>
      'code' in error && error.code === 'EADDRINUSE' ? resolve(undefined) : reject(error),
    )
    server.listen({ path: nameOf(project) }, () => resolve(server))
    server.unref()
  })
}

function nameOf(project: string): string {
  return `\0strapi-blue-green/${project}`
}

/** "90s", "30m", "2h" or plain seconds, in milliseconds. @throws Problem (usage) */
export function parseDuration(text: string): number {
  const [, amount, unit = 's'] = /^(\d+)([smh]?)$/.exec(text) ?? []
  const factors: Record<string, number> = { '': 1000, s: 1000, m: 60_000, h: 3_600_000 }
  const factor = factors[unit]
  if (amount === undefined || factor === undefined) {
    throw new Problem(exitCodes.usage, `"${text}" is not a duration`, 'Write it like 90s, 30m or 2h.')
  }
  return Number(amount) * factor
}
