/** Folders and disks: there, writable by who writes, visible to who reads. */
import { access, constants, stat, statfs } from 'node:fs/promises'
import { dirname, join, resolve } from 'node:path'
import type { Check, Finding } from '../checks.mts'
import * as engine from '../engine.mts'
import { strapiUid } from '../folders.mts'
import { workerUser } from '../nginx.mts'
import { asRoot, scriptCommand, type Site } from '../settings.mts'
import { accountOf, mayReach } from '../users.mts'

/** An image with its build layers, measured for the example: 2.3 GB. */
const leastFreeBytes = 3_000_000_000

export const folderChecks: Check[] = [
  {
    title: 'folders',
    check: async (site) => {
      const folders = {
        UPLOADS_VOLUME: site.folders.uploads,
        POSTGRES_VOLUME: site.folders.postgres,
        BACKUP_DIR: join(site.folders.backups, '.incoming'),
        TRAFFIC_DIR: site.folders.traffic,
      }
      const missing = await Promise.all(
        Object.entries(folders).map(async ([key, path]): Promise<Finding[]> => {
          const found = await stat(path).catch(() => undefined)
          return found?.isDirectory()
            ? []
            : [
                {
                  problem: `${key}: there is no folder ${path}`,
                  fix: asRoot(scriptCommand('setup', site.envFile)),
                },
              ]
        }),
      )
      return missing.flat()
    },
  },
  {
    title: 'what this user may write',
    check: async (site) => {
      const paths = [site.folders.traffic, dirname(site.envFile)]
      const found = await Promise.all(
        paths.map(async (path): Promise<Finding[]> => {
          const fine = await access(path, constants.W_OK).then(
            () => true,
            (error: NodeJS.ErrnoException) => error.code === 'ENOENT',
          )
          return fine
            ? []
            : [{ problem: `${path} is not writable by this user`, fix: asRoot(`chown $(id -un) ${path}`) }]
        }),
      )
      return found.flat()
    },
  },
  {
    title: 'owner of the uploads',
    check: async (site) => {
      const found = await stat(site.folders.uploads).catch(() => undefined)
      const writable = !found || found.uid === strapiUid || (found.mode & 0o002) !== 0
      return writable
        ? []
        : [
            {
              problem: `${site.folders.uploads} belongs to uid ${found.uid}; Strapi writes it as uid ${strapiUid}`,
              fix: asRoot(`chown -R ${strapiUid}:${strapiUid} ${site.folders.uploads}`),
            },
          ]
    },
  },
  { title: 'what nginx may read', check: async (site) => workerSees(site) },
  {
    title: 'disk space',
    check: async (site) => {
      const root = await engine.dataRoot().catch(() => '/')
      const paths = [root, dirname(site.envFile), site.folders.postgres]
      const found = await Promise.all(
        paths.map(async (path, place): Promise<Finding[]> => {
          const disk = await statfs(path).catch(() => undefined)
          const least = place === 0 ? leastFreeBytes : 100_000_000
          const free = disk ? disk.bavail * disk.bsize : Infinity
          const gigabytes = (bytes: number) => `${(bytes / 1e9).toFixed(1)} GB`
          return free < least
            ? [
                {
                  problem: `${gigabytes(free)} are free on the disk of ${path}, at least ${gigabytes(least)} are needed`,
                  fix: 'docker system df   (old images and build cache: docker builder prune)',
                },
              ]
            : []
        }),
      )
      return found.flat()
    },
  },
  {
    title: 'credentials of the application',
    check: async (site) => {
      const keys = ['FIREBASE_CREDENTIALS', 'APNS_KEY']
      const found = await Promise.all(
        keys.map(async (key): Promise<Finding[]> => {
          if (!site.values[key] || site.values[key] === '/dev/null') return []
          const path = resolve(site.root, 'docker', site.values[key])
          const file = await stat(path).catch(() => undefined)
          if (!file?.isFile())
            return [
              { problem: `${key} names no file: ${path}`, fix: `put it there, or set ${key}=/dev/null` },
            ]
          const readable = (file.mode & 0o004) !== 0 || (file.uid === strapiUid && (file.mode & 0o400) !== 0)
          return readable
            ? []
            : [
                {
                  problem: `${path} cannot be read by the container's user`,
                  fix: asRoot(`chown 1000:1000 ${path}`) + ` && ${asRoot(`chmod 400 ${path}`)}`,
                },
              ]
        }),
      )
      return found.flat()
    },
  },
]

/** Whether nginx's worker may reach what it serves by itself. */
export async function workerSees(site: Site): Promise<Finding[]> {
  const user = await workerUser(site)
  const account = user === undefined ? undefined : await accountOf(user)
  if (!account) return []
  const found: Finding[] = []
  for (const [key, path] of Object.entries({
    TRAFFIC_DIR: site.folders.traffic,
    UPLOADS_VOLUME: site.folders.uploads,
  })) {
    const obstacle = await mayReach(account, path)
    if (obstacle)
      found.push({
        problem: `nginx's worker (${user}) cannot see ${key}: ${obstacle} is closed to it`,
        fix: `chmod o+rx ${obstacle}, or choose another folder in ${site.envFile}`,
      })
  }
  return found
}
