/** The configuration of a set: all that a bare host needs beside the database and the uploads. */
import { readdir, realpath, stat } from 'node:fs/promises'
import { join, resolve } from 'node:path'
import type { Site } from '../settings.mts'
import { createArchive } from './archive.mts'

/** @returns the names of files that should be there and are not, each with the reason */
export async function archiveConfig(site: Site, tarPath: string): Promise<string[]> {
  await using archive = createArchive(tarPath)
  const missing: string[] = []
  for (const [name, path] of await configFiles(site)) {
    // A link to a settings file is as good as the file.
    const added = await archive.addFile(await realpath(path).catch(() => path), name)
    if ('skipped' in added) missing.push(`${name} (${path}) ${added.skipped}`)
  }
  await archive.close()
  return missing
}

/** Names in the archive and paths on this host. */
async function configFiles(site: Site): Promise<[string, string][]> {
  const docker = join(site.root, 'docker')
  const services = await Promise.all(
    ['strapi', 'postgresql', 'redis', 'livekit'].map((name) => filesOf(docker, name)),
  )
  const optional: [string, string | undefined][] = [
    ['secrets/firebase', site.values.FIREBASE_CREDENTIALS],
    ['secrets/apns', site.values.APNS_KEY],
  ]
  const credentials = optional.flatMap(([name, path]): [string, string][] =>
    path && path !== '/dev/null' ? [[name, resolve(docker, path)]] : [],
  )
  const nginx = await stat(site.nginx.confFile).catch(() => undefined)
  return [
    ['docker/.env', site.envFile],
    ['strapi/.env', join(site.source, '.env')],
    ['docker/docker-compose.yml', join(docker, 'docker-compose.yml')],
    ...services.flat(),
    ...(nginx
      ? [[`nginx/${site.nginx.serverName}.conf`, site.nginx.confFile] satisfies [string, string]]
      : []),
    ...credentials,
  ]
}

async function filesOf(docker: string, service: string): Promise<[string, string][]> {
  const names = await readdir(join(docker, service))
  return names.map((name) => [`docker/${service}/${name}`, join(docker, service, name)])
}
