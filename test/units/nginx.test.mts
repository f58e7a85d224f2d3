import { mkdir, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { run } from '../../scripts/lib/command.mts'
import { render, replacements, rivals, shippedFile } from '../../scripts/lib/nginx.mts'
import type { Site } from '../../scripts/lib/settings.mts'
import { newFolder, siteWith } from './site.mts'

const shipped = await readFile(shippedFile, 'utf8')
const certificate = { TLS_CERTIFICATE: '/etc/ssl/own.pem', TLS_CERTIFICATE_KEY: '/etc/ssl/own.key' }

/** A second site that shares nothing with the first. */
const second = {
  COMPOSE_PROJECT_NAME: 'bob-two',
  SERVER_NAME: 'two.example.com',
  MASTER_PORT: '2337',
  SLAVE_PORT: '2338',
  CONTROL_PORT: '2339',
  ACCESS_LOG: '/var/log/nginx/two.access.log',
  TRAFFIC_DIR: '/srv/two/traffic',
  UPLOADS_VOLUME: '/srv/two/uploads',
}

test('with the values of .env.example nginx gets the shipped file, byte for byte', async () => {
  expect(await render(await siteWith())).toBe(shipped)
})

test.each<[string, Record<string, string>]>([
  ['a plain site', {}],
  ['a site with HTTPS', certificate],
  ['a site on one address', { HTTP_LISTEN: '127.0.0.1:8080' }],
])('every value of %s finds its place in the shipped file', async (_, settings) => {
  const site = await siteWith(settings)
  const lost = replacements(site).filter(([pattern]) => !new RegExp(pattern, 'm').test(shipped))
  expect(lost).toEqual([])
})

test.each<[string, Record<string, string>, string[], string[]]>([
  [
    'another port',
    { HTTP_LISTEN: '8080' },
    ['  listen 8080;', '  listen [::]:8080;'],
    ['listen 80;', ':80;'],
  ],
  [
    'one address only',
    { HTTP_LISTEN: '10.0.0.7:80' },
    ['  listen 10.0.0.7:80;'],
    ['listen 80;', '  listen [::]'],
  ],
  [
    'another name and other folders',
    second,
    [
      'server_name two.example.com;',
      'alias /srv/two/uploads/;',
      '(-f /srv/two/traffic/slave)',
      '(-f /srv/two/traffic/alone)',
      'access_log /var/log/nginx/two.access.log bob_two;',
      '"site":"two.example.com","listen":"80","master":"127.0.0.1:2337","slave":"127.0.0.1:2338"',
    ],
    ['/var/www/bob', 'bob.strapi-pro.com', '127.0.0.1:133'],
  ],
  [
    'slots on another address',
    { STRAPI_HOST: '10.0.0.7' },
    ['server 10.0.0.7:1337 max', 'server 10.0.0.7:1338 max', 'listen 127.0.0.1:1339;'],
    ['127.0.0.1:1337'],
  ],
  [
    'the ports of the slots swapped',
    { MASTER_PORT: '1338', SLAVE_PORT: '1337' },
    [
      '"master":"127.0.0.1:1338","slave":"127.0.0.1:1337"',
      'server 127.0.0.1:1338 max_fails=3 fail_timeout=2s;        # strapi-master',
    ],
    [],
  ],
  [
    'HTTPS on one address',
    { ...certificate, HTTP_LISTEN: '10.0.0.7:80' },
    ['  listen 10.0.0.7:80;', '  listen 10.0.0.7:443 ssl http2;', '"listen":"10.0.0.7:80"'],
    ['listen [::]', 'listen 443', '#tls#'],
  ],
  [
    'a name that looks like another default',
    { SERVER_NAME: 'bob_master.example.com', TRAFFIC_DIR: '/var/www/bob/uploads/t' },
    ['server_name bob_master.example.com;', '(-f /var/www/bob/uploads/t/slave)'],
    [],
  ],
  [
    'HTTPS',
    certificate,
    [
      '  listen 443 ssl http2;',
      '  listen [::]:443 ssl http2;',
      'ssl_certificate     /etc/ssl/own.pem;',
      'ssl_certificate_key /etc/ssl/own.key;',
      'return 308 https://',
    ],
    ['#tls#', 'letsencrypt'],
  ],
])('a site with %s gets it everywhere', async (_, settings, there, gone) => {
  const text = await render(await siteWith(settings))
  for (const part of there) expect(text).toContain(part)
  for (const part of gone) expect(text).not.toContain(part)
})

describe('two sites in one nginx', () => {
  test('share no upstream, memory, log format, variable, control port, log or folder', async () => {
    const names = [
      await render(await siteWith()),
      await render(await siteWith({ ...second, ...certificate })),
    ].map(namesIn)
    const [first, other] = names
    expect(first).toContain('upstream bob_master')
    expect(first).toContain('upstream bob_master_alone')
    expect(other).toContain('shared:bob_two_tls')
    expect(first?.length).toBeGreaterThan(15)
    expect(first?.filter((name) => other?.includes(name))).toEqual([])
  })

  test.each<[string, Record<string, string>]>([
    ['plain', {}],
    ['with HTTPS', { HTTPS: 'yes' }],
    ['with HTTPS on one address', { HTTPS: 'yes', HTTP_LISTEN: '127.0.0.1:8081' }],
    ['of a project whose name begins with a digit', { COMPOSE_PROJECT_NAME: '2bob' }],
  ])('are both accepted by nginx, the second %s', async (_, { HTTPS, ...settings }) => {
    const folder = await newFolder()
    const own = HTTPS ? await selfSigned(folder) : {}
    const sites = [await siteIn(folder, {}), await siteIn(folder, { ...second, ...own, ...settings })]
    expect(await testedByNginx(folder, sites)).toContain('test is successful')
  })

  test('get no header of a variable that nginx takes for something else', async () => {
    const text = await render(await siteWith({ COMPOSE_PROJECT_NAME: '2bob' }))
    // $2bob is $2 of the last regular expression, and "bob".
    expect(text.match(/\$\d\w*/g)).toBeNull()
  })

  test('are told apart when one is there twice under another name', async () => {
    const folder = await newFolder()
    const site = await siteWith({ NGINX_CONF_DIR: folder })
    await writeFile(site.nginx.confFile, await render(site))
    await writeFile(join(folder, 'copy.conf'), await render(site))
    await writeFile(join(folder, 'copy.conf.previous'), await render(site))
    await writeFile(join(folder, 'two.conf'), await render(await siteWith(second)))
    expect(await rivals(site)).toEqual([join(folder, 'copy.conf')])
  })
})

/** Everything that one nginx has only once, or that one site must not take from another. */
function namesIn(text: string): string[] {
  const patterns = [
    /^upstream \w+/gm,
    /zone[ =]\w+/g,
    /shared:\w+/g,
    /log_format \w+/g,
    /map \S+ (\$\w+)/g,
    /127\.0\.0\.1:\d+/g,
    /access_log \/\S+ \w+/g,
    /server_name \S+/g,
    /-f \S+/g,
    /alias \S+/g,
    /http:\/\/\w+/g,
  ]
  const code = text.replaceAll(/^ *#.*$/gm, '')
  return patterns.flatMap((pattern) => [...code.matchAll(pattern)].map((found) => found[1] ?? found[0]))
}

async function siteIn(folder: string, settings: Record<string, string>): Promise<Site> {
  const log = join(folder, `${settings.COMPOSE_PROJECT_NAME ?? 'bob'}.log`)
  return await siteWith({ ...settings, NGINX_CONF_DIR: join(folder, 'conf.d'), ACCESS_LOG: log })
}

async function selfSigned(folder: string): Promise<Record<string, string>> {
  const [pem, key] = [join(folder, 'own.pem'), join(folder, 'own.key')]
  const subject = ['-subj', '/CN=two.example.com', '-days', '1']
  await run([
    'openssl',
    'req',
    '-x509',
    '-newkey',
    'rsa:2048',
    '-nodes',
    '-keyout',
    key,
    '-out',
    pem,
    ...subject,
  ])
  return { TLS_CERTIFICATE: pem, TLS_CERTIFICATE_KEY: key }
}

/** What `nginx -t` says about these sites, in an nginx of their own. */
async function testedByNginx(folder: string, sites: Site[]): Promise<string> {
  await mkdir(join(folder, 'conf.d'))
  for (const site of sites) await writeFile(site.nginx.confFile, await render(site))
  const temporary = ['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi']
  const main = join(folder, 'nginx.conf')
  await writeFile(
    main,
    `pid ${folder}/pid;
     events {}
     http {
       ${temporary.map((name) => `${name}_temp_path ${folder}/${name};`).join('\n')}
       include ${folder}/conf.d/*.conf;
     }`,
  )
  const lines: string[] = []
  await run(['nginx', '-t', '-c', main, '-e', join(folder, 'error.log')], {
    onLine: (line) => lines.push(line),
  })
  return lines.join('\n')
}
