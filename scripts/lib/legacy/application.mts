/** The application of the legacy set-up, copied to where the new one is built from, as long as nobody has changed it there. */
import { existsSync, realpathSync } from 'node:fs'
import { copyFile, cp, mkdir, readdir, rename, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { run } from '../command.mts'
import { releaseTime } from '../releases.mts'
import { detail, exitCodes, Problem, warn } from '../report.mts'
import type { Site } from '../settings.mts'
import { invokingUser } from '../users.mts'
import { digestOf } from './digest.mts'
import { note, notes } from './journal.mts'
import type { Legacy } from './look.mts'

/** Where there is none yet, or an old copy: booted with an older schema, Strapi would drop what that does not know. */
export async function bringApplication(site: Site, legacy: Legacy): Promise<void> {
  if (existsSync(join(site.source, 'package.json')) && !(await isCopyOld(site, legacy))) return
  await clearCopy(site)
  // As it is before: what is edited meanwhile is copied the next time.
  await note(site, { copied: await digestOfApplication(legacy), copy: '' })
  await rm(join(site.source, 'package.json'), { force: true })
  await copyApplication(legacy, site.source)
  await note(site, { copy: await digestOfCopy(site) })
  detail(`copied the application to ${site.source}`)
}

/** Who typed sudo deploys without it later. */
export async function giveToUser(path: string): Promise<void> {
  const user = invokingUser()
  if (user) await run(['chown', '--recursive', `${user.uid}:${user.gid}`, path])
}

/** Whether the application here is a copy of what the legacy one no longer is. */
export async function isCopyOld(site: Site, legacy: Legacy): Promise<boolean> {
  const { copied } = await notes(site)
  return Boolean(copied) && copied !== (await digestOfApplication(legacy))
}

async function digestOfApplication(legacy: Legacy): Promise<string> {
  const skipped = [...skippedOf(legacy), join(legacy.source, '.git')]
  return await digestOf([legacy.source], { skipped, onlyContents: true })
}

/** What comes and goes in the copy without being of it. */
function besideCopy({ source, folders }: Site): string[] {
  return [...['.env', '.git', 'node_modules'].map((name) => join(source, name)), folders.uploads]
}

async function digestOfCopy(site: Site): Promise<string> {
  return await digestOf([site.source], { skipped: besideCopy(site), onlyContents: true })
}

/** What somebody has mended in the copy is not overwritten; else all of it goes, since the legacy one may have lost files. */
async function clearCopy(site: Site): Promise<void> {
  const { copy } = await notes(site)
  if (!copy || !existsSync(site.source)) return
  if (copy === (await digestOfCopy(site))) {
    await note(site, { copy: '' })
    const isKept = (path: string) => besideCopy(site).some((one) => `${one}/`.startsWith(`${path}/`))
    for (const path of (await readdir(site.source)).map((name) => join(site.source, name)))
      if (!isKept(path)) await rm(path, { recursive: true })
    return
  }
  const kept = `${site.source}.edited-${releaseTime(new Date())}`
  // What lies below must not go with it.
  const isMovable = !`${site.folders.uploads}/`.startsWith(`${site.source}/`)
  const moved = isMovable
    ? rename(site.source, kept)
    : Promise.reject(new Error('UPLOADS_VOLUME is below it'))
  await moved.catch((error: unknown) => {
    throw new Problem(
      exitCodes.failed,
      `the legacy application has changed, and so had its copy ${site.source}; visitors are served as before`,
      'Put what was mended there somewhere else, and package.json with it, then run it again.',
      error,
    )
  })
  // Values of its own stay.
  await mkdir(site.source)
  if (existsSync(join(kept, '.env'))) await copyFile(join(kept, '.env'), join(site.source, '.env'))
  warn(`the legacy application has changed, and so had its copy: that is kept as ${kept}`)
}

/** What is built, installed or uploaded, and what is told otherwise. */
function skippedOf({ source, uploads, database, services }: Legacy): Set<string> {
  const names = [
    'node_modules',
    'dist',
    'build',
    '.cache',
    '.tmp',
    '.strapi',
    '.strapi-updater.json',
    '.env',
    'types/generated',
    'public/uploads',
  ]
  // Whole projects are mounted: data of the services may lie below.
  const redis = services.redis.container.Mounts.filter(({ Destination }) => Destination === '/data')
  const data = [uploads, database.folder, ...redis.map(({ Source }) => Source)]
  return new Set([...names.map((name) => join(source, name)), ...data.map(realPath)])
}

/** `source` is one, too. */
function realPath(path: string): string {
  return existsSync(path) ? realpathSync(path) : path
}

/** Without what is built, installed or uploaded. package.json comes last: a folder without it is not taken for an application. */
async function copyApplication(legacy: Legacy, target: string): Promise<void> {
  const skipped = new Set([...skippedOf(legacy), join(legacy.source, 'package.json')])
  const options = { preserveTimestamps: true, verbatimSymlinks: true }
  await cp(legacy.source, target, {
    ...options,
    recursive: true,
    filter: (path) => !skipped.has(path),
  })
  await mkdir(join(target, 'public/uploads'), { recursive: true })
  await giveToUser(target)
  await cp(join(legacy.source, 'package.json'), join(target, 'package.json'), options)
  await giveToUser(join(target, 'package.json'))
}
