#!/bin/sh
# Starts Strapi with hot reload on the project that is mounted at /app/bob.
set -eu
cd /app/bob

if [ -f yarn.lock ] && [ -f package-lock.json ]; then
  echo 'Both yarn.lock and package-lock.json: remove the stale one.' >&2
  exit 1
fi

# As in Dockerfile: the project's own yarn, whatever the base image brings.
if [ "$(id -u)" = 0 ] && [ ! -f package-lock.json ]; then
  checked_in=$(cat .yarnrc.ym[l] 2>/dev/null | sed -n "s/^yarnPath: *[\"']*\([^\"']*\).*/\1/p")
  version=$(node -p "/^yarn@([^+]+)/.exec(require('./package.json').packageManager)?.[1] ?? ''")
  if [ -n "$checked_in" ]; then
    rm -f /usr/local/bin/yarn
    printf '#!/bin/sh\nexec node "/app/bob/%s" "$@"\n' "$checked_in" >/usr/local/bin/yarn
    chmod 755 /usr/local/bin/yarn
  elif [ -f .yarnrc.yml ] && [ "$(cd / && yarn --version)" != "$version" ]; then
    npm install --global --force "@yarnpkg/cli-dist@${version:-4}"
  elif ! command -v yarn >/dev/null; then
    npm install --global "yarn@${version:-1}"
  fi
fi

# As the owner of the project, so that what is installed and generated here belongs to the developer.
owner=$(stat -c %u .)
if [ "$(id -u)" = 0 ] && [ "$owner" != 0 ]; then
  export HOME=/tmp/home
  install -d -o "$owner" -m 700 "$HOME"
  exec setpriv --reuid "$owner" --regid "$(stat -c %g .)" --clear-groups sh "$0"
fi

if [ -f package-lock.json ]; then
  npm install --no-audit --no-fund
  exec npm run develop
fi
yarn install
exec yarn develop
