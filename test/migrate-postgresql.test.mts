/** A legacy site whose PostgreSQL is an older one, on another C library and ICU: dump and restore between two real servers. */
import { readdir, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, beforeAll, expect, inject, test } from 'vitest'
import { olderPostgresql } from '../example/images.mts'
import { run } from '../scripts/lib/command.mts'
import { readManifest } from '../scripts/lib/data/manifest.mts'
import * as engine from '../scripts/lib/engine.mts'
import { readEnv } from '../scripts/lib/envfile.mts'
import { reasonToDump, sortingOf } from '../scripts/lib/legacy/database.mts'
import { mustSucceed } from './harness.mts'
import { expectLegacy, expectMigrated, killAt, sumsOf, tinyLegacy, type LegacyTest } from './legacy.mts'

let legacy: LegacyTest
let older: string

/** Of what a newer major version dumps, stores or sorts in another way. */
const contents = `CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE DOMAIN percent AS int CHECK (VALUE BETWEEN 0 AND 100);
  CREATE TABLE people (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text NOT NULL UNIQUE, sorted text COLLATE "fr-FR-x-icu",
    mood mood DEFAULT 'ok', share percent, data jsonb, raw bytea, tags text[], at timestamptz DEFAULT '2026-01-01 12:00+01',
    short text GENERATED ALWAYS AS (left(name, 3)) STORED);
  CREATE INDEX people_sorted ON people (sorted); CREATE INDEX people_data ON people USING gin (data);
  CREATE UNIQUE INDEX people_lower ON people (lower(name)) WHERE mood = 'ok';
  INSERT INTO people (name, sorted, share, data, raw, tags) SELECT word || n, word || n, n % 100, jsonb_build_object('n', n, 'w', word),
    decode(md5(word || n), 'hex'), ARRAY[word, NULL, 'a,b'] FROM generate_series(1, 100) AS n,
    unnest(ARRAY['cote', 'côte', 'Coté', 'côté ', 'œuvre', 'zoo', 'Éa', 'a-b', 'ab', 'ß']) AS word;
  CREATE VIEW happy AS SELECT id, name FROM people WHERE mood = 'ok';
  CREATE MATERIALIZED VIEW shares AS SELECT share, count(*) FROM people GROUP BY share;
  CREATE FUNCTION cheer() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.mood := ''ok''; RETURN NEW; END';
  CREATE TRIGGER cheering BEFORE INSERT ON people FOR EACH ROW EXECUTE FUNCTION cheer();
  CREATE TABLE parts (n int) PARTITION BY RANGE (n); CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (100);
  INSERT INTO parts SELECT n FROM generate_series(1, 50) AS n; SELECT lo_from_bytea(4711, '\x0001ff')`
const rows = `SELECT md5(string_agg(p::text, ',' ORDER BY id)) FROM people AS p; SELECT sum(n) FROM parts;
  SELECT count(*) FROM happy; SELECT md5(string_agg(s::text, ',' ORDER BY share)) FROM shares AS s; SELECT lo_get(4711);
  SELECT md5(string_agg(t::text, ',' ORDER BY id)) FROM things AS t; SELECT hash FROM strapi_database_schema`

beforeAll(async () => {
  older = await olderPostgresql(Object.keys(inject('baseImages')).length > 0)
  legacy = await tinyLegacy(18_500, {}, { POSTGRES_IMAGE: older })
  await legacy.sql(contents)
})
afterAll(async () => {
  await legacy.remove()
})

test('the two images sort differently, by each of the three', async () => {
  const { POSTGRES_IMAGE: newer = '' } = (await readEnv(legacy.own.envFile)) ?? {}
  const [from, to] = await Promise.all([sortingOf(older), sortingOf(newer)])
  expect(from.major).toBe(15)
  expect(reasonToDump(from, to, [])).toContain('cannot use data of PostgreSQL 15')
  expect(reasonToDump({ ...from, major: to.major }, to, [])).toContain(
    `sorts differently than ${from.library}`,
  )
  expect(reasonToDump({ ...from, major: to.major, library: to.library }, to, [])).toContain(
    `sorts differently than ICU ${from.icu}`,
  )
})

test('everything comes along by dump and restore, a kill in the middle included; the old folder is kept', async () => {
  const before = await legacy.sql(rows)
  const nextId = Number(await legacy.sql('SELECT max(id) + 1 FROM people'))
  const prepared = await mustSucceed(legacy.migrate('--until', 'build'))
  expect(prepared.stdout).toMatch(
    /PostgreSQL \d+ cannot use data of PostgreSQL 15: the database goes to .* by dump and restore/,
  )
  await killAt(legacy, ['--yes'], 'Restore the dump beside the live database', 100)
  const { stdout } = await mustSucceed(legacy.migrate('--yes'))
  expect(stdout.match(/\[x\]/g)).toHaveLength(7)
  await expectMigrated(legacy)
  expect(await legacy.sql('SHOW server_version_num', true)).toMatch(/^1[6-9]/)
  expect(await legacy.sql(rows, true)).toBe(before)
  expect(await readFile(join(legacy.folder, '../data/postgresql/PG_VERSION'), 'utf8')).toBe('15\n')

  // Indexes and versions of collations are those of the new server.
  expect(
    await legacy.sql(
      'SELECT count(*) FROM pg_collation WHERE collversion <> pg_collation_actual_version(oid)',
      true,
    ),
  ).toBe('0')
  const sorted = `SELECT md5(string_agg(sorted, ',')) FROM (SELECT sorted FROM people ORDER BY sorted, id) AS p`
  expect(await legacy.sql(`SET enable_sort = off; ${sorted}`, true)).toBe(
    await legacy.sql(
      `SET enable_indexscan = off; SET enable_indexonlyscan = off; SET enable_bitmapscan = off; ${sorted}`,
      true,
    ),
  )
  await expect(legacy.sql(`INSERT INTO people (name) VALUES ('COTE1')`, true)).rejects.toThrow('people_lower')
  expect(
    await legacy.sql(
      `INSERT INTO people (name, mood) VALUES ('new', 'sad') RETURNING id >= ${nextId}, mood`,
      true,
    ),
  ).toBe('t|ok')
  const [postgresql] = await engine.serviceContainers(legacy.own.project, 'postgresql')
  expect(await run(['docker', 'logs', postgresql?.Id ?? ''])).not.toContain('collation version mismatch')
})

test('the set that was made of the old server can be read back by the new one', async () => {
  const sets = join(legacy.own.folder, 'backups')
  const [oldest = ''] = (await readdir(sets)).filter((name) => /^\d/.test(name)).toSorted()
  expect((await readManifest(join(sets, oldest))).versions.postgresql).toMatch(/^15/)
  const { stdout } = await mustSucceed(legacy.site.run('data', 'verify', oldest, '--deep'))
  expect(stdout).toContain('restored and compared')
})

test('the way back leaves what came since in a set, and the old server is as it was', async () => {
  const before = await legacy.sql(rows, true)
  const { stdout } = await mustSucceed(legacy.migrate('--rollback', '--yes'))
  expect(stdout).toMatch(/1 rows more in public\.people.*left behind, in a backup set/)
  await expectLegacy(legacy)
  expect(await legacy.sql('SHOW server_version_num')).toMatch(/^15/)
  expect(await legacy.sql(rows)).not.toBe(before)
  expect(await sumsOf(legacy.uploads)).toEqual(await sumsOf(join(legacy.own.folder, 'uploads')))
})
