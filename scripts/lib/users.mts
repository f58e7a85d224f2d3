/** Who may see what, reckoned from owners and modes: a deploy need not be root to know it. */
import { readFile, realpath, stat } from 'node:fs/promises'
import { dirname } from 'node:path'

export interface Account {
  uid: number
  gids: number[]
}

/** An account of this host, or undefined. */
export async function accountOf(user: string): Promise<Account | undefined> {
  const rows = async (path: string) =>
    (await readFile(path, 'utf8')).split('\n').map((line) => line.split(':'))
  const account = (await rows('/etc/passwd')).find(([name]) => name === user)
  if (!account) return undefined
  const groups = (await rows('/etc/group')).filter((row) => row[3]?.split(',').includes(user))
  return { uid: Number(account[2]), gids: [Number(account[3]), ...groups.map((row) => Number(row[2]))] }
}

/** The first folder on the way to `path`, or `path` itself, that the account may not enter and list; undefined when all is open. */
export async function mayReach(account: Account, path: string): Promise<string | undefined> {
  if (account.uid === 0) return undefined
  // A link has to be reachable, and so has what it leads to.
  const real = await realpath(path).catch(() => path)
  for (const folder of [...parents(path), ...parents(real), real]) {
    const found = await stat(folder).catch(() => undefined)
    if (!found) return undefined
    const shift = found.uid === account.uid ? 6 : account.gids.includes(found.gid) ? 3 : 0
    const wanted = folder === real ? 0o5 : 0o1
    if (((found.mode >> shift) & wanted) !== wanted) return folder
  }
  return undefined
}

function parents(path: string): string[] {
  const parent = dirname(path)
  return parent === path ? [] : [...parents(parent), parent]
}

/** The person behind sudo, who owns what is made for them; undefined without sudo. */
export function invokingUser(): { uid: number; gid: number } | undefined {
  const { SUDO_UID: uid, SUDO_GID: gid } = process.env
  return uid !== undefined && gid !== undefined ? { uid: Number(uid), gid: Number(gid) } : undefined
}
