import type { Core } from '@strapi/strapi'

const middlewares: Core.Config.Middlewares = [
  'global::release', // first, so that error answers carry the header too
  'strapi::logger',
  'strapi::errors',
  'strapi::security',
  'strapi::cors',
  'strapi::poweredBy',
  'strapi::query',
  // The upload plugin's limit is below; the parser has one of its own, 200 MB if not told.
  { name: 'strapi::body', config: { formidable: { maxFileSize: 250 * 1024 * 1024 } } },
  'strapi::session',
  'strapi::favicon',
  'strapi::public',
]

export default middlewares
