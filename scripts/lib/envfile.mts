/** Reads and edits .env files: comments, order and untouched lines stay as they are. */
import { chmod, chown, open, readFile, rename, rm, stat } from 'node:fs/promises'
import { dirname } from 'node:path'
import { parse } from 'dotenv'

const assignment = /^\s*(?:export\s+)?([\w.-]+)\s*=\s*(.*)$/

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

/** Sets values in place; a key that is not there is added at the end. The last of several equal keys counts, as in dotenv. */
export function setValues(text: string, values: Record<string, string>): string {
  const lines = text.split('\n')
  const missing: string[] = []
  for (const [key, value] of Object.entries(values)) {
    const at = lines.findLastIndex((line) => assignment.exec(line)?.[1] === key)
    if (at === -1) missing.push(`${key}=${quote(value)}`)
    else lines[at] = `${key}=${quote(value)}`
  }
  if (missing.length === 0) return lines.join('\n')
  const body = lines.join('\n').replace(/\n*$/, '')
  return `${body === '' ? '' : `${body}\n`}${missing.join('\n')}\n`
}

/** Adds the keys of `example` that `text` lacks, each with its comment, behind the key that precedes it there. */
export function addMissing(text: string, example: string): string {
  const known = parse(text)
  const lines = text.replace(/\n*$/, '').split('\n')
  let previous: string | undefined
  let comments: string[] = []
  for (const line of example.split('\n')) {
    const key = assignment.exec(line)?.[1]
    if (key === undefined) {
      comments = line.startsWith('#') && !line.startsWith('# ---') ? [...comments, line] : []
      continue
    }
    if (!(key in known)) {
      const after =
        previous === undefined ? -1 : lines.findLastIndex((one) => assignment.exec(one)?.[1] === previous)
      lines.splice(after === -1 && previous !== undefined ? lines.length : after + 1, 0, ...comments, line)
    }
    previous = key
    comments = []
  }
  return `${lines.join('\n')}\n`
}

/** Keys whose value Compose would expand because a $ is not inside single quotes. dotenv and Strapi would not. */
export function expandedKeys(text: string): string[] {
  return text.split('\n').flatMap((line) => {
    const [, key, value] = assignment.exec(line) ?? []
    return key !== undefined && value !== undefined && !value.startsWith("'") && /\$[\w{$]/.test(value)
      ? [key]
      : []
  })
}

/** Replaces the file in one step, readable by its owner alone; owner stays. The old or the new text survives a power cut. */
export async function writeEnv(path: string, text: string): Promise<void> {
  const before = await stat(path).catch(() => undefined)
  const temporary = `${path}.new`
  await rm(temporary, { force: true })
  const file = await open(temporary, 'wx', 0o600)
  try {
    await file.writeFile(text)
    await file.sync()
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

/** Single quotes keep Compose and dotenv from expanding anything; a value with one gets double quotes. */
function quote(value: string): string {
  if (/^[\w./:@%+,=-]*$/.test(value)) return value
  return value.includes("'") ? `"${value}"` : `'${value}'`
}
