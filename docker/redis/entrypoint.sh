#!/bin/sh
# Starts Redis as its own user. POSIX sh: the image is alpine or Debian.
set -eu

if [ -z "${REDIS_PASSWORD:-}" ]; then
  echo 'redis: REDIS_PASSWORD is not set. Set it in docker/.env and in the .env of Strapi (openssl rand -base64 32).' >&2
  exit 1
fi

# Redis takes a SHA-256 in place of a password, so no character needs quoting, and the password is in no file and
# no process list. ACL is refused too, or a client could give itself back the rest. Unlike rename-command, this
# does not make an append-only file unreadable that holds one of the commands.
hash=$(printf %s "$REDIS_PASSWORD" | sha256sum | cut -d ' ' -f 1)
users=/run/redis-users.conf
rm -f "$users"
(
  umask 077
  echo "user default on #$hash ~* &* +@all -flushdb -flushall -config -acl" > "$users"
)
unset REDIS_PASSWORD REDISCLI_AUTH

chown redis:redis "$users"
find /data ! -user redis -exec chown -h redis:redis {} +

# Which of them there is depends on the image.
for drop in gosu su-exec; do
  if command -v "$drop" > /dev/null; then
    exec "$drop" redis redis-server /etc/redis/redis.conf "$@"
  fi
done
exec setpriv --reuid=redis --regid=redis --init-groups redis-server /etc/redis/redis.conf "$@"
