/** One HTTP question with a deadline, on a connection of its own. */
import http from 'node:http'
import https from 'node:https'
import { once } from 'node:events'
import { text } from 'node:stream/consumers'

export interface Answer {
  status: number
  headers: http.IncomingHttpHeaders
  body: string
}

export interface Question {
  headers?: Record<string, string>
  /** Connect to this host instead of the URL's; TLS still checks the URL's name. */
  dial?: string | undefined
  /** Connect to this socket of the file system instead. */
  socketPath?: string
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
  const signal = AbortSignal.timeout(question.timeoutMs ?? 5000)
  const request = (url.protocol === 'https:' ? https : http).request(url, {
    method,
    // By this name TLS is checked, whatever is connected to.
    headers: { host: url.host, ...question.headers },
    agent: false,
    signal,
    // An IPv6 address without its brackets.
    ...(question.dial && { hostname: question.dial.replaceAll(/[[\]]/g, '') }),
    ...(question.socketPath && { socketPath: question.socketPath }),
  })
  try {
    const answered = once(request, 'response') as Promise<[http.IncomingMessage]>
    request.end()
    const [response] = await answered
    const { statusCode = 0, headers } = response
    return { status: statusCode, headers, body: await text(response) }
  } catch (error) {
    throw new Error(`${address}: ${signal.aborted ? 'no answer in time' : reasonOf(error)}`, { cause: error })
  } finally {
    request.destroy()
  }
}

function reasonOf(error: unknown): string {
  if (!(error instanceof Error)) return String(error)
  const code = 'code' in error ? String(error.code) : ''
  if (code === 'ECONNREFUSED') return 'nothing listens there'
  if (code === 'EPIPE' || code === 'ECONNRESET') return 'accepted, then closed without an answer'
  return error.message
}
