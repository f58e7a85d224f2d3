/** The procedure of the runbook that this project began with, to the letter: what a deploy of ours is measured against. */
import { writeFile } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import type { OwnSite } from '../example/site.mts'
import { run } from '../scripts/lib/command.mts'
import { compose } from '../scripts/lib/compose.mts'
import * as engine from '../scripts/lib/engine.mts'
import { readText, setValues, writeEnv } from '../scripts/lib/envfile.mts'
import { getUrl } from '../scripts/lib/http.mts'
import { loadSite, type Site, type SlotName } from '../scripts/lib/settings.mts'

export interface SeedProcedure {
  /** What visitors ask. */
  url: string
  /** Its steps 2 to 7. The release must have been built. */
  deploy(release: string): Promise<void>
}

/** Opens a second way to the slots of `own` in its nginx, four ports above the first. */
export async function seedProcedure(own: OwnSite): Promise<SeedProcedure> {
  const site = await loadSite(own.envFile)
  const address = `127.0.0.1:${Number(new URL(own.url).port) + 4}`
  await writeFile(join(dirname(site.nginx.confFile), 'seed.conf'), siteFile(site, address))
  await run([...site.nginx.command, '-s', 'reload'])
  await untilAnswered(`http://${address}/_health`)
  return { url: `http://${address}`, deploy: (release) => deploy(site, release) }
}

async function deploy(site: Site, release: string): Promise<void> {
  const text = (await readText(site.envFile)) ?? ''
  await writeEnv(site.envFile, setValues(text, { STRAPI_VERSION: release }))
  await run(compose(site, '--profile', 'blue-green', 'up', '-d', 'strapi-slave'))
  await untilHealthy(site, 'strapi-slave')
  await run(compose(site, 'stop', 'strapi-master'))
  await run(compose(site, 'up', '-d', 'strapi-master'))
  await untilHealthy(site, 'strapi-master')
  await run(compose(site, '--profile', 'blue-green', 'stop', 'strapi-slave'))
}

/** Every 15 s, at most 180 s: its own figures. */
async function untilHealthy(site: Site, slot: SlotName): Promise<void> {
  for (let waited = 0; waited < 180; waited += 15) {
    await sleep(15_000)
    const found = await engine.container(site.slots[slot].container)
    if (found?.State.Health?.Status === 'healthy') return
  }
  throw new Error(`${slot} was not healthy after 180 s`)
}

/** A reload is asynchronous. */
async function untilAnswered(url: string): Promise<void> {
  const deadline = Date.now() + 10_000
  for (;;) {
    const answer = await getUrl(url).catch((error: Error) => error)
    if (!(answer instanceof Error) && answer.status < 300) return
    if (Date.now() > deadline) throw new Error(`${url} does not answer`)
    await sleep(100)
  }
}

function siteFile({ slots }: Site, address: string): string {
  return `upstream strapi_backend {
  server ${slots['strapi-master'].address} max_fails=3 fail_timeout=30s;
  server ${slots['strapi-slave'].address} max_fails=3 fail_timeout=30s backup;
}
server {
  listen ${address};
  client_max_body_size 250m;
  location / {
    proxy_pass http://strapi_backend;
    proxy_set_header Host $host;
    proxy_next_upstream error timeout http_502 http_503;
  }
}
`
}
