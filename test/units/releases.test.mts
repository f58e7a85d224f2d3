import { chown, mkdir, symlink, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { run } from '../../scripts/lib/command.mts'
import { goodReleases, type Entry } from '../../scripts/lib/history.mts'
import { isReleaseName, newReleaseName, outdated, previousRelease } from '../../scripts/lib/releases.mts'
import { newFolder, siteWith } from './site.mts'

const now = new Date('2026-11-23T07:04:55.999Z')

async function nameFor(source: string): Promise<string> {
  return await newReleaseName(await siteWith({ STRAPI_SOURCE: source }), now)
}

async function git(folder: string, ...rest: string[]): Promise<string> {
  const user = ['-c', 'user.name=Test', '-c', 'user.email=test@example.com']
  return (await run(['git', '-C', folder, ...user, ...rest])).trim()
}

/** A repository with one commit: README.md, and package.json in strapi/. */
async function newRepository(): Promise<string> {
  const folder = await newFolder()
  await mkdir(join(folder, 'strapi'))
  await writeFile(join(folder, 'README.md'), 'x\n')
  await writeFile(join(folder, '.gitignore'), '.env\nignored/\n')
  await writeFile(join(folder, 'strapi/package.json'), '{}\n')
  await git(folder, 'init', '--quiet')
  await git(folder, 'add', '.')
  await git(folder, 'commit', '--quiet', '--message', 'First')
  return folder
}

describe('the name of a new release', () => {
  test('is the time in UTC where there is no repository', async () => {
    expect(await nameFor(await newFolder())).toBe('20261123-070455')
  })

  test.each([
    ['the top of its repository', '.'],
    ['a folder of a repository', 'strapi'],
  ])('ends in the commit when the application is %s', async (_, folder) => {
    const top = await newRepository()
    const commit = await git(top, 'rev-parse', '--short=7', 'HEAD')
    expect(await nameFor(join(top, folder))).toBe(`20261123-070455-${commit}`)
  })

  test.each<[string, string, (top: string) => Promise<unknown>]>([
    ['a file was changed', '-dirty', (top) => writeFile(join(top, 'strapi/package.json'), '{ }\n')],
    ['a file was added', '-dirty', (top) => writeFile(join(top, 'strapi/new.js'), '')],
    [
      'a file was staged',
      '-dirty',
      (top) => writeFile(join(top, 'strapi/a'), '').then(() => git(top, 'add', '.')),
    ],
    ['only its .env was written', '', (top) => writeFile(join(top, 'strapi/.env'), 'A=1\n')],
    ['only a file beside it was changed', '', (top) => writeFile(join(top, 'README.md'), 'y\n')],
  ])('when %s since the commit ends in the commit and "%s"', async (_, end, change) => {
    const top = await newRepository()
    const commit = await git(top, 'rev-parse', '--short=7', 'HEAD')
    await change(top)
    expect(await nameFor(join(top, 'strapi'))).toBe(`20261123-070455-${commit}${end}`)
  })

  test('ends in the commit when a link leads to the application', async () => {
    const top = await newRepository()
    const link = join(await newFolder(), 'current')
    await symlink(join(top, 'strapi'), link)
    expect(await nameFor(link)).toBe(`20261123-070455-${await git(top, 'rev-parse', '--short=7', 'HEAD')}`)
  })

  test('ends in the commit when root deploys what belongs to somebody else', async () => {
    const top = await newRepository()
    const commit = await git(top, 'rev-parse', '--short=7', 'HEAD')
    if (process.getuid?.() === 0) await chown(top, 12345, 12345)
    expect(await nameFor(top)).toBe(`20261123-070455-${commit}`)
  })

  test('does not name a commit of a repository that the application only lies in', async () => {
    const top = await newRepository()
    await mkdir(join(top, 'ignored'))
    await writeFile(join(top, 'ignored/package.json'), '{}\n')
    expect(await nameFor(join(top, 'ignored'))).toBe('20261123-070455')
  })

  test('is the time where the repository has no commit yet', async () => {
    const folder = await newFolder()
    await git(folder, 'init', '--quiet')
    expect(await nameFor(folder)).toBe('20261123-070455')
  })
})

test.each([
  ['20261123-070455', true],
  ['20261123-070455-1a2b3c4', true],
  ['20261123-070455-1a2b3c4d5e6f', true],
  ['20261123-070455-1a2b3c4-dirty', true],
  ['20261123-070455-dirty', false],
  ['20261123-070455-1A2B3C4', false],
  ['by-hand-20261123-070455', false],
  ['20261123-070455-1a2b3c4-hotfix', false],
  ['20261123', false],
  ['latest', false],
  ['v1.2.3', false],
  ['', false],
])('the tag "%s" counts as given by a deploy: %s', (tag, expected) => {
  expect(isReleaseName(tag)).toBe(expected)
})

/** The release of the n-th second. */
const r = (second: number) => `20261123-07000${second}`
/** "1 2! 3": release 1 went well, 2 failed, 3 went well. */
function history(text: string): Entry[] {
  const results: Record<string, Entry['result']> = {
    '!': 'failed',
    '?': 'interrupted',
    '~': 'degraded',
    '=': 'found',
  }
  return text
    .split(' ')
    .filter((word) => word !== '')
    .map((word) => ({ at: '', release: r(Number(word[0])), result: results[word[1] ?? ''] ?? 'done' }))
}
const numbers = (releases: string[]) => releases.map((release) => release.at(-1)).join(' ')

test.each([
  ['', ''],
  ['1 2 3', '1 2 3'],
  ['1= 2', '1 2'],
  ['1 2! 3? 4~ 5', '1 5'],
  ['1 2 3 2', '3 1 2'], // the one that was left comes first, the likeliest target last
  ['1 2! 2', '1 2'],
  ['1 2 2!', '1 2'],
])('after the deploys "%s" the good releases are "%s"', (text, good) => {
  expect(numbers(goodReleases(history(text)))).toBe(good)
})

test.each([
  ['1 2 3', 3, 2],
  ['1 2 3!', 2, 1],
  ['1 2 3! 4', 4, 2],
  ['1 2 3 2', 2, 1], // rolled back from 3 to 2: once more goes on to 1
  ['1 2 3 2 1', 1, undefined],
  ['1 2 3 2 4', 4, 2], // 3 was left by a rollback
  ['1 2 3 2 4 2', 2, 1],
  ['1 2 3 2 3', 3, 2], // somebody went on to 3 again
  ['1', 1, undefined],
  ['1', 9, 1], // an image that nobody deployed
  ['1 2', undefined, 2],
  ['', undefined, undefined],
  ['1! 2?', 2, undefined],
])('after the deploys "%s" with %s live --rollback goes to %s', (text, live, target) => {
  const found = previousRelease(history(text), live === undefined ? undefined : r(live))
  expect(found).toBe(target === undefined ? undefined : r(target))
})

test.each([
  ['1 2 3 4 5', '1 2 3 4 5', 5, 3, '1 2'],
  ['1 2 3 4 5', '1 2 3 4 5', 5, 1, '1 2 3 4'],
  ['1 2 3', '1 2 3', 3, 3, ''],
  ['1 2 3', '1 2 3', 3, 9, ''],
  ['1 2 3 4 5 1', '1 2 3 4 5', 1, 3, '2 3'], // rolled back to 1: the two newest stay
  ['1 2 3 4 5 1', '1 2 3 4 5', 1, 1, '2 3 4 5'],
  ['1 2 3 2 4', '1 2 3 4', 4, 2, '1 3'], // 2 is where a rollback goes
  ['1 2 3! 4! 5! 6', '1 2 3 4 5 6', 6, 3, '3 4'], // the newest failed one stays for a look
  ['1 2! 3! 4! 5!', '1 2 3 4 5', 1, 1, '2 3 4'],
  ['1 2', '1 2 3 4', 2, 3, '3'], // built, never deployed
  ['1 2 3 4', '1 4', 4, 1, '1'], // images that are gone need no removal
  ['1 2 3 4 5', '1 2 5', 5, 3, ''], // nor do they push out those that are left
  ['', '1', 1, 1, ''],
])(
  'after the deploys "%s", of the images "%s" with %s live and KEEP_RELEASES=%s "%s" go',
  (text, tags, live, keep, gone) => {
    const all = tags.split(' ').map((one) => r(Number(one)))
    expect(numbers(outdated(all, history(text), r(live), keep))).toBe(gone)
  },
)

test('an image with a name that no deploy gave is never removed', () => {
  const tags = ['latest', 'v1', 'by-hand-20261122-070000', r(1), r(2)]
  expect(outdated(tags, history('1 2'), r(2), 1)).toEqual([r(1)])
})

test('however many deploys fail, the good releases that a rollback may need stay', () => {
  const failures = Array.from({ length: 50 }, (_, at) => `20261124-0700${String(at).padStart(2, '0')}`)
  const failed = failures.map((release): Entry => ({ at: '', release, result: 'failed' }))
  const good = [r(1), r(2), r(3)]
  const gone = outdated([...good, ...failures], [...history('1 2 3'), ...failed], r(3), 3)
  expect(gone).toEqual(failures.slice(0, -1))
})
