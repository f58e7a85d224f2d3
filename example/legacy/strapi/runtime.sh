#!/bin/sh
# Everything at each start: minutes for a site of some size.
set -e
cd /app/bob
if [ -f package-lock.json ]; then
  npm install --no-save --no-audit --no-fund
  npm run build
  export NODE_ENV=production
  npm start
else
  yarn install
  yarn build
  export NODE_ENV=production
  yarn start
fi
