/** Ports and the services that a deploy never touches. */
import type { Check, Finding } from '../checks.mts'
import { ask } from '../command.mts'
import { compose } from '../compose.mts'
import * as engine from '../engine.mts'
import { isFree } from '../ports.mts'
import { pause } from '../report.mts'
import { composeCommand, type Site } from '../settings.mts'

export const serviceChecks: Check[] = [
  {
    title: 'ports of the slots',
    check: async (site) => {
      const found = await Promise.all(
        Object.values(site.slots).map(async (slot): Promise<Finding[]> => {
          const port = slot.address.split(':').at(-1) ?? ''
          if (await isFree(slot.address)) return []
          const holders = await engine.publishers(port).catch(() => [])
          const own = await engine.container(slot.container).catch(() => undefined)
          // Docker lists no port of a container that it is just starting again.
          if (own && (own.State.Status === 'running' || own.State.Status === 'restarting')) return []
          const [name] = holders
          return [
            {
              problem: `port ${port} of ${slot.name} is taken${name ? ` by the container ${name}` : ''}`,
              fix: name ? `docker stop ${name}` : `ss -ltnp 'sport = :${port}'   shows by whom`,
            },
          ]
        }),
      )
      return found.flat()
    },
  },
  {
    title: 'PostgreSQL and Redis',
    check: async (site, way) => {
      if (way === 'first') return []
      const found = await Promise.all(
        ['postgresql', 'redis'].map(async (service): Promise<Finding[]> => {
          const state = await settledState(site, service)
          return state === 'healthy'
            ? []
            : [{ problem: `${service} is ${state}`, fix: composeCommand(site, `up -d ${service}`) }]
        }),
      )
      return found.flat()
    },
  },
  {
    title: 'definitions of PostgreSQL and Redis',
    check: async (site, way) => (way === 'first' ? [] : drift(site)),
  },
]

/** State of a service; one that is starting, as after a reboot, gets a minute to end that. */
async function settledState(site: Site, service: string): Promise<string> {
  for (let waitedMs = 0; ; waitedMs += 500) {
    const [one] = await engine.serviceContainers(site.project, service)
    const state = one?.State.Health?.Status ?? one?.State.Status ?? 'not there'
    if (state !== 'starting' || waitedMs >= 60_000) return state
    await pause(500)
  }
}

/** A changed definition is reported, never applied: it would restart the database under the visitors. */
async function drift(site: Site): Promise<Finding[]> {
  const services = ['postgresql', 'redis']
  const hashes = await ask(compose(site, 'config', '--hash', services.join(',')))
  const found = await Promise.all(
    services.map(async (service): Promise<Finding[]> => {
      const wanted = hashes
        ?.split('\n')
        .find((line) => line.startsWith(`${service} `))
        ?.split(' ')[1]
      const [one] = await engine.serviceContainers(site.project, service)
      const actual = one?.Config.Labels['com.docker.compose.config-hash']
      if (wanted === undefined || actual === undefined || wanted === actual) return []
      return [
        {
          problem: `the definition of ${service} has changed; a deploy does not apply it`,
          fix: `at a quiet time, it restarts: ${composeCommand(site, `up -d ${service}`)}`,
          onlyWarn: true,
        },
      ]
    }),
  )
  return found.flat()
}
