"""What runs of several processes share."""

import socket

import pytest

from tests.conftest import shared


@pytest.fixture(scope="session")
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


@pytest.fixture
def whole(start, command):
    """The workdir of such a run that nothing stops; not to change."""

    def make(path):
        run = start(*command, f"--workdir={path}", no_report=1)
        assert run.status() == 0, run.text

    return shared("whole", make)


@pytest.fixture(scope="session")
def pair(start, free_port):
    """pair(*words, **faults): two processes of one job, with two devices each."""

    def pair(*words, **faults):
        words = *words, f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"
        return [
            start(*words, f"--process_id={i}", devices=2, **faults) for i in range(2)
        ]

    return pair
