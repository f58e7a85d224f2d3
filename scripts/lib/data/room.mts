/** Room on disks, looked at before anything is written: a full disk would stop the live database, too. */
import { stat, statfs } from 'node:fs/promises'
import { exitCodes, interrupted, Problem } from '../report.mts'

/** A second of writing at full speed, and some segments of PostgreSQL's log. */
export const leastFreeBytes = 512 * 2 ** 20

export interface Want {
  folder: string
  bytes: number
}

/** Bytes that may still be written to the disk of a folder. */
export async function freeBytes(folder: string): Promise<number> {
  const { bavail, bsize } = await statfs(folder)
  return bavail * bsize
}

/**
 * Folders on the same disk share what is free there.
 * @param purpose such as "a backup needs"
 * @throws Problem that names every disk that is too small
 */
export async function needRoom(
  purpose: string,
  wants: Want[],
  {
    advice = 'Make room, then run it again.',
    unchanged = 'nothing was changed',
  }: { advice?: string; unchanged?: string } = {},
): Promise<void> {
  const located = await Promise.all(
    wants.map(async (want) => ({ ...want, disk: (await stat(want.folder)).dev })),
  )
  const short: string[] = []
  for (const group of Map.groupBy(located, ({ disk }) => disk).values()) {
    const needed = group.reduce((total, { bytes }) => total + bytes, 0)
    const [{ folder } = { folder: '' }] = group
    const free = await freeBytes(folder)
    if (needed >= free)
      short.push(
        `${purpose} about ${megabytes(needed)}, and ${megabytes(free)} are free on the disk of ${folder}`,
      )
  }
  if (short.length > 0) throw new Problem(exitCodes.failed, `${short.join('; ')}; ${unchanged}`, advice)
}

/** The database itself, and what PostgreSQL's log of it may grow to (max_wal_size). */
export function databaseNeeds(bytes: number): number {
  return 1.2 * bytes + Math.min(bytes, 2 ** 30) + leastFreeBytes
}

/** What has to stay free for PostgreSQL where something else is written to its disk. */
export async function reserveOn(folder: string, postgres: string): Promise<Want[]> {
  return (await areOnOneDisk(folder, postgres)) ? [{ folder, bytes: leastFreeBytes }] : []
}

/**
 * Runs an action that fills a disk. PostgreSQL stops altogether when it cannot write its log: the action has to give up before.
 * @param signal aborted by an interruption, too
 */
export async function sparing<T>(
  folder: string,
  postgres: string,
  action: (signal: AbortSignal) => Promise<T>,
  interruption = interrupted,
): Promise<T> {
  if (!(await areOnOneDisk(folder, postgres))) return await action(interruption)
  const full = new AbortController()
  const look = async () => {
    if ((await freeBytes(folder)) >= leastFreeBytes) return
    full.abort(
      new Problem(
        exitCodes.failed,
        `the disk of ${postgres} is almost full, so this gave up; what is live is as before`,
        'Make room, then run it again.',
      ),
    )
  }
  const timer = setInterval(() => void look().catch(() => undefined), 100)
  try {
    return await action(AbortSignal.any([interruption, full.signal]))
  } finally {
    clearInterval(timer)
  }
}

async function areOnOneDisk(folder: string, other: string): Promise<boolean> {
  const [one, two] = await Promise.all(
    [folder, other].map((path) =>
      stat(path).then(
        ({ dev }) => dev,
        () => undefined,
      ),
    ),
  )
  return one !== undefined && one === two
}

export function megabytes(bytes: number): string {
  return `${(bytes / 1e6).toLocaleString('en', { maximumFractionDigits: bytes < 1e8 ? 1 : 0 })} MB`
}
