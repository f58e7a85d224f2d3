import { chmod, mkdir, writeFile } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { expect, onTestFinished, test } from 'vitest'
import { lookAtOpenSets, lookAtSets } from '../../scripts/lib/data/catalogue.mts'
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

test('files of services that are other ones on a new host are named', async () => {
  const config = new Map([
    ['docker/.env', Buffer.from('A=1')],
    ['docker/redis/redis.conf', Buffer.from('other')],
    ['strapi/.env', Buffer.from('B=2')],
  ])
  expect(await differingConfig(config)).toEqual(['docker/redis/redis.conf'])
})
