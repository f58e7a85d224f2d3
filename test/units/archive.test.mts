import { spawn } from 'node:child_process'
import { createHash, randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { mkdir, readFile, rename, stat, symlink, unlink, utimes, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { run } from '../../scripts/lib/command.mts'
import { createArchive } from '../../scripts/lib/data/archive.mts'
import { sumOf, uploadLines } from '../../scripts/lib/data/manifest.mts'
import { startSumThread } from '../../scripts/lib/data/sums.mts'
import { archiveUploads } from '../../scripts/lib/data/uploads.mts'
import { newFolder } from './site.mts'

/** What GNU tar says of an archive. @throws Error when it does not like it */
async function unpacked(folder: string): Promise<string> {
  const to = join(folder, 'unpacked')
  await mkdir(to)
  await run(['tar', '-xf', join(folder, 'a.tar'), '-C', to])
  return to
}

test('an archive is what tar unpacks: content, time, long names, empty and large files', async () => {
  const folder = await newFolder()
  const files: [string, Buffer][] = [
    ['plain.jpg', randomBytes(1000)],
    ['empty.txt', Buffer.alloc(0)],
    ['block.bin', randomBytes(512)],
    ['large.mp4', randomBytes(3 * 2 ** 20 + 7)],
    [`${'long-'.repeat(30)}é.png`, randomBytes(10)],
    [`${'x'.repeat(96)}.png`, randomBytes(10)],
  ]
  const sums = new Map<string, string>()
  await using archive = createArchive(join(folder, 'a.tar'), (file) => sums.set(file.name, file.sha256))
  for (const [name, content] of files) {
    await writeFile(join(folder, name), content)
    await utimes(join(folder, name), 1_700_000_000, 1_700_000_000)
    expect(await archive.addFile(join(folder, name), name)).toMatchObject({ sizeBytes: content.length })
  }
  expect(await archive.close()).toEqual(await sumOf(join(folder, 'a.tar')))
  const to = await unpacked(folder)
  for (const [name, content] of files) {
    expect(sums.get(name), name).toBe(createHash('sha256').update(content).digest('hex'))
    expect((await readFile(join(to, name))).equals(content), name).toBe(true)
    expect((await stat(join(to, name))).mtimeMs).toBe(1_700_000_000_000)
  }
  expect((await stat(join(folder, 'a.tar'))).size).toBe(archive.sizeBytes)
})

test('what is no plain file is left out and named, and the archive goes on', async () => {
  const folder = await newFolder()
  await writeFile(join(folder, 'secret'), 'x')
  await symlink(join(folder, 'secret'), join(folder, 'link'))
  await run(['mkfifo', join(folder, 'pipe')])
  await writeFile(join(folder, 'last'), 'last')
  await using archive = createArchive(join(folder, 'a.tar'))
  const add = (name: string) => archive.addFile(join(folder, name), name)
  expect(await add('link')).toEqual({ skipped: 'is a link' })
  expect(await add('pipe')).toEqual({ skipped: 'is not a plain file' })
  expect(await add('gone')).toEqual({ skipped: 'vanished while the backup ran' })
  expect(await add('last')).toMatchObject({ sizeBytes: 4 })
  await archive.close()
  expect((await run(['ls', await unpacked(folder)])).trim()).toBe('last')
})

test.each([
  ['grows', 'while :; do echo more >> "$1"; done'],
  ['shrinks', 'while :; do truncate -s 33M "$1"; truncate -s 32M "$1"; done'],
])('a file that %s all the time is left out and named, never cut', async (_, script) => {
  const folder = await newFolder()
  const changing = join(folder, 'changing')
  await writeFile(changing, Buffer.alloc(32 * 2 ** 20, 'x'))
  await writeFile(join(folder, 'calm'), 'calm')
  const writer = spawn('sh', ['-c', script, 'sh', changing])
  try {
    await using archive = createArchive(join(folder, 'a.tar'))
    const results = []
    for (let times = 0; times < 5; times += 1)
      results.push(await archive.addFile(changing, `changing-${times}`))
    await archive.addFile(join(folder, 'calm'), 'calm')
    expect(await archive.close()).toEqual(await sumOf(join(folder, 'a.tar')))
    const to = await unpacked(folder)
    expect(await readFile(join(to, 'calm'), 'utf8')).toBe('calm')
    expect(results).toContainEqual({ skipped: 'changed each of the 5 times that it was read' })
    for (const [times, result] of results.entries()) {
      const found = await stat(join(to, `changing-${times}`)).catch(() => undefined)
      expect(found?.size).toBe('sizeBytes' in result ? result.sizeBytes : undefined)
    }
  } finally {
    writer.kill('SIGKILL')
    await once(writer, 'close')
  }
})

test('uploads: a second pass adds what came or changed, keeps what vanished, and names what is missing', async () => {
  const folder = await newFolder()
  const uploads = join(folder, 'uploads')
  await mkdir(join(uploads, 'deep'), { recursive: true })
  const put = (name: string, text: string) => writeFile(join(uploads, name), text)
  await put('same.png', 'same')
  await put('replaced.png', 'old')
  await put('deleted.png', 'deleted')
  await put('deep/inner.png', 'inner')
  // Some readers take these for ends of lines.
  await put('odd\u2028\u2029.png', 'odd')
  await using archive = archiveUploads(uploads, join(folder, 'a.tar'), join(folder, 'list'))
  await archive.pass()
  await put('new.png', 'new')
  await put('replacement', 'new content')
  await rename(join(uploads, 'replacement'), join(uploads, 'replaced.png'))
  await unlink(join(uploads, 'deleted.png'))
  await archive.pass()
  const referenced = ['same.png', 'replaced.png', 'deleted.png', 'new.png', 'never.png']
  expect(await archive.close(referenced)).toMatchObject({
    files: 6,
    missing: new Map([['never.png', 'is not there']]),
  })
  const to = await unpacked(folder)
  const contents = {
    'same.png': 'same',
    'replaced.png': 'new content',
    'deleted.png': 'deleted',
    'new.png': 'new',
    'deep/inner.png': 'inner',
    'odd\u2028\u2029.png': 'odd',
  }
  for (const [name, text] of Object.entries(contents))
    expect(await readFile(join(to, name), 'utf8')).toBe(text)
  await rename(join(folder, 'list'), join(folder, 'uploads.jsonl'))
  const names: string[] = []
  for await (const { name } of uploadLines(folder)) names.push(name)
  expect(names.toSorted()).toEqual([...Object.keys(contents), 'replaced.png'].toSorted())
})

test('uploads: a file that was half written in a pass is whole in the end', async () => {
  const folder = await newFolder()
  const uploads = join(folder, 'uploads')
  await mkdir(uploads)
  const put = (name: string, text: string) => writeFile(join(uploads, name), text)
  await put('film.mp4', 'half')
  await put('gone.png', 'gone')
  await using archive = archiveUploads(uploads, join(folder, 'a.tar'), join(folder, 'list'))
  await archive.pass()
  const settled = archive.settle()
  await put('film.mp4', 'half, and the rest')
  await unlink(join(uploads, 'gone.png'))
  await settled
  expect((await archive.close(['film.mp4', 'gone.png'])).missing.size).toBe(0)
  const to = await unpacked(folder)
  expect(await readFile(join(to, 'film.mp4'), 'utf8')).toBe('half, and the rest')
  expect(await readFile(join(to, 'gone.png'), 'utf8')).toBe('gone')
})

test('uploads: what was replaced by something unreadable is missing, although its first version is known', async () => {
  const folder = await newFolder()
  const uploads = join(folder, 'uploads')
  await mkdir(uploads)
  for (const name of ['one.png', 'other.png']) await writeFile(join(uploads, name), name)
  await using archive = archiveUploads(uploads, join(folder, 'a.tar'), join(folder, 'list'))
  await archive.pass()
  await unlink(join(uploads, 'one.png'))
  await symlink('other.png', join(uploads, 'one.png'))
  await archive.pass()
  const { missing } = await archive.close(['one.png', 'other.png'])
  expect(missing).toEqual(new Map([['one.png', 'is a link']]))
})

test('a thread of sums that has died refuses, and is not waited for', async () => {
  const thread = startSumThread()
  const pieces = [{ at: 0, sizeBytes: 4, isLast: true }]
  const batch = () => ({ buffer: new ArrayBuffer(4), used: 4, pieces, goesBack: false, isMark: false })
  expect((await thread.reckon(batch())).sums).toEqual([
    createHash('sha256').update(Buffer.alloc(4)).digest('hex'),
  ])
  await thread.end()
  await expect(thread.reckon(batch())).rejects.toThrow('has ended')
})

test('uploads: a folder whose name is not UTF-8 is named, not passed over', async () => {
  const folder = await newFolder()
  const odd = Buffer.concat([Buffer.from(`${folder}/uploads/dir`), Buffer.from([0xe9])])
  await mkdir(odd, { recursive: true })
  await writeFile(Buffer.concat([odd, Buffer.from('/inside.png')]), 'inside')
  await using archive = archiveUploads(join(folder, 'uploads'), join(folder, 'a.tar'), join(folder, 'list'))
  await archive.pass()
  const { missing } = await archive.close([])
  expect([...missing.values()]).toEqual(['has a name that is not UTF-8'])
})
