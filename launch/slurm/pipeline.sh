#!/usr/bin/env bash
# Submits a whole run: pack (array) -> merge -> Stage I -> Stage II -> mteb, each when the one before has succeeded.
# Where Stage I has shards of its own (pack_stage1.yaml), they are packed first.
# Partition and account: SBATCH_PARTITION and SBATCH_ACCOUNT in the environment, which sbatch reads itself.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
usage() {
  cat <<'TEXT'
usage: launch/slurm/pipeline.sh [options] RECIPE_DIR EVAL_ARGUMENTS...
  RECIPE_DIR         folder with pack.yaml, stage1.yaml and stage2.yaml, perhaps pack_stage1.yaml
  EVAL_ARGUMENTS     what follows `python -m eval mteb MODEL`
  --parts N          tasks of the packing array (pack.sbatch)
  --nodes N          nodes of each training and evaluation job (train.sbatch, mteb.sbatch)
  --gpus-per-node N  likewise; 0 trains on CPUs, one rank per node
example:
  launch/slurm/pipeline.sh --nodes 4 launch/recipes/llama3.2-1b --benchmark 'MTEB(eng, v2)' --data-root data/mteb --dtype bf16
TEXT
}
fail() { echo "error: pipeline: $*; see launch/slurm/pipeline.sh --help" >&2; exit 2; }

pack=() ranks=()
while [ $# -gt 0 ]; do
  case $1 in
    --parts | --nodes | --gpus-per-node) [ $# -gt 1 ] || fail "$1 needs a value" ;;
  esac
  case $1 in
    --parts) pack=("--array=0-$((${2-0} - 1))"); shift 2 ;;
    --nodes) ranks+=("--nodes=${2-}"); shift 2 ;;
    --gpus-per-node) ranks+=("--gpus-per-node=${2-}"); shift 2 ;;
    -h | --help) usage; exit 0 ;;
    -*) fail "unknown option $1" ;;
    *) break ;;
  esac
done
[ $# -gt 1 ] || fail "expected RECIPE_DIR and arguments of the evaluation, got '$*'"
recipes=${1%/}
shift
for name in pack stage1 stage2; do
  [ -f "$recipes/$name.yaml" ] || fail "$recipes/$name.yaml: no such recipe"
done
[ -x .venv/bin/python ] || fail "no .venv here; run launch/setup.sh first"
output=$(.venv/bin/python -c 'import sys
from anchor.config.load import load_recipe
from anchor.config.train_recipe import TrainRecipe
from anchor.errors import exit_on_user_error
with exit_on_user_error():
    sys.stdout.write(str(load_recipe(sys.argv[1], TrainRecipe).output_dir))' "$recipes/stage2.yaml")

previous=
submit() { # NAME SBATCH_ARGUMENTS...
  local name=$1 after=()
  shift
  [ -z "$previous" ] || after=("--dependency=afterok:$previous" --kill-on-invalid-dep=yes)
  previous=$(sbatch --parsable ${after[@]+"${after[@]}"} "$@")
  previous=${previous%%;*} # a federated SLURM adds its cluster's name
  echo "$name: job $previous"
}
for one in "$recipes"/pack_stage1.yaml "$recipes"/pack.yaml; do
  [ -f "$one" ] || continue
  submit pack ${pack[@]+"${pack[@]}"} launch/slurm/pack.sbatch "$one"
  submit merge launch/slurm/merge.sbatch "$one"
done
submit stage1 ${ranks[@]+"${ranks[@]}"} launch/slurm/train.sbatch "$recipes/stage1.yaml"
submit stage2 ${ranks[@]+"${ranks[@]}"} launch/slurm/train.sbatch "$recipes/stage2.yaml"
submit mteb ${ranks[@]+"${ranks[@]}"} launch/slurm/mteb.sbatch "$output/export" "$@"
echo "model: $output/export   scores: $output/export/mteb   watch: squeue -j, slurm-*.out"
