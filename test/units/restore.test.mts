import { execFileSync } from 'node:child_process'
import { mkdir, symlink, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { createDatabase, literal, properties } from '../../scripts/lib/data/databases.mts'
import { obstacles, type Circumstances } from '../../scripts/lib/data/fitness.mts'
import type { Manifest } from '../../scripts/lib/data/manifest.mts'
import { missingRoles } from '../../scripts/lib/data/roles.mts'
import { readArchive } from '../../scripts/lib/data/untar.mts'
import { newFolder } from './site.mts'

describe('an archive that we never wrote', () => {
  const making: [string, string, (folder: string) => Promise<string[]>][] = [
    [
      'with a link',
      'is no plain file (SymbolicLink)',
      async (folder) => {
        await symlink('/etc/passwd', join(folder, 'link'))
        return ['-C', folder, 'link']
      },
    ],
    ['with a device', 'is no plain file (CharacterDevice)', async () => ['-C', '/dev', 'null']],
    [
      'with a folder',
      'is no plain file (Directory)',
      async (folder) => {
        await mkdir(join(folder, 'inner'))
        return ['-C', folder, 'inner']
      },
    ],
    ['with an absolute path', 'leads out of its folder', async () => ['-P', '/etc/hostname']],
    [
      'with a way up',
      'leads out of its folder',
      async (folder) => ['-P', '-C', folder, '../../etc/hostname'],
    ],
    [
      'with a bomb, 100 MB in 100 kB',
      'unpacks to more than it is',
      async (folder) => {
        await writeFile(join(folder, 'bomb'), Buffer.alloc(100_000_000))
        return ['-z', '-C', folder, 'bomb']
      },
    ],
    [
      'with a hole instead of content',
      'is no plain file',
      async (folder) => {
        execFileSync('truncate', ['-s', '1G', join(folder, 'hole')])
        return ['--sparse', '--format=gnu', '-C', folder, 'hole']
      },
    ],
  ]
  test.each(making)('%s is refused before a byte of it is taken', async (_, says, options) => {
    const folder = await newFolder()
    const file = join(folder, 'a.tar')
    execFileSync('tar', ['-cf', file, ...(await options(folder))], { stdio: 'ignore' })
    let taken = 0
    const reading = readArchive(file, () => ({
      write: (part) => (taken += part.length),
      end: () => undefined,
    }))
    await expect(reading).rejects.toThrow(says)
    expect(taken).toBe(0)
  })

  test('that was cut is refused', async () => {
    const folder = await newFolder()
    await writeFile(join(folder, 'one'), Buffer.alloc(5000, 1))
    const tar = execFileSync('tar', ['-cf', '-', '-C', folder, 'one'])
    await writeFile(join(folder, 'a.tar'), tar.subarray(0, 3000))
    await expect(readArchive(join(folder, 'a.tar'), () => undefined)).rejects.toThrow()
  })
})

describe('a set fits the site', () => {
  const manifest = {
    missing: [] as string[],
    release: 'one',
    schemaHash: 'hash',
    versions: { postgresql: '16.4' },
    secrets: 'print',
  } as Manifest
  const here: Circumstances = {
    parts: ['database', 'uploads'],
    wrong: [],
    serverVersion: '16.2',
    secrets: 'print',
    schemaHash: 'hash',
    isRunning: true,
    runningRelease: 'one',
    hasRelease: true,
  }
  test.each<[string, Partial<Manifest>, Partial<Circumstances>, string[]]>([
    ['when all is as it was', {}, {}, []],
    ['on a newer PostgreSQL', {}, { serverVersion: '17.1' }, []],
    ['not on an older one', {}, { serverVersion: '15.9' }, ['newer-postgresql']],
    ['not with other secrets', { secrets: 'another' }, {}, ['other-secrets']],
    ['where no secrets are known', {}, { secrets: undefined }, []],
    ['not with another schema', {}, { schemaHash: 'other' }, ['other-schema']],
    ['where nothing runs', {}, { schemaHash: undefined, isRunning: false }, []],
    [
      'not beside a release of which nothing is known',
      { release: 'two' },
      { schemaHash: undefined },
      ['other-schema'],
    ],
    [
      'beside its own release, of which nothing else is known',
      { release: 'one' },
      { schemaHash: undefined },
      [],
    ],
    ['not without its uploads', { missing: ['uploads/a is not there'] }, {}, ['incomplete']],
    ['as a database alone', { missing: ['uploads/a is not there'] }, { parts: ['database'] }, []],
    ['as uploads alone', { secrets: 'another', schemaHash: 'x' }, { parts: ['uploads'] }, []],
    ['not when it is damaged', {}, { wrong: ['cut', 'gone'] }, ['damaged', 'damaged']],
  ])('%s', (_, set, site, expected) => {
    const found = obstacles({ ...manifest, ...set }, { ...here, ...site })
    expect(found.map(({ accept }) => accept)).toEqual(expected)
  })
})

test('only roles that the server lacks are created, with their rights and memberships', () => {
  const sql = `CREATE ROLE "BoB";
ALTER ROLE "BoB" WITH LOGIN PASSWORD 'SCRAM-1';
CREATE ROLE postgres;
ALTER ROLE postgres WITH SUPERUSER;
CREATE ROLE reader;
ALTER ROLE reader WITH LOGIN PASSWORD 'SCRAM-2';
CREATE ROLE "odd ""one""";
GRANT "BoB" TO postgres WITH INHERIT TRUE GRANTED BY postgres;
GRANT reader TO "BoB" WITH INHERIT TRUE GRANTED BY "somebody else";
GRANT gone TO reader;
ALTER ROLE reader SET app.motto TO 'two
lines; GRANT';
`
  const { names, sql: found } = missingRoles(sql, ['postgres', 'BoB'])
  expect(names).toEqual(['reader', 'odd "one"'])
  expect(found.split('\n')).toEqual([
    'CREATE ROLE reader;',
    "ALTER ROLE reader WITH LOGIN PASSWORD 'SCRAM-2';",
    'CREATE ROLE "odd ""one""";',
    'GRANT reader TO "BoB" WITH INHERIT TRUE;',
    "ALTER ROLE reader SET app.motto TO 'two",
    "lines; GRANT';",
  ])
})

test.each([
  [{ provider: 'i', locale: 'fr-FR' } as const, '16.4', " LOCALE_PROVIDER icu ICU_LOCALE 'fr-FR'"],
  [{ provider: 'c', locale: null } as const, '17.1', ' LOCALE_PROVIDER libc'],
  [{ provider: null, locale: null } as const, '15.0', ' LOCALE_PROVIDER libc'],
  [{ provider: 'c', locale: null } as const, '14.9', ''],
])('a database is made as the one of the set was: %j on %s', (own, serverVersion, expected) => {
  const settings = { encoding: 'UTF8', collation: 'C.UTF-8', characters: 'C.UTF-8', owner: 'BoB', ...own }
  const sql = createDatabase('new', 'Bo"B', settings, serverVersion)
  expect(sql).toContain(`CREATE DATABASE "new" OWNER "Bo""B" TEMPLATE template0 ENCODING 'UTF8'`)
  expect(sql).toContain(expected)
})

test('a database gets the parameters, those of its roles and the rights that the one of the set had', () => {
  const settings = {
    encoding: 'UTF8',
    collation: 'C',
    characters: 'C',
    owner: 'BoB',
    connectionLimit: 90,
    parameters: ['work_mem=8MB', `app.secret=it's, "quoted"`],
    roleParameters: [
      { role: 'reader', parameters: ['search_path="$user", "odd ""one""", public'] },
      { role: 'gone', parameters: ['work_mem=1MB'] },
    ],
    grants: [
      { grantee: 'BoB', privilege: 'CREATE', isGrantable: false },
      { grantee: 'reader', privilege: 'CONNECT', isGrantable: true },
      { grantee: 'gone', privilege: 'CONNECT', isGrantable: false },
      { grantee: null, privilege: 'TEMPORARY', isGrantable: false },
    ],
  }
  expect(properties('new', settings, ['BoB', 'reader'])).toEqual([
    `ALTER DATABASE "new" SET "work_mem" = '8MB';`,
    `ALTER DATABASE "new" SET "app"."secret" = 'it''s, "quoted"';`,
    `ALTER ROLE "reader" IN DATABASE "new" SET "search_path" = '$user', 'odd "one"', 'public';`,
    'ALTER DATABASE "new" CONNECTION LIMIT 90;',
    'REVOKE ALL ON DATABASE "new" FROM PUBLIC;',
    'GRANT CONNECT ON DATABASE "new" TO "reader" WITH GRANT OPTION;',
    'GRANT TEMPORARY ON DATABASE "new" TO PUBLIC;',
  ])
  const plain = { ...settings, connectionLimit: -1, parameters: null, roleParameters: null, grants: null }
  expect(properties('new', plain, [])).toEqual([])
  expect(properties('new', undefined, [])).toEqual([])
})

test.each([
  ["it's", "'it''s'"],
  [String.raw`a\b'`, String.raw`E'a\\b'''`],
])('a value is quoted for SQL: %s', (text, expected) => {
  expect(literal(text)).toBe(expected)
})
