import { existsSync } from 'node:fs'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { run } from '../../scripts/lib/command.mts'
import { query } from '../../scripts/lib/compose.mts'
import * as tools from '../../scripts/lib/data/postgresql.mts'
import { writeEnv } from '../../scripts/lib/envfile.mts'
import { writeSynced } from '../../scripts/lib/history.mts'
import { configureReport } from '../../scripts/lib/report.mts'

let folder: string
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'dry-'))
  configureReport({ dryRun: true })
})
afterEach(async () => {
  configureReport({})
  await rm(folder, { recursive: true })
})

test.each([
  'docker start NAME',
  'docker compose --file run/docker-compose.yml --project-name bob up --detach',
  'docker image rm NAME',
  'nginx -c conf -s reload',
  'mkdir NAME',
])('a dry run cannot run "%s"', async (line) => {
  await expect(run(line.split(' '), { cwd: folder })).rejects.toThrow('a dry run does not run')
})

test.each([
  tools.removeIncoming('id', ['x']),
  tools.dump('id', { database: 'BoB', snapshot: '1', compression: 'zstd', file: 'x.dump' }),
  tools.restoreFile('id', { database: 'BoB', file: 'x.dump', jobs: 2, owner: undefined }),
  tools.runFile('id', 'x.sql', false),
  tools.setPassword('id'),
])('a dry run cannot run %j', async (...argv) => {
  await expect(run(argv)).rejects.toThrow('a dry run does not run')
})

test('a dry run can ask', async () => {
  // Refused by nobody but docker and cat themselves.
  expect(await run(['cat', '/dev/null'])).toBe('')
  await expect(run(['docker', 'compose', '--file', 'run/up/start', 'config'])).rejects.toThrow(/no such file/)
})

test('a dry run gives PostgreSQL no transaction that could write', () => {
  for (const argv of [query('id', 'postgres', 'SELECT 1'), tools.psql('id', 'postgres', 'session')])
    expect(argv.join(' ')).toContain('-c default_transaction_read_only=on')
})

test('a dry run cannot write', async () => {
  const path = join(folder, 'file')
  await expect(writeEnv(path, 'A=1\n')).rejects.toThrow('a dry run does not write')
  await expect(writeSynced(path, 'w', 'text')).rejects.toThrow('a dry run does not write')
  expect(existsSync(path)).toBe(false)
})
