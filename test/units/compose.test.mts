import { expect, test } from 'vitest'
import * as compose from '../../scripts/lib/compose.mts'
import { composeFile, type Site } from '../../scripts/lib/settings.mts'
import { passwords, siteWith } from './site.mts'

/** `COMPOSE` stands for `docker compose` with this site's files and project. */
const commands: [string, (site: Site) => string[], string][] = [
  ['builds one image for both slots', compose.build, 'COMPOSE --progress plain build strapi-master'],
  ['removes master', (site) => compose.remove(site, 'strapi-master'), 'docker rm --force try-strapi-master'],
  ['removes slave', (site) => compose.remove(site, 'strapi-slave'), 'docker rm --force try-strapi-slave'],
  [
    'makes master, PostgreSQL and Redis left as they are',
    (site) => compose.create(site, 'strapi-master'),
    'COMPOSE create --no-recreate --no-build strapi-master',
  ],
  [
    'makes slave, which has a profile, PostgreSQL and Redis left as they are',
    (site) => compose.create(site, 'strapi-slave'),
    'COMPOSE --profile blue-green create --no-recreate --no-build strapi-slave',
  ],
  ['starts slave', (site) => compose.start(site, 'strapi-slave'), 'docker start try-strapi-slave'],
  [
    'starts the services of a first deploy',
    (site) => compose.startServices(site, ['postgresql', 'redis']),
    'COMPOSE up --detach postgresql redis',
  ],
  ['asks Compose anything', (site) => compose.compose(site, 'config', '--quiet'), 'COMPOSE config --quiet'],
  ['stops master', (site) => compose.stop(site, 'strapi-master'), 'docker stop try-strapi-master'],
  ['stops slave', (site) => compose.stop(site, 'strapi-slave'), 'docker stop try-strapi-slave'],
  [
    'shows the end of a log',
    (site) => compose.logs(site, 'strapi-slave', 20),
    'docker logs --tail 20 try-strapi-slave',
  ],
  ['names an image', () => compose.tag('sha256:1', 'bob:2'), 'docker tag sha256:1 bob:2'],
  ['removes an image', () => compose.removeImage('bob:1'), 'docker image rm bob:1'],
  [
    'asks the database on its local socket, without a password',
    () => compose.query('abc', 'BoB', 'SELECT 1'),
    'docker exec --user=postgres abc psql --no-psqlrc --tuples-only --no-align --dbname BoB --command SELECT 1',
  ],
]

test.each(commands)('a deploy %s', async (_, build, expected) => {
  const site = await siteWith({ CONTAINER_PREFIX: 'try-', COMPOSE_PROJECT_NAME: 'bob-try' })
  const files = `docker compose --file ${composeFile} --env-file ${site.envFile} --project-name bob-try`
  expect(build(site).join(' ')).toBe(expected.replace('COMPOSE', files))
})

test('no command of a deploy shows a password in the list of processes', async () => {
  const site = await siteWith()
  const words = commands.flatMap(([, build]) => build(site)).join(' ')
  for (const password of Object.values(passwords)) expect(words).not.toContain(password)
})
