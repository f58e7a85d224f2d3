/** Is this host ready? One list; all of it runs, nothing is changed, and everything that is wrong is shown at once. */
import { folderChecks } from './checks/folders.mts'
import { nginxChecks } from './checks/nginx.mts'
import { serviceChecks } from './checks/services.mts'
import { settingChecks } from './checks/settings.mts'
import { softwareChecks } from './checks/software.mts'
import { detail, exitCodes, explain, Problem, warn } from './report.mts'
import type { Site } from './settings.mts'
import type { Way } from './state.mts'

export interface Finding {
  problem: string
  /** What to type or edit. */
  fix: string
  /** Shown, but does not stop anything. */
  onlyWarn?: boolean
}

export interface Check {
  title: string
  /** @returns what is wrong; throwing counts as one finding */
  check: (site: Site, way: Way) => Promise<Finding[]>
}

export const checks: Check[] = [
  ...softwareChecks,
  ...settingChecks,
  ...folderChecks,
  ...serviceChecks,
  ...nginxChecks,
]

/** All findings, in the order of the list. */
export async function findings(site: Site, way: Way): Promise<Finding[]> {
  const found = await Promise.all(
    checks.map(async ({ title, check }) =>
      check(site, way).catch((error: unknown): Finding[] => [
        { problem: `${title}: ${explain(error)}`, fix: '' },
      ]),
    ),
  )
  return found.flat()
}

/**
 * @param outcome what has become of the work so far, for the error
 * @throws Problem (usage) that lists all failures, each with the command to type
 */
export async function runChecks(site: Site, way: Way, outcome = 'nothing was changed'): Promise<void> {
  const found = await findings(site, way)
  for (const finding of found.filter((one) => one.onlyWarn)) warn(describeFinding(finding))
  const failures = found.filter((one) => !one.onlyWarn)
  if (failures.length === 0) return detail(`${checks.length} checks passed`)
  const list = failures
    .map((finding) => `\n  - ${describeFinding(finding).replaceAll('\n', '\n    ')}`)
    .join('')
  throw new Problem(exitCodes.usage, `this host is not ready, ${outcome}:${list}`)
}

function describeFinding({ problem, fix }: Finding): string {
  return fix ? `${problem}\n-> ${fix}` : problem
}
