import type { Core } from '@strapi/strapi'

const database = ({ env }: Core.Config.Shared.ConfigParams): Core.Config.Database<'postgres'> => ({
  connection: {
    client: 'postgres',
    connection: {
      host: env('DATABASE_HOST', '127.0.0.1'),
      port: env.int('DATABASE_PORT', 5432),
      database: env('DATABASE_NAME', 'BoB'),
      user: env('DATABASE_USERNAME', 'BoB'),
      password: env('DATABASE_PASSWORD', ''),
    },
    pool: { min: 0, max: env.int('DATABASE_POOL_MAX', 10) },
  },
})

export default database
