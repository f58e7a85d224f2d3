/** Releases: their names, their images, which may be rolled back to and which may go. */
import { ask, run } from './command.mts'
import { removeImage, tag as tagImage } from './compose.mts'
import * as engine from './engine.mts'
import { goodReleases, readHistory, recordedSchema, trail, type Entry } from './history.mts'
import { change, detail, exitCodes, explain, isDryRun, Problem, warn } from './report.mts'
import { droppedBy, holdsStrapi, readSchema } from './schema.mts'
import { scriptCommand, type Site } from './settings.mts'
import type { Situation } from './state.mts'

const namePattern = /^\d{8}-\d{6}(-[0-9a-f]{7,12}(-dirty)?)?$/

/** "20261123-070455-1a2b3c4": UTC time, and the commit of the application where there is one. Sorts by age. */
export async function newReleaseName(site: Site, now = new Date()): Promise<string> {
  return [releaseTime(now), await commitOf(site.source)].filter(Boolean).join('-')
}

export function releaseTime(now: Date): string {
  return now
    .toISOString()
    .replaceAll(/[-:]|\..*/g, '')
    .replace('T', '-')
}

/** Whether a tag was given by a deploy, and not by hand. */
export function isReleaseName(tag: string): boolean {
  return namePattern.test(tag)
}

/** Short commit of the application, "-dirty" when its folder differs from it; empty when it is in no repository. */
async function commitOf(folder: string): Promise<string> {
  // git refuses what belongs to another user; whoever deploys builds and runs that code anyway.
  const git = (...rest: string[]) =>
    ask(['git', '-c', 'safe.directory=*', '-c', 'core.fsmonitor=false', '-C', folder, ...rest])
  const commit = (await git('rev-parse', '--short=7', 'HEAD'))?.trim()
  // The folder must belong to the repository, not only lie in its tree.
  const tracked = await git('ls-files', '--', '.')
  if (!commit || !tracked?.trim()) return ''
  const changes = await git('status', '--porcelain', '--', '.')
  return changes?.trim() ? `${commit}-dirty` : commit
}

/** Image id of a release, or undefined when its image is gone. */
export async function imageOf(site: Site, release: string): Promise<string | undefined> {
  return (await engine.image(`${site.image}:${release}`))?.Id
}

/** The good release that served before the live one; one that was left by a rollback does not count. */
export function previousRelease(history: Entry[], live: string | undefined): string | undefined {
  const past = trail(history)
  const at = live === undefined ? -1 : past.indexOf(live)
  return at === -1 ? past.at(-1) : past[at - 1]
}

/** Tags that no rollback needs: none of the newest `keep` good ones, not live, not of the newest failed one. Only tags that we gave. */
export function outdated(tags: string[], history: Entry[], live: string, keep: number): string[] {
  const good = goodReleases(history)
  const others = good.filter((release) => release !== live && tags.includes(release))
  const kept = new Set([live, ...others.slice(Math.max(0, others.length - (keep - 1)))])
  const newestFailed = tags
    .filter((tag) => isReleaseName(tag) && !good.includes(tag) && tag !== live)
    .toSorted()
    .at(-1)
  return tags.filter((tag) => isReleaseName(tag) && !kept.has(tag) && tag !== newestFailed)
}

/**
 * The release that `--rollback` goes to.
 * @throws Problem before anything happens: no such release, its image is gone, or a boot of it would change the schema
 */
export async function rollbackTarget(
  site: Site,
  { live = site.release, way }: Pick<Situation, 'live' | 'way'>,
  wish: { rollbackTo: string | undefined; acceptSchemaChange: boolean },
): Promise<string> {
  const history = await readHistory(site)
  const past = trail(history)
  // An earlier release serves, but is not written down as the last one: a rollback to it did not come to its end.
  const isUnfinished = past.includes(live) && live !== past.at(-1)
  const target = wish.rollbackTo ?? (isUnfinished ? live : previousRelease(history, live))
  const status = scriptCommand('deploy', site.envFile, '--status')
  if (target === undefined)
    throw new Problem(exitCodes.usage, 'there is no earlier good release', `See: ${status}`)
  if (target === live && way === 'full' && !isUnfinished)
    throw new Problem(exitCodes.usage, `${target} is live already`, `See: ${status}`)
  if ((await imageOf(site, target)) === undefined) {
    const images = (await engine.tags(site.image)).map(({ tag }) => tag).toSorted()
    throw new Problem(
      exitCodes.usage,
      `there is no image of release ${target}`,
      `There are images of: ${images.join(', ') || 'none'}`,
    )
  }
  if (!wish.acceptSchemaChange) await refuseSchemaChange(site, target, way)
  return target
}

async function refuseSchemaChange(site: Site, target: string, way: Situation['way']): Promise<void> {
  const [current, recorded] = [await readSchema(site), await recordedSchema(site, target)]
  const accepting = scriptCommand('deploy', site.envFile, `--rollback ${target} --accept-schema-change`)
  if (current === undefined) {
    // It is started before, where nothing serves.
    if (isDryRun() && way === 'first')
      return detail('whether the schema has changed is seen when PostgreSQL runs')
    const why = await holdsStrapi(site).then(
      (isUsed) => (isUsed ? 'Strapi’s own record of it is empty, or was locked' : undefined),
      explain,
    )
    if (why === undefined) return
    throw new Problem(
      exitCodes.usage,
      `whether the database schema has changed since ${target} cannot be seen: ${why}`,
      `Run it again. If its boot may drop what it does not know: ${accepting}`,
    )
  }
  if (current.hash === recorded?.hash) return
  const dropped = recorded ? droppedBy(recorded, current) : undefined
  const consequence =
    dropped === undefined
      ? 'what its boot would drop is not known: it was never deployed from here'
      : dropped.length === 0
        ? 'its boot would drop nothing, but change the schema'
        : `its boot would drop, with all data in them: ${dropped.join(', ')}`
  throw new Problem(
    exitCodes.usage,
    `the database schema has changed since ${target}; ${consequence}`,
    `If that is wanted: ${accepting}`,
  )
}

interface HandMade {
  /** Name with the tag of the release that runs. */
  takenName: string
  /** Id of the image that runs. */
  runningId: string
  /** Id of the image that was built by hand. */
  id: string
  /** What it is to be called. */
  name: string
}

/** A `docker compose build` by hand moves the tag of the running release to another image; the next `up` would start that. */
export async function findHandMade(site: Site): Promise<HandMade | undefined> {
  const containers = await Promise.all(
    Object.values(site.slots).map((slot) => engine.container(slot.container)),
  )
  for (const found of containers) {
    if (found?.State.Status !== 'running' || !found.Config.Image.startsWith(`${site.image}:`)) continue
    const tagged = await engine.image(found.Config.Image)
    if (!tagged || tagged.Id === found.Image) continue
    const name = `${site.image}:by-hand-${releaseTime(new Date(tagged.Created))}`
    return { takenName: found.Config.Image, runningId: found.Image, id: tagged.Id, name }
  }
  return undefined
}

/** The tag goes back to the image that runs, the hand-made one gets a name of its own. */
export async function nameHandMade({ takenName, runningId, id, name }: HandMade): Promise<void> {
  warn(`${takenName} was built by hand and is not what runs`)
  await change(`call it ${name}, and give the name back to the image that runs`, async () => {
    await run(tagImage(id, name))
    await run(tagImage(runningId, takenName))
    detail(`it is now called ${name}`)
  })
}

/** Removes images that no rollback needs. A failure is only shown: the deploy has gone well. */
export async function prune(site: Site, live: string): Promise<void> {
  await pruneImages(site, live).catch((error: unknown) =>
    warn(`images that no rollback needs were not removed: ${explain(error)}`),
  )
}

async function pruneImages(site: Site, live: string): Promise<void> {
  const tags = await engine.tags(site.image)
  const slots = await Promise.all(Object.values(site.slots).map((slot) => engine.container(slot.container)))
  // A stopped slot still holds its image, and its log may be wanted.
  const used = slots.map((found) => found?.Config.Image)
  const old = outdated(
    tags.map(({ tag }) => tag),
    await readHistory(site),
    live,
    site.keepReleases,
  )
  for (const release of old.filter((one) => !used.includes(`${site.image}:${one}`))) {
    const removal = change(`remove the image of ${release}`, () =>
      run(removeImage(`${site.image}:${release}`)),
    )
    await removal.catch((error: unknown) =>
      warn(`the image of ${release} was not removed: ${explain(error)}`),
    )
  }
}
