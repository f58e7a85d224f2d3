/** The list at the end of the runbook's chapter, ticked by machine: visitors, admin panel, files, rows, crons. */
import { createHmac, randomBytes } from 'node:crypto'
import { stat } from 'node:fs/promises'
import { join } from 'node:path'
import { run } from '../command.mts'
import { logs, query } from '../compose.mts'
import { reachDatabase } from '../data/backup.mts'
import { readManifest } from '../data/manifest.mts'
import { setFolder } from '../data/sets.mts'
import { openSnapshot } from '../data/snapshot.mts'
import { readEnv } from '../envfile.mts'
import { headUrl, getUrl, type Question } from '../http.mts'
import { addToResult, alive, detail, exitCodes, explain, pause, Problem, warn } from '../report.mts'
import { composeCommand, scriptCommand, type Site } from '../settings.mts'
import { observe } from '../slots.mts'
import { notes } from './journal.mts'

interface Line {
  title: string
  /** @throws Error with the reason why it is not ticked; @returns what was seen, if that says more than the title */
  check: (site: Site) => Promise<string | undefined>
  fix: (site: Site) => string
  /** Not ticked, it is only said: it may be right all the same. */
  isSoft?: boolean
}

/** How many files are asked for at once. */
const concurrency = 8
/** Two turns of a cron that runs every minute, since one may be missed while Strapi boots; others are looked for later. */
const cronPatienceMs = 130_000

const lines: Line[] = [
  {
    title: 'nginx passes visitors to Strapi (/_health answers 204)',
    check: async (site) => {
      const { status } = await getUrl(site.probe.url, { dial: site.probe.dial })
      if (status >= 300) throw new Error(`${site.probe.url} answers ${status}`)
      return undefined
    },
    fix: (site) => scriptCommand('deploy', site.envFile, '--status'),
  },
  {
    title: 'the admin panel answers',
    check: async (site) => {
      for (const path of ['/admin/init', '/admin']) {
        const { status } = await visit(site, path, getUrl)
        if (status >= 400) throw new Error(`${path} answers ${status}`)
      }
      return undefined
    },
    fix: (site) => composeCommand(site, 'logs strapi-master'),
  },
  {
    title: 'every upload that the database refers to is there',
    check: uploadsAnswer,
    fix: (site) => `ls -la ${site.folders.uploads}   (a file that was missing before is missing now)`,
  },
  {
    title: 'a new upload works, and is removed again',
    check: uploadWorks,
    fix: () => 'Try it in the media library of the admin panel.',
  },
  {
    title: 'all rows came along',
    check: rowsCameAlong,
    fix: (site) => scriptCommand('data', site.envFile, 'list') + '   names the set that was made before',
  },
  {
    title: 'crons run ([CRON] in the log)',
    check: cronsRun,
    isSoft: true,
    fix: (site) =>
      `Look again after the next one is due: ${composeCommand(site, 'logs strapi-master | grep CRON')}`,
  },
  {
    title: 'strapi-master is RUNNING + HEALTHY',
    check: async (site) => {
      const { master } = await observe(site)
      if (master.status !== 'healthy') throw new Error(`it is ${master.status}`)
      return undefined
    },
    fix: (site) => scriptCommand('deploy', site.envFile, '--status'),
  },
]

/** @throws Problem (degraded) that says what to do for each line that is not ticked */
export async function checkList(site: Site): Promise<void> {
  const open: string[] = []
  const ticks: Record<string, boolean> = {}
  for (const { title, check, fix, isSoft } of lines) {
    try {
      const seen = await check(site)
      detail(`[x] ${title}${seen === undefined ? '' : `: ${seen}`}`)
      ticks[title] = true
    } catch (error) {
      warn(`[ ] ${title}: ${explain(error)}${isSoft ? `\n-> ${fix(site)}` : ''}`)
      if (!isSoft) open.push(`\n  - ${title}\n    -> ${fix(site)}`)
      ticks[title] = false
    }
  }
  addToResult({ checks: ticks })
  if (open.length > 0)
    throw new Problem(
      exitCodes.degraded,
      `visitors are served by the new set-up, but not all of the list is ticked:${open.join('')}`,
    )
}

/** As a visitor: through nginx, by the name of the site. */
async function visit<T>(
  site: Site,
  path: string,
  ask: (url: string, question: Question) => Promise<T>,
): Promise<T> {
  return await ask(new URL(path, new URL(site.probe.url).origin).href, {
    dial: site.probe.dial,
    timeoutMs: 30_000,
  })
}

async function uploadsAnswer(site: Site): Promise<string> {
  const snapshot = await openSnapshot(await reachDatabase(site), site.database.name)
  await snapshot.close()
  const wrong: string[] = []
  const { backup = '' } = await notes(site)
  const before = await readManifest(setFolder(site, backup)).catch(() => undefined)
  const wasMissing = new Set(before?.uploads?.missing)
  const names = snapshot.uploads.filter((name) => !wasMissing.has(name))
  const count = names.length
  const work = async () => {
    for (let name = names.pop(); name !== undefined; name = names.pop()) {
      const reason = await wrongUpload(site, name)
      if (reason) wrong.push(`${name} ${reason}`)
    }
  }
  await alive(
    () => `${names.length} files left`,
    () => Promise.all(Array.from({ length: concurrency }, work)),
  )
  if (wrong.length > 0) throw new Error(`${wrong.length} of ${count}: ${wrong.slice(0, 10).join('; ')}`)
  return `${count} answer 200 with the right length${wasMissing.size > 0 ? `; ${wasMissing.size} were missing before` : ''}`
}

async function wrongUpload(site: Site, name: string): Promise<string | undefined> {
  const found = await stat(join(site.folders.uploads, name)).catch(() => undefined)
  if (!found) return 'is not there'
  const path = `/uploads/${name.split('/').map(encodeURIComponent).join('/')}`
  const { status, headers } = await visit(site, path, headUrl)
  if (status !== 200) return `answers ${status}`
  return Number(headers['content-length']) === found.size ? undefined : 'has another length'
}

/**
 * With an API token of its own, which goes again, and expires in ten minutes if this is killed. Strapi keeps a keyed hash of each:
 * https://docs.strapi.io/cms/features/api-tokens
 */
async function uploadWorks(site: Site): Promise<undefined> {
  const postgresql = await reachDatabase(site)
  const token = randomBytes(64).toString('hex')
  const { API_TOKEN_SALT: salt = '' } = (await readEnv(join(site.source, '.env'))) ?? {}
  const hash = createHmac('sha512', salt).update(token).digest('hex')
  const name = 'check of the migration'
  const remove = query(postgresql, site.database.name, `DELETE FROM strapi_api_tokens WHERE name = '${name}'`)
  await run(remove)
  await run(
    query(
      postgresql,
      site.database.name,
      `INSERT INTO strapi_api_tokens (name, description, type, access_key, expires_at, created_at, updated_at)
       VALUES ('${name}', '', 'full-access', '${hash}', now() AT TIME ZONE 'UTC' + interval '10 minutes', now() AT TIME ZONE 'UTC', now() AT TIME ZONE 'UTC')`,
    ),
  )
  try {
    await uploadOnce(site, { authorization: `Bearer ${token}` })
  } finally {
    await run(remove)
  }
  return undefined
}

async function uploadOnce(site: Site, headers: Record<string, string>): Promise<void> {
  const origin = `http://${site.slots['strapi-master'].address}`
  // The smallest PNG: one grey pixel.
  const pixel = Buffer.from(
    'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg==',
    'base64',
  )
  const body = new FormData()
  body.append('files', new Blob([pixel], { type: 'image/png' }), 'migration-check.png')
  const signal = AbortSignal.timeout(60_000)
  const response = await fetch(`${origin}/api/upload`, { method: 'POST', headers, body, signal })
  if (!response.ok)
    throw new Error(`/api/upload answers ${response.status}: ${(await response.text()).slice(0, 200)}`)
  const [file] = (await response.json()) as { id: number; url: string }[]
  if (!file) throw new Error('/api/upload names no file')
  // Strapi may have made the picture smaller.
  const reason = await wrongUpload(site, file.url.replace(/^.*\/uploads\//, '')).catch(explain)
  const removal = await fetch(`${origin}/api/upload/files/${file.id}`, { method: 'DELETE', headers, signal })
  if (reason) throw new Error(`${file.url} ${reason}`)
  if (!removal.ok) throw new Error(`migration-check.png is not removed again: ${removal.status}`)
}

/** Compared when PostgreSQL ran again and Strapi did not yet; visitors have gone on since. */
async function rowsCameAlong(site: Site): Promise<string> {
  const { rows, areRowsSame } = await notes(site)
  if (!rows || !areRowsSame)
    throw new Error('the counts before and after were not compared: that run was killed')
  const total = Object.values(rows).reduce((sum, count) => sum + count, 0)
  return `${total.toLocaleString('en')} in ${Object.keys(rows).length} tables, the same before strapi-master started`
}

async function cronsRun(site: Site): Promise<undefined> {
  const deadline = Date.now() + cronPatienceMs
  await alive(
    () => 'waiting for a [CRON] line',
    async () => {
      for (;;) {
        let found = false
        await run(logs(site, 'strapi-master', 5000), {
          onLine: (line) => (found ||= line.includes('[CRON]')),
        })
        if (found) return
        if (Date.now() > deadline) throw new Error(`none in the first ${cronPatienceMs / 1000} s`)
        await pause(1000)
      }
    },
  )
  return undefined
}
