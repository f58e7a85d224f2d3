/** Moves visitors between the slots: one flag file that nginx looks at for each request, and nginx's own word for what it does. */
import { access, open, readFile, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { syncFolder } from './envfile.mts'
import { getUrl } from './http.mts'
import { exitCodes, pause, Problem } from './report.mts'
import { scriptCommand, type Site, type SlotName } from './settings.mts'

/** Raised together with nginx/*.conf whenever a deploy needs a newer one. */
export const contract = 1

/** What the running nginx must say about itself at /config of its control server. */
function expectedConfig(site: Site): Record<string, string | number> {
  return {
    contract,
    site: site.nginx.serverName,
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
export async function flagged(site: Site): Promise<SlotName> {
  const present = await access(flagPath(site)).then(
    () => true,
    () => false,
  )
  return present ? 'strapi-slave' : 'strapi-master'
}

/** The slot that nginx gives the next request to. @throws Error when its control server does not answer */
export async function selected(site: Site): Promise<SlotName> {
  const { body } = await getUrl(`http://${site.nginx.control}/slot`)
  return body.trim() === 'slave' ? 'strapi-slave' : 'strapi-master'
}

/** host:port that answers when nginx asks this slot's upstream: the slot itself, or its backup. */
export async function reached(site: Site, slot: SlotName): Promise<string> {
  const { status, headers } = await getUrl(`http://${site.nginx.control}/reach/${shortName(slot)}`, {
    timeoutMs: 15_000,
  })
  const address =
    String(headers['x-upstream'] ?? '')
      .split(', ')
      .at(-1) ?? ''
  if (status >= 500) throw new Error(`nginx gets ${status} from ${address || 'no server'} for ${slot}`)
  return address
}

/**
 * Sends every new request to `slot` and waits until nginx confirms it. Requests under way stay where they are.
 * The slot must be healthy: it is reached through nginx first.
 * @throws Problem, with the flag as it was
 */
export async function send(site: Site, slot: SlotName): Promise<void> {
  await until(site, 10_000, async () => {
    const address = await reached(site, slot)
    return address === site.slots[slot].address ? undefined : `nginx reaches ${address} instead of ${slot}`
  })
  const before = await flagged(site)
  await setFlag(site, slot)
  try {
    await until(site, 5000, async () =>
      (await selected(site)) === slot ? undefined : `nginx still selects the other slot`,
    )
  } catch (error) {
    await setFlag(site, before)
    throw error
  }
}

/** The flag alone, for when nobody can confirm it. */
export async function setFlag(site: Site, slot: SlotName): Promise<void> {
  if (slot === 'strapi-master') {
    await rm(flagPath(site), { force: true })
  } else {
    const file = await open(flagPath(site), 'a', 0o644)
    await file.sync()
    await file.close()
  }
  await syncFolder(site.folders.traffic)
}

/**
 * Waits until a slot that gets no new requests can be stopped: nginx counts none under way for it, has no connection to it
 * (a request of the other slot may have fallen back on it), and reaches the serving slot itself.
 * @returns false when requests were left after DRAIN_TIMEOUT
 * @throws Problem when the serving slot does not answer by itself: nginx still needs the one that was to be stopped
 */
export async function drained(site: Site, slot: SlotName): Promise<boolean> {
  const deadline = Date.now() + site.drainTimeoutMs
  const serving = slot === 'strapi-master' ? 'strapi-slave' : 'strapi-master'
  // Twice: a request that chose the slot just before the move may not be counted yet.
  for (let idle = 0; ;) {
    idle = (await isIdle(site, slot)) ? idle + 1 : 0
    const address = await reached(site, serving).catch((error: Error) => error.message)
    const isAlone = address === site.slots[serving].address
    if (idle >= 2 && isAlone) return true
    if (Date.now() > deadline && isAlone) return false
    // A serving slot that is only slow for a moment gets the same time again.
    if (Date.now() > deadline + Math.max(site.drainTimeoutMs, 10_000)) {
      throw new Problem(
        exitCodes.degraded,
        `visitors are meant for ${serving}, but nginx reaches ${address}: ${slot} is still needed and keeps running`,
        `Look at the load of this host and at ${serving}, then: ${scriptCommand('deploy', site.envFile)}`,
      )
    }
    await pause(100)
  }
}

/**
 * Waits until no request is left that would reach a stopped slot if it were started: a slow body that chose it before
 * the move connects late, and a booting slot would lose it.
 * @returns false when some were left after DRAIN_TIMEOUT
 */
export async function forgotten(site: Site, slot: SlotName): Promise<boolean> {
  const deadline = Date.now() + site.drainTimeoutMs
  while (!(await isIdle(site, slot))) {
    if (Date.now() > deadline) return false
    await pause(100)
  }
  return true
}

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

function flagPath(site: Site): string {
  return join(site.folders.traffic, 'slave')
}

function shortName(slot: SlotName): string {
  return slot.replace('strapi-', '')
}
