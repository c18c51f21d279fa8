"""Train: python main.py [--config=configs/sra2_xl.py] [--workdir=DIR] [overrides].

Any key of configs/default.py can be overridden: --config.steps=1000. Running the same
command again goes on from the newest checkpoint in the workdir.
"""

from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from sra2_jax.errors import UserError, run_program

ROOT = Path(__file__).resolve().parent
CONFIG = config_flags.DEFINE_config_file(
    "config", str(ROOT / "configs" / "quickstart.py"), "a file of configs/"
)
WORKDIR = flags.DEFINE_string(
    "workdir", "", "folder of the run, local or gs:// (default: runs/NAME of the config)"
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "several processes (TPU pod, SLURM): jax.distributed"
)


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parsing, with mistakes as one clear line.

    Raises:
      UserError: an unknown flag or key, a value of another type, no such config file.
    """
    try:
        return flags.FLAGS(argv)
    except Exception as error:  # ml_collections raises many kinds
        from configs import default
        from sra2_jax import config as configuration

        keys = dict(configuration.flatten(default.get_config()))
        for argument in argv:
            key = argument.lstrip("-").split("=")[0]
            if key.startswith("config.") and key.removeprefix("config.") not in keys:
                raise configuration.unknown_key(
                    key.removeprefix("config."), default.get_config()
                ) from error
        reason = " ".join(str(error).split())
        raise UserError(f"{reason} (--help lists the flags)") from error


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: flags begin with --")
    logging.set_verbosity(logging.INFO)
    config = CONFIG.value
    config.lock()
    from sra2_jax import config as configuration

    configuration.check(config)  # before TensorFlow is imported or a device touched
    import jax

    if DISTRIBUTED.value:
        jax.distributed.initialize()
    from sra2_jax.training.train import train

    train(config, WORKDIR.value or f"runs/{config.name}")


if __name__ == "__main__":
    run_program(lambda: app.run(main, flags_parser=parse_flags))
