#!/usr/bin/env bash
# Train on a Cloud TPU VM or pod slice that exists already: copies this checkout to every
# worker, installs it there, and runs the job on all of them.
#
#   TPU_NAME=my-pod ZONE=us-east5-b WORKDIR=gs://bucket/run \
#     launch/tpu_pod.sh --config=configs/sra2_xl.py --config.data.dir=gs://bucket/latents
#
# DRY_RUN=1 prints the commands. Running it again resumes from the newest checkpoint.
set -euo pipefail

: "${TPU_NAME:?set TPU_NAME to the TPU VM or pod slice}"
: "${ZONE:?set ZONE to its zone}"
: "${WORKDIR:?set WORKDIR to a gs:// folder that every worker can write}"

cd "$(dirname "$0")/.."
run() { if [[ -n "${DRY_RUN:-}" ]]; then printf '%q ' "$@"; echo; else "$@"; fi; }

archive="$(mktemp -d)/sra2_jax.tar.gz"
run git archive --format=tar.gz --output="$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:sra2_jax.tar.gz" \
  --zone="$ZONE" --worker=all
printf -v arguments ' %q' "$@"
run gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all --command="
set -e
mkdir -p sra2_jax && tar -xzf sra2_jax.tar.gz -C sra2_jax && cd sra2_jax
python3 -m venv .venv
.venv/bin/pip install --quiet -e '.[tpu]'
.venv/bin/python main.py --distributed --workdir='$WORKDIR'$arguments"
