import type { Core } from '@strapi/strapi'

const cronTasks = {
  countPings: {
    options: { rule: '*/10 * * * * *' }, // every ten seconds
    task: async ({ strapi }: { strapi: Core.Strapi }) => {
      const count = await strapi.documents('api::ping.ping').count({})
      strapi.log.info(`[CRON] ${count} pings`)
    },
  },
}

export default cronTasks
