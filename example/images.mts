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
  return { standIns: true, settings: await buildStandIns() }
}

/** Of another major version, with another C library and ICU, as a server may have it that a site is moved from. */
export async function olderPostgresql(standIns: boolean): Promise<string> {
  if (!standIns) return 'postgres:15-bookworm'
  return (await buildStandIns('older')).POSTGRES_IMAGE ?? ''
}

/** @returns a line each, as in .env */
async function buildStandIns(...options: string[]): Promise<Record<string, string>> {
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
    () => run([script, ...options], { timeoutMs: 1_200_000, onLine: (line) => (latest = line) }),
  )
  return parse(output)
}

/** The smallest of the images is asked for; a machine without a way out answers at once or not at all. */
async function registryAnswers(): Promise<boolean> {
  const image = 'redis:7-alpine'
  if ((await ask(['docker', 'image', 'inspect', image])) !== undefined) return true
  return (await ask(['docker', 'pull', '--quiet', image], { timeoutMs: 60_000 })) !== undefined
}
