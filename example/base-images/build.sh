#!/usr/bin/env bash
# Builds stand-ins for the base images out of Debian packages, for the trial and the tests on a machine
# that reaches no container registry. Standard output is one line an image, ready for an .env file.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

say() { printf '%s\n' "$*" >&2; }
die() {
  say "base-images: $*"
  exit 1
}

need() { command -v "$1" > /dev/null || die "$1 is missing. Install it: apt-get install $2"; }
need mmdebstrap mmdebstrap
need npm npm
need docker docker.io

source /etc/os-release
case $VERSION_CODENAME in
  bookworm) release=trixie ;; # Debian 12 has PostgreSQL 15 and Node 18
  *) release=$VERSION_CODENAME ;;
esac
if [[ ${1-} = older ]]; then
  [[ $ID = debian ]] || die "$ID has no Debian 12, and no container registry is in reach"
  release=bookworm
fi
architecture=$(dpkg --print-architecture)

# apt knows the host's own mirror, however it is written down; Origin leaves other people's packages out.
mirror=$(apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' \
  'Created-By: Packages' "Origin: ${ID^}" "Architecture: $architecture" |
  sed "s/ $VERSION_CODENAME/ $release/")
[[ -n $mirror ]] || die "apt has no list of the host's packages. Fetch it: apt-get update"
apt_options=$(apt-config dump | grep -E '^Acquire::(https?::Proxy|Check-)' || true)

# A company's proxy that opens TLS is trusted by the host; a build inside an image must trust it too.
authorities=/etc/ssl/certs/ca-certificates.crt
[[ -r $authorities ]] || die "$authorities is missing. Install it: apt-get install ca-certificates"
registry=$(npm config get registry 2> /dev/null)

# Changes whenever an image would turn out different, apart from newer packages.
recipe=$(cat build.sh Dockerfile "$authorities" <(echo "$mirror $apt_options $registry") | sha256sum | cut -c 1-16)

# Images are recognised by this label, and what is built on the first one inherits it.
built() {
  docker image ls --format '{{.Repository}}:{{.Tag}}' \
    --filter "label=bob-standin=$recipe" --filter "reference=bob-standin/$1:*" | head -n 1
}

base=bob-standin/debian:$release

# One build at a time on this host, from whichever checkout; it also clears away what a killed one left. Children hold
# the lock too, so it is free only when none of them runs any more.
work=${TMPDIR:-/tmp}/bob-standin
exec {lock}> "$work.lock"
flock "$lock"
! grep -qF " $work/" /proc/self/mounts || die "something is mounted under $work, unmount it first"
rm -rf --one-file-system "$work"
mkdir "$work"
trap 'rm -rf --one-file-system "$work"' EXIT

# Shows what a command wrote only when it failed.
logged() {
  "$@" > "$work/log" 2>&1 || {
    tail -n 40 "$work/log" >&2
    die "$1 failed, its last lines are above"
  }
}

if [[ -z $(built debian) ]]; then
  [[ $EUID = 0 ]] || die "building $base needs root"
  say "Building $base"
  echo "$mirror" > "$work/sources.list"
  echo "$apt_options" > "$work/apt.conf"
  cp "$authorities" "$work/host.crt"
  # What debian:*-slim leaves out as well.
  mkdir --mode=1777 "$work/tmp"
  # In a mount namespace of its own: a killed mmdebstrap must not leave /sys and /dev/shm mounted in a folder that
  # the next run deletes.
  TMPDIR=$work/tmp logged unshare --mount mmdebstrap --mode=root \
    --variant=minbase --include=ca-certificates --aptopt="$work/apt.conf" \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/info/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --customize-hook="copy-in $work/host.crt /usr/local/share/ca-certificates" \
    --customize-hook='chroot "$1" update-ca-certificates' \
    "$release" "$work/base.tar" "$work/sources.list"
  docker import --change "LABEL bob-standin=$recipe" --change 'CMD ["bash"]' "$work/base.tar" "$base" > /dev/null
fi

node_packages() {
  local cpu=${architecture/amd64/x64}
  npm pack --silent --pack-destination "$1" "node-linux-$cpu@20" npm@10 yarn@1 corepack@0.34 > /dev/null
}

# stand_in SETTING NAME COMMAND: COMMAND --version tells the major version that becomes the tag.
stand_in() {
  local image version
  image=$(built "$2")
  if [[ -z $image ]]; then
    say "Building bob-standin/$2"
    mkdir "$work/$2"
    if [[ $2 = node ]]; then node_packages "$work/node"; fi
    DOCKER_BUILDKIT=1 logged docker build --file Dockerfile --target "$2" --iidfile "$work/$2.id" \
      --build-arg "BASE=$base" --build-arg "REGISTRY=${registry%/}" "$work/$2"
    version=$(docker run --rm "$(< "$work/$2.id")" "$3" --version | grep -oE '[0-9]+' | head -n 1)
    image=bob-standin/$2:$version
    docker tag "$(< "$work/$2.id")" "$image"
  fi
  echo "$1=$image"
}

stand_in POSTGRES_IMAGE postgres postgres
if [[ ${1-} = older ]]; then exit; fi
stand_in NODE_IMAGE node node
stand_in REDIS_IMAGE redis redis-server
say 'These images stand in for the official ones in the trial and the tests. Never run them in production.'
