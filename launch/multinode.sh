#!/usr/bin/env bash
# One training run on the hosts of a hostfile, by DeepSpeed's launcher over pdsh and ssh. Paths are relative to the checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"
source launch/signals.sh

usage() {
  cat <<'TEXT'
usage: launch/multinode.sh --hostfile FILE [options] RECIPE [section.key=value ...]
  --hostfile FILE       one line `HOST slots=GPUS` per host; the first one holds rank 0
  --interface NAME      network interface of the ranks' traffic (the one that leads from host to host)
  --master-addr ADDR    address of the first host (what the other hosts resolve its name to)
  --master-port PORT    port of the rendezvous there (29500)
  --env NAME=VALUE      a further variable for the ranks; may be repeated
  --no-check            do not examine the hosts first; --interface and --master-addr are then needed
  --dry-run             show what would run where; contact no host
example: launch/multinode.sh --hostfile launch/hostfile.example launch/recipes/llama3.2-1b/stage1.yaml seed=1
TEXT
}
fail() { echo "error: multinode: $*" >&2; exit 2; }
quote_all() { printf ' %q' "$@"; }

hostfile= interface= address= port=29500 check=yes dry= extra=()
while [ $# -gt 0 ]; do
  case $1 in
    --hostfile | --interface | --master-addr | --master-port | --env) [ $# -gt 1 ] || fail "$1 needs a value" ;;
  esac
  case $1 in
    --hostfile) hostfile=${2-}; shift 2 ;;
    --interface) interface=${2-}; shift 2 ;;
    --master-addr) address=${2-}; shift 2 ;;
    --master-port) port=${2-}; shift 2 ;;
    --env) extra+=("${2-}"); shift 2 ;;
    --no-check) check=; shift ;;
    --dry-run) dry=yes; shift ;;
    -h | --help) usage; exit 0 ;;
    -*) fail "unknown option $1; see launch/multinode.sh --help" ;;
    *) break ;;
  esac
done
[ -n "$hostfile" ] || fail "no --hostfile; see launch/multinode.sh --help"
[ -f "$hostfile" ] || fail "$hostfile: no such hostfile; write one line \`HOST slots=GPUS\` per host"
[ $# -gt 0 ] || fail "no recipe; see launch/multinode.sh --help"
recipe=$1
for one in "$@"; do
  case $one in --resume) ;; -*) fail "options stand before the recipe, got $one after it" ;; esac
done

# What the ranks' environment needs beyond the login shell's. DeepSpeed writes every value into a double-quoted word of a
# remote command line, and pdsh replaces %h and %n in it.
in_double_quotes() { sed -e 's/[\\$"`]/\\&/g' -e 's/%/%%/g' <<<"$1"; }
deepspeed_env() {
  local name
  for name in PATH HF_HUB_OFFLINE OMP_NUM_THREADS DS_ACCELERATOR CUDA_HOME LD_LIBRARY_PATH TORCH_EXTENSIONS_DIR \
    $(compgen -e | grep -E '^(NCCL|GLOO|TORCH_NCCL|FI|UCX)_' | sort); do
    [ -z "${!name+set}" ] || echo "$name=$(in_double_quotes "${!name}")"
  done
  echo PYTHONFAULTHANDLER=1 # a rank that dies in C++ shows its Python traceback
  for name in ${extra[@]+"${extra[@]}"}; do echo "${name%%=*}=$(in_double_quotes "${name#*=}")"; done
}

in_single_quotes() { printf "'%s'" "${1//\'/\'\\\'\'}"; }

# DeepSpeed puts an argument with a blank into double quotes, escaping only quotes in it, and leaves one without as it
# is; a remote shell then reads the line.
for_pdsh() {
  local quoted
  case $1 in
    *' '*) quoted=$(sed -e 's/[\\$`]/\\&/g' <<<"$1") ;;
    *) quoted=$(in_single_quotes "$1") ;;
  esac
  printf '%s' "${quoted//%/%%}"
}

export HF_HUB_OFFLINE=${HF_HUB_OFFLINE-1}
[ -z "$interface" ] || export GLOO_SOCKET_IFNAME=$interface NCCL_SOCKET_IFNAME=$interface
if [ -n "$dry" ]; then
  : "${address:=<what the other hosts resolve the first host to>}" "${GLOO_SOCKET_IFNAME:=<interface from host to host>}"
  export GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME-$GLOO_SOCKET_IFNAME}
elif [ -n "$check" ]; then
  agreed=$(python -m anchor.doctor --hostfile "$hostfile" --master-port "$port" "$@")
  read -r found_address found_interface <<<"$agreed"
  [ -n "$address" ] || address=$found_address
  if [ -z "${GLOO_SOCKET_IFNAME-}" ]; then
    [ "$found_interface" != - ] || fail "the hosts reach one another by interfaces of different names; use --interface"
    export GLOO_SOCKET_IFNAME=$found_interface NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME-$found_interface}
  fi
  [ "$address" != - ] || fail "the first host's name does not resolve on the hosts; use --master-addr"
else
  [ -n "$address" ] && [ -n "${GLOO_SOCKET_IFNAME-}" ] || fail "--no-check needs --master-addr and --interface"
fi

DS_ENV_FILE=$(mktemp) # by its full name, so that a .deepspeed_env of another run is neither read nor changed
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
deepspeed_env > "$DS_ENV_FILE"
arguments=()
for one in "$@"; do arguments+=("$(for_pdsh "$one")"); done
command=(deepspeed --hostfile "$hostfile" --launcher pdsh --force_multi --no_ssh_check --master_addr "$address"
  --master_port "$port" --module anchor.train "${arguments[@]}")

if [ -n "$dry" ]; then
  awk '{ sub(/#.*/, "") } NF { n = $2; sub(/slots=/, "", n)
         printf "%s: ranks %d to %d of:%s\n", $1, first, first + n - 1, what; first += n }' first=0 \
    what="$(quote_all python -m anchor.train "$@")" "$hostfile"
  echo "environment on every host (.deepspeed_env):"
  sed 's/^/  /' "$DS_ENV_FILE"
  echo "by:$(quote_all "${command[@]}")"
  exit 0
fi

# The ranks are told themselves: DeepSpeed's own handling cuts their output off first.
hosts=$(awk '{ sub(/#.*/, "") } NF { print $1 }' "$hostfile" | paste -sd, -)
ranks=$(sed -e 's/[][\.*^$(){}?+|/]/[&]/g' -e 's/\[\^\]/\\^/g' <<<"-u -m anchor.train --local_rank=X $recipe")
ranks=${ranks/X/[0-9]*} # which does not match the command line of the pkill itself
ask_ranks() { PDSH_RCMD_TYPE=ssh pdsh -w "$hosts" "pkill -USR1 -f -- $(in_single_quotes "$ranks")"; }
end_ranks() { kill -TERM "$runner" 2>/dev/null; }
run_launcher "${command[@]}"
