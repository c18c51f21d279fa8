#!/usr/bin/env bash
#
# One machine with GPUs or a TPU, or a worker of a TPU pod: install, train, start again.
#
#   launch/machine.sh install          packages into .venv
#   launch/machine.sh run ARGUMENTS    train here, arguments as for main.py
#   launch/machine.sh start ARGUMENTS  the same in the background; outlives the login
#   launch/machine.sh logs             follow runs/launch.log
#   launch/machine.sh status           is it running, and how did it end?
#   launch/machine.sh stop
#
# A program that ends with status 42 or by a signal is started again, RESTARTS times
# (50), after PAUSE seconds (10). --dry-run or DRY_RUN=1 prints the commands.
#
#   WORKDIR   folder of the run; the same folder goes on from its last checkpoint
#   MODULE    runs python -m MODULE instead of main.py: "sra2_jax sample", "sra2_jax sweep"
#   EXTRA     what to install: gpu (if not set), tpu, either with ,gcs for gs:// paths, or empty
#   GRACE     seconds between asking a program to stop and killing it (120)
#
#   WORKDIR=runs/xl launch/machine.sh start --config=configs/sra2_xl.py
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

LOG=runs/launch.log
PID=runs/launch.pid
command=${1:-}
(($# == 0)) || shift

install() {
  if python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))'; then
    run python3 -m venv .venv
  else # Ubuntu 22.04 has Python 3.10, on TPU VMs too
    run python3 -m pip install --quiet --user uv
    run python3 -m uv venv --quiet --allow-existing --seed --python=3.12 .venv
  fi
  local extra=${EXTRA-gpu}
  run .venv/bin/pip install --quiet --editable ".${extra:+[$extra]}"
}

train() {
  local status=0 restarts=0 stopped='' child=''
  if [[ -n ${DRY_RUN:-} ]]; then
    run "${program[@]}" "$@"
    return
  fi
  trap 'stopped=1; kill -TERM "$child" 2>/dev/null || true' TERM INT
  while true; do
    "${program[@]}" "$@" & # so that a signal reaches this script at once
    child=$!
    status=0
    wait "$child" || status=$?
    if [[ -n $stopped ]]; then # the signal ended that wait; another may end the next
      status=0
      wait "$child" || status=$?
      while kill -0 "$child" 2>/dev/null; do wait "$child" || status=$?; done
      break
    fi
    if ! restartable "$status" || ((restarts >= ${RESTARTS:-50})); then break; fi
    restarts=$((restarts + 1))
    echo "launch: ended with status $status, starts again ($restarts)" >&2
    sleep "${PAUSE:-10}"
    [[ -z $stopped ]] || break
  done
  echo "launch: ended with status $status" >&2
  exit "$status"
}

# The process of `start`, if it still is that: numbers of processes come back.
running() {
  [[ -f $PID && $(ps -o args= -p "$(<"$PID")" 2>/dev/null) == *"machine.sh run"* ]]
}

start() {
  if running; then
    echo "runs already, as process $(<"$PID")"
    return
  fi
  run mkdir -p runs
  # shellcheck disable=SC2016 # expanded by the inner shell
  run bash -c 'setsid launch/machine.sh run "$@" >>'"$LOG"' 2>&1 </dev/null &
echo $! >'"$PID" start "$@"
}

status() {
  if running; then
    echo "running, as process $(<"$PID")"
  else
    echo "not running; last line: $(tail -n 1 "$LOG" 2>/dev/null)"
  fi
}

stop() {
  if ! running; then
    status
    return
  fi
  local pid second
  pid=$(<"$PID")
  run kill -TERM "$pid"
  [[ -z ${DRY_RUN:-} ]] || return 0
  for ((second = 0; second < ${GRACE:-120}; second++)); do
    sleep 1
    running && continue
    status
    return
  done
  run kill -KILL -- "-$pid"
  echo "killed after $second seconds"
}

case $command in
  run | start)
    choose_program "${PYTHON:-.venv/bin/python}" runs/xl
    if [[ $command == run ]]; then train "$@"; else start "$@"; fi
    ;;
  install | status | stop) "$command" ;;
  logs) run tail -n 50 -F "$LOG" ;;
  *) fail "give a command: install, run, start, logs, status or stop (--help)" ;;
esac
