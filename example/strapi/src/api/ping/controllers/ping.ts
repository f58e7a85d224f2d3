import { createHash } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { factories } from '@strapi/strapi'
import type { Context } from 'koa'

const SLOWEST_MS = 30_000
const ECHO_LIMIT_BYTES = 25 * 1024 * 1024

export default factories.createCoreController('api::ping.ping', {
  /** One question to the database, and as little else as Strapi can do: for many visitors on a small machine. */
  async newest(ctx: Context) {
    ctx.body = {
      data: await strapi.db.query('api::ping.ping').findMany({ orderBy: { id: 'desc' }, limit: 1 }),
    }
  },

  async slow(ctx: Context) {
    const ms = /^\d{1,5}$/.test(String(ctx.query.ms)) ? Number(ctx.query.ms) : Infinity
    if (ms > SLOWEST_MS) return ctx.throw(400, `ms must be a whole number from 0 to ${SLOWEST_MS}`)
    await sleep(ms)
    ctx.body = { ms }
  },

  async echo(ctx: Context) {
    // What the body parser knows (JSON, forms, text) it has read already.
    if (!ctx.is('application/octet-stream')) return ctx.throw(415, 'Send application/octet-stream')
    const hash = createHash('sha256')
    let bytes = 0
    for await (const chunk of ctx.req) {
      bytes += chunk.length
      hash.update(chunk)
    }
    if (bytes > ECHO_LIMIT_BYTES) return ctx.throw(413, `At most ${ECHO_LIMIT_BYTES} bytes`)
    ctx.body = { bytes, sha256: hash.digest('hex') }
  },
})
