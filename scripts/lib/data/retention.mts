/** Which sets may go. Decided from what is known of them; nothing is asked or removed here. */
import type { Manifest, Part } from './manifest.mts'

export interface Known {
  name: string
  parts: Part[]
  createdAt: Date
  sizes: Record<string, number>
  /** What the last look at it said; undefined when nobody looked. */
  isRight: boolean | undefined
  /** Nothing that should be in it was missing on the disk. */
  isWhole: boolean
}

export interface Keep {
  daily: number
  weekly: number
  monthly: number
}

export interface Verdict {
  name: string
  keep: boolean
  reason: string
}

/** @param isRight what the last verification said, undefined without one */
export function known(name: string, manifest: Manifest, isRight: boolean | undefined): Known {
  const sizes = Object.fromEntries(
    Object.entries(manifest.files).map(([file, { sizeBytes }]) => [file, sizeBytes]),
  )
  const isWhole = manifest.missing.length === 0
  return { name, parts: manifest.parts, createdAt: new Date(manifest.createdAt), sizes, isRight, isWhole }
}

/**
 * The newest of each of the last days, weeks (from Monday) and months, in UTC, that have a set which is right. Sets of
 * different parts do not stand in for each other. What is not known to be right is neither counted nor removed, and nothing
 * goes while there is an alarm.
 * @param sets oldest first
 */
export function retention(sets: Known[], keep: Keep, now: Date): Verdict[] {
  const alarm = alarmOf(sets, now)
  const reasons = new Map(kindsOf(sets).flatMap((kind) => [...reasonsToKeep(kind, keep, now)]))
  return sets.map(({ name }) => {
    const reason = reasons.get(name) ?? alarm
    return { name, keep: reason !== undefined, reason: reason ?? 'no day, week or month needs it' }
  })
}

function reasonsToKeep(sets: Known[], keep: Keep, now: Date): Map<string, string> {
  const reasons = new Map<string, string>()
  for (const set of sets) {
    if (set.createdAt > now) reasons.set(set.name, 'is from the future: look at the clock')
    else if (set.isRight === undefined) reasons.set(set.name, 'was never verified')
    else if (!set.isRight) reasons.set(set.name, 'is damaged: look at it, and remove it by hand')
  }
  const good = sets.filter(({ name }) => !reasons.has(name)).toReversed()
  // What a later one lacks, an earlier one of the same day may still have.
  const wholeFirst = [...good.filter(({ isWhole }) => isWhole), ...good.filter(({ isWhole }) => !isWhole)]
  for (const [period, count] of [
    ['daily', keep.daily],
    ['weekly', keep.weekly],
    ['monthly', keep.monthly],
  ] as const) {
    const newest = new Map<string, string>()
    for (const { name, createdAt } of wholeFirst) {
      const key = periodOf[period](createdAt)
      if (!newest.has(key)) newest.set(key, name)
    }
    const latest = [...newest].toSorted(([one], [other]) => (one > other ? -1 : 1))
    for (const [key, name] of latest.slice(0, count)) {
      if (!reasons.has(name)) reasons.set(name, `${period}: the newest of ${key}`)
    }
  }
  const [newest] = good
  if (newest && !reasons.has(newest.name)) reasons.set(newest.name, 'the newest good one')
  return reasons
}

/** Why nothing may go for now, or undefined: the newest set that holds some file is damaged, or has much less of it. */
export function alarmOf(sets: Known[], now: Date): string | undefined {
  const past = sets.filter(({ createdAt }) => createdAt <= now)
  const files = new Set(past.flatMap(({ sizes }) => Object.keys(sizes)))
  return [...files].map((file) => alarmOfFile(past, file)).find((alarm) => alarm !== undefined)
}

/** Compared with one of the same kind, if there is one: a small one before a deploy must not make the nightly one look right. */
function alarmOfFile(sets: Known[], file: string): string | undefined {
  const holders = sets.filter(({ sizes }) => file in sizes)
  const newest = holders.at(-1)
  const right = holders.slice(0, -1).filter(({ isRight }) => isRight)
  const before = right.findLast(({ parts }) => parts.join() === newest?.parts.join()) ?? right.at(-1)
  if (newest?.isRight === false) return `the newest set, ${newest.name}, is damaged: nothing goes`
  const sizeBefore = before?.sizes[file] ?? 0
  return newest && sizeBefore > 100_000 && (newest.sizes[file] ?? 0) < sizeBefore / 2
    ? `${file} of the newest set, ${newest.name}, has less than half its size before: nothing goes`
    : undefined
}

function kindsOf(sets: Known[]): Known[][] {
  return [...Map.groupBy(sets, ({ parts }) => parts.join(', ')).values()]
}

const day = (date: Date) => date.toISOString().slice(0, 10)

const periodOf: Record<keyof Keep, (date: Date) => string> = {
  daily: day,
  weekly: (date) => {
    const sinceMonday = (date.getUTCDay() + 6) % 7
    return `the week of ${day(new Date(date.getTime() - sinceMonday * 86_400_000))}`
  },
  monthly: (date) => date.toISOString().slice(0, 7),
}
