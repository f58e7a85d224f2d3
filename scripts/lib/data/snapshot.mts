/** One state of the database, held open: the dump, the row counts and the list of uploads all come from it. */
import { once } from 'node:events'
import { createInterface } from 'node:readline'
import { converse } from '../command.mts'
import type { Server } from '../compose.mts'
import type { DatabaseSettings } from './manifest.mts'
import { backupSession, psql } from './postgresql.mts'

export interface Snapshot {
  /** Name for `pg_dump --snapshot`. */
  id: string
  serverVersion: string
  settings: DatabaseSettings
  /** Rows of each table, by "schema.table". */
  rows: Record<string, number>
  /** Names in the uploads folder that a row refers to. */
  uploads: string[]
  schemaHash: string | undefined
  /** Digest of what each table, view, sequence and enum is made of, by "schema.name". */
  structure: Record<string, string>
  databaseBytes: number
  close(): Promise<void>
}

/** As JSON, since a name may hold anything. The prefix pg_ is the system's own: catalogs, and temporary tables of others. */
const countTables = String.raw`SELECT format('SELECT json_build_array(%L::text, count(*)) FROM %I.%I', schemaname || '.' || tablename, schemaname, tablename)
  FROM pg_tables WHERE schemaname !~ '^pg_' AND schemaname <> 'information_schema' ORDER BY 1 \gexec`

/** Strapi keeps the original and its smaller formats in one row; only the provider "local" is on this disk. */
const listUploads = `SELECT ltrim(url, '/') FROM (
    SELECT url FROM files WHERE provider = 'local'
    UNION SELECT value->>'url' FROM files, jsonb_each(CASE jsonb_typeof(formats::jsonb) WHEN 'object' THEN formats::jsonb ELSE '{}' END)
      WHERE provider = 'local'
  ) AS one WHERE url LIKE '/uploads/%';`

/** Of what `structure` asks for: digests of another format cannot be compared. */
export const structureFormat = 1

// Names and types alone: PostgreSQL writes an expression (of a check, of a partial index) differently once it was dumped. What a
// dump leaves out is left out here: what an extension brings, indexes that are not valid. NOT NULL is a constraint of its own from 18 on.
const structure = `SET LOCAL search_path = pg_catalog;
  WITH relations AS (
    SELECT c.oid, nspname || '.' || relname AS name, relkind::text AS kind FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = relnamespace
      WHERE relkind IN ('r', 'p', 'v', 'm', 'S', 'f') AND nspname !~ '^pg_' AND nspname <> 'information_schema'
        AND NOT EXISTS (SELECT FROM pg_depend AS d WHERE d.objid = c.oid AND classid = 'pg_class'::regclass AND deptype = 'e')
  ), parts AS (
    SELECT attrelid AS oid, format('column %s %I %s %s %s %s %s', to_char(row_number() OVER (PARTITION BY attrelid ORDER BY attnum), '0000'),
        attname, format_type(atttypid, atttypmod), attnotnull, atthasdef, attidentity, to_jsonb(a)->>'attgenerated') AS part
      FROM pg_attribute AS a WHERE attnum > 0 AND NOT attisdropped
    UNION ALL SELECT i.indrelid, format('index %I %s %s %s %s', relname, amname, indisunique, indpred IS NOT NULL,
        (SELECT string_agg(coalesce(quote_ident(attname), '()'), ',' ORDER BY place)
          FROM unnest(i.indkey) WITH ORDINALITY AS k (number, place) LEFT JOIN pg_attribute ON attrelid = i.indrelid AND attnum = number))
      FROM pg_index AS i JOIN pg_class AS c ON c.oid = indexrelid JOIN pg_am AS a ON a.oid = relam
      WHERE (indisvalid OR c.relkind = 'I') AND indisready
    UNION ALL SELECT conrelid, format('constraint %I %s %s', conname, contype,
        CASE WHEN contype NOT IN ('c', 'x') THEN pg_get_constraintdef(oid) END)
      FROM pg_constraint AS c WHERE contype <> 'n' AND coalesce(to_jsonb(c)->>'conparentid', '0') = '0'
    UNION ALL SELECT tgrelid, format('trigger %I %s', tgname, tgenabled) FROM pg_trigger WHERE NOT tgisinternal
  ), types AS (
    SELECT nspname || '.' || typname AS name, 'enum' AS kind, string_agg(enumlabel, E'\\n' ORDER BY enumsortorder) AS parts
      FROM pg_enum JOIN pg_type AS t ON t.oid = enumtypid JOIN pg_namespace AS n ON n.oid = typnamespace
      WHERE NOT EXISTS (SELECT FROM pg_depend AS d WHERE d.objid = t.oid AND classid = 'pg_type'::regclass AND deptype = 'e')
      GROUP BY 1
  )
  SELECT json_build_array(name, md5(concat_ws(E'\\n', kind, parts))) FROM (
    SELECT name, kind, string_agg(part, E'\\n' ORDER BY part COLLATE "C") AS parts
      FROM relations LEFT JOIN parts USING (oid) GROUP BY oid, name, kind
    UNION ALL SELECT * FROM types
  ) AS one ORDER BY name;`

// As JSON, because the column of the locale has another name in almost every version.
const settings = `SELECT json_build_object('encoding', pg_encoding_to_char(encoding), 'collation', datcollate,
    'characters', datctype, 'owner', pg_get_userbyid(datdba), 'provider', to_jsonb(d)->>'datlocprovider',
    'locale', coalesce(to_jsonb(d)->>'datlocale', to_jsonb(d)->>'daticulocale'),
    'connectionLimit', datconnlimit,
    'parameters', (SELECT setconfig FROM pg_db_role_setting WHERE setdatabase = d.oid AND setrole = 0),
    'roleParameters', (SELECT json_agg(json_build_object('role', pg_get_userbyid(setrole), 'parameters', setconfig))
      FROM pg_db_role_setting WHERE setdatabase = d.oid AND setrole <> 0),
    'grants', CASE WHEN datacl IS NOT NULL THEN (SELECT coalesce(json_agg(json_build_object(
        'grantee', CASE WHEN grantee <> 0 THEN pg_get_userbyid(grantee) END,
        'privilege', privilege_type, 'isGrantable', is_grantable)), '[]') FROM aclexplode(datacl)) END)
  FROM pg_database AS d WHERE datname = current_database();`

/**
 * Opens a snapshot. It must be closed: as long as it is open, PostgreSQL keeps every row version that it can see.
 * @param name what its session calls itself
 * @throws Error with what psql said
 */
export async function openSnapshot(
  server: Server,
  database: string,
  name = backupSession,
  { patienceMs = 0, signal }: { patienceMs?: number; signal?: AbortSignal } = {},
): Promise<Snapshot> {
  const session = startSession(psql(server, database, name), signal)
  try {
    // Whoever waits for a lock keeps all who come later waiting, too.
    await session.ask(`SET lock_timeout = ${lockPatienceMs};`)
    if (patienceMs > 0) await session.ask(`SET statement_timeout = ${patienceMs};`)
    await session.ask('BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;')
    const [id = ''] = await session.ask('SELECT pg_export_snapshot();')
    const [serverVersion = ''] = await session.ask("SELECT current_setting('server_version');")
    const [databaseSettings = '{}'] = await session.ask(settings)
    const [bytes = '0'] = await session.ask('SELECT pg_database_size(current_database());')
    const rows = (await session.ask(countTables)).map((line) => JSON.parse(line) as [string, number])
    const tables = new Set(rows.map(([table]) => table))
    const uploads = tables.has('public.files') ? await session.ask(listUploads) : []
    const [schemaHash] = tables.has('public.strapi_database_schema')
      ? await session.ask('SELECT hash FROM strapi_database_schema ORDER BY id DESC LIMIT 1;')
      : []
    // Last of all: it leaves another search_path.
    const relations = (await session.ask(structure)).map((line) => JSON.parse(line) as [string, string])
    return {
      id,
      serverVersion,
      settings: JSON.parse(databaseSettings) as DatabaseSettings,
      rows: Object.fromEntries(rows),
      uploads: uploads.map((url) => url.slice('uploads/'.length)),
      schemaHash,
      structure: Object.fromEntries(relations),
      databaseBytes: Number(bytes),
      close: () => session.end(),
    }
  } catch (error) {
    await session.end()
    throw error
  }
}

/** For somebody who changes a table. */
const lockPatienceMs = 60_000

/** One psql that answers one question after the other. */
export function startSession(argv: string[], signal?: AbortSignal) {
  const child = converse(argv)
  // PostgreSQL ends what its client does not wait for any more, and so does the next run.
  const onAbort = () => void child.kill()
  signal?.addEventListener('abort', onAbort)
  const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]()
  const ended = once(child, 'close')
  let errors = ''
  child.stderr.on('data', (part: Buffer) => (errors += part.toString()))
  // What it was told last is in `errors`; a pipe that breaks says nothing more.
  child.stdin.on('error', () => undefined)
  let number = 0
  return {
    async ask(sql: string): Promise<string[]> {
      number += 1
      const mark = `answered-${number}`
      child.stdin.write(`${sql}\n\\echo ${mark}\n`)
      const answer: string[] = []
      for (;;) {
        const next = await lines.next()
        if (next.done) signal?.throwIfAborted()
        if (next.done) throw new Error(`PostgreSQL does not answer: ${errors.trim() || 'the session ended'}`)
        if (next.value === mark) return answer
        answer.push(next.value)
      }
    },
    async end(): Promise<void> {
      signal?.removeEventListener('abort', onAbort)
      child.stdin.end()
      await ended
    },
  }
}
