/** Do visitors get answers with the database that is live now? */
import { smoke } from '../health.mts'
import { interrupted, pause, warn } from '../report.mts'
import type { Site } from '../settings.mts'
import { observe } from '../slots.mts'
import { flagged } from '../traffic.mts'

/** For a slot that runs to serve again after the swap. */
const patienceMs = 15_000

/** Whether the slot that visitors are sent to is switched off. */
export async function isOff(site: Site): Promise<boolean> {
  const status = await statusOf(site)
  return status === 'absent' || status === 'stopped'
}

/**
 * Gives the slot time to find out that its connections are gone, and to boot when that was too much for it.
 * @returns why visitors are not served, or undefined
 */
export async function failureToServe(site: Site): Promise<unknown> {
  const slot = flagged(site)
  const startedAt = Date.now()
  let bootedAt = startedAt
  for (;;) {
    try {
      const status = await statusOf(site)
      if (status === 'booting') bootedAt = Date.now()
      if (status !== 'healthy' && status !== 'unhealthy') throw new Error(`${slot} is ${status}`)
      await smoke(site, slot)
      // The engine's probe, a process of its own, is the first that a busy machine starves.
      if (status === 'unhealthy')
        warn(`${slot} answers, but the engine calls it unhealthy: is it overloaded?`)
      return undefined
    } catch (failure) {
      const isTooLate = Date.now() - startedAt > site.health.timeoutMs
      if (isTooLate || Date.now() - bootedAt > patienceMs || interrupted.aborted) return failure
    }
    // Interrupted meanwhile, it asks once more.
    await pause(200).catch(() => undefined)
  }
}

async function statusOf(site: Site) {
  const { master, slave } = await observe(site)
  return (flagged(site) === 'strapi-slave' ? slave : master).status
}
