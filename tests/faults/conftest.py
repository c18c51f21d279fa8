"""Runs as real processes, see driver.py."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

DRIVER = Path(__file__).parent / "driver.py"


class Process:
    """A run; `text` is what it has printed."""

    def __init__(self, pid, out, ended):
        self.pid, self._out, self._ended = pid, out, ended

    @property
    def text(self):
        return self._out.read_text(errors="replace") if self._out.exists() else ""

    def until(self, condition, seconds=200):
        """Wait until `condition`, a text it prints or a function, is there."""
        there = condition if callable(condition) else lambda: condition in self.text
        end = time.monotonic() + seconds
        while not there():
            assert self.pid not in self._ended, f"ended early:\n{self.text[-3000:]}"
            assert time.monotonic() < end, f"waited for {condition}:\n{self.text}"
            time.sleep(0.01)
        return self

    def kill(self, number=signal.SIGTERM):
        os.kill(self.pid, number)
        return self

    def status(self, seconds=200):
        """Wait for its end, at most so long; its exit status."""
        end = time.monotonic() + seconds
        while self.pid not in self._ended:
            assert time.monotonic() < end, f"still runs:\n{self.text[-3000:]}"
            time.sleep(0.01)
        return self._ended[self.pid]


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """start(*arguments of main.py or of sra2, **faults) -> Process."""
    folder = tmp_path_factory.mktemp("out")
    flags = os.environ["XLA_FLAGS"].replace("count=8", "count=2")
    driver = subprocess.Popen(
        [sys.executable, str(DRIVER)],
        env=os.environ | {"XLA_FLAGS": flags},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    started, ended, pids = queue.Queue(), {}, []

    def listen():
        for line in driver.stdout:
            what, pid, *status = line.split()
            if what == "started":
                started.put(int(pid))
            else:
                ended[int(pid)] = int(status[0])

    threading.Thread(target=listen, daemon=True).start()
    count = iter(range(1000))

    def start(*arguments, **faults):
        out = folder / f"{next(count)}.txt"
        command = {"arguments": list(map(str, arguments)), "out": str(out)}
        driver.stdin.write(json.dumps(command | {"faults": faults}) + "\n")
        driver.stdin.flush()
        pids.append(started.get(timeout=200))
        return Process(pids[-1], out, ended)

    yield start
    for pid in set(pids) - ended.keys():  # of tests that failed
        os.kill(pid, signal.SIGKILL)
    driver.kill()
    driver.wait()
    driver.stdin.close()
    driver.stdout.close()


@pytest.fixture
def free_port():
    """A function that finds one."""

    def find():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return free.getsockname()[1]

    return find


@pytest.fixture
def command(tiny, latents, as_file):
    """Arguments of main.py: 12 steps, saved every 4, a row every 2, a picture at 10."""
    tiny.steps, tiny.data.dir, tiny.eval.features = 12, str(latents), ""
    tiny.run.checkpoint_every, tiny.run.log_every, tiny.run.sample_every = 4, 2, 10
    return [f"--config={as_file(tiny)}"]
