/** Installs what is missing from the distribution. An engine that is there, whoever made it, is never changed. */
import { spawn } from 'node:child_process'
import { mkdir, mkdtemp, open, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { parse } from 'dotenv'
import { ask, hasSystemd, run } from './command.mts'
import * as engine from './engine.mts'
import { alive, change, detail, exitCodes, pause, Problem } from './report.mts'

export interface Missing {
  name: 'engine' | 'running engine' | 'compose' | 'buildx' | 'nginx'
  /** What an operator types. */
  fix: string
}

/** Debian releases without Compose v2, and the next release, which has it. Its packages need only libc6 >= 2.34. */
const nextRelease: Record<string, string> = { bookworm: 'trixie' }

export async function missingSoftware(): Promise<Missing[]> {
  const missing: Missing[] = []
  const answers = (await engine.version().catch(() => undefined)) !== undefined
  const has = async (...argv: string[]) => (await ask(argv)) !== undefined
  const hasEngine = answers || (await has('dockerd', '--version'))
  if (!hasEngine) missing.push({ name: 'engine', fix: 'sudo apt-get install docker.io' })
  if (!answers) missing.push({ name: 'running engine', fix: 'sudo systemctl enable --now docker' })
  if (!(await has('docker', 'compose', 'version'))) {
    missing.push({
      name: 'compose',
      fix: 'sudo apt-get install docker-compose   (Debian 13), docker-compose-v2 (Ubuntu); Debian 12: add --install',
    })
  }
  if (!(await has('docker', 'buildx', 'version')))
    missing.push({ name: 'buildx', fix: 'sudo apt-get install docker-buildx   (Debian 12: add --install)' })
  if (!(await has('nginx', '-v'))) missing.push({ name: 'nginx', fix: 'sudo apt-get install nginx' })
  return missing
}

/** @throws Problem when this is not Debian or Ubuntu, or not root */
export async function installSoftware(missing: Missing[]): Promise<void> {
  const system = parse(await readFile('/etc/os-release', 'utf8').catch(() => ''))
  const names = missing.map((one) => one.name)
  const fixes = missing.map((one) => `  ${one.name}: ${one.fix}`).join('\n')
  if (!`${system.ID ?? ''} ${system.ID_LIKE ?? ''}`.includes('debian')) {
    throw new Problem(
      exitCodes.usage,
      `--install knows Debian and Ubuntu, this is ${system.PRETTY_NAME ?? 'unknown'}`,
      `Install by hand:\n${fixes}`,
    )
  }
  if (process.getuid?.() !== 0)
    throw new Problem(
      exitCodes.usage,
      '--install needs root',
      'Put sudo in front, or install by hand:\n' + fixes,
    )

  await change('apt-get update', updateLists)
  if (names.includes('engine')) await aptInstall(['docker.io', 'iptables'])
  for (const plugin of ['compose', 'buildx'] as const) {
    if (names.includes(plugin)) await installPlugin(plugin, system.VERSION_CODENAME ?? '')
  }
  if (names.includes('nginx')) await aptInstall(['nginx'])
  if (names.includes('running engine')) await startEngine()
}

/** Unattended upgrades hold apt's locks for minutes, most of all on a new server. */
const lockTimeoutSeconds = 300

/** apt itself does not wait for the lock of its lists. */
async function updateLists(): Promise<void> {
  const deadline = Date.now() + lockTimeoutSeconds * 1000
  let what = 'reading the lists of packages'
  const update = async () => {
    for (;;) {
      try {
        await run(['apt-get', 'update', '--quiet'], { env: { LC_ALL: 'C' }, timeoutMs: 300_000 })
        return
      } catch (error) {
        if (Date.now() > deadline || !String(error).includes('Could not get lock')) throw error
        what = 'waiting for another apt'
        await pause(2000)
      }
    }
  }
  await alive(() => what, update)
}

async function aptInstall(packages: string[]): Promise<void> {
  await change(`install ${packages.join(', ')}`, async () => {
    const waiting = `DPkg::Lock::Timeout=${lockTimeoutSeconds}`
    const install = ['install', '--yes', '--quiet', '--no-install-recommends', ...packages]
    const argv = ['apt-get', '-o', waiting, ...install]
    await alive(
      () => packages.join(', '),
      () => run(argv, { env: { DEBIAN_FRONTEND: 'noninteractive' }, timeoutMs: 900_000 }),
    )
    detail(`installed ${packages.join(', ')}`)
  })
}

/** The plugin's package is called differently wherever one comes from; the first that offers version 2 is taken. */
async function installPlugin(plugin: 'compose' | 'buildx', codename: string): Promise<void> {
  const packages = {
    compose: ['docker-compose-plugin', 'docker-compose-v2', 'docker-compose'],
    buildx: ['docker-buildx-plugin', 'docker-buildx'],
  }
  for (const name of packages[plugin]) {
    const policy = (await ask(['apt-cache', 'policy', name])) ?? ''
    const candidate = /Candidate: (?:\d+:)?(\d+)/.exec(policy)?.[1]
    if (candidate !== undefined && (plugin === 'buildx' || Number(candidate) >= 2))
      return await aptInstall([name])
  }
  const next = nextRelease[codename]
  if (next === undefined)
    throw new Problem(
      exitCodes.usage,
      `${codename} has no package of docker ${plugin}`,
      `Install the plugin by hand, then run this again.`,
    )
  const name = plugin === 'compose' ? 'docker-compose' : 'docker-buildx'
  await change(`install ${name} from ${next}, through this host's own package source`, async () => {
    await installFromNext(name, codename, next)
    detail(`installed ${name} from ${next}`)
  })
}

/** Fetches one package of the next release without adding that release to the host's sources. */
async function installFromNext(name: string, codename: string, next: string): Promise<void> {
  const folder = await mkdtemp(join(tmpdir(), 'next-release-'))
  try {
    await mkdir(join(folder, 'lists/partial'), { recursive: true })
    const sources = join(folder, 'next.sources')
    await writeFile(sources, await sourcesOf(codename, next))
    const options = [
      `Dir::Etc::SourceList=${sources}`,
      'Dir::Etc::SourceParts=-',
      `Dir::State::Lists=${join(folder, 'lists')}`,
      'APT::Sandbox::User=root',
    ]
    const apt = ['apt-get', '--quiet', ...options.flatMap((option) => ['-o', option])]
    await run([...apt, 'update'], { timeoutMs: 300_000 })
    await run([...apt, 'download', name], { cwd: folder, timeoutMs: 300_000 })
    const file = (await readdir(folder)).find((entry) => entry.endsWith('.deb'))
    if (file === undefined) throw new Error(`${name} was not downloaded`)
    await aptInstall([join(folder, file)])
  } finally {
    await rm(folder, { recursive: true, force: true })
  }
}

/** The host's own Debian sources with the next release's name, in the format they are in. */
async function sourcesOf(codename: string, next: string): Promise<string> {
  const modern = await readFile('/etc/apt/sources.list.d/debian.sources', 'utf8').catch(() => undefined)
  const classic = await readFile('/etc/apt/sources.list', 'utf8').catch(() => '')
  const text =
    modern ??
    classic
      .split('\n')
      .filter((line) => line.startsWith('deb ') && line.includes(codename))
      .join('\n')
  if (!text.includes(codename)) throw new Error(`no package source for ${codename} was found in /etc/apt`)
  return `${text.replaceAll(codename, next)}\n`
}

/** Where systemd runs the host it starts the engine; elsewhere (a container, a chroot) nobody would. */
export async function startEngine(): Promise<void> {
  await change('start the container engine', async () => {
    if (hasSystemd) {
      await run(['systemctl', 'enable', '--now', 'docker'])
    } else {
      const log = await open('/var/log/dockerd.log', 'a')
      spawn('dockerd', [], { detached: true, stdio: ['ignore', log.fd, log.fd] }).unref()
      await log.close()
    }
    for (let waited = 0; waited < 60; waited += 1) {
      if ((await engine.version().catch(() => undefined)) !== undefined) return detail('the engine runs')
      await sleep(500)
    }
    throw new Problem(
      exitCodes.usage,
      'the container engine does not start',
      hasSystemd ? 'See: journalctl -u docker' : 'See: /var/log/dockerd.log',
    )
  })
}
