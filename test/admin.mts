/** What the person at the admin panel does, by Strapi's own API and in a real browser. */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { chromium } from 'playwright-core'

export const account = { email: 'admin@example.org', password: 'Correct-horse-7' }

interface Uploaded {
  id: number
  name: string
  url: string
}

export interface Admin {
  upload(name: string, content: Buffer): Promise<Uploaded>
  /** A token that may read everything. */
  createApiToken(): Promise<string>
}

/** The first admin of a fresh site. */
export async function registerAdmin(url: string): Promise<Admin> {
  const person = { firstname: 'Ada', lastname: 'Admin', ...account }
  return adminOf(url, await token(url, '/admin/register-admin', person))
}

/** @throws Error when the password is not right */
export async function logIn(url: string): Promise<Admin> {
  return adminOf(url, await token(url, '/admin/login', account))
}

async function token(url: string, path: string, body: unknown): Promise<string> {
  const { data } = await ask<{ data: { token?: string; accessToken?: string } }>(`${url}${path}`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify(body),
  })
  return data.accessToken ?? data.token ?? ''
}

function adminOf(url: string, jwt: string): Admin {
  const headers = { authorization: `Bearer ${jwt}` }
  return {
    async upload(name, content) {
      const body = new FormData()
      body.append('files', new Blob([new Uint8Array(content)], { type: 'image/png' }), name)
      const [file] = await ask<Uploaded[]>(`${url}/upload`, { method: 'POST', headers, body })
      if (!file) throw new Error('nothing was uploaded')
      return file
    },
    async createApiToken() {
      const body = JSON.stringify({ name: 'reader', description: '', type: 'full-access', lifespan: null })
      const answer = await ask<{ data: { accessKey: string } }>(`${url}/admin/api-tokens`, {
        method: 'POST',
        headers: { ...headers, 'content-type': 'application/json' },
        body,
      })
      return answer.data.accessKey
    },
  }
}

async function ask<T>(url: string, init: RequestInit): Promise<T> {
  const response = await fetch(url, init)
  const text = await response.text()
  if (!response.ok) throw new Error(`${url} answered ${response.status}: ${text.slice(0, 300)}`)
  return JSON.parse(text) as T
}

/** Logs in to the admin panel and opens the media library. @returns width of the picture as the browser shows it, in pixels */
export async function seePicture(url: string, name: string): Promise<number> {
  const folder = await mkdtemp(join(tmpdir(), 'chromium-'))
  const quiet = ['networking', 'timer-throttling'].map((what) => `--disable-background-${what}`)
  const browser = await chromium.launchPersistentContext(folder, {
    executablePath: '/usr/bin/chromium',
    args: ['--no-sandbox', '--disable-gpu', '--disable-component-update', '--disable-sync', ...quiet],
  })
  try {
    const page = await browser.newPage()
    page.setDefaultTimeout(120_000)
    await page.goto(`${url}/admin/auth/login`)
    await page.fill('input[name=email]', account.email)
    await page.fill('input[name=password]', account.password)
    await page.click('button[type=submit]')
    await page.waitForURL((at) => !at.pathname.includes('/auth/'))
    await page.goto(`${url}/admin/plugins/upload`)
    const picture = page.locator(`img[src*="${name.replace(/\.\w+$/, '')}"]`).first()
    await picture.waitFor()
    return await picture.evaluate(async (element) => {
      const image = element as unknown as { decode(): Promise<void>; naturalWidth: number }
      await image.decode()
      return image.naturalWidth
    })
  } finally {
    await browser.close()
    await rm(folder, { recursive: true, force: true })
  }
}
