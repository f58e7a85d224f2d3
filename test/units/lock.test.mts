import { spawn, type ChildProcess } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { describe, expect, onTestFinished, test } from 'vitest'
import { describeHolder, lockHolder, parseDuration, takeLock } from '../../scripts/lib/lock.mts'
import { exitCodes } from '../../scripts/lib/report.mts'
import { projectRoot } from '../../scripts/lib/settings.mts'

const module = join(projectRoot, 'scripts/lib/lock.mts')
const newProject = () => `bob-unit-${randomBytes(6).toString('hex')}`

/** A process that runs `code` with `lock` in hand, and prints a line when it holds it. */
async function holder(project: string, code = ''): Promise<ChildProcess> {
  const text = `
    import { spawn } from 'node:child_process'
    import { takeLock } from ${JSON.stringify(module)}
    await takeLock(${JSON.stringify(project)}, 'deploy --rollback')
    ${code}
    console.log('held')
    setInterval(() => {}, 1000)`
  const child = spawn(process.execPath, ['--input-type=module', '--eval', text], {
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  onTestFinished(() => void child.kill('SIGKILL'))
  await once(child.stdout, 'data')
  return child
}

describe('a second run', () => {
  test('is refused and told who holds the lock, since when, doing what', async () => {
    const project = newProject()
    const before = Date.now()
    const child = await holder(project)
    const refusal: unknown = await takeLock(project, 'deploy').catch((error: unknown) => error)
    expect(refusal).toMatchObject({
      code: exitCodes.locked,
      message: expect.stringMatching(
        new RegExp(
          `^another run is in progress: "deploy --rollback", process ${child.pid}, since 2\\S+ \\S+ UTC$`,
        ),
      ),
      advice: 'Wait for it, or add: --wait 30m',
    })
    const since = Date.parse((await lockHolder(project))?.since ?? '')
    expect(since).toBeGreaterThanOrEqual(before)
    expect(since).toBeLessThanOrEqual(Date.now())
  })

  test('is refused within the same process as well', async () => {
    const project = newProject()
    const lock = await takeLock(project, 'setup')
    await expect(takeLock(project, 'deploy')).rejects.toMatchObject({
      message: expect.stringContaining(`"setup", process ${process.pid},`),
    })
    lock.release()
  })

  test('of another site is not held up', async () => {
    const lock = await takeLock(newProject(), 'deploy')
    const other = await takeLock(newProject(), 'deploy')
    lock.release()
    other.release()
  })

  test('goes on once the first has ended', async () => {
    const project = newProject()
    for (let times = 0; times < 3; times += 1) {
      const lock = await takeLock(project, 'deploy')
      lock.release()
    }
    expect(await lockHolder(project)).toBeUndefined()
  })

  test('goes on at once after the first was killed, although a command of it still runs', async () => {
    const project = newProject()
    const child = await holder(project, `spawn('sleep', ['5'], { detached: true, stdio: 'ignore' }).unref()`)
    expect(await lockHolder(project)).toMatchObject({ pid: child.pid })
    child.kill('SIGKILL')
    await once(child, 'exit')
    const lock = await takeLock(project, 'deploy')
    expect(await lockHolder(project)).toMatchObject({ pid: process.pid, command: 'deploy' })
    lock.release()
  })

  test('waits as long as it may, and begins when the first ends', async () => {
    const project = newProject()
    const first = await takeLock(project, 'deploy')
    const waiting = takeLock(project, 'deploy --wait 30s', 30_000)
    await sleep(300)
    expect(await lockHolder(project)).toMatchObject({ command: 'deploy' })
    first.release()
    const second = await waiting
    expect(await lockHolder(project)).toMatchObject({ command: 'deploy --wait 30s' })
    second.release()
  })

  test('is refused when it has waited long enough', async () => {
    const project = newProject()
    const lock = await takeLock(project, 'deploy')
    const startedAt = Date.now()
    await expect(takeLock(project, 'deploy', 700)).rejects.toMatchObject({ code: exitCodes.locked })
    expect(Date.now() - startedAt).toBeGreaterThanOrEqual(700)
    expect(Date.now() - startedAt).toBeLessThan(5000)
    lock.release()
  })

  test('gets the lock alone, however many try at the same moment', async () => {
    const project = newProject()
    const tries = await Promise.allSettled(Array.from({ length: 20 }, () => takeLock(project, 'deploy')))
    const taken = tries.filter((one) => one.status === 'fulfilled')
    expect(taken).toHaveLength(1)
    for (const one of taken) one.value.release()
  })
})

describe('a lock whose holder', () => {
  test('hangs up without a word is held, and does not break the run that asks', async () => {
    const project = newProject()
    const server = createServer((socket) => void socket.end())
    await once(server.listen({ path: `\0strapi-blue-green/${project}` }), 'listening')
    onTestFinished(() => void server.close())
    // In a process of its own: what breaks here breaks the process.
    const text = `
      import { lockHolder } from ${JSON.stringify(module)}
      console.log(JSON.stringify(await lockHolder(${JSON.stringify(project)})))`
    const child = spawn(process.execPath, ['--input-type=module', '--eval', text], {
      stdio: ['ignore', 'pipe', 'ignore'],
    })
    let said = ''
    child.stdout.on('data', (part: Buffer) => (said += part.toString()))
    const [code] = (await once(child, 'close')) as [number]
    expect({ code, said: said.trim() }).toEqual({
      code: 0,
      said: '{"pid":0,"command":"a process that does not answer","since":""}',
    })
  })

  test('does not answer is held, by somebody unknown', async () => {
    const project = newProject()
    const sockets: { destroy(): unknown }[] = []
    const server = createServer((socket) => void sockets.push(socket))
    await once(server.listen({ path: `\0strapi-blue-green/${project}` }), 'listening')
    onTestFinished(() => {
      for (const socket of sockets) socket.destroy()
      server.close()
    })
    const holding = await lockHolder(project)
    expect(holding && describeHolder(holding)).toBe(
      'another run is in progress: "a process that does not answer", process unknown, since unknown',
    )
  })

  test('is not there is free', async () => {
    expect(await lockHolder(newProject())).toBeUndefined()
  })
})

test.each([
  ['0', 0],
  ['45', 45_000],
  ['90s', 90_000],
  ['30m', 1_800_000],
  ['2h', 7_200_000],
])('--wait %s waits for %s ms', (text, expected) => {
  expect(parseDuration(text)).toBe(expected)
})

test.each(['', 'm', '1.5h', '-1', '1d', '30 m', '1h30m', '10M', 'soon'])('--wait "%s" is refused', (text) => {
  expect(() => parseDuration(text)).toThrow(
    expect.objectContaining({ code: exitCodes.usage, message: `"${text}" is not a duration` }),
  )
})
