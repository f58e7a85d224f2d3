/** Commands in PostgreSQL's container as data: its own tools, as the superuser on the local socket, without a password. */

import { target, type Server } from '../compose.mts'
import { isDryRun } from '../report.mts'

/** What sessions call themselves, so that the next run finds those that a kill left. */
export const backupSession = 'strapi-blue-green-backup'
export const restoreSession = 'strapi-blue-green-restore'

/** psql for a conversation. It stops at the first error. */
export const psql = (server: Server, database: string, session: string) => [
  ...asSuperuser(server, '--interactive', `--env=PGAPPNAME=${session}`),
  'psql',
  '--no-psqlrc',
  '--quiet',
  '--tuples-only',
  '--no-align',
  '--set=ON_ERROR_STOP=1',
  '--dbname',
  database,
]

export interface Dump {
  database: string
  /** Name of an exported snapshot. */
  snapshot: string
  compression: 'zstd' | 'gzip'
  /** Name in the folder that both sides see; undefined: to stdout. */
  file: string | undefined
}

export const dump = (server: Server, { database, snapshot, compression, file }: Dump) => [
  ...asSuperuser(server, `--env=PGAPPNAME=${backupSession}`),
  ...privately('pg_dump'),
  '--format=custom',
  // Before 16 there is no word for gzip, which is the default.
  ...(compression === 'gzip' ? [] : [`--compress=${compression}`]),
  `--snapshot=${snapshot}`,
  // Behind somebody's ALTER TABLE, which waits for the snapshot, it would wait for ever, and all visitors with it.
  '--lock-wait-timeout=10s',
  ...(file === undefined ? [] : [`--file=/backup/${file}`]),
  '--dbname',
  database,
]

/** Roles with their password hashes, and tablespaces: what a dump of one database leaves out. */
export const dumpRoles = (server: Server, file: string | undefined) => [
  ...asSuperuser(server, `--env=PGAPPNAME=${backupSession}`),
  ...privately('pg_dumpall'),
  '--globals-only',
  ...(file === undefined ? [] : [`--file=/backup/${file}`]),
]

/** Reads a dump from stdin to its end, and writes nothing. */
export const readDump = (containerId: string) => [
  ...asSuperuser(containerId, '--interactive'),
  'pg_restore',
  '--file=/dev/null',
]

/** Restores a dump from stdin into a database that is empty, whatever roles it names. */
export const restoreDump = (containerId: string, database: string) => [
  ...asSuperuser(containerId, '--interactive'),
  'pg_restore',
  '--exit-on-error',
  '--no-owner',
  '--no-acl',
  '--dbname',
  database,
]

export interface FileRestore {
  database: string
  /** Name in the folder that both sides see; readable by root alone. */
  file: string
  jobs: number
  /** Role that gets everything, instead of the roles in the dump. */
  owner: string | undefined
}

/** Restores a dump in several sessions at once; a crash in between costs nothing but the restored database. */
export const restoreFile = (containerId: string, restore: FileRestore) => [
  ...asRestorer(containerId),
  'pg_restore',
  '--exit-on-error',
  `--jobs=${restore.jobs}`,
  ...intoDatabase(restore),
  `/backup/${restore.file}`,
]

/**
 * Restores what can be read of a damaged dump: pg_restore ends at what it cannot decompress, so each table has one of its own,
 * and indexes and constraints have one that does not look at data. After a kill it goes on in the container until the file is
 * removed, which must come before its database is.
 */
export const restoreReadable = (containerId: string, restore: FileRestore) => [
  ...asRestorer(containerId),
  'sh',
  '-c',
  `file=$0; failed=0
judge() { [ "$1" != 137 ] || exit 137; [ "$1" = 0 ] || failed=1; }
pg_restore --section=pre-data "$@" "$file"; judge $?
entries=$(pg_restore --section=data --list "$file"); judge $?
while IFS= read -r entry; do
  case $entry in ';'* | '') continue ;; esac
  echo "$entry" | pg_restore --section=data --use-list=/dev/stdin "$@" "$file"; judge $?
done << END
$entries
END
pg_restore --section=post-data "$@" "$file"; judge $?
exit $failed`,
  `/backup/${restore.file}`,
  ...intoDatabase(restore),
]

function asRestorer(containerId: string): string[] {
  return [
    'docker',
    'exec',
    '--user=root',
    '--env=PGUSER=postgres',
    `--env=PGAPPNAME=${restoreSession}`,
    `--env=PGOPTIONS=${unbound} ${writing()} -c synchronous_commit=off -c wal_compression=off -c maintenance_work_mem=256MB`,
    containerId,
  ]
}

function intoDatabase({ database, owner }: FileRestore): string[] {
  return [...(owner === undefined ? [] : ['--no-owner', `--role=${owner}`]), `--dbname=${database}`]
}

/** A file that PostgreSQL's user wrote becomes the caller's. */
export const takeOver = (containerId: string, file: string, owner: string) => {
  return [...asRoot(containerId), 'chown', owner, `/backup/${file}`]
}

/** What holds a password must not be in the server's log. */
export const unlogged = `SET log_min_duration_statement = -1;
SET log_min_error_statement = panic;`

/** Runs a file of the folder that both sides see, as the superuser: all of it or nothing. @param goesOn instead, also after a statement that failed */
export const runFile = (containerId: string, file: string, goesOn: boolean) => [
  'docker',
  'exec',
  '--user=root',
  '--env=PGUSER=postgres',
  containerId,
  'psql',
  '--no-psqlrc',
  '--quiet',
  ...(goesOn ? [] : ['--set=ON_ERROR_STOP=1', '--single-transaction']),
  '--set=VERBOSITY=terse',
  '--dbname=postgres',
  `--file=/backup/${file}`,
]

/** Gives the role in the container's environment the password that is there, too, where PostgreSQL was made with another one. */
export const setPassword = (containerId: string) => [
  ...asSuperuser(containerId),
  'sh',
  '-c',
  `psql --no-psqlrc --quiet --set=ON_ERROR_STOP=1 --set=VERBOSITY=terse --dbname=postgres << 'SQL'
${unlogged}
\\getenv user POSTGRES_USER
\\getenv password POSTGRES_PASSWORD
SELECT format('CREATE ROLE %I LOGIN', :'user') WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = :'user') \\gexec
ALTER ROLE :"user" PASSWORD :'password';
SQL`,
]

/** Device and number of the folder that it writes to. */
export const lookAtIncoming = (containerId: string) => [
  ...asRoot(containerId),
  'stat',
  '-c',
  '%d:%i',
  '/backup',
]

export const listIncoming = (containerId: string) => [...asRoot(containerId), 'ls', '-A', '/backup']

export const removeIncoming = (containerId: string, files: string[]) => {
  return [...asRoot(containerId), 'rm', '-f', '--', ...files.map((file) => `/backup/${file}`)]
}

/** Whatever a database or a role sets for its sessions, ours are not bound by it. */
const unbound = '-c statement_timeout=0 -c lock_timeout=0 -c idle_in_transaction_session_timeout=0'
const writing = () => `-c default_transaction_read_only=${isDryRun() ? 'on' : 'off'}`

function asSuperuser(server: Server, ...options: string[]): string[] {
  const own = ['--env=PGCLIENTENCODING=UTF8', `--env=PGOPTIONS=${unbound} ${writing()}`]
  return ['docker', 'exec', '--user=postgres', ...own, ...options, ...target(server)]
}

function asRoot(containerId: string): string[] {
  return ['docker', 'exec', '--user=root', containerId]
}

/** Nobody but its owner may read what the command writes. */
function privately(command: string): string[] {
  return ['sh', '-c', 'umask 077; exec "$0" "$@"', command]
}
