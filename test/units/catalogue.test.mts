import { chmod, mkdir, writeFile } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { expect, onTestFinished, test } from 'vitest'
import { lastWord, lookAtOpenSets, lookAtSets } from '../../scripts/lib/data/catalogue.mts'
import type { Verified } from '../../scripts/lib/data/verified.mts'
import { differingConfig } from '../../scripts/lib/data/newhost.mts'
import { siteWith } from './site.mts'

test('sets of root are told from damaged ones by a user who may not read them', async () => {
  const site = await siteWith({ BACKUP_DIR: 'will-be-set' })
  site.folders.backups = join(dirname(site.envFile), 'backups')
  const [closed, damaged] = ['20260101-000000', '20260102-000000']
  await chmod(dirname(site.envFile), 0o711)
  for (const name of [closed, damaged]) {
    await mkdir(join(site.folders.backups, name), { recursive: true })
    await writeFile(join(site.folders.backups, name, 'manifest.json'), '{')
  }
  await chmod(join(site.folders.backups, closed), 0o500)
  onTestFinished(() => process.seteuid?.(0))
  process.seteuid?.(65_534)
  const found = await lookAtOpenSets(site)
  expect([found.closed.map(({ name }) => name), found.unreadable.map(({ name }) => name)]).toEqual([
    [closed],
    [damaged],
  ])
  await expect(lookAtSets(site)).rejects.toThrow('cannot all be read')
})

test.each<[string, Pick<Verified, 'deep' | 'wrong'>[], string | undefined]>([
  ['nobody looked', [], undefined],
  ['it was read', [look(false)], 'read'],
  ['it was restored, and read since', [look(true), look(false)], 'restored'],
  ['it could not be restored, and was read since', [look(true, 'rows'), look(false)], 'wrong'],
  ['it could not be restored, and could later', [look(true, 'rows'), look(true)], 'restored'],
  ['it was restored, and is damaged since', [look(true), look(false, 'cut')], 'wrong'],
])('what is said of a set when %s', (_, looks, expected) => {
  const last = lastWord(looks.map((one) => ({ at: '', set: '', ...one })))
  const word = last && (last.wrong.length > 0 ? 'wrong' : last.deep ? 'restored' : 'read')
  expect(word).toBe(expected)
})

function look(deep: boolean, ...wrong: string[]): Pick<Verified, 'deep' | 'wrong'> {
  return { deep, wrong }
}

test('a set whose manifest cannot be read is damaged, and the others are listed', async () => {
  const site = await siteWith()
  site.folders.backups = join(dirname(site.envFile), 'backups')
  await mkdir(join(site.folders.backups, '20260101-000000/manifest.json'), { recursive: true })
  await mkdir(join(site.folders.backups, '20260102-000000'))
  const { unreadable } = await lookAtSets(site)
  expect(unreadable.map(({ why }) => why)).toEqual([
    'manifest.json cannot be read',
    'manifest.json is missing',
  ])
})

test('files of services that are other ones on a new host are named', async () => {
  const config = new Map([
    ['docker/.env', Buffer.from('A=1')],
    ['docker/redis/redis.conf', Buffer.from('other')],
    ['strapi/.env', Buffer.from('B=2')],
  ])
  expect(await differingConfig(config)).toEqual(['docker/redis/redis.conf'])
})
