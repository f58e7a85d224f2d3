/** Writes both .env files: missing keys from the examples, empty secrets generated, values that are there never touched. */
import { randomBytes } from 'node:crypto'
import { existsSync } from 'node:fs'
import { access, chown } from 'node:fs/promises'
import { join, relative, resolve } from 'node:path'
import { parse } from 'dotenv'
import { addMissing, readEnv, readText, setValues, writeEnv } from './envfile.mts'
import { change, detail, warn } from './report.mts'
import { exampleFile, projectRoot, withEnvironment, type Site } from './settings.mts'
import { invokingUser } from './users.mts'

/** The application's names for values of docker/.env, and what they are when docker/.env does not say. */
export const connection: Record<string, { key: string } | { constant: string }> = {
  DATABASE_CLIENT: { constant: 'postgres' },
  DATABASE_HOST: { constant: 'postgresql' },
  DATABASE_PORT: { constant: '5432' },
  DATABASE_NAME: { key: 'POSTGRES_DB' },
  DATABASE_USERNAME: { key: 'POSTGRES_USER' },
  DATABASE_PASSWORD: { key: 'POSTGRES_PASSWORD' },
  REDIS_HOST: { constant: 'redis' },
  REDIS_PORT: { constant: '6379' },
  REDIS_PASSWORD: { key: 'REDIS_PASSWORD' },
}

/** Strapi's own secrets. https://docs.strapi.io/cms/configurations/environment */
export const appSecrets = [
  'APP_KEYS',
  'API_TOKEN_SALT',
  'ADMIN_JWT_SECRET',
  'TRANSFER_TOKEN_SALT',
  'JWT_SECRET',
  'ENCRYPTION_KEY',
]

/** Secrets of examples and manuals, and of Strapi's own .env.example. */
export const knownExample =
  /^(monMotDePasse|password|secret|changeme|change-me|admin|postgres|redis|strapi|tobemodified|sTDqA5LKNRM5)/i

/** Adds to docker/.env what it lacks. An existing database keeps its password: none is made up for it. */
export async function writeDockerEnv(path: string): Promise<string> {
  const before = await readText(path)
  let text = addMissing(before ?? '', (await readText(exampleFile)) ?? '')
  const values = withEnvironment(parse(text))
  const application = await readEnv(resolve(projectRoot, 'docker', values.STRAPI_SOURCE ?? '', '.env'))
  const made: Record<string, string> = {}
  const hasDatabase = await mayHoldDatabase(resolve(projectRoot, 'docker', values.POSTGRES_VOLUME ?? ''))
  for (const [key, theirs] of [
    ['POSTGRES_PASSWORD', 'DATABASE_PASSWORD'],
    ['REDIS_PASSWORD', 'REDIS_PASSWORD'],
  ] as const) {
    if (values[key]) continue
    if (application?.[theirs]) made[key] = application[theirs]
    else if (key === 'POSTGRES_PASSWORD' && hasDatabase)
      warn(`${values.POSTGRES_VOLUME ?? ''} holds a database: put its password into POSTGRES_PASSWORD`)
    else made[key] = newSecret()
  }
  if (!values.LIVEKIT_API_SECRET) made.LIVEKIT_API_SECRET = newSecret()
  // Compose takes the Dockerfile relative to STRAPI_SOURCE.
  if (!parse(before ?? '').STRAPI_DOCKERFILE)
    made.STRAPI_DOCKERFILE = dockerfileFor(values.STRAPI_SOURCE ?? '')
  text = setValues(text, made)
  await writeChanged(path, before, text)
  return text
}

/** The same for the application's .env, from its own example where it has one. */
export async function writeApplicationEnv(site: Site): Promise<void> {
  if (!existsSync(join(site.source, 'package.json'))) return
  const path = join(site.source, '.env')
  const before = await readText(path)
  const example = (await readText(join(site.source, '.env.example'))) ?? ''
  const keys = [...Object.keys(connection), ...appSecrets].map((key) => `${key}=`).join('\n')
  let text = addMissing(addMissing(before ?? '', example), keys)
  const old = parse(before ?? '')
  const values = parse(text)
  const made: Record<string, string> = {}
  for (const [key, source] of Object.entries(connection)) {
    if (!old[key]) made[key] = 'key' in source ? (site.values[source.key] ?? '') : source.constant
  }
  for (const key of appSecrets) {
    // The example's own placeholder counts as empty, a value that somebody set does not.
    if (old[key] || (values[key] && !knownExample.test(values[key]))) continue
    made[key] = key === 'APP_KEYS' ? Array.from({ length: 4 }, newSecret).join(',') : newSecret()
  }
  text = setValues(text, made)
  await writeChanged(path, before, text)
}

async function writeChanged(path: string, before: string | undefined, text: string): Promise<void> {
  const names = Object.keys(parse(text)).filter((key) => parse(before ?? '')[key] !== parse(text)[key])
  if (before !== undefined && names.length === 0) return detail(`${path} is complete`)
  await change(`write ${names.length} values to ${path}: ${names.join(', ')}`, async () => {
    await writeEnv(path, text)
    const user = invokingUser()
    if (before === undefined && user) await chown(path, user.uid, user.gid)
    detail(`${path}: ${before === undefined ? 'written' : `added ${names.join(', ')}`}`)
  })
}

/** 32 random bytes in letters that need no quoting in .env, YAML or a shell. */
function newSecret(): string {
  return randomBytes(32).toString('base64url')
}

function dockerfileFor(source: string): string {
  const dockerfile = join(projectRoot, 'docker/strapi/Dockerfile')
  if (source.startsWith('/')) return dockerfile
  return relative(join(projectRoot, 'docker', source), dockerfile)
}

/** A folder that this user may not look into is taken for one. */
async function mayHoldDatabase(folder: string): Promise<boolean> {
  return await access(join(folder, 'PG_VERSION')).then(
    () => true,
    (error: NodeJS.ErrnoException) => error.code !== 'ENOENT',
  )
}
