/** Versions of what must be installed. */
import { ask, run } from '../command.mts'
import type { Check, Finding } from '../checks.mts'
import * as engine from '../engine.mts'
import { asRoot, scriptCommand } from '../settings.mts'

/** Tried with these and later ones. */
export const minimum = { engine: '20.10', compose: '2.20', nginx: '1.22' }

export const softwareChecks: Check[] = [
  {
    title: 'container engine',
    check: async (site) => {
      const found = await engine.version().catch(() => undefined)
      if (found !== undefined) return tooOld('the container engine', found, minimum.engine)
      const installed = await ask(['dockerd', '--version'])
      const fix = installed
        ? `${asRoot('systemctl start docker')}   (and your user must be in the group "docker")`
        : asRoot(scriptCommand('setup', site.envFile, '--install'))
      return [{ problem: 'the container engine does not answer', fix }]
    },
  },
  {
    title: 'Compose',
    check: async (site) => {
      const found = await ask(['docker', 'compose', 'version', '--short'])
      const fix = asRoot(scriptCommand('setup', site.envFile, '--install'))
      if (found === undefined) return [{ problem: '"docker compose" (version 2) is missing', fix }]
      return tooOld('Compose', found, minimum.compose)
    },
  },
  {
    title: 'nginx',
    check: async (site) => {
      const lines: string[] = []
      const fix = asRoot(scriptCommand('setup', site.envFile, '--install'))
      // nginx tells its version on stderr.
      const found = await run([...site.nginx.command, '-v'], { onLine: (line) => lines.push(line) }).catch(
        () => undefined,
      )
      if (found === undefined)
        return [{ problem: `nginx is missing ("${site.nginx.command.join(' ')} -v" fails)`, fix }]
      return tooOld('nginx', lines.join(' '), minimum.nginx)
    },
  },
]

function tooOld(name: string, text: string, least: string): Finding[] {
  const version = /\d+(\.\d+)+/.exec(text)?.[0] ?? '0'
  return isAtLeast(version, least)
    ? []
    : [
        {
          problem: `${name} is ${version}, at least ${least} is needed`,
          fix: 'upgrade it with your distribution',
        },
      ]
}

/** Compares dotted numbers. */
export function isAtLeast(version: string, least: string): boolean {
  const numbers = version.split('.').map(Number)
  for (const [place, wanted] of least.split('.').map(Number).entries()) {
    const given = numbers[place] ?? 0
    if (given !== wanted) return given > wanted
  }
  return true
}
