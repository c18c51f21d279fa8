#!/usr/bin/env bash
#
# A Cloud TPU VM or pod slice: one process on each of its workers, all of them one job.
#
#   launch/tpu_pod.sh create            the machines; QUEUED=1: through the queue, waits
#   launch/tpu_pod.sh install           this checkout's HEAD and its packages
#   launch/tpu_pod.sh start ARGUMENTS   train in the background, as main.py ARGUMENTS
#   launch/tpu_pod.sh logs              follow worker 0, or WORKER
#   launch/tpu_pod.sh status            of every worker
#   launch/tpu_pod.sh stop
#   launch/tpu_pod.sh resume ARGUMENTS  after a preemption: create, install, start
#   launch/tpu_pod.sh delete
#
# --dry-run or DRY_RUN=1 prints the commands. The project is gcloud's own, or
# CLOUDSDK_CORE_PROJECT.
#
#   TPU_NAME     name of the machines, and of the request in the queue
#   ZONE         zone, as in us-west4-a
#   WORKDIR      gs:// folder of the run; the same folder goes on from its checkpoint
#   MODULE       runs python -m MODULE instead of main.py: "sra2_jax sample"
#   ACCELERATOR  to create: v5litepod-16, v5p-128, v6e-64
#   RUNTIME      to create: v2-alpha-tpuv5-lite, v2-alpha-tpuv5, v2-alpha-tpuv6e
#   PROVISION    spot, reserved, or on-demand (if not set)
#   POLL         seconds between two looks at the queue (60)
#
#   TPU_NAME=pod ZONE=us-west4-a WORKDIR=gs://bucket/xl launch/tpu_pod.sh start \
#     --config=configs/sra2_xl.py --config.data.dir=gs://bucket/latents256
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

ARCHIVE=build/sra2_jax.tar.gz
command=${1:-}
(($# == 0)) || shift

tpus() { run gcloud compute tpus "$@" --zone="$ZONE"; }

on_workers() { tpus tpu-vm ssh "$TPU_NAME" --worker="$1" --command="$2"; }

# Sets `state`, of the request or the machines: empty without them; $1 in a dry run.
look() {
  local kind=tpu-vm field=state
  [[ -z ${QUEUED:-} ]] || kind=queued-resources field=state.state
  local query=(tpus "$kind" list --filter="name~/$TPU_NAME\$" --format="value($field)")
  if [[ -n ${DRY_RUN:-} ]]; then
    "${query[@]}"
    state=$1
  else
    state=$("${query[@]}")
  fi
}

create() {
  local options=(--accelerator-type="$ACCELERATOR")
  [[ ${PROVISION:-on-demand} == on-demand ]] || options+=("--$PROVISION")
  if [[ -z ${QUEUED:-} ]]; then
    tpus tpu-vm create "$TPU_NAME" --version="$RUNTIME" "${options[@]}"
    return
  fi
  tpus queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" \
    --runtime-version="$RUNTIME" "${options[@]}"
  wait_in_queue
}

wait_in_queue() {
  look ACTIVE
  until [[ $state == ACTIVE ]]; do
    case $state in
      FAILED | SUSPEND* | DELETING) fail "the request for $TPU_NAME is $state" ;;
    esac
    echo "${state:-not listed yet}; looks again in ${POLL:=60} seconds" >&2
    sleep "$POLL"
    look ACTIVE
  done
}

delete() {
  if [[ -n ${QUEUED:-} ]]; then
    tpus queued-resources delete "$TPU_NAME" --force --quiet # and its machines
  else
    tpus tpu-vm delete "$TPU_NAME" --quiet
  fi
}

install() {
  run mkdir -p "${ARCHIVE%/*}"
  git diff --quiet HEAD || echo "note: changes not committed are not copied" >&2
  run git archive --format=tar.gz --output="$ARCHIVE" HEAD
  tpus tpu-vm scp "$ARCHIVE" "$TPU_NAME:sra2_jax.tar.gz" --worker=all
  on_workers all "mkdir -p sra2_jax && tar -xzf sra2_jax.tar.gz -C sra2_jax && \
cd sra2_jax && EXTRA=tpu,gcs launch/machine.sh install"
}

start() {
  local name variables=()
  for name in WORKDIR MODULE RESTARTS PAUSE; do
    [[ -z ${!name:-} ]] || variables+=("$name=${!name}")
  done
  on_workers all "cd sra2_jax && $(quote env "${variables[@]}" launch/machine.sh start \
    --distributed "$@")"
}

# Nothing to stop where nothing is installed yet.
stop() {
  on_workers all "! test -d sra2_jax/launch || (cd sra2_jax && launch/machine.sh stop)"
}

resume() {
  look ''
  case $state in
    READY | ACTIVE) stop ;; # what still runs waits for workers that were lost
    ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING) wait_in_queue ;;
    '') create ;;
    *)
      delete
      create
      ;;
  esac
  install
  start "$@"
}

need TPU_NAME=my-pod ZONE=us-west4-a
case $command in
  create | resume) need ACCELERATOR=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite ;;
esac
case ${PROVISION:-on-demand} in
  on-demand | spot | reserved) ;;
  *) fail "PROVISION=$PROVISION is not one of on-demand, spot, reserved" ;;
esac
case $command in
  start | resume)
    choose_program python gs://bucket/run # refuses here what every worker would
    "$command" "$@"
    ;;
  create | install | stop | delete) "$command" ;;
  logs) on_workers "${WORKER:-0}" "cd sra2_jax && launch/machine.sh logs" ;;
  status) on_workers all "cd sra2_jax && launch/machine.sh status" ;;
  *) fail "give a command, such as create or start (--help)" ;;
esac
