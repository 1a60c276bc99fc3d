# Sourced by the job scripts: the checkout, its programs, and how ranks are started on the nodes of the allocation.
# Everything that depends on the site is here and in the #SBATCH lines, marked EDIT. Jobs are submitted from the checkout.
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
[ -x .venv/bin/python ] || { echo "error: $PWD: no .venv/bin/python; submit from the checkout, after launch/setup.sh" >&2; exit 2; }
# EDIT: module load cuda
# EDIT, where host names do not resolve to the network that is meant: export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 PYTHONFAULTHANDLER=1
max_restarts=${ANCHOR_MAX_RESTARTS:-20}
restarts=${SLURM_RESTART_COUNT:-0}

# run_ranks COMMAND...: one rank per GPU of every node (one per node without GPUs); ends all when one fails.
run_ranks() {
  # --gpus-per-node is in the first, what --gres=gpu:N and the like have brought in the second.
  local per_node=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
  per_node=${per_node##*:} # "h100:8" is 8
  [ "$per_node" != 0 ] || per_node=1
  echo "job $SLURM_JOB_ID: $((SLURM_JOB_NUM_NODES * per_node)) ranks on $SLURM_JOB_NODELIST, restart $restarts of at most $max_restarts" >&2
  # A step number of its own after every restart: a request to end the old step may still be on its way to a node that
  # was away, and would end the new one of the same number.
  local used
  for ((used = 0; used < restarts; used++)); do srun --nodes=1 --ntasks=1 true; done
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * per_node))" --ntasks-per-node="$per_node" \
    --cpus-per-task="$((SLURM_CPUS_ON_NODE / per_node))" --kill-on-bad-exit=1 bash launch/slurm/rank.sh "$@"
}

# run_or_requeue COMMAND...: run_ranks; exit code 85 puts the job back into the queue, under the same id.
run_or_requeue() {
  local code=0
  run_ranks "$@" || code=$?
  [ $code = 85 ] || exit $code
  if [ "$restarts" -ge "$max_restarts" ]; then
    echo "error: job $SLURM_JOB_ID: stopped with a checkpoint after $restarts restarts, the most that ANCHOR_MAX_RESTARTS allows; submit it again" >&2
    exit $code
  fi
  echo "job $SLURM_JOB_ID: stopped with a checkpoint, back into the queue" >&2
  scontrol requeue "$SLURM_JOB_ID"
  sleep 300 # SLURM ends this script
}
