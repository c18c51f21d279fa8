#!/usr/bin/env bash
#
# TPU slices of a GKE cluster, through xpk: the cluster exists, xpk and kubectl know it.
#
#   launch/xpk.sh image             builds launch/Dockerfile as IMAGE and pushes it
#   launch/xpk.sh create ARGUMENTS  submits the run, arguments as for main.py
#   launch/xpk.sh list              what runs on the cluster
#   launch/xpk.sh logs              follow worker 0 of the first slice, or WORKER
#   launch/xpk.sh delete            stops the run
#
# xpk starts a run that ends with status 42 or by a signal again, RESTARTS times (50).
# --dry-run or DRY_RUN=1 prints the commands.
#
#   IMAGE        image and tag in a registry the cluster can read
#   CLUSTER      GKE cluster; ZONE: its zone; PROJECT: its project
#   WORKLOAD     name of the run on the cluster
#   ACCELERATOR  one slice: v5litepod-16, v5p-128; SLICES: how many (1)
#   WORKDIR      gs:// folder of the run; the same folder goes on from its checkpoint
#   MODULE       runs python -m MODULE instead of main.py: "sra2_jax sample"
#   GRACE        seconds that a run has to stop (120)
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

command=${1:-}
(($# == 0)) || shift

image() {
  run docker build --platform=linux/amd64 --file=launch/Dockerfile \
    --build-arg=EXTRA=tpu,gcs --tag="$IMAGE" .
  run docker push "$IMAGE"
}

workload() { # VERB OPTIONS
  run xpk workload "$1" --cluster="$CLUSTER" --zone="$ZONE" --project="$PROJECT" \
    "${@:2}"
}

create() {
  # xpk copies the line into YAML as it is, and without exec its SIGTERM ends a shell.
  [[ "$*" != *$'\n'* ]] || fail "an argument holds a line break: xpk cannot pass it on"
  workload create --workload="$WORKLOAD" --tpu-type="$ACCELERATOR" \
    --num-slices="${SLICES:-1}" --docker-image="$IMAGE" \
    --max-restarts="${RESTARTS:-50}" \
    --termination-grace-period-seconds="${GRACE:-120}" \
    --command="exec $(quote "${program[@]}" --distributed "$@")"
}

logs() {
  local job="jobset.sigs.k8s.io/jobset-name=$WORKLOAD"
  run kubectl logs --follow --container=jax-tpu --selector="$job,\
jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=${WORKER:-0}"
}

place=(CLUSTER=my-cluster ZONE=us-west4-a PROJECT=my-project)
tagged=IMAGE=us-docker.pkg.dev/my-project/images/sra2:1
case $command in
  image)
    need "$tagged"
    image
    ;;
  create)
    need "${place[@]}" WORKLOAD=my-run ACCELERATOR=v5litepod-16 "$tagged"
    choose_program python gs://bucket/run
    create "$@"
    ;;
  list)
    need "${place[@]}"
    workload list
    ;;
  logs)
    need WORKLOAD=my-run
    logs
    ;;
  delete)
    need "${place[@]}" WORKLOAD=my-run
    workload delete --workload="$WORKLOAD" --force
    ;;
  *) fail "give a command: image, create, list, logs or delete (--help)" ;;
esac
