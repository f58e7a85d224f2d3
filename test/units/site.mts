/** A site's settings in a folder of its own, gone when its test ends. Nothing of it runs. */
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { onTestFinished } from 'vitest'
import { setValues } from '../../scripts/lib/envfile.mts'
import { loadSite, type Site } from '../../scripts/lib/settings.mts'

export const passwords = { POSTGRES_PASSWORD: 'pg-test-password', REDIS_PASSWORD: 'redis-test-password' }

export async function newFolder(): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'bob-unit-'))
  onTestFinished(() => rm(folder, { recursive: true, force: true }))
  return folder
}

export async function siteWith(settings: Record<string, string> = {}): Promise<Site> {
  return await siteOf(setValues('', { ...passwords, ...settings }))
}

/** From the text of its .env. */
export async function siteOf(text: string): Promise<Site> {
  const envFile = join(await newFolder(), '.env')
  await writeFile(envFile, text)
  return await loadSite(envFile)
}
