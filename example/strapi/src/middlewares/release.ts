import type { Core } from '@strapi/strapi'

const release: Core.MiddlewareFactory = () => async (ctx, next) => {
  ctx.set('x-release', process.env.RELEASE || 'none')
  await next()
}

export default release
