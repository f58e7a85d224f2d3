/** The ways out: back to the legacy set-up, or for good without it. */
import { existsSync } from 'node:fs'
import { run } from '../command.mts'
import * as engine from '../engine.mts'
import { makeBackup, startingPostgresql } from '../data/backup.mts'
import { parts } from '../data/manifest.mts'
import { setFolder } from '../data/sets.mts'
import { openSnapshot } from '../data/snapshot.mts'
import { rememberVerified } from '../data/verified.mts'
import { addToResult, detail, exitCodes, Problem, say, step } from '../report.mts'
import { scriptCommand } from '../settings.mts'
import { runningServices } from './containers.mts'
import { note, notes } from './journal.mts'
import { inStartOrder, nameOf, type Legacy } from './look.mts'
import type { Migration } from './migration.mts'
import { endCopy, differingUploads } from './uploads.mts'
import { copyUploadsBack, goBack, isSwitched, sharesData, wasStarted } from './switch.mts'

/** What was made since the switch, and what becomes of it; said before anything happens. */
export async function describeRollback(migration: Migration): Promise<void> {
  const { site, legacy } = migration
  if (!migration.isUnderWay) return detail('the switch has not begun: the legacy set-up serves as before')
  const { rows = {} } = await notes(site)
  const postgresql = await startingPostgresql(site)
  const more = postgresql === undefined ? [] : await newRows(postgresql, site.database.name, rows)
  const uploads = existsSync(site.folders.uploads)
    ? await differingUploads(legacy.uploads, site.folders.uploads)
    : []
  const fate = sharesData(migration)
    ? 'both set-ups use the same database and it stays as it is; uploads are copied back'
    : 'they are left behind, in a backup set'
  detail(
    `since the switch: ${more.join(', ') || 'no table has more rows'}; ${uploads.length} uploads are new or differ; ${fate}`,
  )
  detail('what Redis (Bull’s queue) got since then is left behind')
  addToResult({ newRows: more, newUploads: uploads.length })
}

async function newRows(
  postgresql: string,
  database: string,
  before: Record<string, number>,
): Promise<string[]> {
  const now = await openSnapshot(postgresql, database)
  await now.close()
  return Object.entries(now.rows)
    .map(([table, count]): [string, number] => [table, count - (before[table] ?? 0)])
    .filter(([, more]) => more > 0)
    .map(([table, more]) => `${more} rows more in ${table}`)
}

/** @throws Problem (degraded) when the legacy set-up does not serve */
export async function rollBack(migration: Migration): Promise<void> {
  const { site, legacy } = migration
  if ((await wasStarted(site)) && (await startingPostgresql(site)) !== undefined)
    await step('1/3', 'Back the new site up', async () => {
      const { name } = await makeBackup(site, [...parts])
      await rememberVerified(site, { set: name, deep: false, wrong: [] })
      detail(`${setFolder(site, name)}, read back and right`)
      addToResult({ backup: name })
    })
  if (await wasStarted(site))
    await step('2/3', 'Copy new uploads back, where rows refer to them', () => copyUploadsBack(migration))
  await step('3/3', 'Stop the new set-up, start the legacy one', () => goBack(migration))
  await note(site, { backup: '', areRowsSame: false })
  say(
    `Done: the legacy set-up serves. What was prepared stays: ${site.envFile}, ${site.folders.uploads}, images, sets.\nAgain: ${scriptCommand('migrate', site.envFile, `--from ${legacy.folder}`)}`,
  )
}

/** Removes the legacy containers, and volumes and networks that nobody else uses; folders of the host stay. */
export async function finalize(migration: Migration): Promise<void> {
  const { site, legacy } = migration
  if (!(await isSwitched(migration)))
    throw new Problem(
      exitCodes.usage,
      'the new set-up does not serve alone, so the legacy one stays; nothing was changed',
      `See: ${scriptCommand('migrate', site.envFile, `--status --from ${legacy.folder}`)}`,
    )
  const containers = inStartOrder(legacy).map(({ container }) => container)
  for (const { Id } of containers) await run(['docker', 'rm', Id])
  await endCopy(site.folders.uploads)
  await note(site, { isFinal: true })
  const volume = legacy.services.redis.container.Mounts.find(
    ({ Destination }) => Destination === '/data',
  )?.Name
  const kept = [legacy.source, legacy.folder, ...(sharesData(migration) ? [] : [legacy.database.folder])]
  say(
    `Done: removed ${containers.map((container) => nameOf({ container })).join(', ')}. There is no way back by --rollback any more.`,
  )
  say(
    `By hand, when nobody needs it: ${[...(volume === undefined ? [] : [`docker volume rm ${volume}`]), ...kept.map((path) => `rm -r ${path}`)].join('; ')}`,
  )
}

export async function showStatus(migration: Migration): Promise<void> {
  const { site, legacy, isUnderWay } = migration
  const isThrough = isUnderWay && (await isSwitched(migration))
  const state = isThrough ? 'switched' : isUnderWay ? 'between' : 'legacy'
  const words = {
    switched: 'the new set-up serves; the legacy one is out of service and kept',
    between: 'the switch has begun and is not through',
    legacy: 'the legacy set-up serves; nothing was switched',
  }
  const { backup, outageMs, isFinal } = await notes(site)
  addToResult({ state, backup, outageMs })
  say(words[state])
  const running = await runningServices(legacy)
  say(`legacy         ${describeContainers(legacy, running.length)}`)
  const made = await engine.container(site.slots['strapi-master'].container)
  say(`new            strapi-master ${made?.State.Status ?? 'not there'}, release ${site.release}`)
  say(`backup before  ${backup ?? 'none'}`)
  if (outageMs !== undefined) say(`outage         ${(outageMs / 1000).toFixed(1)} s`)
  if (isFinal) return
  const option = (word: string) =>
    scriptCommand('migrate', site.envFile, `${word} --from ${legacy.folder}`.trim())
  say(
    isThrough
      ? `Back: ${option('--rollback')}\nFor good: ${option('--finalize')}`
      : `Go on: ${option('')}\nBack: ${option('--rollback')}`,
  )
}

function describeContainers(legacy: Legacy, running: number): string {
  const all = inStartOrder(legacy)
  return `${running} of ${all.length} run: ${all.map(nameOf).join(', ')}`
}
