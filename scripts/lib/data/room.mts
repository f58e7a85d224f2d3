/** Room on disks, looked at before anything is written: a full disk would stop the live database, too. */
import { stat, statfs } from 'node:fs/promises'
import { exitCodes, Problem } from '../report.mts'

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

export function megabytes(bytes: number): string {
  return `${(bytes / 1e6).toLocaleString('en', { maximumFractionDigits: bytes < 1e8 ? 1 : 0 })} MB`
}
