/** RECOVERY.md of a set: how to restore it with nothing but standard tools. */
import type { Site } from '../settings.mts'
import type { Manifest } from './manifest.mts'

export function recovery(site: Site, name: string, manifest: Manifest): string {
  const database = site.database.name
  const container = `${site.project}-postgresql-1`
  const lines = [
    `# Backup ${name}`,
    '',
    `Taken ${manifest.createdAt}, release ${manifest.release ?? 'unknown'}, PostgreSQL ${manifest.versions.postgresql ?? 'unknown'}.`,
    'Everything here can be restored by hand. First see that the set is whole:',
    '',
    '    sha256sum -c SHA256SUMS',
    '',
  ]
  if (manifest.parts.includes('config')) {
    lines.push(
      'Configuration (both .env, compose file, service folders, nginx): look at it, then copy what is needed.',
      '',
      '    tar -xvf config.tar -C /an/empty/folder',
      '',
    )
  }
  if (manifest.parts.includes('database')) {
    const sql = `docker exec -i -u postgres ${container} psql`
    lines.push(
      'Database: into a fresh one beside the live one. On a bare machine first put docker/.env back and start PostgreSQL',
      '(docker compose up -d postgresql). "already exists" from roles.sql is no matter.',
      '',
      `    ${sql} < roles.sql`,
      `    ${sql} -c 'CREATE DATABASE "${database}_restored" OWNER "${site.database.user}" TEMPLATE template0'`,
      `    docker exec -i -u postgres ${container} pg_restore --exit-on-error -d "${database}_restored" < database.dump`,
      '',
      'Then swap the names; the site is off from the first line to the last. The old database stays until you drop it.',
      '',
      '    docker compose stop strapi-master strapi-slave',
      `    ${sql} -c 'ALTER DATABASE "${database}" RENAME TO "${database}_old"'`,
      `    ${sql} -c 'ALTER DATABASE "${database}_restored" RENAME TO "${database}"'`,
      '    docker compose start strapi-master',
      '',
    )
  }
  if (manifest.parts.includes('uploads')) {
    lines.push(
      'Uploads; a name that is there twice counts in its last version, which tar leaves. uploads.jsonl has the sums. Newer files stay.',
      '',
      '    tar -xf uploads.tar -C UPLOADS_VOLUME && chown -R 1000:1000 UPLOADS_VOLUME',
      '',
    )
  }
  lines.push('Redis (cache and the queue of jobs) is in no backup.', '')
  return lines.join('\n')
}
