/** Restart policies, where the engine is in a race with itself. A script stands for docker. */
import { chmod, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { setRestart, setRestartIfThere } from '../../scripts/lib/booting.mts'

/** As Docker 20.10 says it of a container that ends between its two looks at it. */
const ending =
  'Error response from daemon: Cannot update container 70e5: runc did not terminate successfully: exit status 1: container not running'
const missing = 'Error: No such container: 70e5'

let folder: string
const path = process.env.PATH

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'bob-test-booting-'))
  process.env.PATH = `${folder}:${path ?? ''}`
})
afterEach(async () => {
  process.env.PATH = path
  await rm(folder, { recursive: true })
})

/** Fails so many times, and notes what it was asked. */
async function dockerThatSays(text: string, times: number): Promise<void> {
  const script = `#!/bin/sh
echo "$*" >> ${folder}/asked
[ "$(wc -l < ${folder}/asked)" -gt ${times} ] || { echo '${text}' >&2; exit 1; }`
  await writeFile(join(folder, 'docker'), script)
  await chmod(join(folder, 'docker'), 0o755)
}

async function asked(): Promise<string[]> {
  return (await readFile(join(folder, 'asked'), 'utf8')).trim().split('\n')
}

describe('a restart policy', () => {
  test('is set again when the container ends at that very moment', async () => {
    await dockerThatSays(ending, 2)
    await setRestart('70e5', 'no')
    expect(await asked()).toEqual(Array(3).fill('update --restart no 70e5'))
  })

  test('is not tried for ever', async () => {
    await dockerThatSays(ending, 99)
    await expect(setRestart('70e5', 'no')).rejects.toThrow('container not running')
    expect(await asked()).toHaveLength(5)
  })

  test('is asked for once where there is no such container', async () => {
    await dockerThatSays(missing, 99)
    await expect(setRestart('70e5', 'no')).rejects.toThrow('No such container')
    await setRestartIfThere('70e5', 'no')
    expect(await asked()).toHaveLength(2)
  })
})
