/** The base images of the trial and the tests: the real ones where a registry can be reached, otherwise stand-ins from Debian packages. */
import { join } from 'node:path'
import { parse } from 'dotenv'
import { ask, run } from '../scripts/lib/command.mts'
import { projectRoot } from '../scripts/lib/settings.mts'
import { alive } from '../scripts/lib/report.mts'

export interface BaseImages {
  standIns: boolean
  /** NODE_IMAGE, POSTGRES_IMAGE and REDIS_IMAGE for .env; empty keeps the defaults. */
  settings: Record<string, string>
}

export async function baseImages(): Promise<BaseImages> {
  if (await registryAnswers()) return { standIns: false, settings: {} }
  if ((await ask(['mmdebstrap', '--version'])) === undefined) {
    await run(['apt-get', 'install', '--yes', '--quiet', '--no-install-recommends', 'mmdebstrap'], {
      env: { DEBIAN_FRONTEND: 'noninteractive' },
      timeoutMs: 300_000,
    })
  }
  const script = join(projectRoot, 'example/base-images/build.sh')
  let latest = ''
  const output = await alive(
    () => latest,
    () => run([script], { timeoutMs: 1_200_000, onLine: (line) => (latest = line) }),
  )
  return { standIns: true, settings: parse(output) }
}

/** The smallest of the images is asked for; a machine without a way out answers at once or not at all. */
async function registryAnswers(): Promise<boolean> {
  const image = 'redis:7-alpine'
  if ((await ask(['docker', 'image', 'inspect', image])) !== undefined) return true
  return (await ask(['docker', 'pull', '--quiet', image], { timeoutMs: 60_000 })) !== undefined
}
