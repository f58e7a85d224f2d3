import type { Core } from '@strapi/strapi'

const api: Core.Config.Api = {
  rest: { defaultLimit: 25, maxLimit: 1000, withCount: true, strictParams: true },
  documents: { strictParams: true },
}

export default api
