/** Sites with rows and uploads of the example's Strapi, for what backs them up and puts them back. */
import { createHash, randomBytes } from 'node:crypto'
import { chown, mkdir, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { join, relative } from 'node:path'
import { expect } from 'vitest'
import { orphans, run } from '../scripts/lib/command.mts'
import { query } from '../scripts/lib/compose.mts'
import * as engine from '../scripts/lib/engine.mts'
import { backupSession } from '../scripts/lib/data/postgresql.mts'
import { listSets } from '../scripts/lib/data/sets.mts'
import { ownFolder } from '../scripts/lib/data/untar.mts'
import { filesBelow } from '../scripts/lib/data/uploads.mts'
import { loadSite, type Site } from '../scripts/lib/settings.mts'
import { registerAdmin } from './admin.mts'
import { mustSucceed, resultOf, strapiSite, type Event, type TestSite } from './harness.mts'

/** Of everything. */
export const filesOfSet = [
  'RECOVERY.md',
  'SHA256SUMS',
  'config.tar',
  'database.dump',
  'manifest.json',
  'roles.sql',
  'uploads.jsonl',
  'uploads.tar',
]

/** What describes the others is damaged alone. */
export const damagedTogether = [
  filesOfSet.filter((name) => name !== 'manifest.json' && name !== 'SHA256SUMS'),
  ['manifest.json'],
  ['SHA256SUMS'],
]

interface Own {
  own: TestSite
  site: Site
}

/** What every site is asked and told. */
function common(started: () => Own) {
  const postgresql = async (): Promise<string> => {
    const [found] = await engine.serviceContainers(started().own.project, 'postgresql')
    return found?.Id ?? ''
  }
  /** As the superuser, in the live database if no other is named. */
  const sql = async (text: string, database = started().site.database.name): Promise<string> =>
    (await run(query(await postgresql(), database, text))).trim()
  /** @returns its name */
  const makeSet = async (...options: string[]): Promise<string> => {
    const { outcome } = started().own.begin('data', ['backup', ...options])
    return String(resultOf(await mustSucceed(outcome)).set)
  }
  return { postgresql, sql, makeSet }
}

/** Pictures with their rows. `begin` comes first. */
export function siteWithPictures(port: number) {
  let here: Own
  const { postgresql, sql, makeSet } = common(() => here)
  const pictures = new Map<string, Buffer>()

  async function begin(): Promise<Own> {
    const own = await strapiSite(port)
    await mustSucceed(own.run('deploy'))
    here = { own, site: await loadSite(own.envFile) }
    const rows: string[] = []
    for (let number = 0; number < 200; number += 1) rows.push(await writePicture(`picture_${number}.png`))
    await sql(rows.join('; '))
    await sql("INSERT INTO pings (token) SELECT 'token-' || n FROM generate_series(1, 500) AS n")
    return here
  }

  /** As Strapi does: the file first, then its row, which also names a smaller format. @returns the SQL for that */
  async function writePicture(name: string): Promise<string> {
    for (const one of [name, `small_${name}`]) {
      const content = randomBytes(20_000)
      pictures.set(one, content)
      await writeFile(join(here.site.folders.uploads, one), content)
    }
    const formats = JSON.stringify({ small: { url: `/uploads/small_${name}` } })
    return `INSERT INTO files (name, hash, mime, size, url, provider, formats) VALUES ('${name}', '${name}', 'image/png', 20, '/uploads/${name}', 'local', '${formats}')`
  }

  /** Nothing but finished sets and the empty incoming folder is there, and no session is left in PostgreSQL. */
  async function expectNothingHalfMade(): Promise<void> {
    const entries = await readdir(here.site.folders.backups)
    const sets = await listSets(here.site)
    expect(entries.filter((name) => name !== '.incoming').toSorted()).toEqual(sets.toSorted())
    expect(await readdir(join(here.site.folders.backups, '.incoming'))).toEqual([])
    expect(
      await sql(`SELECT count(*) FROM pg_stat_activity WHERE application_name = '${backupSession}'`),
    ).toBe('0')
    expect(await orphans(here.own.project)).toEqual([])
  }

  return { begin, pictures, postgresql, sql, makeSet, writePicture, expectNothingHalfMade }
}

export interface State {
  /** Its parameters, those of roles in it, and who may connect to it. */
  properties: string
  /** Count and digest of all rows, by table. */
  rows: Record<string, string>
  /** SHA-256 by name. */
  uploads: Record<string, string>
}

/** Rows, uploads, an admin and a token, and the set of them that is to be restored. `begin` comes first. */
export function siteToRestore(port: number) {
  let here: Own
  let picture = { name: '', url: '' }
  const { postgresql, sql, makeSet } = common(() => here)

  async function begin() {
    const own = await strapiSite(port)
    const firebase = join(own.folder, 'firebase.json')
    await writeFile(firebase, '{"key":"of Firebase"}', { mode: 0o400 })
    await chown(firebase, 1000, 1000)
    await own.set({ FIREBASE_CREDENTIALS: firebase })
    await mustSucceed(own.run('deploy'))
    const site = await loadSite(own.envFile)
    here = { own, site }
    const admin = await registerAdmin(own.url)
    picture = await admin.upload('favicon.png', await readFile(join(site.source, 'favicon.png')))
    const apiToken = await admin.createApiToken()
    for (let number = 0; number < 200; number += 1)
      await writeFile(join(site.folders.uploads, `picture_${number}.png`), randomBytes(20_000))
    await mkdir(join(site.folders.uploads, 'folder'))
    await writeFile(join(site.folders.uploads, 'folder/inside.png'), randomBytes(1000))
    await sql("INSERT INTO pings (token) SELECT 'token-' || n FROM generate_series(1, 500) AS n")
    const name = `"${site.database.name}"`
    await sql(`CREATE TABLE "we|ird" AS SELECT 1 AS a; CREATE ROLE reader; CREATE ROLE stranger; REVOKE CONNECT ON DATABASE ${name} FROM PUBLIC;
      GRANT CONNECT ON DATABASE ${name} TO reader; ALTER DATABASE ${name} SET app.motto = 'it''s';
      ALTER ROLE reader IN DATABASE ${name} SET search_path = "$user", public`)
    const set = await makeSet()
    return { own, site, set, saved: await state(), firebase, picture, apiToken }
  }

  /** Every row and every byte that is live. */
  async function state(): Promise<State> {
    const lines = (await sql(everything)).split('\n')
    const isRow = (line: string) => line.startsWith('["')
    const rows = lines.filter(isRow).map((line) => JSON.parse(line) as [string, string])
    const uploads: Record<string, string> = {}
    for await (const name of filesBelow(here.site.folders.uploads)) {
      const content = await readFile(join(here.site.folders.uploads, name))
      uploads[name] = createHash('sha256').update(content).digest('hex')
    }
    const properties = lines.filter((line) => !isRow(line)).join('\n')
    return { properties, rows: Object.fromEntries(rows), uploads }
  }

  /** Rows and files are lost, changed and added, admin and picture among them. @returns what is live now */
  async function spoil(): Promise<State> {
    await sql(`DELETE FROM pings WHERE id % 2 = 0; UPDATE pings SET token = 'changed' WHERE id % 5 = 0;
      INSERT INTO pings (token) VALUES ('after'); DELETE FROM admin_users; DELETE FROM files; DELETE FROM strapi_api_tokens;
      ALTER DATABASE "${here.site.database.name}" SET app.motto = 'changed'; GRANT CONNECT ON DATABASE "${here.site.database.name}" TO PUBLIC`)
    const uploads = here.site.folders.uploads
    for (const name of [picture.url.replace('/uploads/', ''), 'picture_1.png', 'folder/inside.png'])
      await rm(join(uploads, name), { force: true })
    await rm(join(uploads, 'folder'), { recursive: true, force: true })
    await writeFile(join(uploads, 'picture_2.png'), randomBytes(20_000))
    await writeFile(join(uploads, 'picture_3.png'), 'cut')
    await writeFile(join(uploads, `after_${randomBytes(4).toString('hex')}.png`), randomBytes(3000))
    return await state()
  }

  async function expectNothingHalfMade(): Promise<void> {
    expect(await sql("SELECT datname FROM pg_database WHERE datname LIKE '%incoming%'", 'postgres')).toBe('')
    expect(await readdir(join(here.site.folders.backups, '.incoming'))).toEqual([])
    expect(await orphans(here.own.project)).toEqual([])
    const kept = join(here.site.folders.uploads, ownFolder)
    for (const id of await readdir(kept).catch(() => [])) {
      const [plan] = (await readdir(join(kept, id))).filter((name) => name.startsWith('plan'))
      expect(['plan.done', 'plan.undone']).toContain(plan)
    }
  }

  /** Whether visitors get what needs the database. */
  async function expectServed(): Promise<void> {
    for (const path of ['/admin/init', '/api/pings'])
      expect((await fetch(`${here.own.url}${path}`)).status).toBe(200)
  }

  /** With -9, when an event has come, and so many milliseconds later. */
  async function killed(command: string[], at: (event: Event) => boolean, delayMs = 0): Promise<void> {
    let wasReached = false
    const { outcome } = here.own.begin('data', command, (event, child) => {
      if (wasReached || !at(event)) return
      wasReached = true
      setTimeout(() => child.kill('SIGKILL'), delayMs)
    })
    await outcome
    expect(wasReached).toBe(true)
  }

  /** Folder of the data below the mounted one. */
  async function dataFolder(): Promise<string> {
    const mounted = (await engine.container(await postgresql()))?.Mounts.find(
      ({ Source }) => Source === here.site.folders.postgres,
    )
    return relative(mounted?.Destination ?? '', await sql('SHOW data_directory'))
  }

  return {
    begin,
    postgresql,
    sql,
    makeSet,
    state,
    spoil,
    killed,
    expectServed,
    expectNothingHalfMade,
    dataFolder,
  }
}

/** Whether an event says something that begins so. */
export const isSaid = (text: string) => (one: Event) => one.message.startsWith(text)

/** One question for all: each takes a process in the container. What Strapi itself writes whenever it has booted does not count. */
const everything = `SELECT setrole::regrole, setconfig FROM pg_db_role_setting
    WHERE setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database()) ORDER BY 1;
  SELECT role, has_database_privilege(role, current_database(), 'CONNECT') FROM unnest(ARRAY['reader', 'stranger']) AS role;
  SELECT json_build_array(tablename, (xpath('//digest/text()', query_to_xml(format($$
      SELECT count(*) || ' ' || coalesce(md5(string_agg(t::text, ',' ORDER BY t::text)), '-') AS digest FROM %I AS t
        WHERE %L <> 'strapi_core_store_settings' OR to_jsonb(t)->>'key' NOT LIKE '%%metrics%%'$$,
    tablename, tablename), true, false, '')))[1]::text)::text FROM pg_tables WHERE schemaname = 'public' ORDER BY 1`
