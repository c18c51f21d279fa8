"""Train: python main.py [--config=configs/sra2_xl.py] [--workdir=DIR] [overrides].

Any key of configs/default.py can be overridden: --config.steps=1000. Running the same
command again goes on from the newest checkpoint in the workdir.
"""

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from sra2_jax.errors import UserError, run_program

DEFAULT = Path(__file__).resolve().parent / "configs" / "quickstart.py"


def parse_flags(argv: list[str]) -> list[str]:
    """Define and parse the flags; mistakes become one clear line.

    Raises:
      UserError: an unknown flag or key, a value of another type, no such config file.
    """
    flags.DEFINE_string(
        "workdir", "", "folder of the run, local or gs:// (default: runs/CONFIG_NAME)"
    )
    flags.DEFINE_bool(
        "distributed", False, "several processes (TPU pod, SLURM): jax.distributed"
    )
    try:
        # Reads sys.argv at once: its own errors come before the parser's.
        config_flags.DEFINE_config_file("config", str(DEFAULT), "a file of configs/")
        rest = flags.FLAGS(argv)
        flags.FLAGS.config.lock()
    except Exception as error:  # ml_collections raises many kinds
        from configs import default
        from sra2_jax import config as configuration

        known = default.get_config()
        keys = dict(configuration.flatten(known))
        for argument in argv[1:]:
            section, _, key = argument.lstrip("-").split("=")[0].partition(".")
            if section == "config" and key and key not in keys:
                raise configuration.unknown_key(key, known) from error
        if isinstance(error, OSError):
            raise UserError("--config names no file: see configs/") from error
        reason = " ".join(str(error).split())
        raise UserError(f"{reason} (--help lists the flags)") from error
    return rest


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: flags begin with --")
    logging.set_verbosity(logging.INFO)
    # Our own rows of metrics and errors; not the progress notes of the libraries.
    logging.get_absl_handler().addFilter(
        lambda r: r.levelname == "ERROR" or r.filename == "logging_writer.py"
    )
    config = flags.FLAGS.config
    from sra2_jax import config as configuration

    configuration.check(config)  # before TensorFlow is imported or a device touched
    import jax

    if flags.FLAGS.distributed:
        jax.distributed.initialize()
    from sra2_jax.training.train import train

    train(config, flags.FLAGS.workdir or f"runs/{config.name}")


if __name__ == "__main__":
    run_program(lambda: app.run(main, sys.argv, flags_parser=parse_flags))
