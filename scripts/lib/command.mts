/** Runs one command. Commands are plain argv arrays; secrets reach them by environment or file only. */
import { spawn, type ChildProcessWithoutNullStreams } from 'node:child_process'
import { existsSync } from 'node:fs'
import { createInterface } from 'node:readline'
import { open, readdir, readFile } from 'node:fs/promises'
import { setTimeout as sleep } from 'node:timers/promises'
import { $ } from 'zx/core'
import { refuseInDryRun } from './report.mts'

export interface RunOptions {
  /** Added to this process's own environment. */
  env?: Record<string, string>
  cwd?: string
  /** A file that the command gets on its stdin; nothing by default. */
  input?: string
  timeoutMs?: number
  signal?: AbortSignal
  /** For what goes on running afterwards: it must not look like something that a killed run left behind. */
  daemon?: boolean
  /** Gets each line of stdout and stderr as it comes. */
  onLine?: (line: string) => void
}

/** Whether systemd runs this host; a container or a chroot has nobody who starts services. */
export const hasSystemd = existsSync('/run/systemd/system')

/** Names our children in /proc, so that the next run finds those which a kill left behind. */
const marker = 'BLUE_GREEN_PROJECT'
let mark: Record<string, string> = {}

/** Marks every further command of this process as belonging to `project`. */
export function markCommands(project: string): void {
  mark = { [marker]: project }
}

/**
 * Runs a command without a terminal and returns its stdout.
 * It runs in a process group of its own: Ctrl-C reaches us, and we decide.
 * @throws Error with the command, its exit code and the end of its stderr
 */
export async function run(argv: string[], options: RunOptions = {}): Promise<string> {
  if (options.input === undefined) return await runWith('ignore', argv, options)
  const file = await open(options.input, 'r')
  try {
    return await runWith(file.fd, argv, options)
  } finally {
    await file.close()
  }
}

/** What `docker`, `nginx` and the tools of the host change something with. */
const changing =
  /^(docker (compose .* )?(build|cp|create|down|image rm|kill|load|network (connect|create|disconnect)|rename|restart|rm|run|start|stop|tag|up|update)|\S*nginx (.* )?-s|apt-get|chmod|chown|cp|dd|mkdir|mv|rm|sh -c umask|systemctl|tar)( |$)/

/** What a command in a container can only ask. A query of psql does not write in a dry run: `query` sees to that. */
const asking = ['ls', 'pg_isready', 'psql', 'redis-cli', 'stat']

function isChanging(argv: string[]): boolean {
  if (argv[0] !== 'docker' || argv[1] !== 'exec') return changing.test(argv.join(' '))
  const [, command = ''] = argv.slice(2).filter((word) => !word.startsWith('-'))
  return !asking.includes(command) || argv.some((word) => /^(--file=|shutdown$)/.test(word))
}

async function runWith(stdin: 'ignore' | number, argv: string[], options: RunOptions): Promise<string> {
  if (isChanging(argv)) refuseInDryRun(`run ${argv.slice(0, 3).join(' ')}`)
  const child = $({
    stdio: [stdin, 'pipe', 'pipe'],
    env: { ...process.env, ...(options.daemon ? {} : mark), ...options.env },
    cwd: options.cwd ?? process.cwd(),
    detached: true,
    quiet: true,
    nothrow: true,
    timeout: `${options.timeoutMs ?? 120_000}ms`,
    timeoutSignal: 'SIGKILL',
    ...(options.signal ? { signal: options.signal } : {}),
  })`${argv}`
  const onLine = options.onLine
  if (onLine) {
    for (const stream of [child.stdout, child.stderr]) createInterface({ input: stream }).on('line', onLine)
  }
  const output = await child
  options.signal?.throwIfAborted()
  if (output.exitCode === 0) return output.stdout
  const how =
    output.exitCode === null
      ? output.signal
        ? `ended by ${output.signal}`
        : 'could not be started'
      : `exit code ${output.exitCode}`
  const said = (output.stderr.trim() || output.stdout.trim()).split('\n').slice(-5).join('\n')
  throw new Error(`${argv.join(' ')}: ${how}${said ? `\n${said}` : ''}`)
}

/** Starts a command that is talked to over its stdin; it is marked like all others, and ends when its stdin does. */
export function converse(argv: string[]): ChildProcessWithoutNullStreams {
  const [command = '', ...rest] = argv
  return spawn(command, rest, { env: { ...process.env, ...mark }, detached: true })
}

/** The command's stdout, or undefined when it fails. For questions, never for changes. */
export async function ask(argv: string[], options: RunOptions = {}): Promise<string | undefined> {
  return run(argv, options).catch(() => undefined)
}

/** Commands of `project` that outlived the run that started them: pid and command line. */
export async function orphans(project: string): Promise<{ pid: number; command: string }[]> {
  const found = []
  for (const name of await readdir('/proc')) {
    const pid = Number(name)
    if (!Number.isInteger(pid) || pid === process.pid) continue
    const environment = await readFile(`/proc/${pid}/environ`, 'utf8').catch(() => '')
    if (!environment.split('\0').includes(`${marker}=${project}`)) continue
    const command = (await readFile(`/proc/${pid}/cmdline`, 'utf8').catch(() => ''))
      .replaceAll('\0', ' ')
      .trim()
    if (command) found.push({ pid, command })
  }
  return found
}

/** Ends them: politely, and after 5 s for good. */
export async function endOrphans(project: string): Promise<void> {
  const signalAll = async (signal: NodeJS.Signals) => {
    for (const { pid } of await orphans(project)) {
      try {
        process.kill(pid, signal)
      } catch (error) {
        if (!(error instanceof Error && 'code' in error && error.code === 'ESRCH')) throw error
      }
    }
  }
  await signalAll('SIGTERM')
  for (let waitedMs = 0; waitedMs < 5000 && (await orphans(project)).length > 0; waitedMs += 100)
    await sleep(100)
  await signalAll('SIGKILL')
}

/** A word as a shell reads it back. */
export function shellQuoted(word: string): string {
  return /^[\w@+,./:=-]+$/.test(word) ? word : `'${word.replaceAll("'", String.raw`'\''`)}'`
}
