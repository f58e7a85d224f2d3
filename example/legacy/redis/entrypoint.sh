#!/bin/sh
# Makes a password up on the first start, and writes it to Strapi's .env by way of the mounted project.
set -e
file=/data/redis_password.txt
[ -s "$file" ] || head -c 24 /dev/urandom | base64 | tr -d '/+=\n' > "$file"
password=$(cat "$file")
env=/app/bob/.env
if grep -q '^REDIS_PASSWORD=' "$env"; then
  sed -i "s/^REDIS_PASSWORD=.*/REDIS_PASSWORD=$password/" "$env"
else
  echo "REDIS_PASSWORD=$password" >> "$env"
fi
exec redis-server /etc/redis/redis.conf --requirepass "$password"
