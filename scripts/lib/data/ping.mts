/** Tells a watcher (healthchecks.io and the like) that a backup began, went well or failed. */
import { resolve } from 'node:path'
import { readEnv } from '../envfile.mts'
import { explain, recentLines, warn } from '../report.mts'
import { projectRoot } from '../settings.mts'

/** What is told: everything, or only that something failed. */
export type Pings = 'all' | 'failures'

/**
 * Runs an action and tells BACKUP_PING_URL of it, also when the other settings are broken. A URL that does not answer changes
 * nothing. https://healthchecks.io/docs/http_api/
 */
export async function pinged(
  envFile: string | undefined,
  pings: Pings,
  action: () => Promise<void>,
): Promise<void> {
  const url = await pingUrl(envFile)
  if (url === undefined) return await action()
  if (pings === 'all') await ping(url, '/start', '')
  try {
    await action()
  } catch (error) {
    await ping(url, '/fail', [...recentLines(), explain(error)].join('\n').slice(-10_000))
    throw error
  }
  if (pings === 'all') await ping(url, '', recentLines().join('\n').slice(-10_000))
}

async function pingUrl(envFile = resolve(projectRoot, 'docker/.env')): Promise<URL | undefined> {
  const file = await readEnv(resolve(envFile)).catch(() => undefined)
  const text = process.env.BACKUP_PING_URL ?? file?.BACKUP_PING_URL ?? ''
  return URL.canParse(text) ? new URL(text) : undefined
}

/** The URL is as good as a password, so no message names it. */
async function ping(url: URL, suffix: string, body: string): Promise<void> {
  const target = new URL(url)
  target.pathname = `${target.pathname.replace(/\/$/, '')}${suffix}`
  try {
    const response = await fetch(target, { method: 'POST', body, signal: AbortSignal.timeout(10_000) })
    if (!response.ok) warn(`BACKUP_PING_URL${suffix} answered ${response.status}`)
  } catch (error) {
    const cause = error instanceof Error && error.cause instanceof Error ? error.cause : error
    const code = cause instanceof Error && 'code' in cause ? String(cause.code) : 'no answer in time'
    warn(`BACKUP_PING_URL${suffix} did not answer: ${code}`)
  }
}
