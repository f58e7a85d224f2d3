/** How long visitors will be without an answer, from what is known before. */
import { stripVTControlCharacters } from 'node:util'
import { ask } from '../command.mts'
import type { Legacy } from './look.mts'

/** To stop the legacy services, start PostgreSQL and Redis on their data and see that Strapi is healthy: measured on two cores. */
const servicesMs = 4000
/** Strapi's, when the log of the legacy one does not tell. */
const unknownLaunchMs = 10_000
/** A dump, its restore and the statistics, where the data cannot stay: 10 s for 500 MB, measured on two cores. */
const moveMsPerByte = 10_000 / 500e6

export interface Expected {
  outageMs: number
  /** Where the database goes by dump and restore. */
  withMoveMs: number
  /** Strapi's share of it, when the log of the legacy one tells. */
  launchMs: number | undefined
}

export async function expectedOutage({ services: { strapi }, database }: Legacy): Promise<Expected> {
  const launchMs = await launchOf(strapi.container)
  const outageMs = servicesMs + (launchMs ?? unknownLaunchMs)
  return {
    outageMs,
    withMoveMs: outageMs + (database.live?.bytes ?? 0) * moveMsPerByte,
    launchMs,
  }
}

/** "Launched in │ 2345 ms" is what Strapi says when it is up; before it, the legacy one builds. */
async function launchOf({
  Id,
  State,
}: Legacy['services']['strapi']['container']): Promise<number | undefined> {
  const until = new Date(Date.parse(State.StartedAt) + 3_600_000).toISOString()
  const log = await ask(['docker', 'logs', '--since', State.StartedAt, '--until', until, Id])
  return parseLaunch(log ?? '')
}

/** @returns milliseconds */
export function parseLaunch(log: string): number | undefined {
  const last = [...stripVTControlCharacters(log).matchAll(/Launched in\D+(\d+) ms/g)].at(-1)
  return last && Number(last[1])
}
