#!/bin/sh
# Creates the cluster on the first start, then becomes the server. Killed at any moment, the next start finishes
# or begins again. POSIX sh: the image is alpine or Debian.
set -eu
umask 077

say() { echo "postgresql: $*" >&2; }
die() {
  say "$@"
  exit 1
}

# A cluster counts once its PG_VERSION is in PGDATA, and that file comes last. Until then it is made in one
# folder (thrown away when a start finds it) and moved out of the other.
making=$PGDATA/.initialising
made=$PGDATA/.initialised

config=/etc/postgresql/postgresql.conf
major=$(postgres --version | sed 's/[^0-9]*\([0-9]*\).*/\1/')

check_folder() {
  if [ -e "$PGDATA/PG_VERSION" ]; then
    found=$(cat "$PGDATA/PG_VERSION")
    [ "$found" = "$major" ] || die "the data is of PostgreSQL $found, this image is PostgreSQL $major. Nothing was" \
      "changed. Set POSTGRES_IMAGE in docker/.env to an image of PostgreSQL $found and rebuild, or restore a dump" \
      "into an empty POSTGRES_VOLUME."
  elif [ ! -e "$made" ]; then
    others=$(find "$PGDATA" -mindepth 1 -maxdepth 1 ! -name lost+found ! -name .initialising)
    [ -z "$others" ] || die "$PGDATA is not empty and holds no PG_VERSION. Nothing was changed. Set POSTGRES_VOLUME" \
      "in docker/.env to an empty folder or to the data of an existing cluster."
    [ -n "${POSTGRES_PASSWORD:-}" ] || die 'POSTGRES_PASSWORD is not set. Set it in docker/.env.'
    case $POSTGRES_USER in
      postgres | pg_*) die "POSTGRES_USER must not be $POSTGRES_USER: Strapi never works as a superuser." ;;
    esac
    case $POSTGRES_DB in
      postgres | template0 | template1) die "POSTGRES_DB must not be $POSTGRES_DB: PostgreSQL has one already." ;;
    esac
  fi
}

become_postgres() {
  # PGDATA and the dumps are folders of the host, made by whoever made them.
  mkdir -p "$PGDATA" /backup
  find "$PGDATA" ! -user postgres -exec chown -h postgres:postgres {} +
  chown postgres:postgres /backup
  chmod 0700 "$PGDATA"
  chmod 0711 /backup # whoever makes a backup takes its file from here by name
  # Which of them there is depends on the image.
  for drop in gosu su-exec; do
    if command -v "$drop" > /dev/null; then exec "$drop" postgres "$0" "$@"; fi
  done
  exec setpriv --reuid=postgres --regid=postgres --init-groups "$0" "$@"
}

make_cluster() {
  say "creating the database $POSTGRES_DB"
  rm -rf "$making"
  # ICU sorts French; C.UTF-8 is the one libc locale that glibc and musl both have.
  initdb --pgdata="$making" --username=postgres --encoding=UTF8 --locale=C.UTF-8 \
    --locale-provider=icu --icu-locale=fr-FR --data-checksums \
    --auth-local=peer --auth-host=scram-sha-256 --no-instructions > /dev/null

  # Nobody else can reach this server: its socket is in the folder itself. It never logs a statement, because one
  # holds the password.
  pg_ctl --pgdata="$making" --wait --silent start --options="-c config_file=$config -c listen_addresses='' \
    -c unix_socket_directories='$making' -c log_min_messages=fatal -c log_min_error_statement=panic \
    -c log_min_duration_statement=-1"
  psql --no-psqlrc --quiet --set=ON_ERROR_STOP=1 --set=VERBOSITY=terse \
    --host="$making" --username=postgres --dbname=postgres << 'SQL'
\getenv user POSTGRES_USER
\getenv password POSTGRES_PASSWORD
\getenv database POSTGRES_DB
CREATE ROLE :"user" LOGIN PASSWORD :'password';
CREATE DATABASE :"database" OWNER :"user";
SQL
  pg_ctl --pgdata="$making" --wait --silent stop --mode=fast
  sync
  mv "$making" "$made"
}

# Each move is a rename, so a killed one goes on where it stopped.
take_cluster() {
  for entry in "$made"/*; do
    [ "$entry" = "$made/PG_VERSION" ] || mv "$entry" "$PGDATA/"
  done
  sync
  mv "$made/PG_VERSION" "$PGDATA/"
}

check_folder
[ "$(id -u)" != 0 ] || become_postgres "$@"

if [ ! -e "$PGDATA/PG_VERSION" ]; then
  [ -e "$made" ] || make_cluster
  take_cluster
fi
rm -rf "$made"

unset POSTGRES_PASSWORD
exec postgres -D "$PGDATA" -c config_file="$config" "$@"
