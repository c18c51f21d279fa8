"""Train: python main.py [--config=configs/sra2_xl.py] [--workdir=DIR] [overrides].

Any key of configs/default.py can be overridden: --config.steps=1000. Running the same
command again goes on from the newest checkpoint in the workdir.
"""

import argparse
from pathlib import Path

from absl import flags, logging

from sra2_jax import config as configuration
from sra2_jax import distributed
from sra2_jax.errors import run_program
from sra2_jax.training.lock import Lock
from sra2_jax.training.watch import Watch

DEFAULT = Path(__file__).resolve().parent / "configs" / "quickstart.py"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument(
        "--workdir", help="folder of the run, local or gs:// (runs/CONFIG_NAME)"
    )
    distributed.add_arguments(parser)
    # The config is checked before TensorFlow is imported or a device touched.
    arguments, config = configuration.parse_arguments(parser, str(DEFAULT))

    flags.FLAGS.mark_as_parsed()  # absl warns before its first line otherwise
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    # Our own rows of metrics and errors; not the progress notes of the libraries.
    logging.get_absl_handler().addFilter(
        lambda r: r.levelname == "ERROR" or r.filename == "logging_writer.py"
    )
    distributed.initialize(arguments)
    workdir = arguments.workdir or f"runs/{config.name}"
    with (
        Watch(config.run.stall_seconds, arguments.heartbeat_seconds) as watch,
        Lock(workdir),
    ):
        from sra2_jax.training.train import train

        train(config, workdir, watch)
    distributed.finish()


if __name__ == "__main__":
    run_program(main)
