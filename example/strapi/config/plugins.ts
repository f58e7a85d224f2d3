import type { Core } from '@strapi/strapi'

const plugins = ({ env }: Core.Config.Shared.ConfigParams): Core.Config.Plugin => ({
  upload: {
    config: {
      sizeLimit: 250 * 1024 * 1024,
      security: {
        allowedTypes: ['image/*', 'video/*', 'audio/*', 'application/pdf'],
        deniedTypes: ['image/svg+xml'],
      },
    },
  },
  'users-permissions': { config: { jwtSecret: env('JWT_SECRET') } },
})

export default plugins
