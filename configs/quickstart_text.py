"""Text to image in minutes on a CPU: MMDiT with SRA 2 on captioned digits of MNIST.

Command: python main.py --config=configs/quickstart_text.py, after
pip install -e '.[text]'. Images are a digit ("a handwritten seven") or two, side by
side ("two digits, three then one"); ten of the hundred pairs are in no image, and
`python -m benchmarks.quickstart_text` tells how often samples show what a prompt asks.
A small text encoder is trained along.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

# The last four are of pairs that were never shown.
PROMPTS = (
    "a handwritten seven; the digit two; two digits, three then one; five then five; "
    "two digits, one then four; nine then two; two digits, zero then three; "
    "six then nine"
)


def get_config() -> ConfigDict:
    quickstart = Path(__file__).with_name("quickstart.py")
    c: ConfigDict = runpy.run_path(str(quickstart))["get_config"]()
    c.name = "quickstart_text"
    c.data.num_classes = 1
    c.text.encoder, c.text.train, c.text.prompts = "words", True, PROMPTS
    c.model.depth = 4
    c.transport.time = "lognormal"
    c.sampling.guidance = 2.0
    c.steps, c.run.checkpoint_every, c.run.sample_every = 900, 450, 450
    c.run.grid_classes = 8
    c.eval.features = ""
    return c
