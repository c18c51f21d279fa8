"""Train: python main.py [--config=configs/sra2_xl.py] [--workdir=DIR] [overrides].

Any key of configs/default.py can be overridden: --config.steps=1000. Running the same
command again goes on from the newest checkpoint in the workdir.
"""

from pathlib import Path

from sra2_jax import config as configuration
from sra2_jax.errors import UserError, run_program
from sra2_jax.flags import Parser, add_distributed

DEFAULT = Path(__file__).resolve().parent / "configs" / "quickstart.py"


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--workdir", help="folder of the run, local or gs:// (runs/CONFIG_NAME)"
    )
    add_distributed(parser)
    arguments, config = configuration.parse_arguments(parser, str(DEFAULT))
    if arguments.workdir == "":
        raise UserError("--workdir= is empty: name a folder")
    workdir = arguments.workdir or f"runs/{config.name}"
    configuration.check_paths(config, workdir)

    # Only now what takes seconds to import: mistakes in the config are found before.
    from absl import flags, logging

    from sra2_jax import distributed
    from sra2_jax.lock import Lock
    from sra2_jax.sharding import make_mesh
    from sra2_jax.watch import Watch

    flags.FLAGS.mark_as_parsed()  # absl warns before its first line otherwise
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    # Our own rows of metrics and errors; not the progress notes of the libraries, nor
    # what Orbax says of a failed save: that is reported, in a line.
    logging.get_absl_handler().addFilter(
        lambda r: (
            r.filename == "logging_writer.py"
            or (r.levelname == "ERROR" and "orbax" not in r.pathname)
        )
    )
    distributed.initialize(arguments)
    # Refuses a mesh that does not fit the devices, before the workdir is made.
    make_mesh(**config.mesh, batch_size=config.batch_size, n=config.accumulate)
    with (
        Watch(config.run.stall_seconds, arguments.heartbeat_seconds) as watch,
        Lock(workdir),
    ):
        from sra2_jax.train import train

        train(config, workdir, watch)
    distributed.finish()


if __name__ == "__main__":
    run_program(main)
