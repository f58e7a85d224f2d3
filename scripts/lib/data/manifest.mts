/** What a backup set says about itself. */
import { createHash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { open, readdir, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { createInterface } from 'node:readline'

export const format = 1

export const parts = ['database', 'uploads', 'config'] as const
export type Part = (typeof parts)[number]

export interface FileSum {
  sizeBytes: number
  sha256: string
}

export interface Manifest {
  format: number
  /** ISO time at which the state was taken. */
  createdAt: string
  parts: Part[]
  /** Names of what is missing; empty in a whole set. */
  missing: string[]
  /** Of every file of the set but the manifest itself and SHA256SUMS. */
  files: Record<string, FileSum>
  release: string | undefined
  schemaHash: string | undefined
  versions: { postgresql?: string | undefined; strapi?: string | undefined }
  database: DatabaseState | undefined
  /** `missing`: the names in the sentences above; sets of earlier versions lack it. */
  uploads: { files: number; bytes: number; missing?: string[] } | undefined
  /** HMAC-SHA256 of the application's secrets, keyed with `createdAt`: tells whether a site has the same ones, not which. */
  secrets: string | undefined
}

export interface DatabaseState {
  name: string
  settings: DatabaseSettings
  /** Of each table, by "schema.table". */
  rows: Record<string, number>
  /** Digests of columns, indexes and constraints, by "schema.name"; like `bytes`, sets of earlier versions lack it. */
  structure?: { format: number; digests: Record<string, string> }
  bytes?: number
}

/** What CREATE DATABASE is told, as `pg_database` has it. Sets of earlier versions lack what is optional. */
export interface DatabaseSettings {
  encoding: string
  collation: string
  characters: string
  owner: string
  /** libc, ICU or builtin, by its letter; null before PostgreSQL 15, which has only libc. */
  provider?: 'c' | 'i' | 'b' | null
  /** Of ICU or builtin. */
  locale?: string | null
  /** -1: none. */
  connectionLimit?: number
  /** name=value of ALTER DATABASE ... SET. */
  parameters?: string[] | null
  /** The same of ALTER ROLE ... IN DATABASE ... SET. */
  roleParameters?: { role: string; parameters: string[] }[] | null
  /** Undefined or null: the defaults. A grantee that is null is PUBLIC. */
  grants?: { grantee: string | null; privilege: string; isGrantable: boolean }[] | null
}

/** One line of uploads.jsonl: a file as it is in uploads.tar. */
export interface UploadLine extends FileSum {
  name: string
}

/** Tells which uploads a set names as missing. */
export function missingIn({ uploads, missing }: Manifest): (name: string) => boolean {
  const names = uploads?.missing && new Set(uploads.missing)
  if (names) return (name) => names.has(name)
  return (name) => missing.some((sentence) => sentence.startsWith(`uploads/${name} `))
}

/** The text of a line. What some readers take for the end of a line is written as its number. */
export function textOf(line: UploadLine): string {
  const text = JSON.stringify(line).replaceAll('\u2028', String.raw`\u2028`)
  return `${text.replaceAll('\u2029', String.raw`\u2029`)}\n`
}

/** Lines of uploads.jsonl in a set. A name that is there twice counts in its last line. */
export async function* uploadLines(folder: string): AsyncGenerator<UploadLine> {
  for await (const line of createInterface({ input: createReadStream(join(folder, 'uploads.jsonl')) }))
    yield JSON.parse(line) as UploadLine
}

/** Files that each part of a set consists of. */
export const filesOfPart: Record<Part, string[]> = {
  database: ['database.dump', 'roles.sql'],
  uploads: ['uploads.tar', 'uploads.jsonl'],
  config: ['config.tar'],
}

const manifestName = 'manifest.json'
const sumsName = 'SHA256SUMS'
/** Every name that a set may hold. */
export const setFiles = new Set([...Object.values(filesOfPart).flat(), 'RECOVERY.md', manifestName, sumsName])

/** Size and SHA-256 of a file, read from the disk. @param progress counts the bytes on the way */
export async function sumOf(path: string, progress = { bytes: 0 }): Promise<FileSum> {
  const hash = createHash('sha256')
  const file = await open(path, 'r')
  try {
    const { size: sizeBytes } = await file.stat()
    // One buffer for all: a stream's many would stay in memory until somebody collects them.
    const buffer = Buffer.allocUnsafe(Math.min(1 << 20, Math.max(sizeBytes, 1)))
    for (;;) {
      const { bytesRead } = await file.read(buffer, 0, buffer.length, null)
      if (bytesRead === 0) return { sizeBytes, sha256: hash.digest('hex') }
      hash.update(buffer.subarray(0, bytesRead))
      progress.bytes += bytesRead
    }
  } finally {
    await file.close()
  }
}

/** Writes the manifest, and the sums of all files in the form that `sha256sum -c` reads. */
export async function writeManifest(folder: string, manifest: Manifest): Promise<void> {
  const text = `${JSON.stringify(manifest, undefined, 2)}\n`
  await writeFile(join(folder, manifestName), text, { mode: 0o600 })
  const own = { [manifestName]: { sha256: createHash('sha256').update(text).digest('hex') } }
  const lines = Object.entries({ ...manifest.files, ...own }).map(
    ([name, { sha256 }]) => `${sha256}  ${name}\n`,
  )
  await writeFile(join(folder, sumsName), lines.join(''), { mode: 0o600 })
}

/** A disk that fails, and what is no file. */
const unreadable = ['EIO', 'EISDIR', 'ENOTDIR', 'ELOOP']

/** What is wrong with a set itself; that somebody may not read it is another thing. */
export class Damage extends Error {}

/** @throws Damage when there is none, or it is not of this format */
export async function readManifest(folder: string): Promise<Manifest> {
  const text = await readFile(join(folder, manifestName), 'utf8').catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') throw new Damage(`${manifestName} is missing`)
    throw unreadable.includes(error.code ?? '') ? new Damage(`${manifestName} cannot be read`) : error
  })
  let manifest: Partial<Manifest>
  try {
    manifest = JSON.parse(text) as Partial<Manifest>
  } catch (error) {
    throw new Damage(`${manifestName} cannot be read`, { cause: error })
  }
  if (typeof manifest !== 'object' || manifest === null) throw new Damage(`${manifestName} cannot be read`)
  if (manifest.format !== format) {
    throw new Damage(`${manifestName} is of format ${String(manifest.format)}, this program reads ${format}`)
  }
  const wrong = shapeProblem(manifest)
  if (wrong) throw new Damage(`${manifestName} ${wrong}`)
  return manifest as Manifest
}

function shapeProblem(manifest: Partial<Manifest>): string | undefined {
  const { createdAt, parts: held, missing, files, database } = manifest
  if (typeof createdAt !== 'string' || Number.isNaN(Date.parse(createdAt)))
    return 'does not say when it was made'
  if (!Array.isArray(held) || held.some((part) => !parts.includes(part))) return 'does not say what it holds'
  if (!Array.isArray(missing) || missing.some((sentence) => typeof sentence !== 'string'))
    return 'does not say what is missing'
  if (typeof files !== 'object' || files === null) return 'lists no files'
  if (typeof manifest.versions !== 'object' || manifest.versions === null) return 'names no versions'
  const names = ['RECOVERY.md', ...held.flatMap((part) => filesOfPart[part])]
  const isListed = Object.keys(files).length === names.length && names.every((name) => name in files)
  if (!isListed) return `does not list ${names.join(', ')}`
  const isCounted = Object.values(files).every(
    (sum) => typeof sum?.sizeBytes === 'number' && typeof sum.sha256 === 'string',
  )
  if (!isCounted) return 'lacks sums'
  if (held.includes('database') && (typeof database?.rows !== 'object' || database.rows === null))
    return 'counts no rows'
  return undefined
}

/**
 * Reads every byte of a set.
 * @returns what is wrong with it, one sentence each; empty when all sums are right
 */
export async function wrongSums(folder: string, progress = { bytes: 0 }): Promise<string[]> {
  const manifest = await readManifest(folder).catch((error: Error) => {
    if (error instanceof Damage) return error
    throw error
  })
  if (manifest instanceof Damage) return [manifest.message]
  const wrong: string[] = []
  const present = new Set(await readdir(folder))
  const expected: Record<string, FileSum> = { ...manifest.files }
  for (const [name, wanted] of Object.entries(expected)) {
    if (!present.delete(name)) {
      wrong.push(`${name} is missing`)
      continue
    }
    const found = await sumOf(join(folder, name), progress).catch((error: NodeJS.ErrnoException) => {
      if (unreadable.includes(error.code ?? '')) return undefined
      throw error
    })
    if (!found) wrong.push(`${name} cannot be read`)
    else if (found.sizeBytes !== wanted.sizeBytes) {
      wrong.push(`${name} has ${found.sizeBytes} bytes instead of ${wanted.sizeBytes}`)
    } else if (found.sha256 !== wanted.sha256) wrong.push(`${name} is not what was written`)
  }
  present.delete(manifestName)
  if (present.delete(sumsName)) wrong.push(...(await wrongSumsFile(folder, expected)))
  else wrong.push(`${sumsName} is missing`)
  wrong.push(...[...present].map((name) => `${name} does not belong to the set`))
  return wrong
}

/** The manifest is guarded by SHA256SUMS, and that by being what the manifest makes of it. */
export async function wrongSumsFile(folder: string, files: Record<string, FileSum>): Promise<string[]> {
  const own = await sumOf(join(folder, manifestName))
  const lines = Object.entries({ ...files, [manifestName]: own }).map(
    ([name, { sha256 }]) => `${sha256}  ${name}\n`,
  )
  const text = await readFile(join(folder, sumsName), 'utf8').catch((error: NodeJS.ErrnoException) => {
    if (unreadable.includes(error.code ?? '')) return undefined
    throw error
  })
  return text === lines.join('') ? [] : [`${manifestName} and ${sumsName} do not belong together`]
}
