#!/usr/bin/env bash
# One training run on the hosts of a hostfile, by DeepSpeed's launcher over pdsh and ssh. Paths are relative to the checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"

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
  echo ANCHOR_END_WITH_PARENT=yes # a rank whose launcher was killed would train on
  echo "ANCHOR_FINISHED_FILE=$finished"
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

finished=/tmp/anchor-finished-$(date +%s)-$$-$RANDOM # rank 0 makes it on the first host; see prove_finished
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

# The processes above the ranks handle no signal as a run needs it, and turn death by one into exit code 0. So this script
# 1. asks the ranks itself for a checkpoint, at the first signal; each host tries until it has some. Signals of the next
#    2 s are the same one; a later one ends everything.
# 2. believes a 0 only with the file that rank 0 leaves when the run is finished.
# 3. ends what an unfinished run has left on the hosts.
hosts=$(awk '{ sub(/#.*/, "") } NF { print $1 }' "$hostfile" | paste -sd, -)
in_regex() { sed -e 's/[][\.*^$(){}?+|/]/[&]/g' -e 's/\[\^\]/\\^/g' <<<"$1"; }
# Neither matches the command line of the pkill itself.
ranks="$(in_regex '-u -m anchor.train --local_rank=')[0-9]* $(in_regex "$recipe")"
launchers="[d]eepspeed.launcher.launch .*--master_port=$port .*$(in_regex "anchor.train $recipe")"
on_hosts() { PDSH_RCMD_TYPE=ssh PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND-} -o ConnectTimeout=10" pdsh -S -w "$@"; }
tell() { printf 'pkill -%s -f -- %s' "$1" "$(in_single_quotes "${2//%/%%}")"; } # SIGNAL PATTERN
ask_ranks() { on_hosts "$hosts" "for i in 1 2 3 4 5 6 7 8 9 10; do $(tell USR1 "$ranks") && break; sleep 1; done"; }
end_orphans() { on_hosts "$hosts" "$(tell KILL "$launchers"); true" >/dev/null 2>&1 || true; }
prove_finished() { on_hosts "${hosts%%,*}" "rm -- $finished" >/dev/null 2>&1; }

signals=0 asked_at=0 asking=
on_signal() {
  signals=$((signals + 1))
  local now=${EPOCHREALTIME/[.,]/}
  if [ $signals = 1 ]; then
    asked_at=$now
    echo "asking all ranks for a checkpoint; a signal later than 2 s ends them at once" >&2
    ask_ranks >&2 &
    asking=$!
  elif [ $((now - asked_at)) -gt 2000000 ]; then
    kill -TERM "$runner" 2>/dev/null || true
  fi
}
wait_for() { # PROCESS: its exit code, in `code`
  local seen
  while :; do
    seen=$signals code=0
    wait "$1" || code=$?
    [ "$seen" != "$signals" ] || break # otherwise a signal has cut `wait` short
  done
}
trap on_signal INT TERM HUP USR1
setsid "${command[@]}" & # in a session of its own: Ctrl-C is for this script alone
runner=$!
wait_for "$runner"
ended=$code
[ -z "$asking" ] || wait_for "$asking" # it would ask the ranks of the next start
case $signals,$ended in
  *,0)
    prove_finished && exit 0
    echo "error: multinode: DeepSpeed's launcher says 0, but rank 0 has not said that the run is finished; start it again" >&2
    ended=1 ;;
  *,85 | [1-9]*,246) # 246: a rank that USR1 ended before it could listen has lost nothing
    echo "stopped by a signal; the same command goes on" >&2
    exit 85 ;;
  *) echo "error: multinode: the run has ended with $ended, unfinished" >&2 ;;
esac
end_orphans
exit "$ended"
