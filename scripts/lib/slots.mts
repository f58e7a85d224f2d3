/** What the two slots are doing right now, as the engine and nginx's flags tell it. */
import * as engine from './engine.mts'
import type { Site, SlotName } from './settings.mts'
import { flagged, isAlone } from './traffic.mts'

export type SlotStatus = 'absent' | 'stopped' | 'booting' | 'unhealthy' | 'healthy'

export interface SlotState {
  status: SlotStatus
  /** Tag that its container was made from. */
  release: string | undefined
  imageId: string | undefined
  startedAt: string | undefined
  /** Whether the engine starts it again after a crash or a reboot. */
  comesBack: boolean
}

export interface Observed {
  master: SlotState
  slave: SlotState
  /** The slot that the flag names. */
  flag: SlotName
  /** nginx is told not to fall back on the other slot. */
  alone: boolean
  /** strapi-dev runs: it holds master's port. */
  dev: boolean
  /** STRAPI_VERSION of .env. */
  pinned: string
}

export async function observe(site: Site): Promise<Observed> {
  const [master, slave, dev] = await Promise.all([
    slotState(site, 'strapi-master'),
    slotState(site, 'strapi-slave'),
    engine.serviceContainers(site.project, 'strapi-dev'),
  ])
  return {
    master,
    slave,
    flag: flagged(site),
    alone: isAlone(site),
    dev: dev.some((one) => one.State.Status === 'running'),
    pinned: site.release,
  }
}

async function slotState(site: Site, slot: SlotName): Promise<SlotState> {
  const found = await engine.container(site.slots[slot].container)
  if (!found)
    return {
      status: 'absent',
      release: undefined,
      imageId: undefined,
      startedAt: undefined,
      comesBack: false,
    }
  const release = found.Config.Image.startsWith(`${site.image}:`)
    ? found.Config.Image.slice(site.image.length + 1)
    : undefined
  return {
    status: statusOf(found),
    release,
    imageId: found.Image,
    startedAt: found.State.StartedAt,
    comesBack: found.HostConfig.RestartPolicy.Name !== 'no',
  }
}

/** The engine's words in ours. A container that the engine keeps restarting is unhealthy, not booting. */
export function statusOf(found: Pick<engine.Container, 'State'>): SlotStatus {
  if (found.State.Status === 'restarting' || found.State.Status === 'paused') return 'unhealthy'
  if (found.State.Status !== 'running') return 'stopped'
  switch (found.State.Health?.Status) {
    case 'starting':
      return 'booting'
    case 'unhealthy':
      return 'unhealthy'
    default:
      return 'healthy'
  }
}
