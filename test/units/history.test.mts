import { appendFile, readFile, stat, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { goodReleases, readHistory, recordedSchema, remember } from '../../scripts/lib/history.mts'
import type { Site } from '../../scripts/lib/settings.mts'
import { droppedBy, type Schema } from '../../scripts/lib/schema.mts'
import { siteWith } from './site.mts'

const file = (site: Site) => join(site.stateDir, 'deploys.jsonl')
const schema: Schema = { hash: 'abc', tables: [{ name: 'pings', columns: [{ name: 'id' }] }] }

describe('what earlier deploys did', () => {
  test('is nothing before the first', async () => {
    expect(await readHistory(await siteWith())).toEqual([])
  })

  test('is remembered in order, with the time and the schema, for its owner alone', async () => {
    const site = await siteWith()
    await remember(site, { release: 'one', result: 'found' })
    await remember(site, { release: 'two', result: 'done', seconds: 12 }, schema)
    const at = expect.stringMatching(/^\d{4}-\d{2}-\d{2}T[\d:.]+Z$/)
    expect(await readHistory(site)).toEqual([
      { at, release: 'one', result: 'found' },
      { at, release: 'two', result: 'done', seconds: 12 },
    ])
    expect([await recordedSchema(site, 'one'), await recordedSchema(site, 'two')]).toEqual([
      undefined,
      schema,
    ])
    expect((await stat(file(site))).mode & 0o777).toBe(0o600)
  })

  test.each([
    ['half a line', '{"at":"2026-11-23","release":"torn","resu'],
    ['half a line and its end', '{"at":"2026-11-23","rele\n'],
    ['zeros, as some file systems leave', '\0\0\0\0\0\0'],
    ['an empty line', '\n'],
  ])('is whole but for the last when a power cut left %s', async (_, torn) => {
    const site = await siteWith()
    await remember(site, { release: 'one', result: 'done' })
    await appendFile(file(site), torn)
    expect(goodReleases(await readHistory(site))).toEqual(['one'])
    await remember(site, { release: 'two', result: 'done' })
    expect(goodReleases(await readHistory(site))).toEqual(['one', 'two'])
    expect(await readFile(file(site), 'utf8')).toContain(torn)
  })

  test('a schema that a power cut left torn counts as not recorded, so that a rollback still says what it does not know', async () => {
    const site = await siteWith()
    await remember(site, { release: 'one', result: 'done' }, schema)
    await writeFile(join(site.stateDir, 'schema-one.json'), '{"hash":"abc","tab')
    expect(await recordedSchema(site, 'one')).toBeUndefined()
  })
})

/** "a:id,name b:id" */
function schemaOf(text: string): Schema {
  const tables = text.split(' ').map((word) => {
    const [name = '', columns = ''] = word.split(':')
    return { name, columns: columns.split(',').map((column) => ({ name: column })) }
  })
  return { hash: text, tables }
}

test.each([
  ['a:id', 'a:id', ''],
  ['a:id', 'a:id,name', 'column a.name'],
  ['a:id,name', 'a:id', ''], // the older release would add it again
  ['a:id', 'a:id b:id,x', 'table b'],
  ['a:id b:id', 'a:id', ''],
  ['a:id,old', 'a:id,new', 'column a.new'],
  ['a:id', 'a:id,x,y c:id', 'column a.x, column a.y, table c'],
])('back to a release with %s from %s drops: %s', (target, current, dropped) => {
  expect(droppedBy(schemaOf(target), schemaOf(current)).join(', ')).toBe(dropped)
})
