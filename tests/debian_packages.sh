#!/usr/bin/env bash
# The Debian packages of the servers in `make test-services`: Ceph and Postgres. Installs what is missing, as root.
# Two calls at once wait for each other; the second finds nothing missing.
set -euo pipefail
exec 9> "${TMPDIR:-/tmp}/ddpm-debian-packages.lock"
flock 9
missing=()
for package in radosgw ceph-mon ceph-osd ceph-common postgresql; do
  [ "$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
done
[ ${#missing[@]} = 0 ] && exit
echo "installing ${missing[*]}"
sudo=()
[ "$(id -u)" = 0 ] || sudo=(sudo)
"${sudo[@]}" apt-get update -qq
# RUNLEVEL: where systemd runs, Debian's own units must not start.
"${sudo[@]}" env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
  apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null 9>&-
