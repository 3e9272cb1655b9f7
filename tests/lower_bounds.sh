#!/bin/bash
# Installs the lower bounds of setup.py into a new environment and trains a few steps with them; uv resolves them. Run by
# hand when a bound changes: tests/lower_bounds.sh FOLDER
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python3 -m venv "$1/venv"
"$1/venv/bin/pip" install -q uv
DS_BUILD_OPS=0 "$1/venv/bin/uv" pip install --python "$1/venv/bin/python" --resolution lowest-direct "$root"
cd "$root"
"$1/venv/bin/python" -m pip check || true
for engine in ddp deepspeed; do
  "$1/venv/bin/python" -m tools train debug "run=$1/$engine" trainer.device=cpu trainer.max_steps=2 engine.kind=$engine
  "$1/venv/bin/python" -m tools checkpoint info "$1/$engine"
done
