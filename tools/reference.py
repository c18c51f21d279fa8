"""Write docs/config.md, every key of a config, from sra2_jax/config.py.

python -m tools.reference
"""

from pathlib import Path

from sra2_jax.command import Parser, run_program
from sra2_jax.config import Config
from sra2_jax.section import allowed, fields

PAGE = Path(__file__).parents[1] / "docs" / "config.md"
HEAD = """# Config reference

Every key, `--config.SECTION.KEY=VALUE`; defaults are SRA 2's at XL/2, 256 px. A run
that is resumed may change those marked with \u2713. Written by
`python -m tools.reference`.
"""


def page() -> str:
    """Markdown, a table for each section."""
    tables: dict[str, list[str]] = {}
    for name, value in Config().flat().items():
        f = fields(Config)[name]
        known, section = f.metadata["key"], name.rpartition(".")[0]
        free = "\u2713" if known.free else ""
        cells = f"`{f.name}`", f"`{value!r}`", known.about, allowed(f), free
        tables.setdefault(section, []).append(f"| {' | '.join(cells)} |")
    parts = [HEAD]
    for section, rows in tables.items():
        parts.append(f"\n## {section or 'The run'}\n")
        parts.append("| key | default | what | | |\n|---|---|---|---|---|")
        parts += rows
    return "\n".join(parts) + "\n"


def main() -> None:
    Parser(description=(__doc__ or "").splitlines()[0]).parse_args()
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
