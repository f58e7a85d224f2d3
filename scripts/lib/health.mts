/** Waits until a slot is fit for visitors: the engine's word, our own probe, the right image, the smoke paths. */
import * as engine from './engine.mts'
import { getUrl } from './http.mts'
import { pause } from './report.mts'
import type { Site, SlotName } from './settings.mts'
import { obstacleTo } from './traffic.mts'

/** What the last probe saw: ready, not yet, or never. */
type Verdict = { ready: true; hopeless?: false } | { ready: false; reason: string; hopeless?: boolean }

/** To ask the engine costs 10 ms, and each second that a deploy takes is one in which it can be disturbed. */
const askEngineMs = 100

/**
 * The slot itself is asked every HEALTH_INTERVAL, and as soon as the engine calls it healthy.
 * @throws Error with the last reason, at once when it cannot recover, at the latest after HEALTH_TIMEOUT
 */
export async function untilHealthy(site: Site, slot: SlotName, imageId: string): Promise<void> {
  const deadline = Date.now() + site.health.timeoutMs
  let answer = 'was not asked yet'
  for (let askAt = 0; ;) {
    const word = await engineWord(site, slot, imageId).catch(asReason)
    if (word.hopeless) throw new Error(`${slot} ${word.reason}`)
    if (word.ready || Date.now() >= askAt) {
      askAt = Date.now() + site.health.intervalMs
      const own = await probe(site, slot).catch(asReason)
      if (word.ready && own.ready) return
      answer = own.ready ? '/_health answers' : own.reason
    }
    if (Date.now() > deadline) {
      const reason = word.ready ? answer : `${answer}, ${word.reason}`
      throw new Error(`${slot} was not healthy after ${site.health.timeoutMs / 1000} s: ${reason}`)
    }
    await pause(askEngineMs)
  }
}

/**
 * A release may boot well and fall under its first visitors; then the engine starts it again.
 * @throws Error when the slot has not run all the time since it was found healthy, or nginx does not get through to it
 */
export async function stillFit(site: Site, slot: SlotName, imageId: string): Promise<void> {
  const word = await engineWord(site, slot, imageId)
  if (!word.ready) throw new Error(`${slot} got visitors, and ${word.reason}`)
  const obstacle = await obstacleTo(site, slot)
  if (obstacle !== undefined) throw new Error(obstacle)
}

/**
 * Asks each of SMOKE_PATHS once. They count only on a slot that is healthy.
 * @throws Error that lists every path that did not answer 2xx or 3xx
 */
export async function smoke(site: Site, slot: SlotName): Promise<void> {
  const failures: string[] = []
  for (const path of site.health.smokePaths) {
    const url = `http://${site.slots[slot].address}${path}`
    const failure = await getUrl(url, { timeoutMs: 30_000 }).then(
      ({ status, body }) => (status < 400 ? undefined : `${path} answered ${status}: ${body.slice(0, 200)}`),
      (error: unknown) => (error instanceof Error ? error.message : String(error)),
    )
    if (failure) failures.push(failure)
  }
  if (failures.length > 0) throw new Error(`${slot} is healthy, but ${failures.join('; ')}`)
}

/** What the engine says of the container. */
async function engineWord(site: Site, slot: SlotName, imageId: string): Promise<Verdict> {
  const found = await engine.container(site.slots[slot].container)
  if (!found) return { ready: false, reason: 'has no container', hopeless: true }
  if (found.Image !== imageId)
    return { ready: false, reason: `runs another image than this release's (${found.Image})`, hopeless: true }
  if (found.RestartCount > 0 || found.State.Status === 'restarting') {
    return {
      ready: false,
      reason: `exited and was started again (exit code ${found.State.ExitCode})`,
      hopeless: true,
    }
  }
  if (found.State.Status === 'exited' || found.State.Status === 'dead') {
    return { ready: false, reason: `exited (exit code ${found.State.ExitCode})`, hopeless: true }
  }
  const state = found.State.Health?.Status ?? 'healthy'
  return state === 'healthy' ? { ready: true } : { ready: false, reason: `the engine says ${state}` }
}

async function probe(site: Site, slot: SlotName): Promise<Verdict> {
  const { status } = await getUrl(`http://${site.slots[slot].address}/_health`)
  return status < 300 ? { ready: true } : { ready: false, reason: `/_health answers ${status}` }
}

/** The engine may be restarting: that is a reason to wait, not to give up. */
function asReason(error: unknown): Verdict {
  return { ready: false, reason: error instanceof Error ? error.message : String(error) }
}
