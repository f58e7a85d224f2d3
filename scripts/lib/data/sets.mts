/** Where backup sets are kept: folders of BACKUP_DIR, named by their UTC time. A set is whole or it is not there. */
import { chmod, link, mkdir, open, readdir, rename, rm, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { run } from '../command.mts'
import { syncFolder } from '../envfile.mts'
import { alive } from '../report.mts'
import type { Site } from '../settings.mts'
import { setFiles, wrongSums } from './manifest.mts'
import { megabytes } from './room.mts'

const namePattern = /^\d{8}-\d{6}(-\d+)?$/
const partial = '.partial-'

/** Names of all finished sets, oldest first. */
export async function listSets(site: Site): Promise<string[]> {
  return (await readdir(site.folders.backups)).filter((name) => namePattern.test(name)).toSorted(byTime)
}

export function isSetName(name: string): boolean {
  return namePattern.test(name)
}

export function setFolder(site: Site, name: string): string {
  return join(site.folders.backups, name)
}

/** A name that no set has, for a set begun at `now`. */
export async function newSetName(site: Site, now: Date): Promise<string> {
  const time = now
    .toISOString()
    .replaceAll(/[-:]|\..*/g, '')
    .replace('T', '-')
  const taken = new Set(await listSets(site))
  for (let number = 1; ; number += 1) {
    const name = number === 1 ? time : `${time}-${number}`
    if (!taken.has(name)) return name
  }
}

/** An empty folder that a set is built in, readable by its owner alone. */
export async function stageSet(site: Site, name: string): Promise<string> {
  const folder = join(site.folders.backups, `${partial}${name}`)
  await mkdir(folder, { mode: 0o700 })
  return folder
}

/** Writes files to the disk, and out of the system's memory: what is read of them afterwards comes from the disk. */
export async function toDisk(paths: string[]): Promise<void> {
  for (const path of paths) {
    await syncFile(path)
    await run(['dd', `of=${path}`, 'oflag=nocache', 'conv=notrunc', 'count=0', 'status=none'])
  }
}

async function syncFile(path: string): Promise<void> {
  const file = await open(path, 'r')
  try {
    await file.sync()
  } finally {
    await file.close()
  }
}

/** Reads a staged set from the disk. @returns what is wrong with it, one sentence each */
export async function readBack(folder: string): Promise<string[]> {
  const progress = { bytes: 0 }
  return await alive(
    () => `reading back, ${megabytes(progress.bytes)}`,
    async () => {
      await toDisk((await readdir(folder)).map((name) => join(folder, name)))
      return await wrongSums(folder, progress)
    },
  )
}

/** Makes a staged set a finished one, all at once; it survives a power cut from here on, and cannot be written to. */
export async function commitSet(site: Site, name: string): Promise<void> {
  const folder = join(site.folders.backups, `${partial}${name}`)
  for (const file of await readdir(folder)) {
    await chmod(join(folder, file), 0o400)
    await syncFile(join(folder, file))
  }
  await syncFolder(folder)
  await chmod(folder, 0o500)
  await rename(folder, setFolder(site, name))
  await syncFolder(site.folders.backups)
}

/** Whether others may read it: brought here by hand, it may have lost its modes. */
export async function isOpen(site: Site, name: string): Promise<boolean> {
  return ((await stat(setFolder(site, name))).mode & 0o005) !== 0
}

/** Names of what somebody else has put into the folder of a set. */
export async function strangersIn(site: Site, name: string): Promise<string[]> {
  return (await readdir(setFolder(site, name))).filter((file) => !setFiles.has(file))
}

/** Removes a finished set. It stops being one at once; killed here, the next run removes the rest. */
export async function removeSet(site: Site, name: string): Promise<void> {
  const folder = `${partial}${name}`
  await rename(setFolder(site, name), join(site.folders.backups, folder))
  await removePartial(site, folder)
}

/** Names of the sets that a killed run left half-made, or half-removed. */
export async function partialSets(site: Site): Promise<string[]> {
  const names = await readdir(site.folders.backups).catch((error: NodeJS.ErrnoException) => {
    // On a bare host there is no such folder yet.
    if (error.code === 'ENOENT') return []
    throw error
  })
  return names.filter((name) => name.startsWith(partial) && namePattern.test(name.slice(partial.length)))
}

/** Removes a half-made set by the name that `partialSets` gives it. */
export async function removePartial(site: Site, folderName: string): Promise<void> {
  const folder = join(site.folders.backups, folderName)
  // Killed just before its last step, it may have been made read-only.
  await chmod(folder, 0o700)
  await rm(folder, { recursive: true, force: true })
}

/** Folder on this host that PostgreSQL's container sees as /backup. */
export function incomingFolder(site: Site): string {
  return join(site.folders.backups, '.incoming')
}

/** Takes a file of the incoming folder into a staged set, without a copy; the two are on one disk. */
export async function adopt(from: string, to: string): Promise<void> {
  await link(from, to)
  await chmod(to, 0o600)
  if ((await stat(to)).size === 0) throw new Error(`${from} is empty`)
}

/** By time, then by number: -10 comes after -9. */
function byTime(one: string, other: string): number {
  const parts = (name: string) => [name.slice(0, 15), Number(name.slice(16) || 1)] as const
  const [[time, number], [otherTime, otherNumber]] = [parts(one), parts(other)]
  return time === otherTime ? number - otherNumber : time < otherTime ? -1 : 1
}
