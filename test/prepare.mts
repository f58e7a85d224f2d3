/** Once before all tests: the engine, Compose, nginx and the base images, installed and started if they are not there. */
import type { TestProject } from 'vitest/node'
import { baseImages } from '../example/images.mts'
import { ask, run } from '../scripts/lib/command.mts'
import { installSoftware, missingSoftware } from '../scripts/lib/install.mts'

declare module 'vitest' {
  export interface ProvidedContext {
    /** NODE_IMAGE, POSTGRES_IMAGE, REDIS_IMAGE for a site's .env. */
    baseImages: Record<string, string>
  }
}

export default async function prepare(project: TestProject): Promise<void> {
  const missing = await missingSoftware()
  if (missing.length > 0) await installSoftware(missing)
  // For a repository, a certificate, a schedule, the admin panel.
  for (const name of ['git', 'openssl', 'cron', 'chromium']) {
    if ((await ask(['which', name])) === undefined)
      await run(['apt-get', 'install', '--yes', '--quiet', '--no-install-recommends', name], {
        timeoutMs: 900_000,
      })
  }
  const { settings } = await baseImages()
  project.provide('baseImages', settings)
}
