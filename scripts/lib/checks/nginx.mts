/** The nginx files: current, and what nginx really runs. */
import type { Check, Finding } from '../checks.mts'
import { readText } from '../envfile.mts'
import { getUrl } from '../http.mts'
import { render, rivals } from '../nginx.mts'
import { listener } from '../ports.mts'
import { isReadable } from '../proof.mts'
import { asRoot, scriptCommand } from '../settings.mts'
import { differences } from '../traffic.mts'

export const nginxChecks: Check[] = [
  {
    title: 'what nginx runs',
    check: async (site, way) => {
      const found = await differences(site)
      if (found.length === 0) return []
      // A first deploy moves nobody.
      const onlyWarn = way === 'first'
      return [
        {
          problem: `nginx does not run this site's configuration: ${found.join('; ')}`,
          fix: asRoot(scriptCommand('setup', site.envFile)),
          onlyWarn,
        },
      ]
    },
  },
  {
    title: 'ports of nginx',
    check: async (site) => {
      if ((await differences(site)).length === 0) return []
      const ports = {
        HTTP_LISTEN: site.nginx.listen,
        CONTROL_PORT: site.nginx.control,
        ...(site.nginx.tls && { TLS: '443' }),
      }
      const found = await Promise.all(
        Object.entries(ports).map(async ([key, address]): Promise<Finding[]> => {
          const port = address.split(':').at(-1) ?? ''
          const program = await listener(port)
          if (program === undefined || program === 'nginx') return []
          return [
            {
              problem: `port ${port} of nginx (${key}) is taken by ${program}`,
              fix: `ss -ltnp 'sport = :${port}'   shows it; stop it, or choose another port in ${site.envFile}`,
            },
          ]
        }),
      )
      return found.flat()
    },
  },
  {
    title: 'installed configuration',
    check: async (site) => {
      const installed = await readText(site.nginx.confFile).catch(() => undefined)
      if (installed === undefined || installed === (await render(site))) return []
      const fix = `keep your edits, or take the shipped one: ${asRoot(scriptCommand('setup', site.envFile, '--replace-nginx'))}`
      return [
        { problem: `${site.nginx.confFile} differs from the shipped configuration`, fix, onlyWarn: true },
      ]
    },
  },
  {
    title: 'the public way',
    check: async (site, way) => {
      if (way === 'first') return []
      const answer = await getUrl(site.probe.url, { dial: site.probe.dial }).catch((error: Error) => error)
      const failure =
        answer instanceof Error
          ? answer.message
          : answer.status < 400
            ? undefined
            : `${site.probe.url} answers ${answer.status}`
      return failure
        ? [
            {
              problem: `visitors are not served right now: ${failure}`,
              fix: `see nginx's error log; when only this host cannot ask it (a certificate of your own): set PROBE_URL in ${site.envFile}`,
              onlyWarn: true,
            },
          ]
        : []
    },
  },
  {
    title: 'copies of the configuration',
    check: async (site) =>
      (await rivals(site)).map((path) => ({
        problem: `${path} uses the same control port`,
        fix: `remove one of it and ${site.nginx.confFile}`,
      })),
  },
  {
    title: 'access log',
    check: async (site) =>
      (await differences(site)).length > 0 || (await isReadable(site.nginx.accessLog))
        ? []
        : [
            {
              problem: `${site.nginx.accessLog} is not readable: a deploy cannot count what visitors got`,
              fix: 'sudo usermod -aG adm $(id -un)   (then log in again)',
              onlyWarn: true,
            },
          ],
  },
]
