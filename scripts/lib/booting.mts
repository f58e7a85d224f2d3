/** Which slot the engine may start again by itself, after a crash or a reboot. */
import { ask, run } from './command.mts'
import { setRestart } from './compose.mts'
import { recordedSchema } from './history.mts'
import { change, warn } from './report.mts'
import { readSchema } from './schema.mts'
import type { Site, SlotName } from './settings.mts'
import { observe } from './slots.mts'

/** What the database has and the code of a booting release does not know, Strapi drops: none of the slots boots any more. */
export async function forbidBooting(site: Site): Promise<void> {
  for (const slot of ['strapi-master', 'strapi-slave'] as const) await ask(setRestart(site, slot, 'no'))
}

/** Lets a slot come back, but for one that `forbidBooting` has kept from it and whose release still is not that of the database. */
export async function allowBooting(site: Site, slot: SlotName): Promise<void> {
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
  await change(`let ${slot} come back after a reboot`, () => run(setRestart(site, slot, 'unless-stopped')))
}
