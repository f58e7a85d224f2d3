import { describe, expect, test } from 'vitest'
import { retention, type Keep, type Known } from '../../scripts/lib/data/retention.mts'

const now = new Date('2026-11-25T12:00:00Z') // a Wednesday
const all: Keep = { daily: 7, weekly: 4, monthly: 6 }

/** "1125 1124! 1123?": sets of these days at 03:30, oldest first; ! is damaged, ? was never verified. */
function sets(text: string, other: Partial<Known> = {}): Known[] {
  return text.split(' ').map((word) => {
    const createdAt = new Date(`2026-${word.slice(0, 2)}-${word.slice(2, 4)}T03:30:00Z`)
    const isRight = word.endsWith('?') ? undefined : !word.endsWith('!')
    return {
      name: word.slice(0, 4),
      parts: ['database'],
      createdAt,
      sizes: { 'database.dump': 1e6 },
      isRight,
      isWhole: true,
      ...other,
    }
  })
}

const gone = (known: Known[], keep = all) =>
  retention(known, keep, now)
    .filter((one) => !one.keep)
    .map(({ name }) => name)
    .join(' ')

/** One a day, back from the 25th of November. */
const daily = (days: number) =>
  Array.from({ length: days }, (_, back) => new Date(now.getTime() - back * 86_400_000))
    .toReversed()
    .map((date) => date.toISOString().slice(5, 10).replace('-', ''))
    .join(' ')

test.each<[string, string, Keep, string]>([
  ['a single set', '1125', { daily: 0, weekly: 0, monthly: 0 }, ''],
  ['one of each day', '1123 1124 1125', { daily: 2, weekly: 0, monthly: 0 }, '1123'],
  ['the newest of each week', '1116 1122 1123 1125', { daily: 0, weekly: 2, monthly: 0 }, '1116 1123'],
  ['the newest of each month', '0901 0930 1031 1125', { daily: 0, weekly: 0, monthly: 3 }, '0901'],
  ['days that have a set, however long ago', '0101 0301 0501', { daily: 2, weekly: 0, monthly: 0 }, '0101'],
])('keeps %s', (_, text, keep, expected) => {
  expect(gone(sets(text), keep)).toBe(expected)
})

test('of half a year of daily sets keeps 7 days, 4 weeks and 6 months', () => {
  const kept = retention(sets(daily(180)), all, now).filter((one) => one.keep)
  expect(kept.map(({ name }) => name).join(' ')).toBe(
    '0630 0731 0831 0930 1031 1108 1115 1119 1120 1121 1122 1123 1124 1125',
  )
})

describe('what is not known to be right', () => {
  test.each<[string, string, string]>([
    ['does not count as the set of its day, and is not removed', '1122 1123! 1124 1125', '1122'],
    ['when nobody verified it, neither', '1122 1123? 1124 1125', '1122'],
    ['stops everything when it is the newest one', '1120 1121 1122 1123 1124 1125!', ''],
    ['never makes the last good one go', '1101 1124? 1125?', ''],
  ])('%s', (_, text, expected) => {
    expect(gone(sets(text), { daily: 2, weekly: 0, monthly: 0 })).toBe(expected)
  })
})

test('a set from the future is kept and counts for nothing', () => {
  const verdicts = retention(sets('1123 1124 1125 1231'), { daily: 1, weekly: 0, monthly: 0 }, now)
  expect(verdicts.map(({ name, keep }) => `${name} ${keep}`)).toEqual([
    '1123 false',
    '1124 false',
    '1125 true',
    '1231 true',
  ])
  expect(verdicts.at(-1)?.reason).toContain('from the future')
})

test('nothing goes while the newest set has less than half its size', () => {
  const known = [...sets('1120 1121 1122 1123 1124'), ...sets('1125', { sizes: { 'database.dump': 4e5 } })]
  const one = { daily: 1, weekly: 0, monthly: 0 }
  expect(gone(known, one)).toBe('')
  expect(retention(known, one, now)[0]?.reason).toContain('less than half')
})

test('a nightly set is compared with a nightly one, not with a small one of a deploy since', () => {
  const small = { 'database.dump': 4e5 }
  const known = [
    ...sets('1123 1124', { parts: ['database', 'uploads'] }),
    ...sets('1124', { sizes: small }).map((one) => ({ ...one, name: 'deploy' })),
    ...sets('1125', { parts: ['database', 'uploads'], sizes: small }),
  ]
  const verdicts = retention(known, { daily: 1, weekly: 0, monthly: 0 }, now)
  expect(verdicts.every(({ keep }) => keep)).toBe(true)
  expect(verdicts[0]?.reason).toContain('less than half')
})

test('a set that lacks a file does not displace a whole one of its day', () => {
  const whole = sets('1125')
  const degraded = sets('1125', { isWhole: false }).map((one) => ({ ...one, name: 'degraded' }))
  const one = { daily: 1, weekly: 0, monthly: 0 }
  // The newest one stays, too.
  expect(gone([...sets('1124'), ...whole, ...degraded], one)).toBe('1124')
  expect(gone([...sets('1124'), ...degraded], one)).toBe('1124')
})

test('sets of different parts do not stand in for each other', () => {
  const known = [
    ...sets('1123'),
    ...sets('1124', { parts: ['config'], sizes: {} }),
    ...sets('1125', { parts: ['config'], sizes: {} }),
  ]
  expect(gone(known, { daily: 1, weekly: 0, monthly: 0 })).toBe('1124')
})
