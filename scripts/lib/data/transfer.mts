/** A set as one portable file, and back. The file is a plain tar of the set's folder. */
import { closeSync, openSync, writeSync } from 'node:fs'
import { cp, link, open, readdir, rm, stat, statfs } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { isDeepStrictEqual } from 'node:util'
import { syncFolder } from '../envfile.mts'
import { alive, exitCodes, Problem } from '../report.mts'
import { scriptCommand, type Site } from '../settings.mts'
import { createArchive } from './archive.mts'
import { megabytes } from './backup.mts'
import { readManifest, setFiles, wrongSums } from './manifest.mts'
import { commitSet, isSetName, listSets, newSetName, removePartial, setFolder, stageSet } from './sets.mts'
import { readArchive } from './untar.mts'

/** Writes the set to a file that only its owner can read. @throws Problem, with no file left */
export async function exportSet(site: Site, name: string, file: string): Promise<void> {
  if ((await stat(file).catch(() => undefined)) !== undefined)
    throw new Problem(exitCodes.usage, `${file} is there already`, 'Name another file, or remove it.')
  const folder = setFolder(site, name)
  const { files } = await readManifest(folder)
  const partial = `${file}.partial`
  await rm(partial, { force: true })
  try {
    await alive(
      () => `writing ${file}`,
      async () => {
        const archive = createArchive(partial)
        for (const one of await readdir(folder)) {
          const added = await archive.addFile(join(folder, one), `${name}/${one}`)
          const isRight = 'sha256' in added && added.sha256 === (files[one]?.sha256 ?? added.sha256)
          if (!isRight) throw damaged(site, name, one)
        }
        archive.close()
      },
    )
    const handle = await open(partial, 'r')
    try {
      await handle.sync()
    } finally {
      await handle.close()
    }
    // Unlike a rename, it never overwrites.
    await link(partial, file)
    await syncFolder(dirname(file))
  } finally {
    await rm(partial, { force: true })
  }
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
  const { size } = await stat(file)
  await needSpace(site, size)
  let name: string | undefined
  const taken = new Set<string>()
  try {
    await alive(
      () => `reading ${file}`,
      async () => {
        name = await nameInside(file)
        await refuseTwice(site, name)
        const folder = await stageSet(site, name)
        await readArchive(file, ({ name: path }) => {
          const one = path.slice((name ?? '').length + 1)
          if (path !== `${name}/${one}` || !setFiles.has(one) || taken.has(one))
            throw new Error(`${JSON.stringify(path)} does not belong to a set`)
          taken.add(one)
          const target = openSync(join(folder, one), 'wx', 0o600)
          return {
            write(part) {
              for (let written = 0; written < part.length;) written += writeSync(target, part, written)
            },
            end: () => closeSync(target),
          }
        })
        await commitRight(site, name)
      },
    )
  } catch (error) {
    if (name !== undefined && !(error instanceof Problem)) await removePartial(site, `.partial-${name}`)
    throw error instanceof Problem
      ? error
      : new Problem(exitCodes.failed, `${file} holds no set that can be taken; nothing was kept`, '', error)
  }
  return name ?? ''
}

/** Takes a set that is a folder somewhere else. @returns its name */
export async function importFolder(site: Site, folder: string): Promise<string> {
  const manifest = await readManifest(folder)
  const files = [...Object.keys(manifest.files), 'manifest.json', 'SHA256SUMS']
  const own = folder.split('/').at(-1) ?? ''
  const name = isSetName(own) ? own : await newSetName(site, new Date(manifest.createdAt))
  if (dirname(folder) === site.folders.backups) return own
  // Repeated after a kill, it is here already.
  const here = await readManifest(setFolder(site, name)).catch(() => undefined)
  if (here && isDeepStrictEqual(here, manifest)) return name
  await refuseTwice(site, name)
  const staged = await stageSet(site, name)
  try {
    for (const one of files) {
      if (!setFiles.has(one)) throw new Error(`${JSON.stringify(one)} does not belong to a set`)
      await cp(join(folder, one), join(staged, one))
    }
    await commitRight(site, name)
  } catch (error) {
    await removePartial(site, `.partial-${name}`)
    throw error
  }
  return name
}

async function commitRight(site: Site, name: string): Promise<void> {
  const wrong = await wrongSums(join(site.folders.backups, `.partial-${name}`))
  if (wrong.length > 0) throw new Error(wrong.join('; '))
  await commitSet(site, name)
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

async function needSpace(site: Site, bytes: number): Promise<void> {
  const disk = await statfs(site.folders.backups)
  const free = disk.bavail * disk.bsize
  if (bytes < free) return
  throw new Problem(
    exitCodes.failed,
    `the set needs ${megabytes(bytes)}, and ${megabytes(free)} are free on the disk of ${site.folders.backups}`,
    'Make room, then run it again.',
  )
}
