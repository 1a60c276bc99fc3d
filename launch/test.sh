#!/usr/bin/env bash
# Makes .venv if needed and runs the tests in two processes; arguments go on to pytest (`-n 0`: in one process).
set -euo pipefail
source "$(dirname "$0")/setup.sh"
export DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder "$@"
