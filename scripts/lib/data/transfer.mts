/** A set as one portable file, and back. The file is a plain tar of the set's folder. */
import { createHash } from 'node:crypto'
import { closeSync, existsSync, openSync, writeSync } from 'node:fs'
import { cp, link, readdir, rename, rm, stat } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'
import { isDeepStrictEqual } from 'node:util'
import { syncFolder } from '../envfile.mts'
import { alive, exitCodes, Problem } from '../report.mts'
import { scriptCommand, type Site } from '../settings.mts'
import { createArchive } from './archive.mts'
import { megabytes, needRoom, reserveOn, sparing } from './room.mts'
import type { Acceptable } from './fitness.mts'
import { readManifest, setFiles, wrongSumsFile } from './manifest.mts'
import { commitSet, isSetName, listSets, newSetName, readBack, setFolder, stageSet, toDisk } from './sets.mts'
import { readArchive } from './untar.mts'

/** Writes the set to a file that only its owner can read. @throws Problem, with no file left */
export async function exportSet(site: Site, name: string, file: string): Promise<void> {
  const partial = join(dirname(file), `.${basename(file)}.partial`)
  const there = await stat(file).catch(() => undefined)
  // Killed while it had both names: it is whole.
  if (there && there.ino === (await stat(partial).catch(() => undefined))?.ino) {
    const inside = await nameInside(file).catch(() => undefined)
    await rm(partial, { force: true })
    if (inside === name) return await syncFolder(dirname(file))
  }
  if (there)
    throw new Problem(exitCodes.usage, `${file} is there already`, 'Name another file, or remove it.')
  if (!existsSync(dirname(file)))
    throw new Problem(exitCodes.usage, `there is no folder ${dirname(file)}`, 'Make it, or name another one.')
  const folder = setFolder(site, name)
  const { files } = await readManifest(folder)
  const bytes = Object.values(files).reduce((total, { sizeBytes }) => total + sizeBytes, 0)
  const wants = [{ folder: dirname(file), bytes }, ...(await reserveOn(dirname(file), site.folders.postgres))]
  await needRoom('the file needs', wants)
  // Of one that was killed.
  await rm(partial, { force: true })
  try {
    const found = new Map<string, string>()
    await using archive = createArchive(partial, (one) => found.set(one.name, one.sha256))
    const { postgres } = site.folders
    await alive(
      () => `writing ${file}, ${megabytes(archive.sizeBytes)}`,
      () =>
        sparing(dirname(file), postgres, async (signal) => {
          for (const one of await readdir(folder)) {
            signal.throwIfAborted()
            const added = await archive.addFile(join(folder, one), `${name}/${one}`)
            if (!setFiles.has(one) || 'skipped' in added) throw damaged(site, name, one)
          }
          await archive.close()
        }),
    )
    for (const [one, { sha256 }] of Object.entries(files))
      if (found.get(`${name}/${one}`) !== sha256) throw damaged(site, name, one)
    for (const one of await wrongSumsFile(folder, files)) throw damaged(site, name, one)
    await toDisk([partial])
    await readArchiveBack(partial, found)
    // It never overwrites, as a rename would; disks without links have only that.
    await link(partial, file).catch((error: NodeJS.ErrnoException) => {
      if (error.code === 'EEXIST') throw error
      return rename(partial, file)
    })
    await syncFolder(dirname(file))
  } finally {
    await rm(partial, { force: true })
  }
}

/** @throws Error when the disk does not hold what was written to it */
async function readArchiveBack(path: string, written: Map<string, string>): Promise<void> {
  let bytes = 0
  await alive(
    () => `reading back, ${megabytes(bytes)}`,
    () =>
      readArchive(path, ({ name }) => {
        const hash = createHash('sha256')
        return {
          write(part) {
            hash.update(part)
            bytes += part.length
          },
          end() {
            if (hash.digest('hex') !== written.get(name))
              throw new Error(`what was written reads back differently: ${name}`)
          },
        }
      }),
  )
}

function damaged(site: Site, name: string, file: string): Problem {
  return new Problem(
    exitCodes.failed,
    `${file} of ${name} is not what was written; nothing was exported`,
    `Look at it: ${scriptCommand('data', site.envFile, `verify ${name}`)}`,
  )
}

/** Takes a set out of a file. @returns its name @throws Problem, with nothing left */
export async function importSet(site: Site, file: string): Promise<string> {
  const found = await stat(file).catch(() => undefined)
  if (!found?.isFile())
    throw new Problem(
      exitCodes.usage,
      found ? `${file} is no plain file` : `there is no ${file}`,
      'Give a file that export wrote.',
    )
  const { size } = found
  const { backups, postgres } = site.folders
  await needRoom('the set needs', [{ folder: backups, bytes: size }, ...(await reserveOn(backups, postgres))])
  try {
    const name = await alive(
      () => `reading ${file}`,
      () => nameInside(file),
    )
    await refuseTwice(site, name)
    let bytes = 0
    await staged(site, name, [], async (folder) => {
      const taken = new Set<string>()
      await alive(
        () => `taking ${name}, ${megabytes(bytes)}`,
        () =>
          sparing(backups, postgres, (signal) =>
            readArchive(file, ({ name: path }) => {
              const one = path.slice(name.length + 1)
              if (path !== `${name}/${one}` || !setFiles.has(one) || taken.has(one))
                throw new Error(`${JSON.stringify(path)} does not belong to a set`)
              taken.add(one)
              const target = openSync(join(folder, one), 'wx', 0o600)
              return {
                write(part) {
                  signal.throwIfAborted()
                  for (let written = 0; written < part.length;) written += writeSync(target, part, written)
                  bytes += part.length
                },
                end: () => closeSync(target),
              }
            }),
          ),
      )
    })
    return name
  } catch (error) {
    throw error instanceof Problem
      ? error
      : new Problem(exitCodes.failed, `${file} holds no set that can be taken; nothing was kept`, '', error)
  }
}

/** Takes a set that is a folder somewhere else. @returns its name */
export async function importFolder(site: Site, folder: string, accept: Acceptable[]): Promise<string> {
  const manifest = await readManifest(folder)
  const own = basename(folder)
  const name = isSetName(own) ? own : await newSetName(site, new Date(manifest.createdAt))
  if (dirname(folder) === site.folders.backups) return own
  // Repeated after a kill, it is here already.
  const here = await readManifest(setFolder(site, name)).catch(() => undefined)
  if (here && isDeepStrictEqual(here, manifest)) return name
  await refuseTwice(site, name)
  await staged(site, name, accept, async (target) => {
    for (const one of setFiles) {
      if (existsSync(join(folder, one))) await cp(join(folder, one), join(target, one))
    }
  })
  return name
}

/** Makes a set of what `fill` puts into a folder, if it is right. Whatever goes wrong leaves nothing. */
async function staged(
  site: Site,
  name: string,
  accept: Acceptable[],
  fill: (folder: string) => Promise<void>,
): Promise<void> {
  const folder = await stageSet(site, name)
  try {
    await fill(folder)
    const wrong = await readBack(folder)
    if (wrong.length > 0 && !accept.includes('damaged')) throw new Error(wrong.join('; '))
    await commitSet(site, name)
  } catch (error) {
    await rm(folder, { recursive: true, force: true })
    throw error
  }
}

/** The one folder in the file. @throws Error when it does not begin with one of ours */
async function nameInside(file: string): Promise<string> {
  const found = new Set<string>()
  await readArchive(file, ({ name }) => {
    found.add(name.split('/')[0] ?? '')
    return undefined
  })
  const [name] = found
  if (name === undefined || found.size > 1 || !isSetName(name)) throw new Error('it is not one exported set')
  return name
}

async function refuseTwice(site: Site, name: string): Promise<void> {
  if ((await listSets(site)).includes(name))
    throw new Problem(
      exitCodes.usage,
      `${name} is in ${site.folders.backups} already`,
      scriptCommand('data', site.envFile, `verify ${name}`),
    )
}
