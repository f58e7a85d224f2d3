/** Moves visitors between the slots: flag files that nginx looks at for each request, and nginx's own word for what it does. */
import { existsSync } from 'node:fs'
import { open, readFile, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { syncFolder } from './envfile.mts'
import { getUrl } from './http.mts'
import { exitCodes, explain, pause, Problem, refuseInDryRun } from './report.mts'
import { scriptCommand, type Site, type SlotName } from './settings.mts'

/** Raised together with nginx/*.conf whenever a deploy needs a newer one. */
export const contract = 1

/** What the running nginx must say about itself at /config of its control server. */
function expectedConfig(site: Site): Record<string, string | number> {
  return {
    contract,
    site: site.nginx.serverName,
    listen: site.nginx.listen,
    master: site.slots['strapi-master'].address,
    slave: site.slots['strapi-slave'].address,
    traffic: site.folders.traffic,
    uploads: site.folders.uploads,
    tls: site.nginx.tls?.certificate ?? 'none',
  }
}

/** Differences between the configuration that nginx runs and the one it should run; empty when all is well. */
export async function differences(site: Site): Promise<string[]> {
  const running = await getUrl(`http://${site.nginx.control}/config`).catch((error: Error) => error)
  if (running instanceof Error) return [`its control server does not answer (${running.message})`]
  const config = parseObject(running.body)
  if (!config) return [`${site.nginx.control} answers, but is not this site's control server`]
  return Object.entries(expectedConfig(site))
    .filter(([key, wanted]) => config[key] !== wanted)
    .map(([key, wanted]) => `${key} is "${String(config[key])}" and should be "${wanted}"`)
}

function parseObject(text: string): Record<string, unknown> | undefined {
  try {
    return JSON.parse(text) as Record<string, unknown>
  } catch (error) {
    if (error instanceof SyntaxError) return undefined
    throw error
  }
}

/** The slot that the flag names. */
export function flagged(site: Site): SlotName {
  return existsSync(flagPath(site)) ? 'strapi-slave' : 'strapi-master'
}

/** Whether nginx is told not to fall back on the slot that the flag does not name. */
export function isAlone(site: Site): boolean {
  return existsSync(alonePath(site))
}

/** The upstream that nginx gives the next request to, in its own words. @throws Error when its control server does not answer */
async function upstream(site: Site): Promise<string> {
  return (await getUrl(`http://${site.nginx.control}/upstream`)).body.trim()
}

/** The slot that nginx gives the next request to. @throws Error when its control server does not answer */
export async function selected(site: Site): Promise<SlotName> {
  return (await upstream(site)).startsWith('slave') ? 'strapi-slave' : 'strapi-master'
}

/** Why nginx does not get through to this slot, or undefined. @throws Error when its control server does not answer */
export async function obstacleTo(site: Site, slot: SlotName): Promise<string | undefined> {
  const { status } = await getUrl(`http://${site.nginx.control}/reach/${shortName(slot)}`, {
    timeoutMs: 15_000,
  })
  return status < 500 ? undefined : `nginx gets ${status} from ${slot} at ${site.slots[slot].address}`
}

/**
 * Sends every new request to `slot` and waits until nginx confirms it. Requests under way stay where they are.
 * The slot must be healthy: it is reached through nginx first. While the other one runs, too, either may stand in for it.
 * @throws Problem, with visitors where they were
 */
export async function send(site: Site, slot: SlotName): Promise<void> {
  await until(site, 10_000, () => obstacleTo(site, slot))
  const before = flagged(site)
  await setAlone(site, false)
  await setFlag(site, slot)
  try {
    await until(site, 5000, async () =>
      (await upstream(site)) === shortName(slot) ? undefined : 'nginx still selects the other slot',
    )
  } catch (error) {
    await setFlag(site, before)
    throw error
  }
}

/** The flag alone, for when nobody can confirm it. */
export async function setFlag(site: Site, slot: SlotName): Promise<void> {
  await setFile(site, flagPath(site), slot === 'strapi-slave')
}

/** Lets nginx fall back on the slot that the flag does not name, or not. */
export async function setAlone(site: Site, alone: boolean): Promise<void> {
  await setFile(site, alonePath(site), alone)
}

/**
 * From now on nobody falls back on the slot that the flag does not name: it boots, or is about to be stopped.
 * @throws Problem when nginx does not confirm it
 */
export async function secludeIdleSlot(site: Site): Promise<void> {
  await setAlone(site, true)
  await until(site, 5000, async () =>
    (await upstream(site)).endsWith('_alone') ? undefined : 'nginx still falls back on the other slot',
  )
}

/** How long the serving slot may fail to answer before visitors need the other one. */
const patienceMs = 5000

/**
 * Waits until a slot that gets no new requests can be stopped: none is left on it, and the other one serves.
 * Afterwards nobody falls back on it; until then, and after an error, nginx may.
 * @returns false when requests were left after DRAIN_TIMEOUT
 * @throws Error when the serving slot does not answer: visitors still need the one that was to be stopped
 */
export async function drained(site: Site, slot: SlotName): Promise<boolean> {
  const serving = otherSlot(slot)
  const deadline = Date.now() + site.drainTimeoutMs
  try {
    for (;;) {
      await setAlone(site, false)
      await untilIdle(site, slot, deadline, serving)
      await secludeIdleSlot(site)
      const isEmpty = await untilIdle(site, slot, deadline, serving)
      if ((await obstacleTo(site, serving).catch(explain)) === undefined) return isEmpty
    }
  } catch (error) {
    await setAlone(site, false)
    throw error
  }
}

/**
 * Waits until no request is left that reaches a slot, or would reach it if it were started: a slow body that chose it before
 * a move connects late, and a booting slot would lose it.
 * @param deadline in milliseconds since the epoch
 * @param serving must answer, also at the very end
 * @returns false when some were left at the deadline
 * @throws Error when nginx or `serving` has not answered for some seconds
 */
export async function untilIdle(
  site: Site,
  slot: SlotName,
  deadline: number,
  serving?: SlotName,
): Promise<boolean> {
  let answeredAt = Date.now()
  // Twice: a request that chose the slot just before may not be counted yet.
  for (let times = 0; ;) {
    try {
      times = (await isIdle(site, slot)) ? times + 1 : 0
      const obstacle = serving && (await obstacleTo(site, serving))
      if (obstacle !== undefined) throw new Error(obstacle)
      answeredAt = Date.now()
      if (times >= 2) return true
      if (times === 0 && Date.now() > deadline) return false
    } catch (error) {
      // nginx may be restarting, and then counts anew.
      times = 0
      if (Date.now() > answeredAt + patienceMs) throw error
    }
    await pause(100)
  }
}

/** nginx counts no request under way for the slot, and has no connection to it: one of the other slot may have fallen back on it. */
async function isIdle(site: Site, slot: SlotName): Promise<boolean> {
  const { status } = await getUrl(`http://${site.nginx.control}/idle/${shortName(slot)}`)
  if (status !== 200 && status !== 409) {
    throw new Error(`nginx answered ${status} when asked whether ${slot} is idle`)
  }
  return status === 200 && (await connectionsTo(site.slots[slot].address)) === 0
}

/** Connections from this host to an IPv4 address, from the kernel's table. https://docs.kernel.org/networking/proc_net_tcp.html */
export async function connectionsTo(address: string): Promise<number> {
  const [host = '', port = ''] = address.split(':')
  const hex = (value: string) => Number(value).toString(16).toUpperCase().padStart(2, '0')
  // Addresses are in the byte order of the machine, which is little-endian wherever this runs.
  const wanted = `${host.split('.').toReversed().map(hex).join('')}:${hex(port).padStart(4, '0')}`
  const established = '01'
  const rows = (await readFile('/proc/net/tcp', 'utf8')).split('\n').map((row) => row.trim().split(/\s+/))
  return rows.filter(([, , remote, state]) => remote === wanted && state === established).length
}

async function until(site: Site, timeoutMs: number, probe: () => Promise<string | undefined>): Promise<void> {
  const deadline = Date.now() + timeoutMs
  for (;;) {
    const reason = await probe().catch((error: unknown) =>
      error instanceof Error ? error.message : String(error),
    )
    if (reason === undefined) return
    if (Date.now() > deadline) {
      const advice = `Look at nginx: ${site.nginx.command.join(' ')} -t, its error log, and ${scriptCommand('setup', site.envFile)}`
      throw new Problem(exitCodes.failed, `visitors could not be moved: ${reason}`, advice)
    }
    await pause(50)
  }
}

async function setFile(site: Site, path: string, present: boolean): Promise<void> {
  refuseInDryRun(`write ${path}`)
  if (present) {
    const file = await open(path, 'a', 0o644)
    await file.sync()
    await file.close()
  } else {
    await rm(path, { force: true })
  }
  await syncFolder(site.folders.traffic)
}

function flagPath(site: Site): string {
  return join(site.folders.traffic, 'slave')
}

function alonePath(site: Site): string {
  return join(site.folders.traffic, 'alone')
}

export function otherSlot(slot: SlotName): SlotName {
  return slot === 'strapi-master' ? 'strapi-slave' : 'strapi-master'
}

function shortName(slot: SlotName): string {
  return slot.replace('strapi-', '')
}
