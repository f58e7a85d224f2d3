import { describe, expect, test } from 'vitest'
import type { Container } from '../../scripts/lib/engine.mts'
import type { SlotName } from '../../scripts/lib/settings.mts'
import { statusOf, type Observed, type SlotState, type SlotStatus } from '../../scripts/lib/slots.mts'
import { describeRepair, impatient, recognise, type Repair } from '../../scripts/lib/state.mts'

const statuses: SlotStatus[] = ['absent', 'stopped', 'booting', 'unhealthy', 'healthy']
type Short = 'master' | 'slave'

function slot(status: SlotStatus, release: string | undefined): SlotState {
  const known = status === 'absent' ? undefined : release
  return {
    status,
    release: known,
    imageId: known && `sha256:${known}`,
    startedAt: undefined,
    comesBack: true,
  }
}

/** Master has release `old`, which .env names, and slave has `new`, unless told otherwise. */
function observed(
  master: SlotStatus,
  slave: SlotStatus,
  flag: Short,
  other: Partial<Observed> = {},
): Observed {
  const slots = { master: slot(master, 'old'), slave: slot(slave, 'new') }
  return { ...slots, flag: `strapi-${flag}`, alone: false, dev: false, pinned: 'old', ...other }
}

function brief(repair: Repair): string {
  const object =
    'to' in repair ? repair.to : 'slot' in repair ? repair.slot : 'release' in repair ? repair.release : ''
  return `${repair.do} ${object.replace('strapi-', '')}`.trim()
}

function answer(now: Observed): string {
  const { way, repairs } = recognise(now)
  return [way, ...repairs.map(brief)].join(', ')
}

describe('a deploy that finds two releases', () => {
  test.each<[SlotStatus, SlotStatus, Short, string]>([
    // master     slave        flag      what the deploy does: way, repairs before it
    ['absent', 'absent', 'master', 'first'],
    ['absent', 'absent', 'slave', 'first, flag master'],
    ['absent', 'stopped', 'master', 'first'],
    ['absent', 'stopped', 'slave', 'first, flag master'],
    ['absent', 'booting', 'master', 'wait'],
    ['absent', 'booting', 'slave', 'wait'],
    ['absent', 'unhealthy', 'master', 'resume, keep slave, flag slave, pin new'],
    ['absent', 'unhealthy', 'slave', 'resume, pin new'],
    ['absent', 'healthy', 'master', 'resume, keep slave, route slave, pin new'],
    ['absent', 'healthy', 'slave', 'resume, pin new'],
    ['stopped', 'absent', 'master', 'first'],
    ['stopped', 'absent', 'slave', 'first, flag master'],
    ['stopped', 'stopped', 'master', 'first'],
    ['stopped', 'stopped', 'slave', 'first, flag master'],
    ['stopped', 'booting', 'master', 'wait'],
    ['stopped', 'booting', 'slave', 'wait'],
    ['stopped', 'unhealthy', 'master', 'resume, keep slave, flag slave, pin new'],
    ['stopped', 'unhealthy', 'slave', 'resume, pin new'],
    ['stopped', 'healthy', 'master', 'resume, keep slave, route slave, pin new'],
    ['stopped', 'healthy', 'slave', 'resume, pin new'],
    ['booting', 'absent', 'master', 'wait'],
    ['booting', 'absent', 'slave', 'wait'],
    ['booting', 'stopped', 'master', 'wait'],
    ['booting', 'stopped', 'slave', 'wait'],
    ['booting', 'booting', 'master', 'wait'],
    ['booting', 'booting', 'slave', 'wait'],
    ['booting', 'unhealthy', 'master', 'wait'],
    ['booting', 'unhealthy', 'slave', 'wait'],
    ['booting', 'healthy', 'master', 'wait'],
    ['booting', 'healthy', 'slave', 'resume, stop master, pin new'],
    ['unhealthy', 'absent', 'master', 'full'],
    ['unhealthy', 'absent', 'slave', 'full, flag master'],
    ['unhealthy', 'stopped', 'master', 'full'],
    ['unhealthy', 'stopped', 'slave', 'full, flag master'],
    ['unhealthy', 'booting', 'master', 'wait'],
    ['unhealthy', 'booting', 'slave', 'wait'],
    ['unhealthy', 'unhealthy', 'master', 'full, stop slave'],
    ['unhealthy', 'unhealthy', 'slave', 'resume, stop master, pin new'],
    ['unhealthy', 'healthy', 'master', 'resume, keep slave, route slave, drain master, stop master, pin new'],
    ['unhealthy', 'healthy', 'slave', 'resume, drain master, stop master, pin new'],
    ['healthy', 'absent', 'master', 'full'],
    ['healthy', 'absent', 'slave', 'full, route master'],
    ['healthy', 'stopped', 'master', 'full'],
    ['healthy', 'stopped', 'slave', 'full, route master'],
    ['healthy', 'booting', 'master', 'full, stop slave'],
    ['healthy', 'booting', 'slave', 'full, route master, stop slave'],
    ['healthy', 'unhealthy', 'master', 'full, drain slave, stop slave'],
    ['healthy', 'unhealthy', 'slave', 'full, route master, drain slave, stop slave'],
    ['healthy', 'healthy', 'master', 'full, drain slave, stop slave'],
    ['healthy', 'healthy', 'slave', 'resume, drain master, stop master, pin new'],
  ])('with master %s, slave %s and visitors meant for %s: %s', (master, slave, flag, expected) => {
    expect(answer(observed(master, slave, flag))).toBe(expected)
  })
})

test.each<[SlotStatus, SlotStatus, Short, string]>([
  ['booting', 'absent', 'master', 'full'],
  ['booting', 'healthy', 'master', 'resume, keep slave, route slave, drain master, stop master, pin new'],
  ['booting', 'booting', 'slave', 'resume, stop master, pin new'],
  ['absent', 'booting', 'slave', 'resume, pin new'],
])('with master %s, slave %s for too long and visitors meant for %s: %s', (master, slave, flag, expected) => {
  expect(answer(impatient(observed(master, slave, flag)))).toBe(expected)
})

describe('a deploy that finds one release on both', () => {
  const both = (master: SlotStatus, slave: SlotStatus, pinned: string) => {
    return { master: slot(master, 'new'), slave: slot(slave, 'new'), pinned }
  }
  test.each<[SlotStatus, SlotStatus, string, string]>([
    ['healthy', 'healthy', 'new', 'full, route master, drain slave, stop slave'],
    ['healthy', 'healthy', 'old', 'full, route master, drain slave, stop slave, pin new'],
    ['booting', 'healthy', 'new', 'resume, stop master'],
    ['unhealthy', 'healthy', 'new', 'resume, drain master, stop master'],
    ['stopped', 'healthy', 'new', 'resume'],
    ['healthy', 'unhealthy', 'new', 'full, route master, drain slave, stop slave'],
  ])(
    'with master %s, slave %s, %s in .env, visitors meant for slave: %s',
    (master, slave, pinned, expected) => {
      expect(answer(observed(master, slave, 'slave', both(master, slave, pinned)))).toBe(expected)
    },
  )
})

test.each<[SlotStatus, SlotStatus, Short, string]>([
  ['absent', 'absent', 'master', 'first, rejoin'],
  ['healthy', 'stopped', 'master', 'full, rejoin'],
  ['stopped', 'healthy', 'slave', 'resume, pin new, rejoin'],
  ['stopped', 'healthy', 'master', 'resume, keep slave, route slave, pin new, rejoin'],
  // To stop a slot lets nginx fall back on it again.
  ['healthy', 'booting', 'master', 'full, stop slave'],
  ['booting', 'booting', 'master', 'wait'],
  ['booting', 'healthy', 'master', 'wait, rejoin'],
  ['stopped', 'booting', 'slave', 'wait'],
])(
  'with master %s, slave %s and nginx kept from falling back on the one that is not %s: %s',
  (master, slave, flag, expected) => {
    expect(answer(observed(master, slave, flag, { alone: true }))).toBe(expected)
  },
)

test.each<[string, Partial<Observed>, string, string | undefined]>([
  ['refuses while strapi-dev holds the port of master', { dev: true }, 'refuse', undefined],
  ['writes down what serves when .env names another release', { pinned: 'newer' }, 'full, pin old', 'old'],
  [
    'leaves .env alone when the image has a name of its own',
    { master: slot('healthy', undefined) },
    'full',
    undefined,
  ],
])('a deploy that finds a healthy master %s', (_, other, expected, live) => {
  const now = observed('healthy', 'absent', 'master', other)
  expect([answer(now), recognise(now).live]).toEqual([expected, live])
})

test('two images without a release are not taken for one: visitors never get an older one unasked', () => {
  const unnamed = (imageId: string): SlotState => ({ ...slot('healthy', undefined), imageId })
  const slots = { master: unnamed('sha256:a'), slave: unnamed('sha256:b') }
  expect(answer(observed('healthy', 'healthy', 'slave', slots))).toBe('resume, drain master, stop master')
})

test.each<[SlotStatus, SlotStatus, Short, string]>([
  ['healthy', 'stopped', 'master', 'master serves old'],
  ['healthy', 'healthy', 'master', 'master serves old, slave is left from an earlier run'],
  ['stopped', 'healthy', 'slave', 'only slave serves new, master is stopped'],
  ['booting', 'absent', 'master', 'master is booting'],
  ['stopped', 'booting', 'slave', 'slave is booting'],
  ['unhealthy', 'absent', 'master', 'master is unhealthy on old: visitors may see errors'],
  ['absent', 'unhealthy', 'slave', 'slave is unhealthy on new: visitors may see errors'],
  ['absent', 'stopped', 'master', 'nothing runs: visitors are not served'],
])(
  'with master %s, slave %s and visitors meant for %s the operator reads "%s"',
  (master, slave, flag, sentence) => {
    expect(recognise(observed(master, slave, flag)).sentence).toBe(sentence)
  },
)

/** Everything that can be found: 5 x 5 states, the flag, the same or other or unknown releases, what .env names. */
const everything = statuses.flatMap((master) =>
  statuses.flatMap((slave) =>
    (['master', 'slave'] as const).flatMap((flag) =>
      [
        ['old', 'new'],
        ['new', 'new'],
        [undefined, 'new'],
        ['old', undefined],
      ].flatMap(([first, second]) =>
        ['old', 'new', 'other'].map((pinned) => {
          const slots = { master: slot(master, first), slave: slot(slave, second) }
          return observed(master, slave, flag, { ...slots, pinned })
        }),
      ),
    ),
  ),
)

/** A state before each repair, with the repair, and the state at the end. */
function played(now: Observed): { moments: [Observed, Repair][]; end: Observed } {
  const moments: [Observed, Repair][] = []
  let at = now
  for (const repair of recognise(now).repairs) {
    moments.push([at, repair])
    at = after(at, repair)
  }
  return { moments, end: at }
}

function after(now: Observed, repair: Repair): Observed {
  switch (repair.do) {
    case 'route':
    case 'flag':
      return { ...now, flag: repair.to }
    case 'pin':
      return { ...now, pinned: repair.release }
    case 'stop':
      return { ...now, [short(repair.slot)]: { ...stateOf(now, repair.slot), status: 'stopped' } }
    default:
      return now
  }
}

const short = (name: SlotName): Short => (name === 'strapi-master' ? 'master' : 'slave')
const stateOf = (now: Observed, name: SlotName) => now[short(name)]
const runs = (state: SlotState) => state.status !== 'absent' && state.status !== 'stopped'
const text = ({ master, slave, flag, pinned }: Observed) =>
  `master ${master.status} ${master.release}, slave ${slave.status} ${slave.release}, flag ${flag}, pinned ${pinned}`

/** Those for which the promise does not hold, readable. */
function broken(promise: (now: Observed) => boolean): string[] {
  return [...new Set(everything.filter((now) => !promise(now)).map((now) => `${text(now)}: ${answer(now)}`))]
}

describe('whatever is found', () => {
  test('all of it is tried', () => expect(everything).toHaveLength(5 * 5 * 2 * 4 * 3))

  const promises: [string, (now: Observed) => boolean][] = [
    [
      'no slot is stopped while visitors are meant for it',
      (now) => played(now).moments.every(([at, repair]) => repair.do !== 'stop' || repair.slot !== at.flag),
    ],
    [
      'the only slot that runs is never stopped',
      (now) =>
        played(now).moments.every(
          ([at, repair]) => repair.do !== 'stop' || (runs(at.master) && runs(at.slave)),
        ),
    ],
    [
      'a healthy slot is only stopped beside another that answers',
      (now) =>
        played(now).moments.every(
          ([at, repair]) =>
            repair.do !== 'stop' ||
            stateOf(at, repair.slot).status !== 'healthy' ||
            stateOf(at, at.flag).status === 'healthy',
        ),
    ],
    [
      'a slot that answers is given time for its last requests before it is stopped, when another takes the new ones',
      (now) =>
        recognise(now).repairs.every(
          (repair, at, all) =>
            repair.do !== 'stop' ||
            ![now.master, now.slave].some(({ status }) => status === 'healthy') ||
            !['healthy', 'unhealthy'].includes(stateOf(now, repair.slot).status) ||
            (all[at - 1]?.do === 'drain' && brief(all[at - 1] ?? repair) === `drain ${short(repair.slot)}`),
        ),
    ],
    [
      'a slot is waited for only when no new visitors get to it',
      (now) => played(now).moments.every(([at, repair]) => repair.do !== 'drain' || repair.slot !== at.flag),
    ],
    [
      'visitors are only sent to a healthy slot',
      (now) =>
        played(now).moments.every(
          ([at, repair]) => repair.do !== 'route' || stateOf(at, repair.to).status === 'healthy',
        ),
    ],
    [
      'the flag is moved without nginx confirming it only when nothing healthy is there',
      (now) =>
        now.master.status !== 'healthy' && now.slave.status !== 'healthy'
          ? true
          : recognise(now).repairs.every((repair) => repair.do !== 'flag'),
    ],
    [
      'visitors are meant for the slot that the deploy takes to be serving',
      (now) => {
        const { way } = recognise(now)
        const wanted = { full: 'strapi-master', first: 'strapi-master', resume: 'strapi-slave' }
        return way === 'wait' || way === 'refuse' || played(now).end.flag === wanted[way]
      },
    ],
    [
      '.env names the release that serves, and no other was ever written to it',
      (now) => {
        const { way, live, repairs } = recognise(now)
        const { end } = played(now)
        const pins = repairs.filter((repair) => repair.do === 'pin')
        if (way === 'wait' || way === 'first') return pins.length === 0
        const served = way === 'full' ? end.master.release : end.slave.release
        return (
          live === served &&
          pins.every((pin) => pin.release === served) &&
          end.pinned === (served ?? now.pinned)
        )
      },
    ],
    [
      'a second look after the repairs finds nothing more to repair, and goes the same way',
      (now) => {
        const { way, repairs } = recognise(played(now).end)
        return way === recognise(now).way && repairs.length === 0
      },
    ],
    [
      'a healthy slot that visitors are meant for is never waited for',
      (now) => stateOf(now, now.flag).status !== 'healthy' || recognise(now).way !== 'wait',
    ],
    [
      'nothing is changed while a deploy waits',
      (now) => recognise(now).way !== 'wait' || recognise(now).repairs.length === 0,
    ],
    [
      'strapi-dev stops every deploy before it changes anything',
      (now) => answer({ ...now, dev: true }) === 'refuse',
    ],
  ]
  test.each(promises)('%s', (_, promise) => {
    expect(broken(promise)).toEqual([])
  })
})

test.each<[string, SlotStatus, Container['State']]>([
  ['running without a health check', 'healthy', engineState('running')],
  ['running and healthy', 'healthy', engineState('running', 'healthy')],
  ['running and not asked yet', 'booting', engineState('running', 'starting')],
  ['running and not answering', 'unhealthy', engineState('running', 'unhealthy')],
  ['started again and again', 'unhealthy', engineState('restarting', 'starting')],
  ['paused', 'unhealthy', engineState('paused', 'healthy')],
  ['made, never started', 'stopped', engineState('created')],
  ['exited', 'stopped', engineState('exited', 'healthy')],
  ['half removed', 'stopped', engineState('dead')],
])('a container that is %s counts as %s', (_, expected, found) => {
  expect(statusOf({ State: found })).toBe(expected)
})

test.each<[string, Repair]>([
  ['send visitors to strapi-slave', { do: 'route', to: 'strapi-slave' }],
  ['let the flag name strapi-master', { do: 'flag', to: 'strapi-master' }],
  ['wait until no request is left on strapi-slave', { do: 'drain', slot: 'strapi-slave' }],
  ['stop strapi-slave', { do: 'stop', slot: 'strapi-slave' }],
  ['let strapi-slave come back after a reboot', { do: 'keep', slot: 'strapi-slave' }],
  ['write STRAPI_VERSION=new', { do: 'pin', release: 'new' }],
])('a dry run says: would %s', (sentence, repair) => {
  expect(describeRepair(repair)).toBe(sentence)
})

function engineState(status: string, health?: string): Container['State'] {
  const times = { StartedAt: '', FinishedAt: '', ExitCode: 0 }
  return { Status: status, ...times, ...(health ? { Health: { Status: health } } : {}) }
}

test('a serving slot that a killed move left without a restart gets it back', () => {
  const master = { ...slot('healthy', 'old'), comesBack: false }
  expect(answer(observed('healthy', 'absent', 'master', { master }))).toBe('full, keep master')
  const slave = { ...slot('healthy', 'new'), comesBack: false }
  expect(answer(observed('stopped', 'healthy', 'slave', { slave, pinned: 'new' }))).toBe('resume, keep slave')
})
