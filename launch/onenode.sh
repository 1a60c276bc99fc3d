#!/usr/bin/env bash
# One training run on this machine, where a signal may reach the first process alone: a pod, a pre-emptible machine.
# Paths are relative to the checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=${HF_HUB_OFFLINE-1}

usage() {
  cat <<'TEXT'
usage: launch/onenode.sh [--ranks N] [--master-port PORT] RECIPE [section.key=value ...]
  --ranks N             processes; without it one per GPU, or one where there is no GPU
  --master-port PORT    port of the rendezvous (29500), for a second run on one machine
example: launch/onenode.sh launch/recipes/llama3.2-1b/stage1.yaml seed=1
TEXT
}
fail() { echo "error: onenode: $*" >&2; exit 2; }

ranks='' port=29500
while [ $# -gt 0 ]; do
  case $1 in
    --ranks | --master-port) [[ ${2-} =~ ^[1-9][0-9]{0,4}$ ]] || fail "$1 needs a number, got ${2:-nothing}" ;;
  esac
  case $1 in
    --ranks) ranks=$2; shift 2 ;;
    --master-port) port=$2; shift 2 ;;
    -h | --help) usage; exit 0 ;;
    -*) fail "unknown option $1; see launch/onenode.sh --help" ;;
    *) break ;;
  esac
done
[ $# -gt 0 ] || fail "no recipe; see launch/onenode.sh --help"
[ -x .venv/bin/python ] || fail "no .venv/bin/python here; run launch/setup.sh first"
exec .venv/bin/python -m launch.onenode "$port" "$ranks" "$@"
