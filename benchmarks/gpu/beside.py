"""Run modules side by side on one device; the exit status is that of the worst.

    python -m benchmarks.gpu.beside "MODULE FLAGS ..." "MODULE FLAGS ..."

For what does not fill a device by itself: none takes its memory beforehand.
"""

import os
import shlex
import subprocess
import sys


def main() -> int:
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    running = []
    for text in sys.argv[1:]:
        words = sys.executable, "-m", *shlex.split(text)
        running.append(subprocess.Popen(words, env=environment))
    return max(abs(process.wait()) for process in running)


if __name__ == "__main__":
    sys.exit(main())
