import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { defineConfig } from 'vitest/config'

export default defineConfig({
  test: {
    include: ['test/**/*.test.mts'],
    globalSetup: ['test/prepare.mts'],
    // Real containers on few cores: one file at a time keeps the measured times honest.
    fileParallelism: false,
    testTimeout: 300_000,
    hookTimeout: 900_000,
    // The scripts are started hundreds of times; with what Node has compiled before, in half the time.
    env: { NODE_COMPILE_CACHE: join(tmpdir(), 'strapi-blue-green-compile-cache') },
  },
})
