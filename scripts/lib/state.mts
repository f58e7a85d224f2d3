/** From what is observed to what the next deploy does: which repairs first, then which way. Nothing is asked or changed here. */
import type { SlotName } from './settings.mts'
import type { Observed, SlotState } from './slots.mts'

/** One small step back to a state that a deploy may start from. */
export type Repair =
  | { do: 'route'; to: SlotName }
  | { do: 'flag'; to: SlotName } // where nothing healthy is there to be confirmed
  | { do: 'rejoin' } // let nginx fall back on the other slot again
  | { do: 'drain'; slot: SlotName }
  | { do: 'stop'; slot: SlotName }
  | { do: 'keep'; slot: SlotName } // bring it back after a reboot
  | { do: 'pin'; release: string } // STRAPI_VERSION in .env

/** `first`: nothing serves. `full`: master serves. `resume`: only slave serves. `wait`: look again. `refuse`: strapi-dev runs. */
export type Way = 'first' | 'full' | 'resume' | 'wait' | 'refuse'

export interface Situation {
  /** One line for the operator. */
  sentence: string
  repairs: Repair[]
  way: Way
  /** The release that visitors get. */
  live: string | undefined
}

const master = 'strapi-master'
const slave = 'strapi-slave'

export function recognise(now: Observed): Situation {
  const situation = recogniseSlots(now)
  const idle = now.flag === master ? now.slave : now.master
  // To stop a slot lets nginx fall back on it again; one that boots must not be fallen back on.
  const isDue = situation.way === 'wait' ? idle.status === 'healthy' : !situation.repairs.some(isStop)
  return now.alone && isDue ? { ...situation, repairs: [...situation.repairs, { do: 'rejoin' }] } : situation
}

/** What is, for who has waited long enough: what still boots counts as unhealthy. */
export function impatient(now: Observed): Observed {
  const judged = (state: SlotState): SlotState =>
    state.status === 'booting' ? { ...state, status: 'unhealthy' } : state
  return { ...now, master: judged(now.master), slave: judged(now.slave) }
}

function recogniseSlots(now: Observed): Situation {
  if (now.dev) return { sentence: 'strapi-dev is running', repairs: [], way: 'refuse', live: undefined }
  const healthy = { master: now.master.status === 'healthy', slave: now.slave.status === 'healthy' }

  if (healthy.master && now.flag === master) return masterServes(now)
  if (healthy.slave && now.flag === slave) {
    return healthy.master && isSameRelease(now) ? bothServe(now) : slaveServes(now, [])
  }
  if (healthy.master) return masterServes(now, [{ do: 'route', to: master }])
  // A booting slot answers soon; whether it will serve is not known yet.
  if (now.master.status === 'booting') return waitFor('master', now)
  if (healthy.slave)
    return slaveServes(now, [
      { do: 'keep', slot: slave },
      { do: 'route', to: slave },
    ])
  if (now.slave.status === 'booting') return waitFor('slave', now)
  return nobodyIsHealthy(now)
}

function masterServes(now: Observed, first: Repair[] = []): Situation {
  const repairs = [
    ...first,
    ...keep(master, now.master, first),
    ...retire(slave, now),
    ...pin(now, now.master),
  ]
  const also = isRunning(now.slave) ? ', slave is left from an earlier run' : ''
  return {
    sentence: `master serves ${nameOf(now.master)}${also}`,
    repairs,
    way: 'full',
    live: now.master.release,
  }
}

function slaveServes(now: Observed, first: Repair[]): Situation {
  const repairs = [...first, ...keep(slave, now.slave, first), ...retire(master, now), ...pin(now, now.slave)]
  return {
    sentence: `only slave serves ${nameOf(now.slave)}, master is ${now.master.status}`,
    repairs,
    way: 'resume',
    live: now.slave.release,
  }
}

/** An earlier run stopped between its steps 6 and 7. */
function bothServe(now: Observed): Situation {
  const repairs: Repair[] = [{ do: 'route', to: master }, ...retire(slave, now), ...pin(now, now.master)]
  const sentence = `slave serves ${nameOf(now.slave)} and master is ready on it: an earlier run did not finish`
  return { sentence, repairs, way: 'full', live: now.master.release }
}

function waitFor(slot: string, now: Observed): Situation {
  return { sentence: `${slot} is booting`, repairs: [], way: 'wait', live: now.pinned }
}

function nobodyIsHealthy(now: Observed): Situation {
  if (isRunning(now.slave) && (now.flag === slave || !isRunning(now.master))) {
    const first: Repair[] = [
      { do: 'keep', slot: slave },
      { do: 'flag', to: slave },
    ]
    const situation = slaveServes(now, now.flag === slave ? [] : first)
    return { ...situation, sentence: `slave is unhealthy on ${nameOf(now.slave)}: visitors may see errors` }
  }
  const flag: Repair[] = now.flag === slave ? [{ do: 'flag', to: master }] : []
  if (isRunning(now.master)) {
    const sentence = `master is unhealthy on ${nameOf(now.master)}: visitors may see errors`
    return {
      sentence,
      repairs: [...flag, ...retire(slave, now), ...pin(now, now.master)],
      way: 'full',
      live: now.master.release,
    }
  }
  return { sentence: 'nothing runs: visitors are not served', repairs: flag, way: 'first', live: undefined }
}

/** A slot that gets no new visitors is stopped once its last request has ended; there must be one that takes them. */
function retire(slot: SlotName, now: Observed): Repair[] {
  const [state, other] = slot === master ? [now.master, now.slave] : [now.slave, now.master]
  if (!isRunning(state)) return []
  const isAnswering = state.status === 'healthy' || state.status === 'unhealthy'
  const drain: Repair[] = isAnswering && other.status === 'healthy' ? [{ do: 'drain', slot }] : []
  return [...drain, { do: 'stop', slot }]
}

/** Killed in the middle of a move, a run may leave the serving slot without a restart; to route to it restores that, too. */
function keep(slot: SlotName, state: SlotState, first: Repair[]): Repair[] {
  return state.comesBack || first.length > 0 ? [] : [{ do: 'keep', slot }]
}

function pin(now: Observed, live: SlotState): Repair[] {
  return live.release === undefined || live.release === now.pinned
    ? []
    : [{ do: 'pin', release: live.release }]
}

/** Two images that nobody named are the same release only when they are the same image. */
function isSameRelease({ master: one, slave: other }: Observed): boolean {
  return one.release === other.release && (one.release !== undefined || one.imageId === other.imageId)
}

function isStop(repair: Repair): boolean {
  return repair.do === 'stop'
}

function isRunning(state: SlotState): boolean {
  return state.status !== 'absent' && state.status !== 'stopped'
}

function nameOf(state: SlotState): string {
  return state.release ?? 'an image of another name'
}

/** A repair as a sentence, for the dry run and the log. */
export function describeRepair(repair: Repair): string {
  switch (repair.do) {
    case 'route':
      return `send visitors to ${repair.to}`
    case 'flag':
      return `let the flag name ${repair.to}`
    case 'rejoin':
      return 'let nginx fall back on the other slot again'
    case 'drain':
      return `wait until no request is left on ${repair.slot}`
    case 'stop':
      return `stop ${repair.slot}`
    case 'keep':
      return `let ${repair.slot} come back after a reboot`
    case 'pin':
      return `write STRAPI_VERSION=${repair.release}`
  }
}
