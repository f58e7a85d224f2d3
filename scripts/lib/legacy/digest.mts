/** Whether somebody has edited something: by names, sizes and times, without reading what may be large. */
import { createHash } from 'node:crypto'
import { lstat, readdir, stat } from 'node:fs/promises'
import { join } from 'node:path'

/**
 * @param paths files and folders
 * @param skipped paths below them
 * @param onlyContents what merely gets another owner or mode is the same
 */
export async function digestOf(
  paths: string[],
  { skipped = [], onlyContents = false }: { skipped?: string[]; onlyContents?: boolean } = {},
): Promise<string> {
  const hash = createHash('sha256')
  const visit = async (path: string, look = lstat): Promise<void> => {
    if (skipped.includes(path)) return
    const found = await look(path).catch(() => undefined)
    if (found?.isDirectory()) {
      for (const name of (await readdir(path)).toSorted()) await visit(join(path, name))
    } else {
      hash.update(`${path} ${found?.size} ${onlyContents ? found?.mtimeMs : found?.ctimeMs}\n`)
    }
  }
  // Behind a link to one of them is what somebody edits.
  for (const path of paths) await visit(path, stat)
  return hash.digest('hex')
}
