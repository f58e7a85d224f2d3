/** The nginx files that pass visitors to the legacy Strapi, and their way out of service and back. */
import { mkdir, readdir, rename, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { ask, run } from '../command.mts'
import { makeStateDir } from '../history.mts'
import { install } from '../nginx.mts'
import { detail, warn } from '../report.mts'
import type { Site } from '../settings.mts'

export interface LegacyNginx {
  files: string[]
  serverName: string | undefined
  tls: { certificate: string; key: string } | undefined
}

/** As the running configuration has it: `nginx -T` names each file in front of its text. */
export async function legacyNginx(command: string[], address: string, control: string): Promise<LegacyNginx> {
  const port = address.split(':').at(-1) ?? ''
  const passing = new RegExp(
    String.raw`(?:proxy_pass\s+https?://|server\s+)(?:127\.0\.0\.1|localhost|\[::1\]|0\.0\.0\.0):${port}\b`,
  )
  const dump = (await ask([...command, '-T'])) ?? ''
  const found = dump
    .split(/^# configuration file (?=.*:$)/m)
    .slice(1)
    .map((part) => ({ path: part.slice(0, part.indexOf(':\n')), text: part.slice(part.indexOf('\n') + 1) }))
    .filter(({ text }) => passing.test(text) && !text.includes(`listen ${control};`))
  const all = found.map(({ text }) => text).join('\n')
  const value = (name: string) => new RegExp(String.raw`^\s*${name}\s+([^;\s]+)`, 'm').exec(all)?.[1]
  const [certificate, key] = [value('ssl_certificate'), value('ssl_certificate_key')]
  return {
    files: found.map(({ path }) => path),
    serverName: value('server_name'),
    tls: certificate !== undefined && key !== undefined ? { certificate, key } : undefined,
  }
}

/** Where the legacy files are kept, each with its path as its name. */
function keptFolder(site: Site): string {
  return join(site.stateDir, 'legacy-nginx')
}

/**
 * The new site in place of the legacy files, which are kept.
 * @throws Problem with nginx's own words, and everything as before
 */
export async function replaceNginx(site: Site, files: string[]): Promise<void> {
  await makeStateDir(site)
  await mkdir(keptFolder(site), { recursive: true, mode: 0o700 })
  for (const path of files) {
    const name = encodeURIComponent(path)
    // Copied before anything else, links as links: from then on there is a way back.
    await run(['cp', '--archive', '--no-target-directory', path, join(keptFolder(site), `${name}.new`)])
    await rename(join(keptFolder(site), `${name}.new`), join(keptFolder(site), name))
    if (path !== site.nginx.confFile) await rm(path)
    detail(`${path} is kept in ${keptFolder(site)}`)
  }
  try {
    await install(site)
  } catch (error) {
    await restoreNginx(site)
    throw error
  }
}

/** The legacy files in place of the new site. @returns whether there was anything to bring back */
export async function restoreNginx(site: Site): Promise<boolean> {
  const names = await keptNames(site)
  if (names.length === 0) return false
  const paths = names.map((name) => decodeURIComponent(name))
  if (!paths.includes(site.nginx.confFile)) await rm(site.nginx.confFile, { force: true })
  for (const [at, name] of names.entries()) {
    await rm(paths[at] ?? '', { force: true })
    await run(['cp', '--archive', '--no-target-directory', join(keptFolder(site), name), paths[at] ?? ''])
  }
  await run([...site.nginx.command, '-t'])
  if ((await ask([...site.nginx.command, '-s', 'reload'])) === undefined)
    warn(`nginx could not be told: ${[...site.nginx.command, '-s', 'reload'].join(' ')}`)
  await rm(keptFolder(site), { recursive: true, force: true })
  return true
}

async function keptNames(site: Site): Promise<string[]> {
  return (await readdir(keptFolder(site)).catch(() => [])).filter((name) => !name.endsWith('.new'))
}
