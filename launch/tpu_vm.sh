#!/usr/bin/env bash
# Train on a Cloud TPU host: create it, install, run, follow the log, delete it.
#
#   NAME=gidd ZONE=us-east5-b TYPE=v6e-8 REPO=https://github.com/you/gidd_jax.git \
#     launch/tpu_vm.sh run --config=gidd:small --workdir=runs/small
#   launch/tpu_vm.sh create | install | run ARGS... | logs | delete
#
# DRY_RUN=1 prints the gcloud commands instead of running them. A run in an existing workdir goes
# on from its newest checkpoint, so after a preemption: delete, create, install, run again.
set -euo pipefail

NAME=${NAME:-gidd-jax}
ZONE=${ZONE:-us-central2-b}
TYPE=${TYPE:-v4-8}
RUNTIME=${RUNTIME:-tpu-ubuntu2204-base}
REPO=${REPO:-}
SPOT=${SPOT:-1}

say() { printf '%q ' "$@"; printf '\n'; }
do_it() { if [[ ${DRY_RUN:-0} == 1 ]]; then say "$@"; else "$@"; fi; }
on_workers() {
  do_it gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

create() {
  local spot=()
  [[ $SPOT == 1 ]] && spot=(--spot)
  do_it gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" \
    --version="$RUNTIME" "${spot[@]}"
}

install() {
  [[ -n $REPO ]] || { echo "error: set REPO to the address of your clone" >&2; exit 2; }
  local clone
  printf -v clone 'git clone %q gidd_jax' "$REPO"
  on_workers "sudo apt-get install -y python3-venv && (test -d gidd_jax || $clone) && \
cd gidd_jax && python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e '.[tpu]'"
}

run() {
  local arguments
  printf -v arguments '%q ' "$@"
  on_workers "cd gidd_jax && nohup .venv/bin/python -m gidd_jax.train $arguments \
>train.log 2>&1 & disown"
}

logs() {
  do_it gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=0 \
    --command="tail -n 50 -f gidd_jax/train.log"
}

delete() { do_it gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE" --quiet; }

case ${1:-} in
  create | install | logs | delete) "$1" ;;
  run)
    shift
    [[ $# -gt 0 ]] || { echo "error: run needs the flags of gidd_jax.train" >&2; exit 2; }
    run "$@"
    ;;
  *)
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
