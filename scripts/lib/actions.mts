/** What the steps of a deploy do to the slots, the flag and .env. Each is safe to repeat. */
import { createWriteStream } from 'node:fs'
import { join } from 'node:path'
import { allowBooting, setRestart, setRestartIfThere } from './booting.mts'
import { ask, endOrphans, run } from './command.mts'
import * as compose from './compose.mts'
import { makeBackup } from './data/backup.mts'
import { rememberProven } from './data/verified.mts'
import * as engine from './engine.mts'
import { readText, setValues, writeEnv } from './envfile.mts'
import { strangerOnData } from './folders.mts'
import { makeStateDir } from './history.mts'
import { notes } from './legacy/journal.mts'
import type { Proof } from './proof.mts'
import {
  addToResult,
  alive,
  change,
  detail,
  exitCodes,
  interrupted,
  pause,
  Problem,
  warn,
} from './report.mts'
import { holdsStrapi } from './schema.mts'
import { scriptCommand, type Site, type SlotName } from './settings.mts'
import { describeRepair, type Repair } from './state.mts'
import * as traffic from './traffic.mts'

/** Builds the Strapi image as `release`. The full output is in the state folder. @throws Error with its end */
export async function build(site: Site, release: string): Promise<void> {
  await change(`build ${site.image}:${release} from ${site.source}`, async () => {
    await makeStateDir(site)
    const logFile = join(site.stateDir, 'build.log')
    const log = createWriteStream(logFile, { mode: 0o600 })
    log.on('error', (error) => warn(`the output of the build is not written down: ${error.message}`))
    const recent: string[] = []
    const onLine = (line: string) => {
      log.write(`${line}\n`)
      recent.push(line)
      if (recent.length > 20) recent.shift()
    }
    try {
      const options = {
        env: { STRAPI_VERSION: release, DOCKER_BUILDKIT: '1' },
        timeoutMs: 3_600_000,
        signal: interrupted,
        onLine,
      }
      await alive(
        () => recent.at(-1)?.slice(0, 90) ?? '',
        () => run(compose.build(site), options),
      )
    } catch (error) {
      // Compose, a child of a child, may outlive the command that was ended.
      if (interrupted.aborted) await endOrphans(site.project)
      interrupted.throwIfAborted()
      throw new Error(
        `the image could not be built; the whole output is in ${logFile}, its end:\n${recent.join('\n')}`,
        { cause: error },
      )
    } finally {
      log.end()
    }
  })
}

/**
 * A release that boots may change the schema, and drop what its code no longer has.
 * @param served how visitors are served when there can be no backup
 * @throws Problem (failed)
 */
export async function backUpDatabase(site: Site, served: string): Promise<void> {
  if (!site.backupBeforeDeploy) return
  await change(`back up the database to ${site.folders.backups}`, async () => {
    try {
      if (!(await holdsStrapi(site)))
        return detail('no Strapi has used this database yet: nothing to back up')
      const { name } = await makeBackup(site, ['database'])
      await rememberProven(site, name)
      addToResult({ backup: name })
      detail(`the database before it is in ${name}`)
    } catch (error) {
      interrupted.throwIfAborted()
      throw new Problem(
        exitCodes.failed,
        `the database could not be backed up, so nothing was deployed; ${served}`,
        `To deploy without: BACKUP_BEFORE_DEPLOY=off in ${site.envFile}`,
        error,
      )
    }
  })
}

/** Before a slot is started beside one that serves: nobody may fall back on it or be on the way to it. */
export async function seclude(site: Site, slot: SlotName): Promise<void> {
  await change(`let nobody fall back on ${slot}, wait until no request is on its way to it`, async () => {
    await traffic.secludeIdleSlot(site)
    const isIdle = await alive(
      () => `requests are on their way to ${slot}`,
      () => traffic.untilIdle(site, slot, Date.now() + site.drainTimeoutMs),
    )
    if (!isIdle) warn(`requests that began before the move are still on their way to ${slot}; they may fail`)
  })
}

/** Starts a slot on a release, in a fresh container. */
export async function start(site: Site, slot: SlotName, release: string): Promise<void> {
  await change(`start ${slot} on ${release}`, async () => {
    const old = await engine.container(site.slots[slot].container)
    const owner = old?.Config.Labels['com.docker.compose.project']
    if (old && owner !== site.project)
      throw new Error(
        `a container of another project has the name ${site.slots[slot].container} (${owner ?? 'made by hand'})`,
      )
    if (old) await run(compose.remove(site, slot))
    await run(compose.create(site, slot), { env: { STRAPI_VERSION: release } })
    await run(compose.start(site, slot))
  })
}

/** Stops a slot. A stopped one may be fallen back on: a closed port costs nothing, and somebody may start it by hand. */
export async function stop(site: Site, slot: SlotName): Promise<void> {
  await change(`stop ${slot}`, async () => {
    try {
      if (await engine.container(site.slots[slot].container)) await run(compose.stop(site, slot))
    } finally {
      await traffic.setAlone(site, false)
    }
  })
}

/** Sends visitors to a slot. From then on it is the one that comes back after a reboot, not the other. */
export async function route(site: Site, slot: SlotName): Promise<void> {
  const { container } = site.slots[slot]
  const other = site.slots[traffic.otherSlot(slot)].container
  await change(`send visitors to ${slot}`, async () => {
    await setRestart(container, 'unless-stopped')
    try {
      // Before the move: the older release, booted again after a power cut, would drop the newer one's columns.
      await setRestartIfThere(other, 'no')
      await traffic.send(site, slot)
    } catch (error) {
      await Promise.allSettled([setRestart(other, 'unless-stopped'), setRestart(container, 'no')])
      throw error
    }
  })
}

/** Waits for a slot's last request; what is left after DRAIN_TIMEOUT is cut by the stop that follows, and counted. */
export async function drain(site: Site, slot: SlotName, proof?: Proof): Promise<void> {
  await change(
    `wait until no request is left on ${slot}, at most ${site.drainTimeoutMs / 1000} s`,
    async () => {
      const idle = await alive(
        () => `requests are left on ${slot}`,
        () => traffic.drained(site, slot),
      )
      if (idle) return
      proof?.cut(site.slots[slot].address)
      warn(`after ${site.drainTimeoutMs / 1000} s requests are left on ${slot}: stopping it cuts them`)
    },
  )
}

/** Writes the release that `docker compose up -d` starts. */
export async function pin(site: Site, release: string): Promise<void> {
  await change(`write STRAPI_VERSION=${release} to ${site.envFile}`, async () => {
    const text = (await readText(site.envFile)) ?? ''
    await writeEnv(site.envFile, setValues(text, { STRAPI_VERSION: release }))
    site.release = release
  })
}

/** First start: PostgreSQL, Redis and what .env asks for, healthy. */
export async function startServices(site: Site): Promise<void> {
  const optional = (site.values.COMPOSE_PROFILES ?? '').split(',').includes('livekit') ? ['livekit'] : []
  await change('start PostgreSQL and Redis', async () => {
    if ((await notes(site)).isSwitching)
      throw new Problem(
        exitCodes.usage,
        'a migration is in the middle of its switch: what would start now has no data yet; nothing was started',
        `End it: ${scriptCommand('migrate', site.envFile)}`,
      )
    const own = await engine.serviceContainers(site.project, 'postgresql')
    const stranger = await strangerOnData(
      site.folders.postgres,
      own.map(({ Id }) => Id),
    )
    if (stranger !== undefined)
      throw new Problem(
        exitCodes.usage,
        `${stranger} works in ${site.folders.postgres}: a second PostgreSQL there would destroy the data; nothing was started`,
        `If it is the legacy set-up: ${scriptCommand('migrate', site.envFile, '--status')}`,
      )
    const services = ['postgresql', 'redis', ...optional]
    await alive(
      () => `starting ${services.join(', ')}`,
      () => run(compose.startServices(site, services), { timeoutMs: 1_800_000 }),
    )
    const deadline = Date.now() + 120_000
    for (const service of ['postgresql', 'redis']) {
      for (;;) {
        const [found] = await engine.serviceContainers(site.project, service)
        if (found?.State.Health?.Status === 'healthy') break
        if (Date.now() > deadline || found?.State.Status === 'exited') {
          let output = ''
          const onLine = (line: string) => (output += `${line}\n`)
          if (found) await ask(['docker', 'logs', '--tail', '10', found.Id], { onLine })
          throw new Error(
            `${service} does not become healthy (${found?.State.Status ?? 'no container'})\n${output.trimEnd()}`,
          )
        }
        await pause(500)
      }
    }
  })
}

export async function repair(site: Site, step: Repair): Promise<void> {
  detail(describeRepair(step))
  switch (step.do) {
    case 'route':
      return await route(site, step.to)
    case 'rejoin':
      return await change(describeRepair(step), () => traffic.setAlone(site, false))
    case 'flag':
      return await change(describeRepair(step), () => traffic.setFlag(site, step.to))
    case 'drain':
      return await drain(site, step.slot)
    case 'stop':
      return await stop(site, step.slot)
    case 'keep':
      return await allowBooting(site, step.slot)
    case 'pin':
      return await pin(site, step.release)
  }
}

/** The last lines of a slot's log, for a failure message. */
export async function logTail(site: Site, slot: SlotName, lines = 20): Promise<string> {
  let output = ''
  await run(compose.logs(site, slot, lines), { onLine: (line) => (output += `${line}\n`) }).catch(() => '')
  return output.trimEnd()
}
