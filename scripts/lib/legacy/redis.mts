/** The data of the legacy Redis in the volume of the new one, which reads nothing but an append-only file. */
import { existsSync } from 'node:fs'
import { readdir, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { run } from '../command.mts'
import * as engine from '../engine.mts'
import type { Site } from '../settings.mts'
import type { Legacy } from './look.mts'

/** With append-only switched on, Redis does not look at a snapshot: one has to be read first, and written out as such a file. */
const convert = `set -e
redis-server --dir /data --port 0 --unixsocket /tmp/redis.sock --appendonly no --save '' --daemonize yes > /dev/null
ask() { redis-cli -s /tmp/redis.sock "$@"; }
until [ "$(ask ping 2> /dev/null)" = PONG ]; do sleep 0.05; done
ask config set appendonly yes > /dev/null
until ask info persistence | tr -d '\\r' | grep -q '^aof_rewrite_in_progress:0' && ! ask info persistence | tr -d '\\r' | grep -q '^aof_rewrite_scheduled:1'; do sleep 0.05; done
ask shutdown nosave 2> /dev/null || true`

/** Both must be stopped. What is in the new volume goes: it is a copy, or empty. */
export async function copyRedis(site: Site, legacy: Legacy): Promise<void> {
  const volume = `${site.project}_redis-data`
  const target = await engine.volumeFolder(volume)
  if (target === undefined) throw new Error(`there is no volume ${volume}`)
  for (const name of await readdir(target)) await rm(join(target, name), { recursive: true, force: true })
  const names = (await readdir(legacy.redis.folder)).filter((name) => name !== 'redis_password.txt')
  if (names.length === 0) return
  await run([
    'cp',
    '--archive',
    '--reflink=auto',
    ...names.map((name) => join(legacy.redis.folder, name)),
    target,
  ])
  const hasLog = names.some((name) => name.startsWith('appendonly'))
  if (hasLog || !existsSync(join(target, 'dump.rdb'))) return
  const image = (await engine.serviceContainers(site.project, 'redis'))[0]?.Image ?? ''
  await run([
    'docker',
    'run',
    '--rm',
    '--network=none',
    '--user=0',
    `--volume=${volume}:/data`,
    '--entrypoint=sh',
    image,
    '-c',
    convert,
  ])
}
