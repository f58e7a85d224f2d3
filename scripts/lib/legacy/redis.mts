/** The data of the legacy Redis in the volume of the new one, which reads nothing but an append-only file. */
import { setTimeout as sleep } from 'node:timers/promises'
import { ask, run } from '../command.mts'
import * as engine from '../engine.mts'
import type { Site } from '../settings.mts'
import type { Legacy } from './look.mts'

/**
 * In a container, since a volume may be mounted only while one uses it. With append-only switched on, Redis does not look at a
 * snapshot: one has to be read first, and written out as such a file.
 * https://redis.io/docs/latest/operate/oss_and_stack/management/persistence/
 */
const copy = `set -e
find /new -mindepth 1 -delete
cp -a /data/. /new/
rm -f /new/redis_password.txt
[ -e /new/dump.rdb ] || exit 0
[ -z "$(ls -d /new/appendonly* 2> /dev/null)" ] || exit 0
ask() { redis-cli -s /tmp/redis.sock "$@" 2> /dev/null | tr -d '\\r'; }
until_said() { n=0; until eval "$1"; do n=$((n + 1)); [ "$n" -lt 2000 ] || { echo "redis: not $1" >&2; exit 1; }; sleep 0.05; done; }
redis-server --dir /new --port 0 --unixsocket /tmp/redis.sock --appendonly no --save '' --daemonize yes --logfile /tmp/redis.log > /dev/null
until_said '[ "$(ask ping)" = PONG ]' || { cat /tmp/redis.log >&2; exit 1; }
ask config set appendonly yes > /dev/null
done_means='^aof_(enabled:1|rewrite_in_progress:0|rewrite_scheduled:0|last_bgrewrite_status:ok)$'
until_said '[ "$(ask info persistence | grep -c -E "$done_means")" = 4 ]'
ask shutdown nosave || true`

/** What it writes, an older one does not read. */
export async function redisMajor(image: string): Promise<number> {
  const text = await run([
    'docker',
    'run',
    '--rm',
    '--network=none',
    '--entrypoint=redis-server',
    image,
    '--version',
  ])
  return Number(/v=(\d+)/.exec(text)?.[1])
}

/** Both must be stopped. What is in the new volume goes: it is a copy, or empty. @throws Error with what Redis said */
export async function copyRedis(site: Site, legacy: Legacy): Promise<void> {
  const [made] = await engine.serviceContainers(site.project, 'redis')
  const from = `--volumes-from=${legacy.services.redis.container.Id}:ro`
  const to = `--volume=${site.project}_redis-data:/new`
  // What a killed run has left goes on in its container.
  const name = `${site.project}-redis-copy`
  for (let attemptsLeft = 50; attemptsLeft > 0 && (await engine.container(name)); attemptsLeft--) {
    await ask(['docker', 'rm', '--force', name])
    await sleep(100)
  }
  const argv = [
    'docker',
    'run',
    '--rm',
    `--name=${name}`,
    '--network=none',
    '--user=0',
    from,
    to,
    '--entrypoint=sh',
    made?.Image ?? '',
  ]
  await run([...argv, '-c', copy], { timeoutMs: 300_000 })
}
