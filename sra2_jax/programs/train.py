"""Train a config, from the newest checkpoint in its workdir on."""

import logging

from sra2_jax import config_file
from sra2_jax.command import Parser, add_distributed
from sra2_jax.errors import UserError


def main() -> None:
    """Check the command line, become one of the job's processes, train."""
    parser = Parser(description=(__doc__ or "").strip())
    parser.add_argument(
        "--workdir", help="folder of the run, local or gs:// (runs/CONFIG_NAME)"
    )
    add_distributed(parser)
    arguments, config = parser.parse_config("quickstart")
    if arguments.workdir == "":
        raise UserError("--workdir= is empty: name a folder")
    workdir = arguments.workdir or f"runs/{config.name}"
    config_file.check_paths(config, workdir)

    # Only now what takes seconds to import: mistakes in the config are found before.
    import jax

    from sra2_jax import runtime
    from sra2_jax.run import Lock, Run
    from sra2_jax.sharding import mesh

    logging.disable()  # libraries' notes: what they raise is reported, in a line
    runtime.join(arguments)
    mesh(config)  # refuses what does not fit the devices, before the workdir is made
    run = Run(workdir, jax.process_index() == 0)
    with runtime.Watch(config.run.stall_seconds) as watch, Lock(run):
        from sra2_jax.train import train

        train(config, workdir, watch)
    runtime.part()
