#!/bin/sh
# Makes the cluster on the first start. As in the official image, POSTGRES_USER is the superuser, and there is no other.
set -e
mkdir -p "$PGDATA"
chown -R postgres:postgres "$PGDATA"
for drop in gosu su-exec; do
  if command -v "$drop" > /dev/null; then break; fi
done

if [ ! -s "$PGDATA/PG_VERSION" ]; then
  "$drop" postgres initdb --pgdata="$PGDATA" --username="$POSTGRES_USER" --encoding=UTF8 --locale=C.UTF-8 > /dev/null
  echo 'host all all all scram-sha-256' >> "$PGDATA/pg_hba.conf"
  "$drop" postgres pg_ctl --pgdata="$PGDATA" --wait start -o "-c listen_addresses=''" > /dev/null
  psql --username="$POSTGRES_USER" --dbname=postgres --set=user="$POSTGRES_USER" --set=db="$POSTGRES_DB" << SQL
ALTER ROLE :"user" PASSWORD '$POSTGRES_PASSWORD';
CREATE DATABASE :"db" OWNER :"user";
SQL
  "$drop" postgres pg_ctl --pgdata="$PGDATA" --wait stop > /dev/null
fi

exec "$drop" postgres postgres -D "$PGDATA" -c listen_addresses='*'
