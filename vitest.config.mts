import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { defineConfig } from 'vitest/config'

/** What measures, or restarts the engine, has the machine for itself. */
const alone = ['engine', 'load', 'migrate-strapi', 'nginx', 'strapi'].map((name) => `test/${name}.test.mts`)

export default defineConfig({
  test: {
    globalSetup: ['test/prepare.mts'],
    testTimeout: 300_000,
    hookTimeout: 900_000,
    // The scripts are started hundreds of times; with what Node has compiled before, in half the time.
    env: { NODE_COMPILE_CACHE: join(tmpdir(), 'strapi-blue-green-compile-cache') },
    projects: [
      {
        extends: true,
        test: {
          name: 'side by side',
          include: ['test/**/*.test.mts'],
          exclude: alone,
          // They mostly wait: for containers to start and stop.
          maxWorkers: 2,
          sequence: { groupOrder: 0 },
        },
      },
      {
        extends: true,
        test: { name: 'alone', include: alone, fileParallelism: false, sequence: { groupOrder: 1 } },
      },
    ],
  },
})
