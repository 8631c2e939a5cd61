#!/usr/bin/env bash
# Train on all GPUs of this machine.
#
#   launch/gpu_node.sh --config=gidd:small --config.data.path='texts/*.jsonl' --workdir=runs/small
#
# Makes .venv with the CUDA build of jax on first use. DRY_RUN=1 prints what it would do.
set -euo pipefail
cd "$(dirname "$0")/.."

do_it() { if [[ ${DRY_RUN:-0} == 1 ]]; then printf '%q ' "$@"; printf '\n'; else "$@"; fi; }

[[ $# -gt 0 ]] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
if [[ ! -e .venv/.cuda ]]; then
  do_it "${PYTHON:-python3}" -m venv .venv
  do_it .venv/bin/pip install -q -c constraints.txt -e '.[cuda]'
  do_it touch .venv/.cuda
fi
do_it .venv/bin/python -m gidd_jax.train "$@"
