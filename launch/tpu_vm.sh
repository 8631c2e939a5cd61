#!/usr/bin/env bash
# Train on a Cloud TPU slice of one or more hosts: create it, install, run, follow, delete it.
#
#   NAME=gidd ZONE=us-east5-b TYPE=v6e-64 REPO=https://github.com/you/gidd_jax.git \
#     launch/tpu_vm.sh keep --config=gidd:small --workdir=/mnt/bucket/runs/small
#   launch/tpu_vm.sh create | install | run ARGS... | logs | delete | keep ARGS...
#
# keep does all of it, and makes a preempted slice again: the run continues from the newest
# checkpoint of its workdir, which must outlive the slice: BUCKET=name is mounted at /mnt/bucket.
# DRY_RUN=1 prints the gcloud commands.
set -euo pipefail

NAME=${NAME:-gidd-jax}
ZONE=${ZONE:-us-central2-b}
TYPE=${TYPE:-v4-8}
RUNTIME=${RUNTIME:-tpu-ubuntu2204-base}
REPO=${REPO:-}
SPOT=${SPOT:-1}
BUCKET=${BUCKET:-}

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
  [[ -z $BUCKET ]] || on_workers "sudo apt-get install -y gcsfuse && sudo mkdir -p /mnt/bucket && \
sudo chown \"\$USER\" /mnt/bucket && (mountpoint -q /mnt/bucket || gcsfuse ${BUCKET@Q} /mnt/bucket)"
}

run() {
  local arguments
  printf -v arguments '%q ' "$@"
  on_workers "cd gidd_jax && rm -f train.exit && (nohup .venv/bin/python -m gidd_jax.train \
$arguments --distributed >>train.log 2>&1; echo \$? >train.exit) >/dev/null 2>&1 & disown"
}

logs() {
  do_it gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=0 \
    --command="tail -n 50 -f gidd_jax/train.log"
}

# READY, PREEMPTED, ...; nothing where there is no such slice.
state() {
  gcloud compute tpus tpu-vm describe "$NAME" --zone="$ZONE" --format='value(state)' 2>/dev/null \
    || true
}

# The exit code of the run on worker 0; nothing while it runs or cannot be asked.
exit_code() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=0 \
    --command="cat gidd_jax/train.exit 2>/dev/null" 2>/dev/null || true
}

keep() {
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    create
    install
    run "$@"
    echo "# again from the top, after a delete, whenever the slice is no longer READY"
    return
  fi
  local code
  while true; do
    if [[ $(state) != READY ]]; then
      [[ -z $(state) ]] || delete
      create
      install
      run "$@"
    fi
    sleep "${POLL_SECONDS:-60}"
    code=$(exit_code)
    if [[ -n $code && $(state) == READY ]]; then
      echo "the run ended with exit code $code; the slice is still there: $0 delete"
      exit "$code"
    fi
  done
}

delete() { do_it gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE" --quiet; }

case ${1:-} in
  create | install | logs | delete) "$1" ;;
  run | keep)
    what=$1
    shift
    [[ $# -gt 0 ]] || { echo "error: $what needs the flags of gidd_jax.train" >&2; exit 2; }
    "$what" "$@"
    ;;
  *)
    sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
