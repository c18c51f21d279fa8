"""Train: python main.py [--config=configs/sra2_xl.py] [--workdir=DIR] [overrides].

Any key of the config can be overridden: --config.steps=1000; --keys lists them. Running
the same command again goes on from the newest checkpoint in the workdir.
"""

from sra2_jax.command import run_program
from sra2_jax.programs.train import main

if __name__ == "__main__":
    run_program(main)
