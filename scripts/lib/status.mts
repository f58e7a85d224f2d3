/** The state of a site on one screen. Needs no lock and changes nothing. */
import { pendingExchanges } from './data/plan.mts'
import { describeHolder, lockHolder } from './lock.mts'
import * as engine from './engine.mts'
import { goodReleases, readHistory, trail, type Entry } from './history.mts'
import { describeFigures } from './proof.mts'
import { addToResult, say } from './report.mts'
import { findHandMade } from './releases.mts'
import { asRoot, composeCommand, scriptCommand, type Site, type SlotName } from './settings.mts'
import { observe, type Observed, type SlotState } from './slots.mts'
import { describeRepair, recognise } from './state.mts'
import { differences, isAlone, obstacleTo, selected } from './traffic.mts'

export async function showStatus(site: Site): Promise<void> {
  const [now, history, images, holder, nginx, handMade] = await Promise.all([
    observe(site),
    readHistory(site),
    engine.tags(site.image),
    lockHolder(site.project),
    nginxView(site),
    findHandMade(site),
  ])
  const situation = recognise(now)
  const good = goodReleases(history).toReversed()
  const last = history.findLast((entry) => entry.result !== 'found')
  addToResult({
    master: now.master,
    slave: now.slave,
    flag: now.flag,
    nginx,
    pinned: now.pinned,
    good,
    last,
    running: holder,
    way: situation.way,
  })

  say(slotLine(site, 'strapi-master', now.master))
  say(slotLine(site, 'strapi-slave', now.slave))
  say(`visitors       ${nginx}`)
  say(
    `release        ${situation.live ?? 'none'}${now.pinned === situation.live ? '' : `   (STRAPI_VERSION is ${now.pinned})`}`,
  )
  const withImage = new Set(images.map(({ tag }) => tag))
  const earlier = good.filter((release) => release !== situation.live && withImage.has(release))
  say(`earlier        ${earlier.join(', ') || 'none'}`)
  say(`last deploy    ${last ? describeEntry(last) : 'none yet'}`)
  if (handMade)
    say(
      `by hand        ${handMade.takenName} was built by hand; it is not what runs, and the next deploy renames it`,
    )
  if (holder) say(`running now    ${describeHolder(holder)}`)
  else {
    sayUnfinished(site, now, trail(history))
    await sayRestores(site)
  }
}

function slotLine(site: Site, slot: SlotName, state: SlotState): string {
  const words: Record<SlotState['status'], string> = {
    absent: 'NOT CREATED',
    stopped: 'STOPPED',
    booting: 'RUNNING + STARTING',
    unhealthy: 'RUNNING + UNHEALTHY',
    healthy: 'RUNNING + HEALTHY',
  }
  const isRunning = state.status !== 'absent' && state.status !== 'stopped'
  const age =
    isRunning && state.startedAt ? `since ${state.startedAt.slice(0, 19).replace('T', ' ')} UTC` : ''
  return [slot.padEnd(14), words[state.status].padEnd(20), site.slots[slot].address, state.release ?? '', age]
    .join(' ')
    .trimEnd()
}

async function nginxView(site: Site): Promise<string> {
  const found = await differences(site)
  if (found.length > 0) return `nginx does not run this site's configuration: ${found.join('; ')}`
  const slot = await selected(site)
  const obstacle = await obstacleTo(site, slot)
  if (obstacle === undefined) return `go to ${slot}, nginx reaches it at ${site.slots[slot].address}`
  const other = slot === 'strapi-master' ? 'strapi-slave' : 'strapi-master'
  const fallsBack = !isAlone(site) && (await obstacleTo(site, other)) === undefined
  return `are meant for ${slot}, but ${obstacle}: ${fallsBack ? `${other} stands in for it` : 'they are not served'}`
}

function describeEntry(entry: Entry): string {
  const words = {
    done: 'went well',
    found: 'was found serving',
    failed: 'failed',
    degraded: 'ended degraded',
    interrupted: 'was interrupted',
  }
  const figures = entry.figures ? `; ${describeFigures(entry.figures)}` : ''
  return `${entry.at.slice(0, 19).replace('T', ' ')} UTC, ${entry.release}, ${words[entry.result]}${entry.seconds ? ` in ${entry.seconds} s` : ''}${figures}${entry.why ? `: ${entry.why}` : ''}`
}

async function sayRestores(site: Site): Promise<void> {
  for (const { id } of await pendingExchanges(site))
    say(
      `\nrestore ${id} was interrupted half-way; it is finished or taken back by: ${asRoot(scriptCommand('data', site.envFile))}`,
    )
}

/** Half-finished states by name, with the command that mends them. */
function sayUnfinished(site: Site, now: Observed, past: string[]): void {
  const situation = recognise(now)
  const isWhole = situation.repairs.length === 0 && situation.way === 'full'
  if (isWhole) return
  say(`\n${situation.sentence}`)
  if (situation.way === 'refuse')
    return say(`A deploy needs its port: ${composeCommand(site, '--profile dev stop strapi-dev')}`)
  for (const repair of situation.repairs) say(`  to do: ${describeRepair(repair)}`)
  const { way, live = '' } = situation
  if (way === 'resume' && past.includes(live) && live !== past.at(-1))
    say(`To end the rollback to ${live}: ${scriptCommand('deploy', site.envFile, `--rollback ${live}`)}`)
  say(`The next deploy does the rest: ${scriptCommand('deploy', site.envFile)}`)
}
