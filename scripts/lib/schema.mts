/** The database schema as Strapi itself tracks it: what a boot of another release would drop. */
import { query } from './compose.mts'
import { ask, run } from './command.mts'
import * as engine from './engine.mts'
import type { Site } from './settings.mts'

export interface Schema {
  hash: string
  tables: {
    name: string
    columns: { name: string }[]
    indexes?: { name: string }[]
    foreignKeys?: { name: string }[]
  }[]
}

/** The newest row of Strapi's own table, or undefined when there is none (no Strapi has booted yet) or PostgreSQL is not up. */
export async function readSchema(site: Site): Promise<Schema | undefined> {
  const postgresql = await runningContainer(site, 'postgresql')
  if (!postgresql) return undefined
  const sql = `SELECT json_build_object('hash', hash, 'tables', schema->'tables') FROM strapi_database_schema ORDER BY id DESC LIMIT 1`
  const row = await ask(query(postgresql, site.database.name, sql))
  return row === undefined || row.trim() === '' ? undefined : (JSON.parse(row) as Schema)
}

/** Whether a Strapi has used the database. @throws Error when PostgreSQL cannot be asked */
export async function holdsStrapi(site: Site): Promise<boolean> {
  const [found] = await engine.serviceContainers(site.project, 'postgresql')
  const sql = "SELECT to_regclass('public.strapi_database_schema') IS NOT NULL"
  return (await run(query(found?.Id ?? '', site.database.name, sql))).trim() === 't'
}

/** Tables and columns that `current` has and `target` lacks: a boot of the release of `target` drops them with their data. */
export function droppedBy(target: Schema, current: Schema): string[] {
  const kept = new Map(
    target.tables.map((table) => [table.name, new Set(table.columns.map((column) => column.name))]),
  )
  return current.tables.flatMap((table) => {
    const columns = kept.get(table.name)
    if (!columns) return [`table ${table.name}`]
    return table.columns
      .filter((column) => !columns.has(column.name))
      .map((column) => `column ${table.name}.${column.name}`)
  })
}

async function runningContainer(site: Site, service: string): Promise<string | undefined> {
  const containers = await engine.serviceContainers(site.project, service)
  return containers.find((one) => one.State.Status === 'running')?.Id
}
