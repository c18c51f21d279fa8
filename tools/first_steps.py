"""Record the first steps that `sra2 verify --steps` compares: minutes on two cores.

python -m tools.first_steps
"""

import itertools
import json

from sra2_jax.command import Parser, run_program
from sra2_jax.programs.steps import BANDS, RECORDED, first_steps


def main() -> None:
    Parser(description=(__doc__ or "").splitlines()[0]).parse_args()
    RECORDED.parent.mkdir(exist_ok=True)
    with RECORDED.open("w") as file:
        for row in itertools.islice(first_steps(), max(BANDS)):
            values = {name: float(f"{value:.7g}") for name, value in row.items()}
            print(json.dumps(values), file=file, flush=True)


if __name__ == "__main__":
    run_program(main)
