#!/usr/bin/env bash
#
# launch/slurm.sbatch on a real SLURM: a controller and two node daemons on this machine
# (Debian: apt install slurm-wlm munge; as root). Not part of the suite: a quarter of an hour.
#
#   unshare --mount tests/slurm.sh [FOLDER]     CASES="whole limited" picks
#
# A run over two nodes; stopped by SIGTERM; by its time limit; by a node that dies. Each
# time the job is queued again and its rows are those of the run that nothing stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
dir=${1:-$(mktemp -d)} python=${PYTHON:-.venv/bin/python}
mkdir -p "$dir"/{state,munge,spool.node1,spool.node2}

# Two nodes of one machine, each a name of the loopback (hence --mount).
echo "127.0.0.1 localhost node1 node2 $(hostname)" > "$dir/hosts"
mount --bind "$dir/hosts" /etc/hosts
dd if=/dev/urandom of="$dir/munge/key" bs=1k count=1 status=none
chown -R munge "$dir/munge" && chmod 700 "$dir/munge" && chmod 600 "$dir/munge/key"
chmod 755 "$dir"
cat > "$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=localhost
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=1,sched_interval=2
ReturnToService=2
SlurmdTimeout=20
KillWait=15
MpiDefault=none
GresTypes=gpu
NodeName=node1 NodeHostname=localhost Port=17001 CPUs=4 RealMemory=4000 Gres=gpu:1
NodeName=node2 NodeHostname=localhost Port=17002 CPUs=4 RealMemory=4000 Gres=gpu:1
PartitionName=all Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
CONF
echo 'Name=gpu File=/dev/zero' > "$dir/gres.conf"  # any device: jax takes the CPU
export SLURM_CONF=$dir/slurm.conf JAX_PLATFORMS=cpu PYTHON=$python
unset XLA_FLAGS

node() { slurmd -N "$1"; }
stop() {
  pkill -F "$dir/slurmctld.pid" || true
  for name in node1 node2; do pkill -F "$dir/slurmd.$name.pid" || true; done
  pkill -F "$dir/munge/pid" || true
}
trap stop EXIT
runuser -u munge -- munged --force --key-file="$dir/munge/key" \
  --socket="$dir/munge/socket" --pid-file="$dir/munge/pid" \
  --seed-file="$dir/munge/seed" --log-file="$dir/munge/log"
slurmctld
node node1
node node2
for _ in {1..30}; do [[ $(sinfo --noheader --format=%t) == idle ]] && break; sleep 1; done
sinfo

config=(--config=configs/digits.py --config.model.depth=2 --config.align.vae.depth=1
  --config.eval.features= --config.run.sample_every=100000 --config.sampling.steps=3
  --config.run.log_every=20 --config.run.checkpoint_every=20 --config.mesh.fsdp=2
  --config.data.dir="$dir/latents" --config.steps="${STEPS:-300}")
[[ -e $dir/latents/latents.json ]] || "$python" -m sra2_jax encode --images=digits \
  --vae=digits --resolution=32 --out="$dir/latents"

submit() {  # name, options of sbatch...
  local name=$1; shift
  export WORKDIR=$dir/$name
  job=$(sbatch --parsable --nodes=2 --gpus-per-node=1 --ntasks-per-node=1 \
    --cpus-per-task=1 --output="$dir/$name.log" "$@" launch/slurm.sbatch "${config[@]}")
  echo "$name: job $job"
}
state() { squeue --noheader --format='%T' --jobs="$job" 2>/dev/null || true; }
until_row() {  # that many rows of metrics
  for _ in {1..300}; do
    (($(wc -l 2>/dev/null < "$WORKDIR/metrics.jsonl" || echo 0) >= $1)) && return
    sleep 1
  done
  echo "no $1 rows in $WORKDIR: $(state)"; tail -20 "$dir/${WORKDIR##*/}.log"; exit 1
}
ended() {  # how the job ended; its rows are those of the first
  for _ in {1..1800}; do [[ -n $(state) ]] || break; sleep 1; done
  scontrol show job "$job" | grep --only-matching --extended-regexp \
    'JobState=\w+|Restarts=[0-9]+|ExitCode=[0-9:]+' | paste --serial --delimiters=' '
  grep --no-filename 'launch:\|is saved' "$dir/${WORKDIR##*/}.log" | sort | uniq --count
  "$python" - "$dir/whole/metrics.jsonl" "$WORKDIR/metrics.jsonl" <<'PY'
import json, sys
first, this = (
    [{k: v for k, v in json.loads(line).items() if k != "images_per_second"}
     for line in open(name)] for name in sys.argv[1:])
print(f"{len(this)} rows, equal: {first == this}")
sys.exit(first != this)
PY
}

for case in ${CASES:-whole terminated limited node_dies}; do
  case $case in
  whole) submit "$case" ;;
  terminated)
    submit "$case"
    until_row 3
    scancel --signal=TERM "$job"
    ;;
  limited) submit "$case" --time=3 --signal=TERM@40 ;;  # up to a minute earlier
  node_dies)
    submit "$case"
    until_row 3
    pkill -KILL -F "$dir/slurmd.node2.pid"
    pkill -KILL -f 'slurmstepd.*node2' || true
    sleep 45
    echo "after a node died: $(state) $(sinfo --noheader --format='%n %t' | paste -s -d,)"
    node node2
    ;;
  esac
  ended
done
echo "all is as it should be"
