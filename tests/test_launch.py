"""The launch scripts, run for real against programs that write down their words."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ["machine.sh", "slurm.sbatch", "tpu_pod.sh", "xpk.sh"]

# Appends its words to RECORD. The n-th call of NAME ends with line n of NAME.status;
# one with `list` or --noheader first prints a line of `states`.
FAKE = r"""#!/usr/bin/env bash
next() { [[ -s $1 ]] && { head -n 1 "$1"; sed -i 1d "$1"; }; }
cd "$FAKES"
printf '%s\0' "${0##*/}" "$@" >>record
printf '\1' >>record
[[ " $* " != *" list "* && " $* " != *" --noheader "* ]] || next states
exit "$(next "${0##*/}.status" || echo 0)"
"""
CLOUD = ["gcloud", "git", "docker", "xpk", "kubectl"]
CLUSTER = ["srun", "squeue", "scontrol"]
PYTHON = ["python", "python3", "pip"]

TPU = {"TPU_NAME": "pod", "ZONE": "us-west4-a", "WORKDIR": "gs://bucket/run"}
NEW = TPU | {"ACCELERATOR": "v5litepod-16", "RUNTIME": "v2-alpha-tpuv5-lite"}
ON = {"CLUSTER": "cluster", "ZONE": "us-west4-a", "PROJECT": "project"}
GKE = ON | {"WORKLOAD": "run", "ACCELERATOR": "v5p-128", "IMAGE": "registry/image:1"}
GKE |= {"WORKDIR": "gs://bucket/run"}
SLURM = {
    "WORKDIR": "runs/xl",
    "SLURM_JOB_ID": "7",
    "SLURM_CPUS_PER_TASK": "8",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_GPUS_ON_NODE": "4",
}
WORDS = ["--config=configs/sra2_xl.py", '--config.name=it\'s "two" $HOME `x` \\ *']


class Site:
    """A checkout with nothing but the scripts, and fakes of all they call."""

    def __init__(self, folder: Path):
        self.checkout = folder / "checkout"
        self.fakes = folder / "fakes"
        shutil.copytree(ROOT / "launch", self.checkout / "launch")
        self.fakes.mkdir()
        venv = self.checkout / ".venv" / "bin"
        venv.mkdir(parents=True)
        for name in CLOUD + CLUSTER + PYTHON:
            self.program(self.fakes / name, FAKE)
        for name in ("python", "pip"):
            (venv / name).symlink_to(self.fakes / name)

    @staticmethod
    def program(path: Path, text: str) -> None:
        path.unlink(missing_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def lines(self, name: str, *lines: object) -> None:
        (self.fakes / name).write_text("".join(f"{line}\n" for line in lines))

    def shell(self, words, variables):
        environment = {
            "PATH": f"{self.fakes}:{os.environ['PATH']}",
            "FAKES": str(self.fakes),
            "HOME": str(self.checkout.parent),
            "POLL": "0",
        }
        return subprocess.run(
            words,
            env=environment | variables,
            cwd=self.checkout,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def run(self, script, *words, **variables):
        return self.shell([f"launch/{script}", *words], variables)

    def refuses(self, line, script, *words, **variables):
        """In one line, before anything is called."""
        done = self.run(script, *words, **variables)
        assert (done.returncode, done.stdout, self.record()) == (2, "", [])
        assert line in done.stderr
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1

    def record(self) -> list[list[str]]:
        """What was called since the last look, without questions about the machine."""
        path = self.fakes / "record"
        text = path.read_text() if path.exists() else ""
        path.unlink(missing_ok=True)
        calls = [call.split("\0")[:-1] for call in text.split("\1")[:-1]]
        asked = (["git", "diff"], ["python3", "-c"])
        return [call for call in calls if call[:2] not in asked]


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def test_shellcheck_finds_nothing():
    shellcheck = Path(sys.prefix) / "bin" / "shellcheck"
    assert shellcheck.exists(), "pip install -e '.[test]' brings shellcheck"
    scripts = [f"launch/{name}" for name in [*SCRIPTS, "common.sh"]]
    done = subprocess.run(
        [shellcheck, "--external-sources", *scripts],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_comment_at_the_top(site, script):
    """Nor does an unknown command run anything."""
    done = site.run(script, "--help")
    assert done.returncode == 0
    text = "".join(f"# {line}".rstrip() + "\n" for line in done.stdout.splitlines())
    assert text in (ROOT / "launch" / script).read_text()
    assert "WORKDIR" in done.stdout
    assert "--dry-run" in done.stdout
    assert not site.record()
    line = "no SLURM job" if "slurm" in script else "give a command"
    site.refuses(line, script, "nonsense", **NEW)


@pytest.mark.parametrize(
    ("script", "command", "needed"),
    [
        ("machine.sh", "run", ["WORKDIR"]),
        ("slurm.sbatch", "--config=x", ["WORKDIR"]),
        ("tpu_pod.sh", "create", [name for name in NEW if name != "WORKDIR"]),
        ("tpu_pod.sh", "start", list(TPU)),
        ("tpu_pod.sh", "resume", list(NEW)),
        ("xpk.sh", "image", ["IMAGE"]),
        ("xpk.sh", "create", list(GKE)),
        ("xpk.sh", "logs", ["WORKLOAD"]),
        ("xpk.sh", "delete", [*ON, "WORKLOAD"]),
    ],
)
def test_refuses_without_each_variable(site, script, command, needed):
    everything = NEW | GKE | SLURM | {"WORKDIR": "gs://bucket/run"}
    for name in needed:
        variables = {key: value for key, value in everything.items() if key != name}
        site.refuses(f"set {name}, for example: {name}=", script, command, **variables)


# What the commands run, in shell's own writing.
VM = "gcloud compute tpus tpu-vm"
SSH = f"{VM} ssh pod --worker=all '--command=%s' --zone=us-west4-a"
CREATE = f"""{VM} create pod --version=v2-alpha-tpuv5-lite \\
  --accelerator-type=v5litepod-16 --zone=us-west4-a"""
DELETE = f"{VM} delete pod --quiet --zone=us-west4-a"
LIST = f"{VM} list '--filter=name~/pod$' '--format=value(state)' --zone=us-west4-a"
UNPACK = "mkdir -p sra2_jax && tar -xzf sra2_jax.tar.gz -C sra2_jax && "
INSTALL = f"""git archive --format=tar.gz --output=build/sra2_jax.tar.gz HEAD
{VM} scp build/sra2_jax.tar.gz pod:sra2_jax.tar.gz --worker=all --zone=us-west4-a
{SSH % (UNPACK + "cd sra2_jax && EXTRA=tpu,gcs launch/machine.sh install")}"""
WORKER = "cd sra2_jax && env WORKDIR=gs://bucket/run launch/machine.sh"
START = SSH % f"{WORKER} start --distributed --config=a"
STOP = SSH % "! test -d sra2_jax/launch || (cd sra2_jax && launch/machine.sh stop)"

QUEUED = NEW | {"QUEUED": "1", "PROVISION": "spot"}
QUEUE = "gcloud compute tpus queued-resources"
REQUEST = f"""{QUEUE} create pod --node-id=pod --runtime-version=v2-alpha-tpuv5-lite \\
  --accelerator-type=v5litepod-16 --spot --zone=us-west4-a"""
WITHDRAW = f"{QUEUE} delete pod --force --quiet --zone=us-west4-a"
LOOK = f"""{QUEUE} list '--filter=name~/pod$' '--format=value(state.state)' \\
  --zone=us-west4-a"""

IMAGE = """docker build --platform=linux/amd64 --file=launch/Dockerfile \\
  --build-arg=EXTRA=tpu,gcs --tag=registry/image:1 .
docker push registry/image:1"""
ON_GKE = "--cluster=cluster --zone=us-west4-a --project=project"
SUBMIT = f"""xpk workload create {ON_GKE} --workload=run --tpu-type=v5p-128 \\
  --num-slices=1 --docker-image=registry/image:1 --max-restarts=50 \\
  --termination-grace-period-seconds=120 '--command=exec python main.py \
--workdir=gs://bucket/run --distributed --config=a'"""
LOGS = """kubectl logs --follow --container=jax-tpu --selector=\\
jobset.sigs.k8s.io/jobset-name=run,jobset.sigs.k8s.io/job-index=0,\\
batch.kubernetes.io/job-completion-index=0"""
TASK = """'trap : TERM; "$@"; s=$?; exit $((s == 0 || s == 42 \
|| (s > 128 && s < 200) ? s : s < 50 ? 200 + s : 250))'"""
SRUN = f"""srun --gpu-bind=none --cpus-per-task=8 --kill-on-bad-exit=0 --wait=180 \\
  bash -c {TASK} task .venv/bin/python main.py \\
  --workdir=runs/xl --distributed --config=a"""


def calls(*texts):
    """The words of each call in texts of shell commands."""
    lines = "\n".join(texts).replace("\\\n", "").splitlines()
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize(
    ("command", "variables", "expected"),
    [
        ("tpu_pod.sh create", NEW, CREATE),
        ("tpu_pod.sh create", QUEUED, f"{REQUEST}\n{LOOK}"),
        ("tpu_pod.sh install", TPU, INSTALL),
        ("tpu_pod.sh start --config=a", TPU, START),
        ("tpu_pod.sh stop", TPU, STOP),
        ("tpu_pod.sh status", TPU, SSH % "cd sra2_jax && launch/machine.sh status"),
        (
            "tpu_pod.sh logs",
            TPU | {"WORKER": "3"},
            SSH.replace("all", "3") % "cd sra2_jax && launch/machine.sh logs",
        ),
        (
            "tpu_pod.sh resume --config=a",
            NEW,
            f"{LIST}\n{CREATE}\n{INSTALL}\n{START}",
        ),
        ("tpu_pod.sh delete", TPU, DELETE),
        ("tpu_pod.sh delete", QUEUED, WITHDRAW),
        ("xpk.sh image", GKE, IMAGE),
        ("xpk.sh create --config=a", GKE, SUBMIT),
        ("xpk.sh list", GKE, f"xpk workload list {ON_GKE}"),
        ("xpk.sh logs", GKE, LOGS),
        ("xpk.sh delete", GKE, f"xpk workload delete {ON_GKE} --workload=run --force"),
        ("slurm.sbatch --config=a", SLURM, SRUN),
        (
            "machine.sh run --num=5",
            {"MODULE": "sra2_jax sample", "PYTHON": "python"},
            "python -m sra2_jax sample --num=5",
        ),
        (
            "machine.sh install",
            {},
            "python3 -m venv .venv\npip install --quiet --editable .[gpu]",
        ),
    ],
)
def test_dry_run_prints_what_it_runs(site, command, variables, expected):
    script, *words = command.split()
    dry = site.run(script, "--dry-run", *words, **variables)
    assert (dry.returncode, dry.stderr) == (0, "")
    assert not site.record()

    pasted = site.shell(["bash", "-e", "-c", dry.stdout], {})
    assert (pasted.returncode, site.record()) == (0, calls(expected))

    site.lines("states", "ACTIVE" if expected.endswith(LOOK) else "")
    done = site.run(script, *words, **variables)
    assert (done.returncode, site.record()) == (0, calls(expected))


def test_words_survive_down_to_the_program(site):
    python = ["python", "main.py", "--workdir=gs://b/it's a run"]
    run = {"WORKDIR": "gs://b/it's a run"}
    assert site.run("machine.sh", "run", *WORDS, **run).returncode == 0
    assert site.record() == [[*python, *WORDS]]

    assert site.run("slurm.sbatch", *WORDS, **SLURM | run).returncode == 0
    assert site.record()[0][-5:] == [*python[1:], "--distributed", *WORDS]

    site.refuses("line break", "xpk.sh", "create", "--config.name=two\nlines", **GKE)
    assert site.run("xpk.sh", "create", *WORDS, **GKE | run).returncode == 0
    line = site.record()[0][-1].removeprefix("--command=")
    site.shell(["bash", "-c", line], {})
    assert site.record() == [[*python, "--distributed", *WORDS]]

    # the worker's login shell, then the script there, then the program
    assert site.run("tpu_pod.sh", "start", *WORDS, **TPU | run).returncode == 0
    line = site.record()[0][-2].removeprefix("--command=")
    line = line.replace("cd sra2_jax", ":").replace(" start ", " run ")
    site.shell(["sh", "-c", line], {})
    assert site.record() == [[*python, "--distributed", *WORDS]]


@pytest.mark.parametrize(
    ("script", "command", "program", "statuses", "count"),
    [
        ("tpu_pod.sh", "install", "git", [0, 1], 1),  # the first: what is uncommitted
        ("tpu_pod.sh", "install", "gcloud", [1], 2),
        ("tpu_pod.sh", "resume", "gcloud", [1], 1),
        ("tpu_pod.sh", "resume", "gcloud", [0, 1], 2),
        ("tpu_pod.sh", "resume", "gcloud", [0, 0, 0, 1], 5),
        ("xpk.sh", "image", "docker", [1], 1),
        ("machine.sh", "install", "python3", [0, 1], 1),  # the first: its version
    ],
)
def test_stops_at_the_first_failure(site, script, command, program, statuses, count):
    site.lines(f"{program}.status", *statuses)
    done = site.run(script, command, **NEW | GKE)
    assert done.returncode != 0
    assert len(site.record()) == count


@pytest.mark.parametrize(
    ("variables", "states", "expected"),
    [
        (NEW, ["READY"], [LIST, STOP]),
        (NEW, ["PREEMPTED"], [LIST, DELETE, CREATE]),
        (QUEUED, ["ACTIVE"], [LOOK, STOP]),
        (QUEUED, ["PROVISIONING", "ACTIVE"], [LOOK, LOOK]),
        (
            QUEUED,
            ["SUSPENDED", "WAITING_FOR_RESOURCES", "ACTIVE"],
            [LOOK, WITHDRAW, REQUEST, LOOK, LOOK],
        ),
    ],
)
def test_resume_makes_what_is_gone(site, variables, states, expected):
    site.lines("states", *states)
    done = site.run("tpu_pod.sh", "resume", "--config=a", **variables)
    assert done.returncode == 0
    assert site.record() == calls(*expected, INSTALL, START)


def test_a_failed_request_ends_the_wait(site):
    site.lines("states", "WAITING_FOR_RESOURCES", "FAILED")
    done = site.run("tpu_pod.sh", "create", **QUEUED)
    assert done.returncode == 2
    assert "error: the request for pod is FAILED" in done.stderr
    assert site.record() == calls(REQUEST, LOOK, LOOK)


@pytest.mark.parametrize(
    ("restarts", "statuses", "count"),
    [
        (50, [0], 1),
        (50, [42, 143, 137, 134, 0], 5),
        (50, [2], 1),
        (50, [1], 1),
        (50, [130], 1),
        (50, [42, 2], 2),
        (1, [42, 42, 42], 2),
    ],
)
def test_starts_again_only_what_is_worth_it(site, restarts, statuses, count):
    site.lines("python.status", *statuses)
    variables = {"WORKDIR": "runs/xl", "RESTARTS": str(restarts), "PAUSE": "0"}
    done = site.run("machine.sh", "run", **variables)
    assert done.returncode == statuses[count - 1]
    assert len(site.record()) == count


def test_a_run_in_the_background_starts_once_and_stops(site):
    sleeper = "#!/usr/bin/env bash\necho up\nexec sleep 30\n"
    site.program(site.checkout / ".venv" / "bin" / "python", sleeper)
    log = site.checkout / "runs" / "launch.log"
    try:
        assert site.run("machine.sh", "start", WORKDIR="runs/xl").returncode == 0
        again = site.run("machine.sh", "start", WORKDIR="runs/xl")
        assert "runs already" in again.stdout
        while "up" not in log.read_text():
            pass
        assert site.run("machine.sh", "status").stdout.startswith("running")
    finally:
        stopped = site.run("machine.sh", "stop")
    assert "not running; last line: launch: ended with status 143" in stopped.stdout
    assert log.read_text() == "up\nlaunch: ended with status 143\n"


@pytest.mark.parametrize(
    ("status", "state", "count", "ends"),
    [
        (42, "RUNNING", 0, None),
        (143, "RUNNING", 0, None),
        (143, "CANCELLED", 0, 143),
        (42, "RUNNING", 50, 42),
        (202, "RUNNING", 0, 2),  # the task raised it above the others' SIGABRT
        (0, "RUNNING", 0, 0),
    ],
)
def test_slurm_queues_a_job_again(site, status, state, count, ends):
    site.lines("srun.status", status)
    site.lines("states", state)
    done = site.run("slurm.sbatch", **SLURM | {"SLURM_RESTART_COUNT": str(count)})
    requeued = ["scontrol", "requeue", "7"] in site.record()
    assert requeued == (ends is None)
    assert done.returncode == (ends or 0)


def test_slurm_tells_reasons_from_signals(site):
    site.run("slurm.sbatch", **SLURM)
    task = site.record()[0][5:]
    for status, ends in ((0, 0), (42, 42), (143, 143), (134, 134), (2, 202), (1, 201)):
        site.lines("python.status", status)
        assert site.shell(task, {}).returncode == ends


def test_slurm_runs_in_a_container(site):
    """And refuses a process for more than one GPU."""
    alone = SLURM | {"SLURM_NTASKS_PER_NODE": "1"}
    site.refuses("1 processes for 4 GPUs", "slurm.sbatch", **alone)
    site.run("slurm.sbatch", "--config=a", **SLURM | {"IMAGE": "sra2.sif"})
    words = site.record()[0]
    inside = words.index("apptainer")
    program = "python main.py --workdir=runs/xl --distributed --config=a"
    container = f"apptainer exec --nv --pwd={site.checkout} sra2.sif"
    assert [words[inside:]] == calls(f"{container} {program}")


def test_old_pythons_get_a_newer_one(site):
    site.lines("python3.status", 1)  # its answer about its version
    assert site.run("machine.sh", "install", EXTRA="").returncode == 0
    assert site.record() == calls(
        "python3 -m pip install --quiet --user uv",
        "python3 -m uv venv --quiet --allow-existing --seed --python=3.12 .venv",
        "pip install --quiet --editable .",
    )


def test_the_image_takes_what_the_program_needs():
    ignored = (ROOT / "launch" / "Dockerfile.dockerignore").read_text().splitlines()
    taken = {line[1:] for line in ignored if line.startswith("!")}
    assert {"main.py", "setup.py", "requirements.txt", "configs", "sra2_jax"} <= taken
    assert all((ROOT / name).exists() for name in taken)
