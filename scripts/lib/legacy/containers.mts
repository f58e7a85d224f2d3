/** Takes the containers of the legacy set-up out of service and brings them back. They are never removed here. */
import { existsSync } from 'node:fs'
import { rename } from 'node:fs/promises'
import { dirname } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { setRestart, setRestartIfThere } from '../booting.mts'
import { ask, run } from '../command.mts'
import * as engine from '../engine.mts'
import { syncFolder } from '../envfile.mts'
import { getUrl } from '../http.mts'
import { alive, detail, refuseInDryRun } from '../report.mts'
import { releaseTime } from '../releases.mts'
import type { Note } from './journal.mts'
import {
  inStartOrder,
  isRunning,
  nameOf,
  retiredPrefix,
  retiredSuffix,
  type Legacy,
  type Service,
} from './look.mts'

/** Those that run now. */
export async function runningServices(legacy: Legacy): Promise<Service[]> {
  const now = await Promise.all(inStartOrder(legacy).map(asItIs))
  return now.filter(isRunning)
}

async function asItIs(service: Service): Promise<Service> {
  return { ...service, container: (await engine.container(service.container.Id)) ?? service.container }
}

/** Its server drains nothing, and npm as the first process passes no signal on: everything in the container is told. */
export async function stopStrapi({ services: { strapi } }: Legacy): Promise<void> {
  await stop(strapi, { tell: ['sh', '-c', 'kill -TERM -1'], seconds: 3, moreSeconds: 0 })
}

export async function stopRedis({ services: { redis }, redis: { password } }: Legacy): Promise<void> {
  const env = { REDISCLI_AUTH: password }
  await stop(redis, { tell: ['redis-cli', 'shutdown'], seconds: 30, moreSeconds: 30, env })
}

/** "Fast": sessions are ended, the data is whole. A first process that is a shell would keep the signal for itself. */
export async function stopPostgresql({ services: { postgresql } }: Legacy): Promise<void> {
  const tell = 'kill -INT "$(head -n 1 "${PGDATA:-/var/lib/postgresql/data}/postmaster.pid")"'
  await stop(postgresql, { tell: ['sh', '-c', tell], seconds: 60, moreSeconds: 60 })
}

export async function stopLiveKit({ services: { livekit } }: Legacy): Promise<void> {
  if (livekit) await stop(livekit, { seconds: 10, moreSeconds: 0 })
}

interface Stop {
  /** Said in the container, by what it has itself. */
  tell?: string[]
  env?: Record<string, string>
  /** For it to end by itself, and then until it is killed. */
  seconds: number
  moreSeconds: number
}

/** First of all the engine must not start it again: neither now nor after a reboot. */
async function stop(service: Service, { tell, env = {}, seconds, moreSeconds }: Stop): Promise<void> {
  const { Id } = service.container
  await setRestart(Id, 'no')
  if (!isRunning(await asItIs(service))) return
  const names = Object.keys(env).map((name) => `--env=${name}`)
  const isTold =
    tell !== undefined && (await ask(['docker', 'exec', ...names, Id, ...tell], { env })) !== undefined
  const deadline = performance.now() + (isTold ? seconds * 1000 : 0)
  while (performance.now() < deadline) {
    if ((await engine.container(Id))?.State.Status === 'exited') return
    await sleep(50)
  }
  await run(['docker', 'stop', '--time', String(isTold ? moreSeconds : seconds), Id])
}

/** The engine starts none of them again, also not after a reboot. */
export async function keepOut(legacy: Legacy): Promise<void> {
  for (const { container } of inStartOrder(legacy)) await setRestartIfThere(container.Id, 'no')
}

/** Nobody starts it again by mistake: two PostgreSQL on the same data would destroy it. */
export async function retireFiles(legacy: Legacy): Promise<void> {
  for (const path of legacy.composeFiles.filter((one) => !one.endsWith(retiredSuffix))) {
    // Put back meanwhile, it is not the one that the containers were made from.
    const isThere = existsSync(`${path}${retiredSuffix}`)
    const name = isThere ? `${path}.put-back-${releaseTime(new Date())}` : `${path}${retiredSuffix}`
    await renameSynced(path, name)
  }
}

/** Their names say what they are. */
export async function renameRetired(legacy: Legacy): Promise<void> {
  for (const service of await Promise.all(inStartOrder(legacy).map(asItIs))) {
    const name = nameOf(service)
    if (!name.startsWith(retiredPrefix))
      await run(['docker', 'rename', service.container.Id, `${retiredPrefix}${name}`])
  }
}

/** Names and restarts as they were; all that visitors need is started. Nothing that it needs is in use by others by now. */
export async function bringBack(legacy: Legacy, networks: Note['networks']): Promise<void> {
  for (const service of inStartOrder(legacy).filter((one) => one !== legacy.services.livekit))
    await bringServiceBack(service, networks)
}

/** Its many ports may be taken meanwhile: visitors must not wait for that. */
export async function bringLiveKitBack(
  { services: { livekit } }: Legacy,
  networks: Note['networks'],
): Promise<void> {
  if (livekit) await bringServiceBack(livekit, networks)
}

async function bringServiceBack(service: Service, networks: Note['networks']): Promise<void> {
  const { container } = await asItIs(service)
  const name = nameOf({ container })
  await mendNetworks({ ...service, container }, networks)
  if (name.startsWith(retiredPrefix))
    await run(['docker', 'rename', container.Id, name.slice(retiredPrefix.length)])
  // First: to start one that was told to end, and has not yet, does nothing.
  await setRestart(container.Id, service.restart)
  await run(['docker', 'start', container.Id])
}

/** `docker network prune` takes those whose containers do not run, and the engine starts none of them then. */
async function mendNetworks({ container }: Service, labels: Note['networks'] = {}): Promise<void> {
  for (const [name, { NetworkID, Aliases }] of Object.entries(container.NetworkSettings.Networks)) {
    if (name === 'host' || name === 'none' || (await engine.network(NetworkID || name))) continue
    detail(`the network ${name} of ${nameOf({ container })} was removed: it is made again`)
    const argv = Object.entries(labels[name] ?? {}).map(([key, value]) => `--label=${key}=${value}`)
    if (!(await engine.network(name))) await run(['docker', 'network', 'create', ...argv, name])
    await ask(['docker', 'network', 'disconnect', '--force', name, container.Id])
    const aliases = (Aliases ?? []).map((alias) => `--alias=${alias}`)
    await run(['docker', 'network', 'connect', ...aliases, name, container.Id])
  }
}

/** Last of all: these names, too, tell that the legacy set-up is in service. */
export async function bringFilesBack(legacy: Legacy): Promise<void> {
  for (const path of legacy.composeFiles) {
    const name = path.endsWith(retiredSuffix) ? path.slice(0, -retiredSuffix.length) : path
    await renameSynced(`${name}${retiredSuffix}`, name)
  }
}

/** Why the legacy Strapi does not answer, or undefined. */
export async function failureOf({ address }: Legacy): Promise<string | undefined> {
  return await getUrl(`http://${address}/_health`).then(
    ({ status }) => (status < 300 ? undefined : `/_health answers ${status}`),
    (error: Error) => error.message,
  )
}

/** It builds at each start, which takes minutes. @throws Error when Strapi does not answer in half an hour */
export async function untilServing(legacy: Legacy): Promise<void> {
  const startedAt = performance.now()
  const deadline = startedAt + 1_800_000
  const name = nameOf(legacy.services.strapi).replace(retiredPrefix, '')
  await alive(
    () => `waiting for the legacy Strapi, which builds at its start: docker logs -f ${name}`,
    async () => {
      for (let reason = await failureOf(legacy); reason !== undefined; reason = await failureOf(legacy)) {
        if (performance.now() > deadline)
          throw new Error(`the legacy Strapi does not serve: ${reason}; see: docker logs ${name}`)
        await sleep(500)
        if (performance.now() < startedAt + 60_000) await startEnded(legacy).catch(() => undefined)
      }
    },
  )
}

/** What was told to end just before it was started ends nevertheless. */
async function startEnded({ services: { postgresql, redis, strapi } }: Legacy): Promise<void> {
  for (const { container } of await Promise.all([postgresql, redis, strapi].map(asItIs)))
    if (container.State.Status === 'exited') await ask(['docker', 'start', container.Id])
}

async function renameSynced(from: string, to: string): Promise<void> {
  if (!existsSync(from)) return
  refuseInDryRun(`rename ${from}`)
  await rename(from, to)
  await syncFolder(dirname(to))
}
