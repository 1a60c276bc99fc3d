#!/usr/bin/env bash
# What the tests marked `cluster` need on Debian or Ubuntu: ssh between namespaces, pdsh, SLURM. Root only; no questions.
set -euo pipefail
wanted=(iproute2 util-linux procps openssh-server openssh-client pdsh munge slurmctld slurmd slurm-client)
missing=()
for package in "${wanted[@]}"; do
  dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0
[ "$(id -u)" = 0 ] || { echo "install_debian: needs root to install ${missing[*]}" >&2; exit 2; }
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then # the packages would start their services; none is wanted
  printf '#!/bin/sh\nexit 101\n' > "$policy"
  chmod 755 "$policy"
  trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
