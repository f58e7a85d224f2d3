import { tmpdir } from 'node:os'
import { basename, join } from 'node:path'
import { defineConfig } from 'vitest/config'
import { BaseSequencer, type TestSpecification } from 'vitest/node'

/** What measures, or restarts the engine, has the machine for itself. */
const alone = ['engine', 'load', 'migrate-strapi', 'nginx', 'strapi'].map((name) => `test/${name}.test.mts`)

/** Those that take minutes. */
const long = [
  'migrate',
  'restore',
  'backup',
  'restore-killed',
  'migrate-killed',
  'deploy',
  'interrupted',
  'sets',
  'migrate-postgresql',
  'setup',
  'refused',
  'migrate-form',
  'services',
  'migrate-refused',
]

/** So that the workers end together. */
class LongestFirst extends BaseSequencer {
  override async sort(files: TestSpecification[]): Promise<TestSpecification[]> {
    const place = (file: TestSpecification) => {
      const at = long.indexOf(basename(file.moduleId, '.test.mts'))
      return at < 0 ? long.length : at
    }
    return files.toSorted((one, other) => place(one) - place(other))
  }
}

export default defineConfig({
  test: {
    globalSetup: ['test/prepare.mts'],
    sequence: { sequencer: LongestFirst },
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
