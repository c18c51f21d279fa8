"""The programs: python -m sra2_jax COMMAND, or sra2 COMMAND; each has --help."""

import importlib
import sys

from sra2_jax.command import run_program
from sra2_jax.errors import UserError

# command -> its module, what it does
COMMANDS = {
    "encode": ("data.encode", "images to a dataset of latents; --check verifies one"),
    "import-latents": ("data.import_latents", "latents that exist to a dataset"),
    "train": ("programs.train", "the training job, as main.py"),
    "sample": ("programs.sample", "images from a run, in ADM's .npz"),
    "evaluate": ("programs.evaluate", "FID and the other metrics of images"),
    "sweep": ("programs.sweep", "metrics over guidance scales and intervals"),
    "convert": ("programs.convert", "checkpoints of PyTorch code, in and out"),
    "push": ("programs.push", "a run's network to the Hugging Face hub"),
    "pull": ("programs.pull", "a run of a network on the hub"),
    "verify": ("programs.verify", "this machine's numbers against golden files"),
    "status": ("programs.status", "how runs are doing"),
    "report": ("report.page", "a run's report.html anew"),
    "serve": ("programs.serve", "runs in the browser, also while they train"),
    "mirror": ("programs.mirror", "a run's metrics and samples to W&B"),
    "fit": ("programs.fit", "does a config fit on chips that need not be here"),
}


def main() -> int | None:
    """Run the command that is named first."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
        for command, (_, what) in COMMANDS.items():
            print(f"  {command:15} {what}")
        return None
    if name not in COMMANDS:
        raise UserError(f"unknown command {name}: one of {', '.join(COMMANDS)}")
    del sys.argv[1]
    sys.argv[0] = f"sra2 {name}"
    return importlib.import_module(f"sra2_jax.{COMMANDS[name][0]}").main()


def console() -> None:
    """The console script `sra2`."""
    run_program(main)


if __name__ == "__main__":
    console()
