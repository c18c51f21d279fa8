"""A run of a network on the hub: python -m sra2_jax pull USER/NAME --workdir=RUN.

USER/NAME[@REVISION] is one that `sra2 push` wrote. The run is sampled, swept, scored
and trained further as any other; its optimizer starts anew.
"""

import shutil

from sra2_jax.command import Parser
from sra2_jax.hub import PARTS, WEIGHTS, fetch_run
from sra2_jax.programs.convert import import_file
from sra2_jax.run import Run


def pull(source: str, workdir: str) -> None:
    """Make `workdir` a run. Raises UserError: see `fetch_run` and `import_file`."""
    folder, config = fetch_run(source)
    import_file(folder / WEIGHTS, workdir, config)
    run = Run(workdir)
    for key, part in PARTS.items():
        if (folder / part).is_dir():
            shutil.copytree(folder / part, run.folder / part)
            config = config.override({key: str(run.folder / part)})
    run.write("config", config.to_dict())


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("source", metavar="USER/NAME", help="on the hub; USER/NAME@REVISION")
    add("--workdir", required=True, metavar="RUN", help="folder of the run to make")
    flags = parser.parse_args()
    pull(flags.source, flags.workdir)
