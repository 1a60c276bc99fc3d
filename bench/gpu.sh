#!/usr/bin/env bash
# All kernel and step benchmarks on one GPU, one JSON and one log each:
#
#     [PAIRS=FOLDER] bash bench/gpu.sh MODEL_FOLDER SHARDS OUTPUT_FOLDER [attention kernel]
#
# MODEL_FOLDER is an exported folder (RUN/export): sentence-transformers reads it too. SHARDS are made by
# `python -m data_prep pack` with the same tokenizer; their first batch is used, so pack the batch that you train on.
# With PAIRS, a folder of NAME.jsonl.gz, 5,000 of its texts are embedded too. Takes minutes. flash-attn and liger_kernel
# take part where they are installed; the kernel of the two step benchmarks is `flash` where flash-attn is, else
# `varlen`, unless named. What OUTPUT_FOLDER holds is not measured again.
set -euo pipefail

if [ $# -lt 3 ] || [ $# -gt 4 ]; then
    sed -n '2,10p' "$0" >&2
    exit 2
fi
model=$(realpath "$1") shards=$(realpath "$2") output=$3
mkdir -p "$output"
output=$(realpath "$output")
[ -z "${PAIRS:-}" ] || PAIRS=$(realpath "$PAIRS")
unset DS_ACCELERATOR OMP_NUM_THREADS # of a shell that has worked on CPUs
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: $python: torch sees no CUDA device; install a CUDA build of torch, or name another PYTHON" >&2
    exit 2
fi
kernel=${4:-$("$python" -c 'import importlib.util as u; print("flash" if u.find_spec("flash_attn") else "varlen")')}

# The head's and the attention's sizes are the model's own.
read -r hidden vocabulary heads key_value_heads head_dim < <("$python" - "$model/config.json" <<'EOF'
import json
import sys

c = json.load(open(sys.argv[1]))
heads = c["num_attention_heads"]
print(c["hidden_size"], c["vocab_size"], heads, c.get("num_key_value_heads") or heads,
      c.get("head_dim") or c["hidden_size"] // heads)
EOF
)

bench() {  # bench RESULT SCRIPT ARGUMENTS...: a failure is reported at the end and does not keep the others from running
    local name=$1 script=$2
    shift 2
    if [ -e "$output/$name.json" ]; then
        echo "== $name: measured already"
        return
    fi
    echo "== $name: $script $*"
    "$python" "bench/$script.py" "$@" --turns 10 --json "$output/$name.json" 2>&1 | tee "$output/$name.log" ||
        failed+=("$name")
}

failed=()
nvidia-smi >"$output/nvidia-smi.txt" || true  # clocks, driver and other users of the GPU, for the record
bench head head --rows 16384 --hidden "$hidden" --vocabulary "$vocabulary"
bench attention attention --shards "$shards" --heads "$heads" --key-value-heads "$key_value_heads" --head-dim "$head_dim" \
    --calls 20
bench reconstruction_step reconstruction_step --shards "$shards" --model "$model" --attention "$kernel" --checkpointing yes
# Throughput and MFU at the sizes that are trained: random weights of Llama-3.2-1B and 3.1-8B, every kernel, and padding.
kernels=varlen$("$python" -c 'import importlib.util as u; print(",flash" if u.find_spec("flash_attn") else "")')
for size in 1B 8B; do
    bench "throughput_$size" reconstruction_step --shards "$shards" --shape "$size" --attention "$kernels" \
        --checkpointing yes
done
bench contrastive_step contrastive_step --shards "$shards" --model "$model" --attention "$kernel" --mini 8

if [ -n "${PAIRS:-}" ]; then
    bench embed embed --model "$model" --pairs "$PAIRS"
fi

if [ ${#failed[@]} -gt 0 ]; then
    echo "error: failed: ${failed[*]}; see the logs in $output" >&2
    exit 1
fi
echo "all results: $output"
