/** RECOVERY.md of a set: how to restore it with nothing but standard tools. */
import { composeCommand, type Site } from '../settings.mts'
import { createDatabase, identifier, properties } from './databases.mts'
import type { DatabaseState, Manifest } from './manifest.mts'

/** Markdown whose code blocks can be copied into a shell as they are, in the folder of the set. */
export function recovery(site: Site, name: string, manifest: Manifest): string {
  const sections = [
    `# Backup ${name}`,
    `Taken ${manifest.createdAt}, release ${manifest.release ?? 'unknown'}, PostgreSQL ${manifest.versions.postgresql ?? 'unknown'}.
Everything here can be restored by hand. First see that the set is whole:`,
    shell('sha256sum -c SHA256SUMS'),
  ]
  if (manifest.parts.includes('config'))
    sections.push(
      'Configuration (both .env, compose file, service folders, nginx): look at it, then copy what is needed.',
      shell('mkdir /tmp/config-of-the-set', 'tar -xvf config.tar -C /tmp/config-of-the-set'),
    )
  if (manifest.database) sections.push(...databaseSections(site, manifest.database, manifest))
  if (manifest.parts.includes('uploads'))
    sections.push(
      'Uploads; a name that is there twice counts in its last version, which tar leaves. uploads.jsonl has the sums. Newer files stay.',
      shell(`tar -xf uploads.tar -C ${site.folders.uploads}`, `chown -R 1000:1000 ${site.folders.uploads}`),
    )
  sections.push('Redis (cache and the queue of jobs) is in no backup.', '')
  return sections.join('\n\n')
}

function databaseSections(site: Site, { settings }: DatabaseState, { versions }: Manifest): string[] {
  const { name, user } = site.database
  const restored = `${name}_restored`
  const inContainer = `docker exec -i -u postgres ${site.project}-postgresql-1`
  const psql = (...sql: string[]) => `${inContainer} psql << 'SQL'\n${sql.join('\n')}\nSQL`
  const named = [
    ...(settings.roleParameters ?? []).map(({ role }) => role),
    ...(settings.grants ?? []).flatMap(({ grantee }) => grantee ?? []),
  ]
  const rename = (from: string, to: string) =>
    `ALTER DATABASE ${identifier(from)} RENAME TO ${identifier(to)};`
  return [
    `Database: into a fresh one beside the live one. On a bare machine first put docker/.env back and start PostgreSQL
(docker compose up -d postgresql). "already exists" from roles.sql is no matter.`,
    shell(
      `${inContainer} psql < roles.sql`,
      psql(`${createDatabase(restored, user, settings, versions.postgresql ?? '')};`),
      `${inContainer} pg_restore --exit-on-error -d ${identifier(restored)} < database.dump`,
      psql(...properties(restored, settings, named)),
    ),
    'Then swap the names; the site is off from the first line to the last. The old database stays until you drop it.',
    shell(
      `cd ${site.root}`,
      composeCommand(site, 'stop strapi-master strapi-slave'),
      psql(rename(name, `${name}_old`), rename(restored, name)),
      composeCommand(site, 'start strapi-master'),
    ),
  ]
}

function shell(...lines: string[]): string {
  return ['```sh', ...lines, '```'].join('\n')
}
