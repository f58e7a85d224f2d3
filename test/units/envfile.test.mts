import { chmod, chown, lstat, readFile, stat, symlink, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { parse } from 'dotenv'
import { describe, expect, test } from 'vitest'
import { run } from '../../scripts/lib/command.mts'
import {
  addMissing,
  expandedKeys,
  readEnv,
  readText,
  setValues,
  unreadableLines,
  writeEnv,
} from '../../scripts/lib/envfile.mts'
import { newFolder } from './site.mts'

describe('setting values', () => {
  test.each<[string, string, Record<string, string>, string]>([
    ['replaces a value where it stands', 'A=1\nB=2\nC=3\n', { B: '5' }, 'A=1\nB=5\nC=3\n'],
    [
      'keeps comments, blank lines and order',
      '# a\nB=1\n\n#B=0\nA=2\n',
      { B: '5' },
      '# a\nB=5\n\n#B=0\nA=2\n',
    ],
    ['keeps the comment behind a value', 'A=1 # one\nB=2\n', { A: '5' }, 'A=5 # one\nB=2\n'],
    ['adds what is not there at the end', 'A=1\n', { C: '3', B: '2' }, 'A=1\nC=3\nB=2\n'],
    ['adds to a file without a last line end', 'A=1', { B: '2' }, 'A=1\nB=2\n'],
    ['adds to an empty file', '', { A: '1' }, 'A=1\n'],
    ['changes the last of equal keys: it is the one that counts', 'A=1\nA=2\n', { A: '3' }, 'A=1\nA=3\n'],
    ['knows spaces and export', ' export A = 1\n', { A: '2' }, 'A=2\n'],
    ['does not take a key for another that begins with it', 'AB=1\nA=2\n', { A: '3' }, 'AB=1\nA=3\n'],
    [
      'changes a value in a file with Windows line ends in place',
      'A=1\r\nB=2\r\n',
      { A: '3' },
      'A=3\r\nB=2\r\n',
    ],
    ['replaces a value of several lines as a whole', 'A="1\n2\n3"\nB=2\n', { A: '5' }, 'A=5\nB=2\n'],
    ['leaves a file alone when there is nothing to set', '# only this', {}, '# only this'],
  ])('%s', (_, text, values, expected) => {
    expect(setValues(text, values)).toBe(expected)
  })
})

const plain = ['', 'plain', 'a b', ' lead', 'trail ', 'a=b', 'é', '!~;&|*', 'a,b:c@d%e+f/g.h-i=']
const quoted = ["it's", 'say "x"', "'quoted'", '"quoted"', 'back`tick', "it's `x`", "it's #1"]
const signs = ['a#b', 'a #b', 'a$b', '$HOME', 'a${HOME}b', '$$', 'a\\b', 'a\\nb', 'a\nb', "it's\nb"]
const hard = [
  `it's "x"`,
  "it's $HOME",
  "it's $$x",
  "it's \\ x",
  "it's a\\nb",
  "it's a\\tb",
  'a\\',
  "it's\\",
  '\'"`',
  `'"$\\`,
]

describe('a value that was set', () => {
  const values = Object.fromEntries([...plain, ...quoted, ...signs].map((value, at) => [`V${at}`, value]))

  test('is the same to dotenv, and so to our scripts', () => {
    expect(parse(setValues('', values))).toEqual(values)
  })

  test('is the same to Compose, and so to the containers', async () => {
    expect(await seenByCompose(setValues('', values), Object.keys(values))).toEqual(values)
  })

  test.each(hard)('with quotes and signs mixed is never read differently: %j', async (value) => {
    const text = orRefused(() => setValues('', { A: value }))
    if (text === undefined) return
    expect(parse(text)).toEqual({ A: value })
    expect(await seenByCompose(text, ['A'])).toEqual({ A: value })
  })
})

describe('keys that an update of the example brings', () => {
  const key = '"-----BEGIN KEY-----\nabc\nB=\n-----END KEY-----"'
  test.each<[string, string, string, string]>([
    [
      'come with their comment, behind the key before',
      'A=1\nC=3\n',
      '# a\nA=\n# b\nB=2\n',
      'A=1\n# b\nB=2\nC=3\n',
    ],
    ['come first when they are first in the example', 'B=2\n', '# a\nA=1\nB=\n', '# a\nA=1\nB=2\n'],
    ['come in their order', 'A=1\nZ=9\n', 'A=\nB=2\nC=3\nZ=\n', 'A=1\nB=2\nC=3\nZ=9\n'],
    ['come behind the last of equal keys', 'A=1\nX=0\nA=2\n', 'A=\nB=2\n', 'A=1\nX=0\nA=2\nB=2\n'],
    [
      'come without the title of their section',
      'A=1\n',
      'A=\n\n# --- Title ---\n# b\nB=2\n',
      'A=1\n# b\nB=2\n',
    ],
    ['come without a comment that stands apart', 'A=1\n', 'A=\n# apart\n\nB=2\n', 'A=1\nB=2\n'],
    ['keep quotes and comments of the example', 'A=1\n', "A=\nB='x y' # z\n", "A=1\nB='x y' # z\n"],
    ['change no value, not even an empty one', 'A=\nB=own\n', 'A=1\nB=2\n', 'A=\nB=own\n'],
    [
      'change no own key and no own comment',
      '# mine\nX=1\nA=1 # own\n',
      'A=\nB=2\n',
      '# mine\nX=1\nA=1 # own\nB=2\n',
    ],
    ['are not there when only commented out', '#B=7\nA=1\n', 'A=\nB=2\n', '#B=7\nA=1\nB=2\n'],
    ['make a whole file where there is none', '', '# a\nA=1\nB=2\n', '# a\nA=1\nB=2\n'],
    ['never cut a value of several lines in two', `K=${key}\nZ=1\n`, 'K=\nL=2\n', `K=${key}\nL=2\nZ=1\n`],
    [
      'find their place in a file with Windows line ends',
      'A=1\r\nC=3\r\n',
      'A=\nB=2\nC=\n',
      'A=1\r\nB=2\r\nC=3\r\n',
    ],
  ])('%s', (_, text, example, expected) => {
    expect(addMissing(text, example)).toBe(expected)
  })

  test('are all there afterwards, and a second time changes nothing', async () => {
    const example = (await readText('docker/.env.example')) ?? ''
    const text = addMissing("MASTER_PORT=5\nOWN='x'\n", example)
    expect(parse(text)).toEqual({ ...parse(example), MASTER_PORT: '5', OWN: 'x' })
    expect(addMissing(text, example)).toBe(text)
  })
})

describe('an operator is told about a value that Compose and Strapi would read differently', () => {
  test.each([
    ['A=pa$word', ['A']],
    ['A=pa${word}', ['A']],
    ['A=pa$$word', ['A']],
    ['A="pa$word"', ['A']],
    ['A="pa\\$word"', ['A']],
    ['  export A = $word', ['A']],
    ['A=$word\nB=1\nC=$word', ['A', 'C']],
    ['A=pa$word\r\nB=1\r\n', ['A']],
    ['A=pa#word', ['A']],
    ['A="1\n$word"', ['A']],
    ["A='pa$word'", []],
    ["A='pa$word' # $word", []],
    ["A='1\n$word'", []],
    ['A=word # costs $word', []],
    ['A=word #word', []],
    ['# A=$word', []],
    ['A=word$', []],
    ['A=5$ each', []],
  ])('%j: %j', (text, keys) => {
    expect(expandedKeys(text)).toEqual(keys)
  })
})

describe('lines that Compose refuses', () => {
  test.each<[string, string, number[]]>([
    ['none', '', []],
    ['none among comments, blanks and values', '# a\n\nA=1\n  B = 2 # b\nexport C=3\n', []],
    ['none in a value of several lines', 'A="1\n2\n3"\nB=\'4\n5\'\n', []],
    ['a word alone', 'A=1\nword\nB=2\n', [2]],
    ['a secret that lost its name', 'A=1\n=secret\n', [2]],
    ['a double quote that is never closed', 'A=1\nB="2\nC=3\n', [2]],
    ['a single quote that is never closed', "A=1\nB='2\n", [2]],
    ['text behind a closing quote', 'A="1" 2\n', [1]],
  ])('%s', (_, text, lines) => {
    expect(unreadableLines(text)).toEqual(lines)
  })
})

describe('a written .env', () => {
  test.each([
    ['0600 when it is new', undefined, 0o600],
    ['0600 as before', 0o600, 0o600],
    ['0660 as before, for a group that deploys', 0o660, 0o660],
    ['closed to others when it was open', 0o644, 0o640],
  ])('has mode %s', async (_, before, expected) => {
    const path = join(await newFolder(), '.env')
    if (before !== undefined) {
      await writeFile(path, 'A=1\n')
      await chmod(path, before)
    }
    await writeEnv(path, 'A=2\n')
    expect((await stat(path)).mode & 0o777).toBe(expected)
    expect(await readEnv(path)).toEqual({ A: '2' })
  })

  test('still belongs to its owner after root wrote it', async () => {
    const path = join(await newFolder(), '.env')
    await writeFile(path, 'A=1\n')
    const { uid, gid } = process.getuid?.() === 0 ? { uid: 12345, gid: 23456 } : await stat(path)
    await chown(path, uid, gid)
    await writeEnv(path, 'A=2\n')
    expect(await stat(path)).toMatchObject({ uid, gid })
  })

  test('is whole at every moment, the old text or the new one', async () => {
    const path = join(await newFolder(), '.env')
    const texts = ['A', 'B'].map((key) => `${key}=1\n`.repeat(20_000))
    await writeEnv(path, texts[0] ?? '')
    const seen = new Set<string>()
    const state = { writing: true }
    const watching = (async () => {
      while (state.writing) seen.add(await readFile(path, 'utf8'))
    })()
    for (let times = 0; times < 40; times += 1) await writeEnv(path, texts[times % 2] ?? '')
    state.writing = false
    await watching
    expect([...seen].toSorted()).toEqual(texts)
  })

  test('does not keep the open mode or the text of a file that a killed run left half-written', async () => {
    const path = join(await newFolder(), '.env')
    await writeFile(`${path}.new`, 'A=half', { mode: 0o644 })
    await writeEnv(path, 'A=2\n')
    expect((await stat(path)).mode & 0o777).toBe(0o600)
    expect(await readText(path)).toBe('A=2\n')
    expect(await readText(`${path}.new`)).toBeUndefined()
  })

  test('stays a link to the real file where it was one', async () => {
    const folder = await newFolder()
    const [path, real] = [join(folder, '.env'), join(folder, 'real.env')]
    await writeFile(real, 'A=1\n')
    await symlink(real, path)
    await writeEnv(path, 'A=2\n')
    expect((await lstat(path)).isSymbolicLink()).toBe(true)
    expect(await readText(real)).toBe('A=2\n')
  })

  test('that is not there is not an error to who reads it', async () => {
    const path = join(await newFolder(), '.env')
    expect([await readText(path), await readEnv(path)]).toEqual([undefined, undefined])
  })
})

/** What a container gets for these keys. */
async function seenByCompose(text: string, keys: string[]): Promise<Record<string, string>> {
  const folder = await newFolder()
  const [envFile, file] = [join(folder, '.env'), join(folder, 'compose.yml')]
  const environment = Object.fromEntries(keys.map((key) => [key, `\${${key}-not set}`]))
  // JSON is YAML.
  await writeFile(file, JSON.stringify({ services: { one: { image: 'none', environment } } }))
  await writeFile(envFile, text)
  const argv = ['docker', 'compose', '--file', file, '--env-file', envFile, 'config', '--format', 'json']
  const config = JSON.parse(await run(argv)) as { services: { one: { environment: Record<string, string> } } }
  // `config` writes every $ as $$, for whoever reads its output as a compose file.
  return Object.fromEntries(
    Object.entries(config.services.one.environment).map(([key, value]) => [key, value.replaceAll('$$', '$')]),
  )
}

function orRefused(action: () => string): string | undefined {
  try {
    return action()
  } catch (error) {
    expect(error).toMatchObject({ code: 2 })
    return undefined
  }
}
