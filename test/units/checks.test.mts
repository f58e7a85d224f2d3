import { chmod, chown, mkdir, symlink } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { isAtLeast } from '../../scripts/lib/checks/software.mts'
import { accountOf, mayReach } from '../../scripts/lib/users.mts'
import { newFolder } from './site.mts'

test.each([
  ['20.10', '20.10', true],
  ['20.10.24', '20.10', true],
  ['20.9.9', '20.10', false],
  ['26', '20.10', true],
  ['20', '20.10', false],
  ['2.9.0', '2.20', false],
  ['2.26.1', '2.20', true],
  ['1.22.1', '1.22', true],
  ['1.9.15', '1.22', false],
  ['0', '1.22', false],
])('version %s is at least %s: %s', (version, least, expected) => {
  expect(isAtLeast(version, least)).toBe(expected)
})

describe('the folder of the flag', () => {
  const owner = 1234
  const group = 2345
  const worker = { uid: 33, gids: [33] }
  const people = { worker, owner: { uid: owner, gids: [owner] }, member: { uid: 34, gids: [34, group] } }

  /** outer/inner; outer, inner: their modes. */
  async function folders(outer: string, inner: string): Promise<string> {
    const top = await newFolder()
    await chmod(top, 0o755)
    const path = join(top, 'outer/inner')
    await mkdir(path, { recursive: true })
    await chmod(path, Number.parseInt(inner, 8))
    await chmod(join(top, 'outer'), Number.parseInt(outer, 8))
    if (process.getuid?.() === 0) for (const one of [path, join(top, 'outer')]) await chown(one, owner, group)
    return path
  }

  test.each<[keyof typeof people, string, string, 'outer' | 'inner' | undefined]>([
    ['worker', '755', '755', undefined],
    ['worker', '711', '755', undefined],
    ['worker', '700', '755', 'outer'],
    ['worker', '750', '755', 'outer'],
    ['worker', '755', '700', 'inner'],
    ['worker', '755', '711', 'inner'],
    ['worker', '700', '700', 'outer'],
    ['member', '710', '750', undefined],
    ['member', '705', '755', 'outer'], // the group's bits count for a member, not the others'
    ['owner', '700', '700', undefined],
    ['owner', '077', '755', 'outer'],
  ])('as seen by the %s, behind %s and %s, is closed at: %s', async (who, outer, inner, closed) => {
    const path = await folders(outer, inner)
    const expected = { outer: join(path, '..'), inner: path }
    expect(await mayReach(people[who], path)).toBe(closed && expected[closed])
  })

  test('is open to root whatever its mode', async () => {
    expect(await mayReach({ uid: 0, gids: [0] }, await folders('000', '000'))).toBeUndefined()
  })

  test('that is not there yet is not in the way', async () => {
    expect(await mayReach(worker, join(await folders('755', '755'), 'not/there'))).toBeUndefined()
  })

  test('that a link leads to is judged where it really lies', async () => {
    const path = await folders('700', '755')
    const top = await newFolder()
    await chmod(top, 0o755)
    await symlink(path, join(top, 'link'))
    expect(await mayReach(worker, join(top, 'link'))).toBe(join(path, '..'))
  })
})

test('an account of this host has its groups, and one that is not there is not made up', async () => {
  expect(await accountOf('root')).toMatchObject({ uid: 0, gids: expect.arrayContaining([0]) })
  expect(await accountOf('no-such-user')).toBeUndefined()
})
