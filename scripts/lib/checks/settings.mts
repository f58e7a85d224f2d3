/** Both .env files: present, equal where they must be, not weak, not readable by others. */
import { existsSync } from 'node:fs'
import { readFile, stat } from 'node:fs/promises'
import { join, resolve } from 'node:path'
import { parse } from 'dotenv'
import type { Check, Finding } from '../checks.mts'
import { ask, run } from '../command.mts'
import { compose } from '../compose.mts'
import { expandedKeys, readEnv, readText, unreadableLines } from '../envfile.mts'
import { appSecrets, connection, knownExample } from '../secrets.mts'
import { scriptCommand, type Site } from '../settings.mts'

/** Strapi starts without these; they only must not be empty when they are there. */
const optionalSecrets = ['TRANSFER_TOKEN_SALT', 'JWT_SECRET', 'ENCRYPTION_KEY']

export const settingChecks: Check[] = [
  {
    title: 'application',
    check: async (site) => {
      const found: Finding[] = []
      const has = (name: string) => existsSync(join(site.source, name))
      if (!has('package.json')) {
        found.push({
          problem: `STRAPI_SOURCE holds no application: there is no ${join(site.source, 'package.json')}`,
          fix: `put the application there, or set STRAPI_SOURCE in ${site.envFile}`,
        })
      } else if (!has('yarn.lock') && !has('package-lock.json')) {
        found.push({
          problem: `${site.source} has neither yarn.lock nor package-lock.json`,
          fix: 'commit the lock file of the application',
        })
      }
      if (!existsSync(site.dockerfile)) {
        found.push({
          problem: `STRAPI_DOCKERFILE names no file: ${site.dockerfile}`,
          fix: `set it in ${site.envFile} to ${join(site.root, 'docker/strapi/Dockerfile')}`,
        })
      }
      return found
    },
  },
  { title: 'both .env files', check: async (site) => compareEnvs(site) },
  {
    title: 'schema of the database',
    check: async (site) => {
      const { DATABASE_SCHEMA: schema = '' } = (await readEnv(join(site.source, '.env'))) ?? {}
      const problem = `DATABASE_SCHEMA is ${schema}: in public alone these scripts see which uploads rows refer to, and what a release changes`
      const fix = `move the tables to public, and set it in ${join(site.source, '.env')}; until then a backup names no missing upload, and a rollback or restore to another schema is not refused`
      return ['', 'public'].includes(schema) ? [] : [{ problem, fix, onlyWarn: true }]
    },
  },
  {
    title: 'secrets',
    check: async (site) => {
      const keys = [
        'POSTGRES_PASSWORD',
        'REDIS_PASSWORD',
        ...(usesLiveKit(site) ? ['LIVEKIT_API_SECRET'] : []),
      ]
      const found = keys.flatMap((key) =>
        weakness(key, site.values[key] ?? '', key === 'LIVEKIT_API_SECRET' ? 32 : 12, site.envFile),
      )
      const application = (await readEnv(join(site.source, '.env'))) ?? {}
      for (const key of appSecrets) {
        for (const one of (application[key] ?? '').split(',').filter(Boolean))
          found.push(...weakness(key, one.trim(), 12, join(site.source, '.env')))
      }
      return found
    },
  },
  {
    title: 'LiveKit',
    check: async (site) => {
      if (!usesLiveKit(site)) return []
      const found: Finding[] = []
      const empty = ['LIVEKIT_EXTERNAL_IP', 'LIVEKIT_API_KEY', 'LIVEKIT_URL'].filter(
        (key) => !site.values[key],
      )
      for (const key of empty)
        found.push({
          problem: `${key} is empty`,
          fix: `set it in ${site.envFile}, or take livekit out of COMPOSE_PROFILES`,
        })
      if (site.values.LIVEKIT_EXTERNAL_IP?.startsWith('127.')) {
        found.push({
          problem: 'LIVEKIT_EXTERNAL_IP is a loopback address: calls work on this host only',
          fix: `set the public address in ${site.envFile}`,
          onlyWarn: true,
        })
      }
      return found
    },
  },
  {
    title: 'environment',
    check: async () => {
      if (process.env.STRAPI_VERSION === undefined) return []
      return [
        {
          problem: 'STRAPI_VERSION is set in the environment and would beat the one in .env',
          fix: 'unset STRAPI_VERSION',
        },
      ]
    },
  },
  {
    title: 'modes of the .env files',
    check: async (site) => {
      const paths = [site.envFile, join(site.source, '.env')]
      const found = await Promise.all(
        paths.map(async (path): Promise<Finding[]> => {
          const mode = (await stat(path).catch(() => undefined))?.mode
          return mode !== undefined && (mode & 0o007) !== 0
            ? [{ problem: `${path} can be read by every user of this host`, fix: `chmod 600 ${path}` }]
            : []
        }),
      )
      return found.flat()
    },
  },
  {
    title: 'compose file',
    check: async (site) => {
      // Compose would show the value that it cannot read.
      const text = (await readText(join(site.source, '.env'))) ?? ''
      if (expandedKeys(text).length + unreadableLines(text).length > 0) return []
      // Without the engine's plugin the check of the software says enough; without the application's .env the one above.
      if (
        (await ask(['docker', 'compose', 'version'])) === undefined ||
        !(await readEnv(join(site.source, '.env')))
      )
        return []
      const failure = await run(compose(site, '--profile', '*', 'config', '--quiet')).then(
        () => undefined,
        (error: unknown) => error,
      )
      return failure instanceof Error
        ? [
            {
              problem: `the compose file is not valid: ${failure.message}`,
              fix: `${site.root}/docker/docker-compose.yml is where to look`,
            },
          ]
        : []
    },
  },
  {
    title: 'Strapi ports',
    check: async (site) =>
      site.values.STRAPI_HOST === '0.0.0.0'
        ? [
            {
              problem: 'STRAPI_HOST is 0.0.0.0: visitors can go around nginx, and a deploy does not see them',
              fix: `set STRAPI_HOST=127.0.0.1 in ${site.envFile}`,
              onlyWarn: true,
            },
          ]
        : [],
  },
  {
    title: 'base images',
    check: async (site) => {
      const keys = ['NODE_IMAGE', 'POSTGRES_IMAGE', 'REDIS_IMAGE', 'LIVEKIT_IMAGE']
      const standIns = keys.filter((key) => site.values[key]?.startsWith('bob-standin/'))
      const fix = `take ${standIns.join(', ')} out of ${site.envFile} for the official images`
      const problem = 'the base images are stand-ins from Debian packages: for the trial and the tests only'
      // The trial may; a site that serves everybody may not.
      return standIns.length > 0 ? [{ problem, fix, onlyWarn: site.nginx.listen.startsWith('127.') }] : []
    },
  },
  {
    title: 'development folder',
    check: async (site) => {
      const folder = site.values.STRAPI_VOLUME ?? ''
      return existsSync(resolve(site.root, 'docker', folder))
        ? []
        : [
            {
              problem: `STRAPI_VOLUME names no folder (${folder}): strapi-dev cannot start`,
              fix: `set it in ${site.envFile}`,
              onlyWarn: true,
            },
          ]
    },
  },
]

/** What the application's own .env lacks: asked also when docker/.env is not fit for more. */
export async function applicationProblems(site: Site): Promise<string[]> {
  return (await compareEnvs(site)).map(({ problem }) => problem)
}

export function usesLiveKit(site: Site): boolean {
  return (site.values.COMPOSE_PROFILES ?? '').split(',').includes('livekit')
}

async function compareEnvs(site: Site): Promise<Finding[]> {
  const path = join(site.source, '.env')
  const text = await readFile(path, 'utf8').catch(() => undefined)
  if (text === undefined)
    return [{ problem: `the application has no .env: ${path}`, fix: scriptCommand('setup', site.envFile) }]
  const application = parse(text)
  const found: Finding[] = expandedKeys(text).map((key) => {
    return {
      problem: `${key} in ${path} holds a $, which Compose would expand`,
      fix: 'put the value in single quotes',
    }
  })
  for (const number of unreadableLines(text))
    found.push({
      problem: `line ${number} of ${path} is not of the form KEY=value`,
      fix: 'mend it; a quote needs a second one',
    })
  for (const [key, wanted] of Object.entries(connection)) {
    const value = 'key' in wanted ? site.values[wanted.key] : wanted.constant
    const source = 'key' in wanted ? `${wanted.key} in ${site.envFile}` : `"${wanted.constant}"`
    if (application[key] === undefined || application[key] === '')
      found.push({ problem: `${key} is missing in ${path}`, fix: `set it to the value of ${source}` })
    else if (application[key] !== value)
      found.push({ problem: `${key} in ${path} differs from ${source}`, fix: 'make them equal' })
  }
  for (const key of appSecrets) {
    const value = application[key]
    if (value === '' || (value === undefined && !optionalSecrets.includes(key)))
      found.push({ problem: `${key} is missing in ${path}`, fix: scriptCommand('setup', site.envFile) })
  }
  return found
}

function weakness(key: string, value: string, least: number, path: string): Finding[] {
  const fix = `generate one: openssl rand -base64 32   (a password that is in use must be changed in its service as well)`
  if (value === '') return []
  if (knownExample.test(value)) return [{ problem: `${key} in ${path} is a known example`, fix }]
  return value.length < least ? [{ problem: `${key} in ${path} has less than ${least} characters`, fix }] : []
}
