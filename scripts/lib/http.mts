/** One HTTP question with a deadline, on a connection of its own. */
import { Client } from 'undici'

export interface Answer {
  status: number
  headers: Record<string, string | string[] | undefined>
  body: string
}

export interface Question {
  headers?: Record<string, string>
  /** Connect to this host instead of the URL's; TLS still checks the URL's name. */
  dial?: string | undefined
  timeoutMs?: number
}

/** @throws Error with the reason when there is no complete answer in time (default 5 s) */
export async function getUrl(address: string, question: Question = {}): Promise<Answer> {
  return await ask('GET', address, question)
}

/** The same without the body. */
export async function headUrl(address: string, question: Question = {}): Promise<Answer> {
  return await ask('HEAD', address, question)
}

async function ask(method: 'GET' | 'HEAD', address: string, question: Question): Promise<Answer> {
  const url = new URL(address)
  const origin = new URL(url.origin)
  if (question.dial) origin.hostname = question.dial
  const client = new Client(origin, {
    connect: { servername: url.hostname, timeout: question.timeoutMs ?? 5000 },
  })
  try {
    const { statusCode, headers, body } = await client.request({
      method,
      path: `${url.pathname}${url.search}`,
      headers: { host: url.host, ...question.headers },
      signal: AbortSignal.timeout(question.timeoutMs ?? 5000),
    })
    return { status: statusCode, headers, body: await body.text() }
  } catch (error) {
    throw new Error(`${address}: ${reasonOf(error)}`, { cause: error })
  } finally {
    await client.destroy()
  }
}

function reasonOf(error: unknown): string {
  if (!(error instanceof Error)) return String(error)
  const code = 'code' in error ? String(error.code) : ''
  if (code === 'ECONNREFUSED') return 'nothing listens there'
  if (code === 'UND_ERR_SOCKET' || code === 'ECONNRESET') return 'accepted, then closed without an answer'
  return error.name === 'TimeoutError' ? 'no answer in time' : error.message
}
