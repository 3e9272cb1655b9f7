#!/bin/bash
# Installs the lower bounds of setup.py into a new environment (5 GB) and trains two steps with them under each engine. uv
# resolves the bounds. `make test-full` runs it: tests/lower_bounds.sh FOLDER
set -euo pipefail
export TORCH_EXTENSIONS_DIR=$1/extensions # what another version of torch has built there can block this one
root=$(cd "$(dirname "$0")/.." && pwd)
python3 -m venv "$1/venv"
"$1/venv/bin/pip" install -q uv
DS_BUILD_OPS=0 "$1/venv/bin/uv" pip install --python "$1/venv/bin/python" --resolution lowest-direct "$root"
cd "$root"
"$1/venv/bin/python" -m pip check
for engine in ddp deepspeed fsdp2; do
  "$1/venv/bin/python" -m tools train debug "run=$1/$engine" trainer.device=cpu trainer.max_steps=2 engine.kind=$engine
  "$1/venv/bin/python" -m tools checkpoint info "$1/$engine"
done
