/** The nginx files that pass visitors to the legacy Strapi, and their way out of service and back. */
import { mkdir, readdir, rename, rm } from 'node:fs/promises'
import { join } from 'node:path'
import type { Finding } from '../checks.mts'
import { ask, run } from '../command.mts'
import { readText } from '../envfile.mts'
import { makeStateDir } from '../history.mts'
import { install } from '../nginx.mts'
import { detail, exitCodes, explain, Problem, refuseInDryRun, warn } from '../report.mts'
import { scriptCommand, type Site } from '../settings.mts'
import { setAlone, setFlag } from '../traffic.mts'

export interface LegacyNginx {
  files: string[]
  serverName: string | undefined
  tls: { certificate: string; key: string } | undefined
  /** What is in them and will not be in the new site. */
  lost: string[]
  problems: Finding[]
}

interface Given {
  /** Address of our own control server. */
  control: string
  /** SERVER_NAME. */
  name: string | undefined
  hasTls: boolean
}

/**
 * As the configuration on disk has it: `nginx -T` names each file in front of its text.
 * @param given what docker/.env says already, and so need not be found out
 */
export async function legacyNginx(command: string[], address: string, given: Given): Promise<LegacyNginx> {
  const dump = await ask([...command, '-T'])
  const found: LegacyNginx = { files: [], serverName: undefined, tls: undefined, lost: [], problems: [] }
  if (dump === undefined) {
    found.problems.push({
      problem: 'nginx does not tell its configuration',
      fix: `See: ${command.join(' ')} -T`,
    })
    return found
  }
  return readNginx(dump, address, given)
}

export function readNginx(
  dump: string,
  address: string,
  { control, name: givenName, hasTls }: Given,
): LegacyNginx {
  const files = dump
    .split(/^# configuration file (?=.*:$)/m)
    .slice(1)
    .map((part) => ({
      path: part.slice(0, part.indexOf(':\n')),
      text: part.slice(part.indexOf('\n') + 1).replaceAll(/(^|\s)#.*$/gm, ''),
    }))
  const [host, port] = [address.slice(0, address.lastIndexOf(':')), address.split(':').at(-1) ?? '']
  const place = String.raw`(?:127\.0\.0\.1|localhost|\[::1\]|0\.0\.0\.0|${host.replaceAll('.', String.raw`\.`)}):${port}\b`
  const upstreams = files.flatMap(({ text }) =>
    [...text.matchAll(/upstream\s+(\S+)\s*\{([^}]*)\}/g)]
      .filter(([, , body = '']) => new RegExp(String.raw`server\s+${place}`).test(body))
      .map(([, name = '']) => name),
  )
  const target = new RegExp(
    String.raw`^(?:${[place, ...upstreams.map((name) => String.raw`${name.replaceAll('.', String.raw`\.`)}(?![\w.-])`)].join('|')})`,
  )
  const own = files.filter(
    ({ text }) => !text.includes(`listen ${control};`) && passes(text).some((one) => target.test(one)),
  )
  const all = own.map(({ text }) => text).join('\n')
  const value = (name: string) => new RegExp(String.raw`\b${name}\s+([^;\s]+)`).exec(all)?.[1]
  const names = namesIn(all)
  const [certificate, key] = [value('ssl_certificate'), value('ssl_certificate_key')]
  const problems: Finding[] = []
  const [serverName] = names.filter((name) => !/[_*~]/.test(name))
  for (const { path, text } of own)
    if (passes(text).some((one) => !target.test(one)))
      problems.push({
        problem: `${path} also passes visitors to something else than the legacy Strapi`,
        fix: 'Put the site of Strapi into a file of its own: the whole file goes out of service.',
      })
  const [main] = files
  if (main && own.includes(main))
    problems.push({
      problem: `the site of Strapi is in ${main.path} itself, which cannot go out of service`,
      fix: 'Put its server block into a file of its own, which that one includes.',
    })
  const wanted = givenName ?? serverName ?? ''
  for (const { path, text } of files)
    if (
      !own.some((one) => one.path === path) &&
      !text.includes(`listen ${control};`) &&
      namesIn(text).includes(wanted)
    )
      problems.push({
        problem: `${path} serves ${wanted}, too, and would take visitors from the new site`,
        fix: 'Take that server block out, or choose another SERVER_NAME.',
      })
  if (serverName === undefined && givenName === undefined)
    problems.push({
      problem: `no nginx file with a server_name passes visitors to ${address}`,
      fix: 'Set SERVER_NAME in docker/.env.',
    })
  if (/\blisten\s[^;]*(?:443|ssl)/.test(all) && certificate === undefined && !hasTls)
    problems.push({
      problem: 'nginx serves the legacy site by HTTPS, and its certificate is not in the same file',
      fix: 'Set TLS_CERTIFICATE and TLS_CERTIFICATE_KEY in docker/.env.',
    })
  const taken =
    /^\s*(?:server_name|allow|deny|auth_basic\w*|location\s+(?!\/\s*\{)[^{]+|client_max_body_size|rewrite|return)\b[^;{]*/gm
  const lost = [...all.matchAll(taken)]
    .map(([line]) => line.trim())
    .filter(
      (line) =>
        line !== `server_name ${serverName}` &&
        !/^client_max_body_size\s+(\d\d?|1\d\d|2[0-4]\d|250)m$/i.test(line),
    )
  return {
    files: own.map(({ path }) => path),
    serverName,
    tls: certificate !== undefined && key !== undefined ? { certificate, key } : undefined,
    lost,
    problems,
  }
}

function namesIn(text: string): string[] {
  return [...text.matchAll(/\bserver_name\s+([^;]+);/g)].flatMap(([, list = '']) => list.trim().split(/\s+/))
}

/** Where each proxy_pass leads, without the scheme. */
function passes(text: string): string[] {
  return [...text.matchAll(/\bproxy_pass\s+(?:https?:\/\/)?([^;]+);/g)].map(([, to = '']) => to.trim())
}

/** Where the legacy files are kept, each with its path as its name. */
function keptFolder(site: Site): string {
  return join(site.stateDir, 'legacy-nginx')
}

/**
 * The new site in place of the legacy files, which are kept.
 * @throws Problem (degraded) with nginx's own words, and everything as before
 */
export async function replaceNginx(site: Site, files: string[]): Promise<void> {
  refuseInDryRun('replace the legacy nginx file')
  try {
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
    // A run that was killed may have left it to slave alone.
    await setFlag(site, 'strapi-master')
    await setAlone(site, false)
    await install(site)
  } catch (error) {
    await restoreNginx(site).catch((failure: unknown) => warn(explain(failure)))
    throw new Problem(
      exitCodes.degraded,
      'visitors are served by the new set-up through the legacy nginx file; the new one could not be installed',
      `Mend it, then: ${scriptCommand('migrate', site.envFile)}`,
      error,
    )
  }
}

/** The legacy files in place of the new site. @throws Error when nginx does not take them */
export async function restoreNginx(site: Site): Promise<void> {
  const kept = await readdir(keptFolder(site)).catch(() => undefined)
  if (kept === undefined) {
    const installed = (await readText(site.nginx.confFile)) ?? ''
    if (installed.includes(`listen ${site.nginx.control};`))
      warn(
        `${site.nginx.confFile} stays, since no legacy nginx file is in ${keptFolder(site)}; if there was one, it is in config.tar of the set that was made before the switch`,
      )
    return
  }
  const names = kept.filter((name) => !name.endsWith('.new'))
  const paths = names.map((name) => decodeURIComponent(name))
  const { confFile, control } = site.nginx
  // Only what is ours: killed at its very beginning, nothing was kept yet, and the file is still the legacy one.
  const isOurs = ((await readText(confFile)) ?? '').includes(`listen ${control};`)
  if (isOurs && !paths.includes(confFile)) await rm(confFile, { force: true })
  for (const [at, name] of names.entries()) {
    await rm(paths[at] ?? '', { force: true })
    await run(['cp', '--archive', '--no-target-directory', join(keptFolder(site), name), paths[at] ?? ''])
  }
  const previous = `${confFile}.previous`
  // What the installation has kept of a legacy file with the name of ours is that file again.
  const isBack = paths.includes(confFile) && (await readText(previous)) === (await readText(confFile))
  if (isBack) await rm(previous)
  await run([...site.nginx.command, '-t'])
  await run([...site.nginx.command, '-s', 'reload'])
  await rm(keptFolder(site), { recursive: true, force: true })
}
