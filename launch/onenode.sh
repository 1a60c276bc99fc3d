#!/usr/bin/env bash
# One training run on this machine, where a signal may reach the first process alone: a pod, a pre-emptible machine.
# Paths are relative to the checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=${HF_HUB_OFFLINE-1}
source launch/signals.sh

usage() {
  cat <<'TEXT'
usage: launch/onenode.sh [--ranks N] [--master-port PORT] RECIPE [section.key=value ...]
  --ranks N             processes; without it one per GPU
  --master-port PORT    port of the rendezvous (29500), for a second run on one machine
example: launch/onenode.sh launch/recipes/llama3.2-1b/stage1.yaml seed=1
TEXT
}
fail() { echo "error: onenode: $*" >&2; exit 2; }

options=()
while [ $# -gt 0 ]; do
  case $1 in
    --ranks | --master-port) [[ ${2-} =~ ^[1-9][0-9]*$ ]] || fail "$1 needs a number, got ${2:-nothing}" ;;
  esac
  case $1 in
    --ranks) options+=(--num_accelerators "$2"); shift 2 ;;
    --master-port) options+=(--master_port "$2"); shift 2 ;;
    -h | --help) usage; exit 0 ;;
    -*) fail "unknown option $1; see launch/onenode.sh --help" ;;
    *) break ;;
  esac
done
[ $# -gt 0 ] || fail "no recipe; see launch/onenode.sh --help"
command -v pkill >/dev/null || fail "no pkill here, by which the ranks are told of signals; install procps"

# Below the runner is the launcher, below that the ranks; all in a session of its own, so that Ctrl-C reaches them from
# here alone.
ask_ranks() {
  local launcher
  launcher=$(pgrep -P "$runner") && pkill -USR1 -P "$launcher" && return
  kill -TERM -- "-$runner" || kill -TERM "$runner" # no rank yet, nothing to keep
}
end_ranks() { pkill -TERM -P "$runner"; }
run_launcher setsid deepspeed ${options[@]+"${options[@]}"} --module anchor.train "$@"
