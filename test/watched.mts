/** The scripts as an operator runs them, with all that they say and all command lines that they start remembered. */
import { spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { mkdtemp, readdir, readFile, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { parse } from 'dotenv'
import { expect, inject } from 'vitest'
import { writeOwnSite, type OwnSite } from '../example/site.mts'
import { run } from '../scripts/lib/command.mts'
import * as engine from '../scripts/lib/engine.mts'
import { setValues } from '../scripts/lib/envfile.mts'
import { appSecrets } from '../scripts/lib/secrets.mts'
import { projectRoot } from '../scripts/lib/settings.mts'
import type { Outcome } from './harness.mts'

/** Everything that a script of this test file wrote on either stream. */
export const said: string[] = []
/** Every command line of this host while a script made or used secrets. */
const seen = new Set<string>()
/** Those secrets. */
const secrets = new Set<string>()

/** Runs one of the scripts to its end, and remembers what it said. */
export async function script(
  name: 'deploy' | 'setup',
  envFile: string,
  ...options: string[]
): Promise<Outcome> {
  return await ran(join(projectRoot, `scripts/${name}.mts`), '--env-file', envFile, ...options)
}

export async function ran(...argv: string[]): Promise<Outcome> {
  const child = spawn(process.execPath, argv, { stdio: ['ignore', 'pipe', 'pipe'], cwd: tmpdir() })
  const outcome: Outcome = { code: null, stdout: '', stderr: '', events: [] }
  child.stdout.on('data', (part: Buffer) => (outcome.stdout += part.toString()))
  child.stderr.on('data', (part: Buffer) => (outcome.stderr += part.toString()))
  const [code] = (await once(child, 'close')) as [number | null]
  said.push(outcome.stdout, outcome.stderr)
  return { ...outcome, code }
}

/** Sees the command lines of this host while a script runs, so those of its children. */
export async function watched<T>(outcome: Promise<T>): Promise<T> {
  const over = outcome.then(() => true)
  do {
    for (const line of await commandLines()) seen.add(line)
  } while (!(await Promise.race([over, sleep(10, false)])))
  return await outcome
}

async function commandLines(): Promise<string[]> {
  const processes = (await readdir('/proc')).filter((name) => /^\d+$/.test(name))
  const read = (pid: string) => readFile(`/proc/${pid}/cmdline`, 'utf8').catch(() => '')
  return (await Promise.all(processes.map(read))).map((line) => line.replaceAll('\0', ' ').trim())
}

/** Files of a site with owner, mode and content, its containers, and its images: to see that something changed nothing. */
export async function everything(own: OwnSite, ...moreFolders: string[]): Promise<string[]> {
  const files = await Promise.all([own.folder, ...moreFolders].map(filesOf))
  const label = `label=com.docker.compose.project=${own.project}`
  const list = ['docker', 'ps', '--all', '--no-trunc', '--format', '{{.ID}} {{.State}}', '--filter', label]
  const containers = (await run(list)).split('\n')
  const images = (await engine.tags(`${own.project}-strapi`)).map(({ tag, id }) => `${tag} ${id}`)
  return [...files.flat(), ...containers, ...images].toSorted()
}

async function filesOf(folder: string): Promise<string[]> {
  // What a running database, visitors and nginx write at any time.
  const isAlive = /^(postgresql|uploads)\/|^nginx\/(\w+\.log|client_body|proxy|fastcgi|uwsgi|scgi)/
  const names = (await readdir(folder, { recursive: true })).filter((name) => !isAlive.test(name))
  const lines = names.map(async (name) => {
    const found = await stat(join(folder, name))
    const content = found.isFile() ? await readFile(join(folder, name), 'utf8') : ''
    return [folder, name, found.mode.toString(8), found.uid, content].join(' ')
  })
  return await Promise.all(lines)
}

/** A folder with the tiny app, and the settings of a site that was never set up. */
export async function freshSite(port: number, folder?: string): Promise<OwnSite> {
  const project = `bob-test-${port}-${randomBytes(2).toString('hex')}`
  const settings = { ...inject('baseImages'), STRAPI_DOCKERFILE: join(projectRoot, 'test/tiny/Dockerfile') }
  const application = join(projectRoot, 'test/tiny')
  const place = folder ?? (await mkdtemp(join(tmpdir(), `${project}-`)))
  const own = await writeOwnSite({ folder: place, project, port, application, settings })
  await writeFile(join(own.source, 'package.json'), '{ "name": "tiny" }\n')
  await writeFile(join(own.source, 'package-lock.json'), '{}\n')
  return own
}

export async function modeOf(path: string): Promise<string> {
  const { mode, uid } = await stat(path)
  return `${(mode & 0o7777).toString(8)} ${uid}`
}

export async function valuesOf(path: string): Promise<Record<string, string>> {
  return parse(await readFile(path, 'utf8'))
}

export async function edit(path: string, values: Record<string, string>): Promise<void> {
  await writeFile(path, setValues(await readFile(path, 'utf8'), values))
}

export const appEnv = (own: OwnSite): string => join(own.source, '.env')

/** Learns the secrets of a site, to look for them in all that was said. */
export async function noteSecrets(...envFiles: string[]): Promise<void> {
  const keys = ['POSTGRES_PASSWORD', 'REDIS_PASSWORD', 'LIVEKIT_API_SECRET', ...appSecrets]
  for (const values of await Promise.all(envFiles.map(valuesOf))) {
    for (const secret of keys.flatMap((key) => (values[key] ?? '').split(','))) {
      if (secret.length >= 8) secrets.add(secret)
    }
  }
}

/** In nothing that scripts wrote, and in no command line; both hold these parts, or nobody looked. */
export function expectSecretsUnseen(inOutput: string[], inCommands: string[]): void {
  const showsSecret = (line: string) => [...secrets].some((secret) => line.includes(secret))
  expect(secrets.size).toBeGreaterThan(15)
  for (const part of inOutput) expect(said.join('')).toContain(part)
  expect(said.flatMap((text) => text.split('\n')).filter(showsSecret)).toEqual([])
  for (const part of inCommands) expect([...seen].join('\n')).toContain(part)
  expect([...seen].filter(showsSecret)).toEqual([])
}
