import { existsSync } from 'node:fs'
import { link, lstat, mkdir, mkdtemp, readFile, rm, stat, utimes, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { parseSorting, reasonToDump, type Sorting } from '../../scripts/lib/legacy/database.mts'
import { parseLaunch } from '../../scripts/lib/legacy/outage.mts'
import { readNginx, restoreNginx } from '../../scripts/lib/legacy/nginx.mts'
import { differences } from '../../scripts/lib/legacy/settings.mts'
import { copyUploads, differingUploads, uploadProblems } from '../../scripts/lib/legacy/uploads.mts'
import { newFolder, siteWith } from './site.mts'

describe('the order of texts', () => {
  const debian =
    'postgres (PostgreSQL) 17.2\nldd (Debian GLIBC 2.41-12) 2.41\nicu 76.1\nlocale C.utf8\nlocale fr_FR.utf8\n'
  const alpine = 'postgres (PostgreSQL) 16.4\nmusl libc (x86_64)\nicu 74.2\n'

  test.each<[string, string, Sorting]>([
    ['Debian', debian, { major: 17, library: 'glibc 2.41', icu: '76', locales: ['c.utf8', 'fr_fr.utf8'] }],
    ['Alpine', alpine, { major: 16, library: 'musl', icu: '74', locales: [] }],
  ])('is read from an image of %s', (_, text, expected) => {
    expect(parseSorting(text)).toEqual(expected)
  })

  test.each<[string, Partial<Sorting>, string[], RegExp | undefined]>([
    ['nothing differs', {}, ['C', 'fr_FR.UTF-8'], undefined],
    ['the major version differs', { major: 18 }, ['C'], /PostgreSQL 18 cannot use data of PostgreSQL 17/],
    ['glibc is newer', { library: 'glibc 2.42' }, ['C'], /glibc 2\.42 sorts differently/],
    ['another C library', { library: 'musl' }, ['C'], /musl sorts differently/],
    ['ICU is newer', { icu: '78' }, ['C'], /ICU 78 sorts differently/],
    [
      'a locale is missing',
      { locales: ['c.utf8'] },
      ['fr_FR.UTF-8'],
      /does not know the locale fr_FR\.UTF-8/,
    ],
    ['a locale is missing that nobody uses', { locales: ['c.utf8'] }, ['C.UTF-8'], undefined],
  ])('decides whether the data can stay: %s', (_, change, used, expected) => {
    const from = parseSorting(debian)
    const reason = reasonToDump(from, { ...from, ...change }, used)
    if (expected) expect(reason).toMatch(expected)
    else expect(reason).toBeUndefined()
  })
})

describe('the nginx files of a legacy site', () => {
  const given = { control: '127.0.0.1:1339', name: undefined, hasTls: false }
  /** Behind the main file, as `nginx -T` has them. */
  const file = (path: string, text: string) => `# configuration file ${path}:\n${text}\n`
  const site =
    'server {\n listen 80;\n server_name bob.example.org;\n location / { proxy_pass http://127.0.0.1:1337; }\n}'

  test('are those that pass visitors to the port of Strapi', () => {
    const dump =
      file('/etc/nginx/nginx.conf', 'http { include conf.d/*; }') + file('/etc/nginx/conf.d/bob.conf', site)
    expect(readNginx(dump, '127.0.0.1:1337', given)).toEqual({
      files: ['/etc/nginx/conf.d/bob.conf'],
      serverName: 'bob.example.org',
      tls: undefined,
      lost: [],
      problems: [],
    })
  })

  test('may lead there by an upstream, and tell the certificate', () => {
    const text = site
      .replace('http://127.0.0.1:1337', 'http://strapi')
      .replace(
        'listen 80;',
        'listen 443 ssl;\n ssl_certificate /a/full.pem;\n ssl_certificate_key /a/key.pem;',
      )
    const dump = file('/e/up.conf', 'upstream strapi { server localhost:1337; }') + file('/e/bob.conf', text)
    const found = readNginx(dump, '127.0.0.1:1337', given)
    expect(found.files).toEqual(['/e/bob.conf'])
    expect(found.tls).toEqual({ certificate: '/a/full.pem', key: '/a/key.pem' })
  })

  test.each<[string, string, RegExp]>([
    [
      'another site in the same file',
      `${site}\nserver { location / { proxy_pass http://127.0.0.1:3000; } }`,
      /also passes visitors/,
    ],
    [
      'HTTPS with a certificate from elsewhere',
      site.replace('listen 80', 'listen 443 ssl'),
      /its certificate is not in the same file/,
    ],
    [
      'no name',
      site.replace('server_name bob.example.org;', 'server_name _;'),
      /no nginx file with a server_name/,
    ],
    ['nobody passes visitors to it', site.replace('1337', '1400'), /no nginx file with a server_name/],
    [
      'only a remark does',
      `# proxy_pass http://127.0.0.1:1337;\n${site.replace('1337', '1400')}`,
      /no nginx file/,
    ],
  ])('are not understood: %s', (_, text, expected) => {
    const { problems } = readNginx(file('/e/bob.conf', text), '127.0.0.1:1337', given)
    expect(problems.map(({ problem }) => problem).join()).toMatch(expected)
  })

  test('what will not be in the new site is named', () => {
    const text = site.replace(
      'location /',
      'auth_basic "closed";\n allow 192.0.2.0/24;\n client_max_body_size 500m;\n location /',
    )
    expect(
      readNginx(
        file('/e/bob.conf', text.replace('bob.example.org', 'bob.example.org www.example.org')),
        '127.0.0.1:1337',
        given,
      ).lost,
    ).toEqual([
      'server_name bob.example.org www.example.org',
      'auth_basic "closed"',
      'allow 192.0.2.0/24',
      'client_max_body_size 500m',
    ])
  })

  test('ours is not one of them', () => {
    expect(
      readNginx(file('/e/new.conf', `${site}\nserver { listen 127.0.0.1:1339; }`), '127.0.0.1:1337', given)
        .files,
    ).toEqual([])
  })
})

test.each([
  ['│ Launched in        │ 9100 ms   │\nbuilt again\n│ Launched in        │ 2345 ms   │\n', 2345],
  ['Server listening', undefined],
])('how long Strapi takes to start is told by its log: %j', (log, expected) => {
  expect(parseLaunch(log)).toBe(expected)
})

test('a way back leaves no second copy of the legacy file', async () => {
  const site = await siteWith({ NGINX_COMMAND: 'true' })
  site.nginx.confFile = join(await newFolder(), 'bob.conf')
  const kept = join(site.stateDir, 'legacy-nginx')
  await mkdir(kept, { recursive: true })
  const legacyText = 'server { listen 80; }'
  await writeFile(join(kept, encodeURIComponent(site.nginx.confFile)), legacyText)
  await writeFile(`${site.nginx.confFile}.previous`, legacyText)
  await writeFile(site.nginx.confFile, `server { listen ${site.nginx.control}; }`)
  await restoreNginx(site)
  expect(await readFile(site.nginx.confFile, 'utf8')).toBe(legacyText)
  expect(existsSync(`${site.nginx.confFile}.previous`)).toBe(false)
})

test('a way back that finds nothing kept leaves the file that is still the legacy one', async () => {
  const site = await siteWith({ NGINX_COMMAND: 'true' })
  site.nginx.confFile = join(await newFolder(), 'bob.conf')
  await mkdir(join(site.stateDir, 'legacy-nginx'), { recursive: true })
  await writeFile(site.nginx.confFile, 'server { listen 80; }')
  await restoreNginx(site)
  expect(await readFile(site.nginx.confFile, 'utf8')).toBe('server { listen 80; }')
  await mkdir(join(site.stateDir, 'legacy-nginx'), { recursive: true })
  await writeFile(site.nginx.confFile, `server { listen ${site.nginx.control}; }`)
  await restoreNginx(site)
  expect(existsSync(site.nginx.confFile)).toBe(false)
})

test('of settings that change, only what cannot be a secret is shown', async () => {
  const after =
    'POSTGRES_USER=BoB\nREDIS_PASSWORD=hush\nSMTP_PASS=hush\nSTRIPE_SK=hush\nDATABASE_HOST=postgresql\nMASTER_PORT=1337\n'
  expect(await differences('MASTER_PORT=1400\nPOSTGRES_USER=BoB\nREDIS_PASSWORD=', after)).toEqual([
    'REDIS_PASSWORD: (empty) -> ********',
    'SMTP_PASS: (not there) -> ********',
    'STRIPE_SK: (not there) -> ********',
    'DATABASE_HOST: (not there) -> postgresql',
    'MASTER_PORT: 1400 -> 1337',
  ])
})

describe('uploads are copied', () => {
  let folder: string
  let from: string
  let to: string
  const owner = { uid: 1000, gid: 1000 }
  const copy = (removesOthers = true) => copyUploads(from, to, owner, { removesOthers })

  beforeEach(async () => {
    folder = await mkdtemp(join(tmpdir(), 'uploads-'))
    from = join(folder, 'from')
    to = join(folder, 'to')
    await mkdir(join(from, 'sub'), { recursive: true })
    for (const name of ['a.jpg', 'sub/b c.jpg', 'é\nnew.jpg', 'empty'])
      await writeFile(join(from, name), name === 'empty' ? '' : name)
    await utimes(join(from, 'a.jpg'), 1_600_000_000, 1_600_000_000.25)
  })
  afterEach(() => rm(folder, { recursive: true }))

  test('with names, times and bytes, for the user of the image, readable for nginx', async () => {
    await writeFile(join(from, 'closed.jpg'), 'closed', { mode: 0o600 })
    expect(await copy()).toMatchObject({ files: 5, copied: 5, removed: 0 })
    expect(await readFile(join(to, 'é\nnew.jpg'), 'utf8')).toBe('é\nnew.jpg')
    const copied = await stat(join(to, 'a.jpg'))
    expect([copied.uid, copied.gid, copied.mtimeMs]).toEqual([1000, 1000, 1_600_000_000_250])
    expect((await stat(join(to, 'sub'))).uid).toBe(1000)
    expect((await stat(join(to, 'closed.jpg'))).mode & 0o777).toBe(0o644)
    expect(await differingUploads(from, to)).toEqual([])
  })

  test('never as links: Strapi writes new bytes into an old file', async () => {
    await link(join(from, 'a.jpg'), join(from, 'again.jpg'))
    await copy()
    expect((await lstat(join(to, 'a.jpg'))).ino).not.toBe((await lstat(join(from, 'a.jpg'))).ino)
    expect((await lstat(join(to, 'a.jpg'))).nlink).toBe(1)
  })

  test('once: the next pass takes what is new, has changed or is gone', async () => {
    await copy()
    await writeFile(join(from, 'a.jpg'), 'other bytes')
    await writeFile(join(from, 'new.jpg'), 'new')
    await rm(join(from, 'empty'))
    expect(await differingUploads(from, to)).toEqual(expect.arrayContaining(['a.jpg', 'new.jpg', 'empty']))
    expect(await copy()).toMatchObject({ files: 4, copied: 2, removed: 1 })
    expect(await readFile(join(to, 'a.jpg'), 'utf8')).toBe('other bytes')
    expect(await copy()).toMatchObject({ copied: 0, removed: 0 })
  })

  test('back without removing anything', async () => {
    await mkdir(to)
    await writeFile(join(to, 'mine.jpg'), 'mine')
    expect(await copy(false)).toMatchObject({ removed: 0 })
    expect(await readFile(join(to, 'mine.jpg'), 'utf8')).toBe('mine')
  })

  test('back without touching what is newer there, where that is asked for', async () => {
    await copy()
    await writeFile(join(to, 'a.jpg'), 'newer')
    await rm(join(to, 'empty'))
    await copyUploads(from, to, owner, { removesOthers: false, keepsNewer: true })
    expect(await readFile(join(to, 'a.jpg'), 'utf8')).toBe('newer')
    expect((await stat(join(to, 'empty'))).size).toBe(0)
  })

  test('after half a copy was left by a kill', async () => {
    await mkdir(join(to, '.strapi-blue-green/migration'), { recursive: true })
    await writeFile(join(to, '.strapi-blue-green/migration/copy'), 'half')
    await copy()
    expect(await differingUploads(from, to)).toEqual([])
  })

  test('into a folder of somebody else is refused, into one that was begun is not', async () => {
    expect((await uploadProblems(from, to)).join()).toMatch(/new\.jpg/)
    await rm(join(from, 'é\nnew.jpg'))
    expect(await uploadProblems(from, to)).toEqual([])
    await copy()
    expect(await uploadProblems(from, to)).toEqual([])
    await rm(join(to, '.strapi-blue-green'), { recursive: true })
    expect((await uploadProblems(from, to)).join()).toMatch(/is not empty/)
  })
})
