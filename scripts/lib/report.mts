/** What an operator sees: steps, warnings, one last line, an exit code. One place prints, one place sets the code. */
import { setTimeout as sleepFor } from 'node:timers/promises'

export const exitCodes = { done: 0, failed: 1, usage: 2, degraded: 3, locked: 4, interrupted: 130 } as const
export type ExitCode = (typeof exitCodes)[keyof typeof exitCodes]

/** An error with the exit code it ends in and the one thing to type or look at next. */
export class Problem extends Error {
  readonly code: ExitCode
  readonly advice: string
  constructor(code: ExitCode, message: string, advice = '', cause?: unknown) {
    super(message, cause === undefined ? undefined : { cause })
    this.code = code
    this.advice = advice
  }
}

const mode = { json: false, dryRun: false, quiet: false }
const interruption = new AbortController()
let result: Record<string, unknown> = {}
const recent: string[] = []
let isPassing = false

/** Aborted by Ctrl-C, SIGTERM or a lost terminal. Waits end with it; commands under way are let finish. */
export const interrupted = interruption.signal

export function configureReport(options: {
  json?: boolean | undefined
  dryRun?: boolean | undefined
  quiet?: boolean | undefined
}): void {
  mode.json = options.json ?? false
  mode.dryRun = options.dryRun ?? false
  mode.quiet = options.quiet ?? false
}

export function isDryRun(): boolean {
  return mode.dryRun
}

/** A line for people, or one object for programs. */
export function say(message: string, event = 'info', fields: Record<string, unknown> = {}): void {
  clearPassing()
  recent.push(message)
  if (recent.length > 50) recent.shift()
  if (mode.json) {
    process.stdout.write(`${JSON.stringify({ event, at: new Date().toISOString(), message, ...fields })}\n`)
  } else if (!mode.quiet || event === 'warning') {
    process.stdout.write(`${message}\n`)
  }
}

/** The last lines that were said, or would have been without --quiet. */
export function recentLines(): string[] {
  return [...recent]
}

export function warn(message: string): void {
  say(mode.json ? message : `      ! ${message.replaceAll('\n', '\n        ')}`, 'warning')
}

/** A detail below a step. */
export function detail(message: string): void {
  say(mode.json ? message : `      ${message.replaceAll('\n', '\n      ')}`, 'detail')
}

/** Runs one numbered step of the runbook. */
export async function step<T>(number: string, title: string, action: () => Promise<T>): Promise<T> {
  interrupted.throwIfAborted()
  const startedAt = Date.now()
  say(mode.json ? title : `${number}  ${title}`, 'step', { step: number })
  const value = await action()
  const seconds = (Date.now() - startedAt) / 1000
  if (mode.json) say(title, 'step-done', { step: number, seconds })
  else if (seconds >= 1 && !mode.dryRun) detail(`${seconds.toFixed(1)} s`)
  return value
}

/** Something that changes the world: done, or in a dry run only named. */
export async function change(what: string, action: () => Promise<unknown>): Promise<void> {
  if (mode.dryRun) say(mode.json ? what : `      would ${what}`, 'would')
  else await action()
}

/** In front of what changes this host: a dry run does not get past it, whatever its plan has forgotten. @throws Error in a dry run */
export function refuseInDryRun(what: string): void {
  if (mode.dryRun) throw new Error(`a dry run does not ${what}; please report this`)
}

/** Shows that a long action lives: on a terminal all the time, else by a line every 15 s. `latest` says what it is at. */
export async function alive<T>(latest: () => string, action: () => Promise<T>): Promise<T> {
  const startedAt = Date.now()
  const onTerminal = process.stdout.isTTY && process.env.TERM !== 'dumb' && !mode.json && !mode.quiet
  const show = () => {
    const line = `… ${Math.round((Date.now() - startedAt) / 1000)} s ${latest()}`.trimEnd()
    if (onTerminal) showPassing(`      ${line}`)
    else detail(line)
  }
  const timer = setInterval(show, onTerminal ? 500 : 15_000)
  try {
    return await action()
  } finally {
    clearInterval(timer)
    clearPassing()
  }
}

/** A line that the next one replaces. */
function showPassing(line: string): void {
  clearPassing()
  process.stdout.write(line.slice(0, (process.stdout.columns || 80) - 1))
  isPassing = true
}

function clearPassing(): void {
  if (isPassing) process.stdout.write('\r\u{1b}[2K')
  isPassing = false
}

/** Waits, but not through an interruption. @throws AbortError */
export async function pause(ms: number): Promise<void> {
  await sleepFor(ms, undefined, { signal: interrupted })
}

/** Fields of the last `--json` object. */
export function addToResult(fields: Record<string, unknown>): void {
  result = { ...result, ...fields }
}

/** Message of an error and of everything that caused it, one line each. */
export function explain(error: unknown): string {
  const lines: string[] = []
  for (
    let at: unknown = error;
    at !== undefined && at !== null;
    at = at instanceof Error ? at.cause : undefined
  ) {
    const line = at instanceof Error ? at.message : JSON.stringify(at)
    if (line && !lines.some((known) => known.includes(line))) lines.push(line)
    if (at instanceof AggregateError) lines.push(...at.errors.map((one) => explain(one)))
  }
  return lines.join('\n  because: ')
}

/** Runs a script to its end: prints what went wrong and what to do, and sets the process's exit code. */
export async function main(script: () => Promise<void>): Promise<void> {
  for (const name of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
    process.on(name, () => {
      if (!interrupted.aborted) say(`${name}: stopping at the next safe point`, 'warning')
      interruption.abort(new Problem(exitCodes.interrupted, `interrupted by ${name}`))
    })
  }
  // A terminal that is gone must not stop a deploy half-way.
  process.stdout.on('error', () => undefined)
  process.stderr.on('error', () => undefined)
  // A wrong option must be told as JSON, too.
  mode.json = scriptArguments().includes('--json')
  try {
    await script()
    finish(exitCodes.done)
  } catch (error) {
    const { code, message, advice } = describeError(error)
    if (!mode.json) {
      process.stderr.write(`\n${code === exitCodes.interrupted ? 'Interrupted' : 'Error'}: ${message}\n`)
      if (advice) process.stderr.write(`\n${advice}\n`)
    }
    addToResult({ error: message, advice })
    finish(code)
  }
}

function describeError(error: unknown): { code: ExitCode; message: string; advice: string } {
  if (error instanceof Problem) return { code: error.code, message: explain(error), advice: error.advice }
  if (interrupted.aborted)
    return { code: exitCodes.interrupted, message: explain(interrupted.reason), advice: '' }
  if (isUsageError(error)) {
    // Node adds how to pass a file name that begins with a dash.
    const message = explain(error).replace(/\. To specify a positional.*/s, '')
    return { code: exitCodes.usage, message, advice: 'See --help.' }
  }
  return { code: exitCodes.failed, message: explain(error), advice: '' }
}

/** parseArgs of node:util refuses unknown options with codes of this form. */
function isUsageError(error: unknown): boolean {
  return error instanceof Error && 'code' in error && String(error.code).startsWith('ERR_PARSE_ARGS')
}

function finish(code: ExitCode): void {
  if (mode.json) say('', 'result', { ok: code === exitCodes.done, exitCode: code, ...result })
  process.exitCode = code
}

/** Options behind the script's name, whether it was started by zx or by node. */
export function scriptArguments(): string[] {
  return process.argv.slice(process.argv.findIndex((argument) => argument.endsWith('.mts')) + 1)
}
