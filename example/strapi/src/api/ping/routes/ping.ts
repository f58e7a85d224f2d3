import type { Core } from '@strapi/strapi'

const open = { auth: false } as const

// No /pings/:id, which would take /pings/slow for itself.
const router: Core.RouterInput = {
  type: 'content-api',
  routes: [
    { method: 'GET', path: '/pings', handler: 'api::ping.ping.find', config: open },
    { method: 'POST', path: '/pings', handler: 'api::ping.ping.create', config: open },
    { method: 'GET', path: '/pings/newest', handler: 'api::ping.ping.newest', config: open },
    { method: 'GET', path: '/pings/slow', handler: 'api::ping.ping.slow', config: open },
    { method: 'POST', path: '/pings/echo', handler: 'api::ping.ping.echo', config: open },
  ],
}

export default router
