/** Makes the folders of a site with the owners that the images and nginx need. Folders that are there stay as they are. */
import { existsSync, statSync, type Stats } from 'node:fs'
import { chown, mkdir, stat } from 'node:fs/promises'
import { dirname, join, resolve } from 'node:path'
import * as engine from './engine.mts'
import { change, detail, explain, warn } from './report.mts'
import type { Site } from './settings.mts'
import { invokingUser } from './users.mts'

/** User `node` of the Strapi image. */
export const strapiUid = 1000

export async function makeFolders(site: Site): Promise<void> {
  const me = invokingUser()
  // PostgreSQL's entrypoint takes its two folders over by itself: its uid differs from image to image.
  const folders = [
    { path: site.folders.uploads, owner: { uid: strapiUid, gid: strapiUid }, mode: 0o755 },
    { path: site.folders.traffic, owner: me, mode: 0o755 },
    { path: site.folders.backups, owner: me, mode: 0o711 },
    { path: join(site.folders.backups, '.incoming'), owner: undefined, mode: 0o700 },
    { path: site.folders.postgres, owner: undefined, mode: 0o700 },
  ]
  for (const { path, owner, mode } of folders) {
    if ((await stat(path).catch(() => undefined)) !== undefined) continue
    await change(`make ${path}`, async () => {
      try {
        await mkdir(dirname(path), { recursive: true, mode: 0o755 })
        await mkdir(path, { mode })
        if (owner && process.getuid?.() === 0) await chown(path, owner.uid, owner.gid)
        detail(`made ${path}`)
      } catch (error) {
        warn(explain(error))
      }
    })
  }
}

/** The folder, or the nearest one above it that is there. */
export async function nearestFolder(path: string): Promise<string> {
  return existsSync(path) ? path : nearestFolder(dirname(path))
}

/** Whether two paths are one folder, by whatever links; one that is not there yet, or closed to this user, is told by its name. */
export function isSameFolder(one: string, other: string): boolean {
  const [first, second] = [one, other].map(look)
  if (first && second) return first.dev === second.dev && first.ino === second.ino
  return resolve(one) === resolve(other)
}

function look(path: string): Stats | undefined {
  try {
    return statSync(path, { throwIfNoEntry: false })
  } catch {
    return undefined
  }
}

/**
 * Name of a running container, other than these, that works with the data of PostgreSQL in this folder: two servers there would
 * destroy it, and their lock file does not hold between containers.
 */
export async function strangerOnData(folder: string, own: string[]): Promise<string | undefined> {
  const isAbove = (above: string) => `${folder}/`.startsWith(`${above}/`)
  const found = (await engine.mountsInUse()).find(
    ({ id, folder: seen, at }) =>
      // Somebody who watches all of the host sees every folder.
      !own.includes(id) && (isSameFolder(seen, folder) || (isAbove(seen) && /postgres|pgdata/i.test(at))),
  )
  return found?.container
}

/** Name of another site's PostgreSQL that writes its dumps to this folder: each would take what the other writes for its own remains. */
export async function strangerOnBackups(folder: string, ownProject: string): Promise<string | undefined> {
  const found = (await engine.mountsInUse()).find(
    ({ project, folder: seen, at }) =>
      at === '/backup' && project !== ownProject && isSameFolder(seen, folder),
  )
  return found?.container
}
