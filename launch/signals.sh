# Sourced by the scripts that start DeepSpeed's launcher. Its processes handle no signal as a run needs it: the first of
# them dies and leaves the ranks, or as the first process of a container ignores it; the second kills after 30 s.
# `run_launcher COMMAND ...` runs it with the process id in `runner`. The first signal calls `ask_ranks` (for a checkpoint;
# the run then ends with the trainer's code 85), every further one `end_ranks`; the caller defines both.
signals=0
on_signal() {
  signals=$((signals + 1))
  if [ $signals = 1 ]; then
    echo "asking all ranks for a checkpoint; once more to end them at once" >&2
    ask_ranks || true
  else
    end_ranks || true
  fi
}

run_launcher() {
  trap on_signal INT TERM HUP USR1
  "$@" &
  runner=$!
  local seen code
  while :; do
    seen=$signals code=0
    wait "$runner" || code=$?
    [ "$seen" != "$signals" ] || break # otherwise a signal has cut `wait` short
  done
  [ $code = 85 ] && echo "stopped with a checkpoint; the same command goes on from it" >&2
  return $code
}
