/** Reads and edits .env files: comments, order and untouched lines stay as they are. */
import { chmod, chown, open, readFile, realpath, rename, rm, stat } from 'node:fs/promises'
import { dirname } from 'node:path'
import { parse } from 'dotenv'
import { exitCodes, Problem, refuseInDryRun } from './report.mts'

/** One assignment as dotenv and Compose read it: key, value with its quotes (of several lines, too), comment behind it. */
const assignment =
  /^[^\S\r\n]*(?:export\s+)?([\w.-]+)[^\S\r\n]*=([^\S\r\n]*'[^']*'|[^\S\r\n]*"(?:\\[^]|[^"\\])*"|[^\r\n]*?)([^\S\r\n]+#[^\r\n]*)?[^\S\r\n]*$/gm

interface Assignment {
  key: string
  raw: string
  comment: string
  from: number
  to: number
}

/** The file's values, or undefined when there is no file. */
export async function readEnv(path: string): Promise<Record<string, string> | undefined> {
  const text = await readText(path)
  return text === undefined ? undefined : parse(text)
}

/** The file's text, or undefined when there is no file. */
export async function readText(path: string): Promise<string | undefined> {
  try {
    return await readFile(path, 'utf8')
  } catch (error) {
    if (error instanceof Error && 'code' in error && error.code === 'ENOENT') return undefined
    throw error
  }
}

/**
 * Sets values in place; a key that is not there is added at the end. The last of several equal keys counts, as in dotenv.
 * @throws Problem (usage) for a value that dotenv and Compose cannot both read
 */
export function setValues(text: string, values: Record<string, string>): string {
  let changed = text
  for (const [key, value] of Object.entries(values)) {
    const line = `${key}=${quote(key, value)}`
    const old = lastOf(changed, key)
    changed = old
      ? `${changed.slice(0, old.from)}${line}${old.comment}${changed.slice(old.to)}`
      : `${endedLine(changed)}${line}${lineEnd(text)}`
  }
  return changed
}

/** Adds the keys of `example` that `text` lacks, each with its comment, behind the key that precedes it there. */
export function addMissing(text: string, example: string): string {
  if (text.trim() === '') return example
  const known = parse(text)
  const end = lineEnd(text)
  let changed = endedLine(text)
  let previous: string | undefined
  for (const { key, from, to } of assignments(example)) {
    if (!(key in known)) {
      const lines = [...commentAbove(example.slice(0, from)), example.slice(from, to)]
      const before = previous === undefined ? undefined : lastOf(changed, previous)
      const at = before ? changed.indexOf('\n', before.to) + 1 : previous === undefined ? 0 : changed.length
      changed = `${changed.slice(0, at)}${lines.join(end)}${end}${changed.slice(at)}`
    }
    previous = key
  }
  return changed
}

/** Keys whose value Compose and dotenv (and so Strapi) read differently: a $, a # or backticks outside quotes. */
export function expandedKeys(text: string): string[] {
  return assignments(text).flatMap(({ key, raw }) => {
    const value = raw.trim()
    if (value.startsWith("'") && value.endsWith("'")) return []
    const isBare = !value.startsWith('"')
    return /\$[\w{$]/.test(value) || (isBare && /#|^`/.test(value)) ? [key] : []
  })
}

/** Numbers of the lines that are neither blank, comment nor assignment, or that open a quote for good. Compose refuses them and shows their values. */
export function unreadableLines(text: string): number[] {
  const found = assignments(text)
  const numberAt = (at: number) => text.slice(0, at).split('\n').length
  const isOpen = ({ raw }: Assignment) => /^\s*(?:"(?!(?:\\[^]|[^"\\])*"$)|'(?![^']*'$))/.test(raw)
  let rest = text
  for (const { from, to } of found)
    rest = rest.slice(0, from) + rest.slice(from, to).replaceAll(/[^\n]/g, ' ') + rest.slice(to)
  const others = rest.split('\n').flatMap((line, at) => (/^\s*(#|$)/.test(line) ? [] : [at + 1]))
  return [...others, ...found.filter(isOpen).map(({ from }) => numberAt(from))]
}

function assignments(text: string): Assignment[] {
  return [...text.matchAll(assignment)].map((found) => {
    const [all, key = '', raw = '', comment = ''] = found
    return { key, raw, comment, from: found.index, to: found.index + all.length }
  })
}

function lastOf(text: string, key: string): Assignment | undefined {
  return assignments(text).findLast((one) => one.key === key)
}

/** The lines of comment right above, without the title of a section. */
function commentAbove(text: string): string[] {
  const lines = text.split(/\r?\n/).slice(0, -1)
  const start = lines.findLastIndex((line) => !line.startsWith('#') || line.startsWith('# ---')) + 1
  return lines.slice(start)
}

function lineEnd(text: string): string {
  return text.includes('\r\n') ? '\r\n' : '\n'
}

function endedLine(text: string): string {
  return text === '' || text.endsWith('\n') ? text : `${text}${lineEnd(text)}`
}

/** Replaces the file in one step, readable by its owner alone; owner stays. The old or the new text survives a power cut. */
export async function writeEnv(link: string, text: string): Promise<void> {
  refuseInDryRun(`write ${link}`)
  const path = await realpath(link).catch(() => link)
  const before = await stat(path).catch(() => undefined)
  const temporary = `${path}.new`
  await rm(temporary, { force: true })
  const file = await open(temporary, 'wx', 0o600)
  try {
    await file.writeFile(text)
    await file.sync()
  } catch (error) {
    await rm(temporary, { force: true })
    throw error
  } finally {
    await file.close()
  }
  if (before && process.getuid?.() === 0) await chown(temporary, before.uid, before.gid)
  await chmod(temporary, before ? before.mode & 0o660 : 0o600)
  await rename(temporary, path)
  await syncFolder(dirname(path))
}

/** Makes names that were created, renamed or removed in a folder survive a power cut. */
export async function syncFolder(path: string): Promise<void> {
  const folder = await open(path, 'r')
  try {
    await folder.sync()
  } finally {
    await folder.close()
  }
}

/** The first way of writing that dotenv and Compose read alike: dotenv knows no escapes but \n, Compose expands a $ outside single quotes. */
function quote(key: string, value: string): string {
  if (/^[\w./:@%+,=-]*$/.test(value)) return value
  if (!/'|\\$/.test(value)) return `'${value}'`
  if (!/["$\\]/.test(value)) return `"${value}"`
  if (/^[^\s"'`][^\r\n#$\\]*$/.test(value) && value === value.trim()) return value
  throw new Problem(
    exitCodes.usage,
    `${key} mixes quotes with other signs: no .env can hold it for both Compose and Strapi`,
    'Choose a value without quotes or backslashes.',
  )
}
