"""Time the steps of several small runs in one program against one after another.

    python -m benchmarks.gpu.seeds --config=configs/digits.py --runs=3 --json=FILE

One program: the step mapped over the runs' states and batches (vmap). By turns; the
ratio is the time of one step of all runs over that of as many single steps.
"""

import jax
import jax.numpy as jnp

from sra2_jax.command import Parser, run_program, writable
from tools.measure import Timed, by_turns, machine, prepare, ratio, spread, write


def together(one: Timed, runs: int) -> Timed:
    """The step of as many runs in one program, with states and batches of their own."""

    def stacked(tree: object) -> object:
        return jax.tree.map(lambda x: jnp.stack([x] * runs), tree)

    mapped = jax.vmap(one.program.update, in_axes=(0, 0, None))
    step = jax.jit(mapped, donate_argnums=0)
    state, batch = stacked(one.state), stacked(one.batch)
    compiled = step.lower(state, batch, one.frozen).compile()
    return Timed(one.program, compiled, state, batch, one.frozen, 0.0)


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--runs", type=int, default=3)
    add("--rounds", type=int, default=7)
    add("--steps", type=int, default=3, help="a round and program (%(default)s)")
    add("--json", type=writable, metavar="FILE", help="write the figures there")
    a, config = parser.parse_config("digits")
    facts, one = machine(), prepare(config)
    all_runs = together(one, a.runs)
    by_turns({"one": one, "all": all_runs}, a.rounds, a.steps)
    middle, low, high = (x / a.runs for x in ratio(all_runs, one))
    seconds = {"one": spread(one.seconds), "all": spread(all_runs.seconds)}
    print(
        f"{config.name}, batch {config.batch_size}: {a.runs} runs in one program take "
        f"{middle:.2f} ({low:.2f} to {high:.2f}) of the time of one after another; "
        f"a step of one {1e3 * seconds['one']['p50']:.1f} ms"
    )
    row = {"runs": a.runs, "ratio": [middle, low, high], "seconds": seconds}
    write(a.json, facts, [row])


if __name__ == "__main__":
    run_program(main)
