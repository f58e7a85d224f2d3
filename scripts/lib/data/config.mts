/** The configuration of a set: all that a bare host needs beside the database and the uploads. */
import { readdir, realpath, stat } from 'node:fs/promises'
import { join, relative, resolve } from 'node:path'
import type { Site } from '../settings.mts'
import { createArchive } from './archive.mts'

/** Name in the archive and path on this host. */
export type ConfigFile = [string, string]

/** @returns the names of files that should be there and are not, each with the reason */
export async function archiveConfig(files: ConfigFile[], tarPath: string): Promise<string[]> {
  await using archive = createArchive(tarPath)
  const missing: string[] = []
  for (const [name, path] of files) {
    // A link to a settings file is as good as the file.
    const added = await archive.addFile(await realpath(path).catch(() => path), name)
    if ('skipped' in added) missing.push(`${name} (${path}) ${added.skipped}`)
  }
  await archive.close()
  return missing
}

export async function configFiles(site: Site): Promise<ConfigFile[]> {
  const docker = join(site.root, 'docker')
  const services = await Promise.all(
    ['strapi', 'postgresql', 'redis', 'livekit'].map((name) => filesOf(docker, name)),
  )
  const optional: [string, string | undefined][] = [
    ['secrets/firebase', site.values.FIREBASE_CREDENTIALS],
    ['secrets/apns', site.values.APNS_KEY],
  ]
  const credentials = optional.flatMap(([name, path]): ConfigFile[] =>
    path && path !== '/dev/null' ? [[name, resolve(docker, path)]] : [],
  )
  const nginx = await stat(site.nginx.confFile).catch(() => undefined)
  return [
    ['docker/.env', site.envFile],
    ['strapi/.env', join(site.source, '.env')],
    ['docker/docker-compose.yml', join(docker, 'docker-compose.yml')],
    ...services.flat(),
    ...(nginx ? [[`nginx/${site.nginx.serverName}.conf`, site.nginx.confFile] satisfies ConfigFile] : []),
    ...credentials,
  ]
}

async function filesOf(docker: string, service: string): Promise<ConfigFile[]> {
  const folder = join(docker, service)
  const entries = await readdir(folder, { withFileTypes: true, recursive: true }).catch(
    (error: NodeJS.ErrnoException) => {
      // A service that this site does not have.
      if (error.code === 'ENOENT') return []
      throw error
    },
  )
  return entries
    .filter((entry) => !entry.isDirectory())
    .map((entry) => join(entry.parentPath, entry.name))
    .map((path) => [`docker/${relative(docker, path)}`, path])
}
