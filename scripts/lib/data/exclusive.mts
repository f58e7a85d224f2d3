/** One run at a time per site, which first mends what an earlier one left half-made. */
import { endOrphans, markCommands, orphans } from '../command.mts'
import { strangerOnBackups } from '../folders.mts'
import { takeLock } from '../lock.mts'
import { detail, exitCodes, explain, interrupted, isDryRun, Problem, warn } from '../report.mts'
import { asRoot, scriptCommand, type Site } from '../settings.mts'
import { observe } from '../slots.mts'
import { endBackupLeftovers } from './backup.mts'
import { incomingFolder } from './sets.mts'
import { mendRestore, rememberTakenBack, type Mended } from './undo.mts'

/** Runs an action under the lock of the site, with what a killed run left mended first. @throws Problem (locked) */
export async function exclusively(
  site: Site,
  command: string,
  waitMs: number,
  action: () => Promise<void>,
): Promise<void> {
  const lock = isDryRun() ? undefined : await takeLock(site.project, command, waitMs)
  try {
    markCommands(site.project)
    if (!isDryRun()) await endLeftovers(site)
    if (isDisturbed.has(command)) await refuseHalfDeployed(site, command)
    await action()
  } finally {
    lock?.release()
  }
}

/**
 * Ends what a killed run left behind: commands, half-made sets, a restore. What cannot be mended yet is warned of.
 * @throws Problem (usage) when another site backs up to the same folder
 */
export async function endLeftovers(site: Site): Promise<void> {
  await refuseShared(site)
  const left = await orphans(site.project)
  if (left.length > 0) {
    detail(`an earlier run left commands behind: ${left.map((one) => one.command).join('; ')}`)
    await endOrphans(site.project)
  }
  // What another user's run has left must not stop a deploy, nor a backup of what can be.
  for (const found of await endBackupLeftovers(site).catch(warned))
    detail(`an earlier run left ${found}: removed`)
  const mended: Mended = await mendRestore(site).catch((error: unknown) => ({ found: warned(error) }))
  for (const found of mended.found) detail(`an earlier run left ${found}`)
  if (mended.takenBack !== undefined) await rememberTakenBack(site, mended.takenBack).catch(warned)
}

/** What reads or replaces the database while a release that boots may change its schema. */
const isDisturbed = new Set(['backup', 'restore', 'undo'])

/**
 * A deploy that was killed leaves another release running or booting beside the one that serves. Once it has booted, it is in no
 * backup's way.
 * @throws Problem (failed)
 */
async function refuseHalfDeployed(site: Site, command: string): Promise<void> {
  const { master, slave, flag } = await observe(site)
  const [serving, idle] = flag === 'strapi-slave' ? [slave, master] : [master, slave]
  const isIdle =
    ['absent', 'stopped'].includes(idle.status) || (command === 'backup' && idle.status === 'healthy')
  if (isIdle || idle.imageId === serving.imageId || serving.status === 'absent') return
  throw new Problem(
    exitCodes.failed,
    `a deploy was interrupted: ${idle.release ?? 'another release'} is ${idle.status} beside ${serving.release ?? 'the one that serves'}, and may change the database at any moment; nothing was changed`,
    `End it first: ${scriptCommand('deploy', site.envFile)}`,
  )
}

async function refuseShared(site: Site): Promise<void> {
  // Without an engine nobody else backs up either.
  const stranger = await strangerOnBackups(incomingFolder(site), site.project).catch(() => undefined)
  if (stranger === undefined) return
  throw new Problem(
    exitCodes.usage,
    `${stranger}, of another site, backs up to ${site.folders.backups}, too: each would take what the other writes for its own; nothing was changed`,
    `Set another BACKUP_DIR in ${site.envFile}, then: ${asRoot(scriptCommand('setup', site.envFile))}`,
  )
}

function warned(error: unknown): string[] {
  interrupted.throwIfAborted()
  warn([explain(error), ...(error instanceof Problem ? [error.advice] : [])].join('\n'))
  return []
}
