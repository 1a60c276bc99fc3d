#!/usr/bin/env bash
# One rank under srun: srun ... bash launch/slurm/rank.sh PROGRAM... SLURM signals every process of a step; this one only waits for the program, which acts on them.
# 1. srun ends the step at the first exit code that is not 0, so 85 ("checkpoint written, start me again") is held back
#    until the other ranks, too, have had the time to leave with it.
# 2. A program that USR1 ended before it could listen has lost nothing: 85 as well.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} # compute nodes need no network
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
# Rank 0 is on the first node of the step, which may have fewer nodes than the job. The names are expanded locally.
first=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
export MASTER_ADDR=${MASTER_ADDR:-$first} MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
asked= signals=0
trap 'asked=yes signals=$((signals + 1))' USR1
trap 'signals=$((signals + 1))' TERM
"$@" &
while :; do
  seen=$signals
  wait $!
  code=$?
  [ "$seen" != "$signals" ] || break # otherwise a signal has cut `wait` short
done
if [ -n "$asked" ]; then
  case $code in 138 | 143) code=85 ;; esac # 128 + USR1, 128 + TERM
fi
[ $code != 85 ] || sleep 3
exit $code
