/** The Strapi image as every application gets it: by yarn 1, yarn 4 or npm, without secrets, and the one for development. */
import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterAll, beforeAll, describe, expect, inject, test } from 'vitest'
import { run } from '../scripts/lib/command.mts'
import { compose } from '../scripts/lib/compose.mts'
import { getUrl } from '../scripts/lib/http.mts'
import { loadSite, projectRoot } from '../scripts/lib/settings.mts'
import { tinySite, type TestSite } from './harness.mts'

const nodeImage = () => inject('baseImages').NODE_IMAGE ?? 'node:20-bookworm-slim'
const name = `bob-test-image-${process.pid}`
let folder: string

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), `${name}-`))
})
afterAll(async () => {
  await rm(folder, { recursive: true, force: true })
})

/** A smallest application, with everything that must stay out of an image. */
async function application(kind: string, extra: Record<string, unknown> = {}): Promise<string> {
  const source = join(folder, kind)
  await mkdir(join(source, 'src'), { recursive: true })
  await mkdir(join(source, 'public/uploads'), { recursive: true })
  const manifest = {
    name: 'fixture',
    version: '1.0.0',
    private: true,
    scripts: { build: "node -e \"require('fs').mkdirSync('dist',{recursive:true});require('is-odd')\"" },
    dependencies: { ms: '2.1.3' },
    devDependencies: { 'is-odd': '3.0.1' },
    ...extra,
  }
  const files = {
    'package.json': JSON.stringify(manifest),
    '.env': 'APP_KEYS=sesame',
    'AuthKey_ABC.p8': 'sesame',
    'bob-firebase-adminsdk-1.json': '{"private_key":"sesame"}',
    'public/uploads/picture.txt': 'sesame',
    'src/firebase.json': '{"this is":"code"}',
  }
  for (const [path, text] of Object.entries(files)) await writeFile(join(source, path), text)
  return source
}

/** Runs a package manager where the image's own Node is. */
async function inNode(source: string, ...argv: string[]): Promise<void> {
  const mounted = ['--volume', `${source}:/fixture`, '--workdir', '/fixture']
  await run(['docker', 'run', '--rm', '--network', 'host', ...mounted, nodeImage(), ...argv], {
    timeoutMs: 300_000,
  })
}

async function inImage(image: string, command: string): Promise<string> {
  return await run(['docker', 'run', '--rm', image, 'sh', '-c', command])
}

describe('the production image', () => {
  const managers: {
    kind: string
    extra?: Record<string, unknown>
    lock: (source: string) => Promise<void>
  }[] = [
    { kind: 'npm', lock: (source) => inNode(source, 'npm', 'install', '--package-lock-only') },
    { kind: 'yarn-1', lock: (source) => inNode(source, 'yarn', 'install', '--non-interactive') },
    {
      kind: 'yarn-4',
      extra: { packageManager: 'yarn@4.10.3' },
      lock: async (source) => {
        await writeFile(join(source, '.yarnrc.yml'), 'nodeLinker: node-modules\n')
        await writeFile(join(source, 'yarn.lock'), '')
        await inNode(source, 'npx', '--yes', '@yarnpkg/cli-dist@4.10.3', 'install', '--mode=update-lockfile')
      },
    },
    {
      kind: 'yarn-4-checked-in',
      lock: async (source) => {
        const release = '.yarn/releases/yarn-4.10.3.cjs'
        const fetch = `npm pack --silent @yarnpkg/cli-dist@4.10.3 && tar -xzf yarnpkg-*.tgz && mkdir -p .yarn/releases && cp package/bin/yarn.js ${release} && rm -r package yarnpkg-*.tgz`
        await inNode(source, 'sh', '-c', fetch)
        await writeFile(join(source, '.yarnrc.yml'), `nodeLinker: node-modules\nyarnPath: ${release}\n`)
        await writeFile(join(source, 'yarn.lock'), '')
        await inNode(source, 'node', release, 'install', '--mode=update-lockfile')
      },
    },
  ]
  test.each(managers)(
    'is built by $kind: without development packages, secrets or root',
    async ({ kind, extra, lock }) => {
      const source = await application(kind, extra)
      await lock(source)
      const image = `${name}-${kind}`
      const dockerfile = join(projectRoot, 'docker/strapi/Dockerfile')
      const build = [
        'docker',
        'build',
        '--file',
        dockerfile,
        '--tag',
        image,
        '--build-arg',
        `NODE_IMAGE=${nodeImage()}`,
      ]
      await run([...build, '--build-arg', 'RELEASE=r1', source], {
        env: { DOCKER_BUILDKIT: '1' },
        timeoutMs: 600_000,
      })
      try {
        expect(await inImage(image, 'id -u; pwd; echo $RELEASE')).toBe('1000\n/app/bob\nr1\n')
        expect(await inImage(image, 'ls node_modules')).toMatch(/^ms$/m)
        expect(await inImage(image, 'ls node_modules')).not.toMatch(/^is-odd$/m)
        expect(await inImage(image, 'ls -d dist src/firebase.json')).toBe('dist\nsrc/firebase.json\n')
        expect(await inImage(image, 'grep -rlE "sesame" /app 2>/dev/null | wc -l')).toBe('0\n')
        expect(
          await inImage(image, 'touch x 2>/dev/null || touch public/uploads/x && ls public/uploads'),
        ).toBe('x\n')
        const history = await run(['docker', 'history', '--no-trunc', image])
        expect(history).toContain('strapi.js')
        expect(history).not.toContain('sesame')
      } finally {
        await run(['docker', 'image', 'rm', '--force', image])
      }
    },
  )
})

describe('strapi-dev', () => {
  let site: TestSite
  beforeAll(async () => {
    site = await tinySite(18_040)
  })
  afterAll(async () => {
    await site.remove()
  })

  test('serves the mounted project on the port of master, and shows an edit without a restart', async () => {
    const manifest = {
      name: 'tiny',
      version: '1.0.0',
      private: true,
      scripts: { develop: 'node --watch server.mjs' },
    }
    await writeFile(join(site.source, 'package.json'), JSON.stringify(manifest))
    await rm(join(site.source, 'package-lock.json'))
    await inNode(site.source, 'npm', 'install', '--package-lock-only')
    await mkdir(join(site.source, 'public/uploads'), { recursive: true })
    await run(['chown', '-R', '1000:1000', site.source])
    const dev = async (...rest: string[]) => {
      await run(compose(await loadSite(site.envFile), '--profile', 'dev', ...rest), { timeoutMs: 300_000 })
    }
    await dev('up', '--detach', '--build', 'strapi-dev')
    const port = 18_042
    const status = async () =>
      (await getUrl(`http://127.0.0.1:${port}/_health`).catch(() => ({ status: 0 }))).status
    const until = async (wanted: number) => {
      for (let waited = 0; waited < 600 && (await status()) !== wanted; waited += 1) await sleep(200)
      expect(await status()).toBe(wanted)
    }
    await until(204)
    const code = join(site.source, 'server.mjs')
    await writeFile(code, (await readFile(code, 'utf8')).replaceAll('204', '299'))
    await until(299)
    const refused = await site.run('deploy')
    expect(refused.code).toBe(2)
    expect(refused.stderr).toContain('strapi-dev is running')
    await dev('stop', 'strapi-dev')
  })
})
