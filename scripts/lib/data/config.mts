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
  const nginx = await stat(site.nginx.confFile).catch(() => undefined)
  return [
    ['docker/.env', site.envFile],
    ['strapi/.env', join(site.source, '.env')],
    ['docker/docker-compose.yml', join(docker, 'docker-compose.yml')],
    ...(await serviceFiles(docker)),
    ...(nginx ? [[`nginx/${site.nginx.serverName}.conf`, site.nginx.confFile] satisfies ConfigFile] : []),
    ...credentialFiles(site.values, docker),
  ]
}

/** What the images are built from and the services are told, by the folders beside the compose file. */
export async function serviceFiles(docker: string): Promise<ConfigFile[]> {
  const services = ['strapi', 'postgresql', 'redis', 'livekit']
  return (await Promise.all(services.map((name) => filesOf(docker, name)))).flat()
}

/** Firebase and APNs, where they are set. @param docker folder that their paths are relative to */
export function credentialFiles(values: Record<string, string>, docker: string): ConfigFile[] {
  const optional: [string, string | undefined][] = [
    ['secrets/firebase', values.FIREBASE_CREDENTIALS],
    ['secrets/apns', values.APNS_KEY],
  ]
  return optional.flatMap(([name, path]): ConfigFile[] =>
    path && path !== '/dev/null' ? [[name, resolve(docker, path)]] : [],
  )
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
