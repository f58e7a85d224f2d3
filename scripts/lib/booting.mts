/** What the engine may start again by itself, after a crash or a reboot. */
import { appendFile, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { run } from './command.mts'
import { start, stop } from './compose.mts'
import * as engine from './engine.mts'
import { readText } from './envfile.mts'
import { makeStateDir, recordedSchema } from './history.mts'
import { change, warn } from './report.mts'
import { readSchema } from './schema.mts'
import type { Site, SlotName } from './settings.mts'
import { observe, statusOf } from './slots.mts'

/**
 * Does not count as a change for Compose.
 * @throws Error when the engine does not take it; a container that ends at this very moment it takes a moment later
 */
export async function setRestart(container: string, policy: string): Promise<void> {
  for (let attemptsLeft = 5; ; attemptsLeft--) {
    try {
      await run(['docker', 'update', '--restart', policy, container])
      return
    } catch (error) {
      if (attemptsLeft === 1 || !String(error).includes('Cannot update container')) throw error
      await sleep(200)
    }
  }
}

/** For a container that need not be there. @throws Error as `setRestart`, but for that */
export async function setRestartIfThere(container: string, policy: string): Promise<void> {
  await setRestart(container, policy).catch((error: unknown) => {
    if (!String(error).includes('No such container')) throw error
  })
}

/** What the database has and the code of a booting release does not know, Strapi drops: none of the slots boots any more. */
export async function forbidBooting(site: Site, restore: string): Promise<void> {
  for (const slot of ['strapi-master', 'strapi-slave'] as const) {
    await setRestartIfThere(site.slots[slot].container, 'no')
    // That calls off neither a boot under way nor one that the engine has in mind for what has crashed.
    const found = await engine.container(site.slots[slot].container)
    if (!found || (found.State.Status !== 'restarting' && statusOf(found) !== 'booting')) continue
    await makeStateDir(site)
    await appendFile(stoppedFile(site), `${restore} ${found.Id}\n`)
    await run(stop(site, slot))
    warn(
      `${slot} was not healthy, and is stopped: its release must not boot on the database of another schema`,
    )
  }
}

/** Which restore has stopped which container for that. */
function stoppedFile(site: Site): string {
  return join(site.stateDir, 'kept-from-booting')
}

/**
 * Lets a slot come back, but for one that `forbidBooting` has kept from it and whose release still is not that of the database.
 * @param takenBack the restore that is: what it has stopped is started again
 */
export async function allowBooting(site: Site, slot: SlotName, takenBack?: string): Promise<void> {
  const { master, slave } = await observe(site)
  const { status, release } = slot === 'strapi-slave' ? slave : master
  if (status === 'absent') return
  const expected = release === undefined ? undefined : await recordedSchema(site, release)
  const found = await readSchema(site)
  const isForbidden = !master.comesBack && !slave.comesBack
  if (isForbidden && expected && found && expected.hash !== found.hash)
    return warn(
      `${slot} stays off after a crash or a reboot: the database has another schema than ${release}, which would drop what it does not know`,
    )
  const { container } = site.slots[slot]
  await change(`let ${slot} come back after a reboot`, () => setRestart(container, 'unless-stopped'))
  const stopped = (await readText(stoppedFile(site))) ?? ''
  const id = (await engine.container(container))?.Id
  if (!stopped.split('\n').includes(`${takenBack} ${id}`)) return
  await change(`start ${slot} again`, async () => {
    await run(start(site, slot))
    await rm(stoppedFile(site))
  })
}
