/** RECOVERY.md of a set: how to restore it with nothing but standard tools. */
import { shellQuoted } from '../command.mts'
import { composeCommand, type Site } from '../settings.mts'
import { createDatabase, identifier, properties } from './databases.mts'
import type { DatabaseState, Manifest } from './manifest.mts'

/** Shell commands for a set-up that is not this one. */
export interface ByHand {
  /** Runs what follows it in PostgreSQL's container, as a superuser. */
  inContainer: string
  stop: string
  start: string
}

/** Markdown whose code blocks can be copied into a shell as they are, in the folder of the set. */
export function recovery(site: Site, name: string, manifest: Manifest, byHand?: ByHand): string {
  const uploads = shellQuoted(site.folders.uploads)
  const sections = [
    `# Backup ${name}`,
    `Taken ${manifest.createdAt}, release ${manifest.release ?? 'unknown'}, PostgreSQL ${manifest.versions.postgresql ?? 'unknown'}.
Everything here can be restored by hand. First see that the set is whole:`,
    shell('sha256sum -c SHA256SUMS'),
  ]
  if (manifest.parts.includes('config'))
    sections.push(
      'Configuration (both .env, compose file, service folders, nginx): look at it, then copy what is needed.',
      shell('mkdir -m 700 ~/config-of-the-set && tar -xvf config.tar -C ~/config-of-the-set'),
    )
  if (manifest.database)
    sections.push(...databaseSections(site, manifest.database, manifest, byHand ?? byHandOf(site)))
  if (manifest.parts.includes('uploads'))
    sections.push(
      'Uploads; a name that is there twice counts in its last version, which tar leaves. uploads.jsonl has the sums. Newer files stay.',
      shell(`tar -xf uploads.tar -C ${uploads}${byHand ? '' : ` && chown -R 1000:1000 ${uploads}`}`),
    )
  sections.push('Redis (cache and the queue of jobs) is in no backup.', '')
  return sections.join('\n\n')
}

function byHandOf(site: Site): ByHand {
  const command = (rest: string) => `(cd ${shellQuoted(site.root)} && ${composeCommand(site, rest)})`
  return {
    inContainer: `docker exec -i -u postgres ${site.project}-postgresql-1`,
    stop: command('stop strapi-master strapi-slave'),
    start: command('start strapi-master'),
  }
}

function databaseSections(
  site: Site,
  { settings }: DatabaseState,
  { versions }: Manifest,
  { inContainer, stop, start }: ByHand,
): string[] {
  const { name, user } = site.database
  const restored = `${name}_restored`
  const psql = (options: string, ...sql: string[]) =>
    `${inContainer} psql --set=ON_ERROR_STOP=1${options} << 'SQL'\n${sql.join('\n')}\nSQL`
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
      psql('', `${createDatabase(restored, user, settings, versions.postgresql ?? '')};`),
      `${inContainer} pg_restore --exit-on-error -d ${identifier(restored)} < database.dump`,
      psql('', ...properties(restored, settings, named)),
    ),
    'When nothing of that has failed, swap the names; the site is off from the first line to the last. The old database stays until you drop it.',
    shell(stop, psql(' --single-transaction', rename(name, `${name}_old`), rename(restored, name)), start),
  ]
}

function shell(...lines: string[]): string {
  return ['```sh', ...lines, '```'].join('\n')
}
