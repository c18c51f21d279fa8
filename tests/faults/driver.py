"""Real processes in little time: imports once, then forks one for each line on stdin.

A line is {"arguments": [...], "out": FILE, "faults": {NAME: VALUE}}; the answers are
"started PID" and, when that process has ended, "ended PID STATUS" (-N: by signal N).
Arguments are those of main.py, of sra2, or a module with a `main` and its.
"""

import gc
import importlib
import json
import math
import os
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


def each_batch(change):
    """change(i, batch): before a run gets its batch i."""
    from sra2_jax.data import pipeline

    whole = pipeline.batches

    def batches(*arguments, **named):
        for i, batch in enumerate(whole(*arguments, **named)):
            change(i, batch)
            yield batch

    pipeline.batches = batches


def no_data(after):
    """The disk hangs: no batch after so many."""

    def hang(i, batch):
        if i == after:
            time.sleep(1)  # the batches before are used up
            print("no data", flush=True)
            time.sleep(1e6)

    each_batch(hang)


def only_data_stalls(_):
    """All else may take its time, so that a test need not wait for a stall."""
    from sra2_jax import runtime

    class Watch(runtime.Watch):
        def __init__(self, stall_seconds):
            super().__init__(stall_seconds)
            self.progress("start")

        def progress(self, phase):
            super().progress(phase)
            if phase != "data":
                self._since = math.inf

    runtime.Watch = Watch


def infinite(batches_of_infinity):
    """Latents of infinity in these batches, the first is 0."""

    def spoil(i, batch):
        if i in batches_of_infinity:
            batch["mean"] = batch["mean"].copy()
            batch["mean"][0] = math.inf

    each_batch(spoil)


def slow_steps(seconds):
    """For every batch."""
    each_batch(lambda i, batch: time.sleep(seconds))


def slow_samples(seconds):
    """Between batches of samples."""
    from sra2_jax.observe import Observer

    between = Observer._between

    def slowly(self, batches):
        for batch in between(self, batches):
            print("sampling", flush=True)
            time.sleep(seconds)
            yield batch

    Observer._between = slowly


def slow_commit(seconds):
    """A checkpoint's last step, when all its files are written."""
    from orbax.checkpoint._src.path import atomicity

    def slowly(finalize):
        async def finalized(self, *arguments, **named):
            print("saving", flush=True)
            time.sleep(seconds)
            return await finalize(self, *arguments, **named)

        return finalized

    for name in ("AtomicRenameTemporaryPath", "CommitFileTemporaryPath"):
        kind = getattr(atomicity, name)
        kind.finalize = slowly(kind.finalize)


def fast_beat(seconds):
    """Of the lock, so that a test need not wait."""
    from sra2_jax import run, storage

    run.BEAT_SECONDS, storage.TRIES = seconds, (0.1, 0.1, 0.1)


def no_tensorboard(_):
    """Every write to it fails, as on a full disk."""
    from sra2_jax import log

    def fail(*arguments, **named):
        raise OSError(28, "No space left on device")

    log.EventWriter.write_scalars = fail


class Blind:
    """An Observer that makes neither pictures nor a report."""

    def __init__(self, *_):
        self.facts = {}

    def due(self, step):
        return False, False

    def observe(self, *_, **__):
        pass

    finish = report = observe


def no_pictures(_):
    """Where they are not the point: in half the time."""
    from sra2_jax import train

    train.Observer = Blind


def no_report(_):
    """Pictures, but nothing drawn of them."""
    from sra2_jax import observe

    observe.write_report = print


def environment(values):
    os.environ.update(values)


def child(command):
    out = os.open(command["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    from sra2_jax.__main__ import COMMANDS, main
    from sra2_jax.command import run_program

    sys.argv = words = command["arguments"]
    if words[0].startswith(("benchmarks.", "tools.", "tests.")):
        main = importlib.import_module(words[0]).main
    else:
        sys.argv = ["sra2", *([] if words[0] in COMMANDS else ["train"]), *words]
    for name, value in command["faults"].items():
        globals()[name](value)
    try:
        run_program(main)
    except SystemExit as end:
        os._exit(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def serve():
    # All that takes time, and starts no thread nor device.
    import matplotlib.figure  # noqa: F401

    import sra2_jax.train  # noqa: F401

    gc.disable()
    gc.freeze()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(json.loads(line))
        print("started", pid, flush=True)
        threading.Thread(target=wait, args=(pid,), daemon=True).start()


def wait(pid):
    _, status = os.waitpid(pid, 0)
    print("ended", pid, os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
