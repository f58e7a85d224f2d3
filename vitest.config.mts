import { defineConfig } from 'vitest/config'

export default defineConfig({
  test: {
    include: ['test/**/*.test.mts'],
    globalSetup: ['test/prepare.mts'],
    // Real containers on few cores: one file at a time keeps the measured times honest.
    fileParallelism: false,
    testTimeout: 300_000,
    hookTimeout: 900_000,
  },
})
