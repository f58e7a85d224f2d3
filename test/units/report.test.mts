import { execFileSync } from 'node:child_process'
import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterEach, expect, test, vi } from 'vitest'
import { alive, configureReport } from '../../scripts/lib/report.mts'
import { projectRoot } from '../../scripts/lib/settings.mts'
import { newFolder } from './site.mts'

/** What is written while something takes so long. */
async function saidFor(ms: number): Promise<string> {
  const said: string[] = []
  vi.spyOn(process.stdout, 'write').mockImplementation((text) => said.push(String(text)) > 0)
  vi.useFakeTimers()
  const waiting = alive(
    () => 'reading 12.3 MB',
    () => new Promise((resolve) => setTimeout(resolve, ms)),
  )
  await vi.advanceTimersByTimeAsync(ms + 1)
  await waiting
  return said.join('')
}
afterEach(() => {
  vi.useRealTimers()
  vi.restoreAllMocks()
  configureReport({})
})

test('without a terminal, a line now and then says how far something is', async () => {
  expect(await saidFor(40_000)).toBe('      … 15 s reading 12.3 MB\n      … 30 s reading 12.3 MB\n')
})

test('with --quiet nothing does', async () => {
  configureReport({ quiet: true })
  expect(await saidFor(40_000)).toBe('')
})

test('on a terminal one line is written over and over, and gone at the end', async () => {
  const file = join(await newFolder(), 'waits.mts')
  const report = join(projectRoot, 'scripts/lib/report.mts')
  await writeFile(
    file,
    `import { alive, say } from '${report}'
    await alive(() => 'reading 12.3 MB', () => new Promise((resolve) => setTimeout(resolve, 1700)))
    say('Done')`,
  )
  const command = `${process.execPath} ${file}`
  const said = execFileSync('script', ['--quiet', '--return', '--command', command, '/dev/null'], {
    encoding: 'utf8',
    env: { ...process.env, TERM: 'xterm' },
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  // What erases the line, written as |.
  const lines = said.replaceAll('\r\u{1b}[2K', '|').replaceAll(/… \d s/g, '… N s')
  expect(lines).toMatch(/^( {6}… N s reading 12\.3 MB\|){2,3}Done\r\n$/)
})
