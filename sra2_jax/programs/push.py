"""A run's network to the Hugging Face hub: python -m sra2_jax push RUN --to=USER/NAME.

Sends the weights in SiT's names with their heads, config.json, the VAE and the text
encoder if they are folders of your own, the newest sample grid, and a model card of
what the run has recorded. The token is that of `hf auth login` or HF_TOKEN. Run again
it sends what is not there yet.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from sra2_jax.command import Parser
from sra2_jax.config import Config
from sra2_jax.errors import explained
from sra2_jax.hub import CONFIG, PARTS, WEIGHTS
from sra2_jax.programs.convert import check_names, export_run
from sra2_jax.programs.sample import add_weights
from sra2_jax.report.page import Page
from sra2_jax.run import Run
from sra2_jax.storage import is_remote

SAMPLES = "samples.png"
CARD = """---
library_name: sra2_jax
pipeline_tag: {task}
tags: [diffusion-transformer, sit, jax]
---

# {name}

{kind}. {network} of {parameters} parameters, {claim}, trained for {step:,} of {steps:,}
steps of {batch_size} images. The weights are float32 in {names} names, `{weights}` of
the run; heads of alignments have names of their own, which that code ignores with
`strict=False`. t = 0 is data, t = 1 noise.
{picture}
```python
import sra2_jax as sra

run = sra.load_run("hub:{to}", guidance=1.5)
images = sra.generate(run.program, run.params, labels={labels})
```

`sra2 pull {to} --workdir=runs/{name}` makes a run of it.

## Data

{source}, {resolution} px, {conditions}, latents of `{vae}`. Its licence:
{licence}.

## Metrics

{metrics}

## Not shown

Whatever is not in the tables above. Metrics are comparable where every setting is the
same. The project that trained this has not reproduced the published numbers of its
methods unless its own documentation says so by now.

Every key of the run is in [config.json](config.json).
"""


def table(rows: Mapping[str, Any], *heads: str) -> str:
    """Rows of Markdown: a key, and its value or values."""
    found = [("", *(heads or ("",)))]
    found.append(("---",) * len(found[0]))
    found += [(k, *v) if isinstance(v, list) else (k, v) for k, v in rows.items()]
    return "\n".join(f"| {' | '.join(map(cell, row))} |" for row in found)


def cell(value: Any) -> str:
    """Numbers with four digits; a text cannot leave its cell."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(("" if value is None else str(value)).replace("|", "/").split())


def public(config: Config) -> Config:
    """Without the folders of the machine it was trained on: their last part stays."""

    def place(value: Any) -> bool:
        if not isinstance(value, str):
            return False
        return is_remote(value) or value.startswith(("/", "~", "."))

    found = {key: value for key, value in config.flat().items() if place(value)}
    return config.override({key: epath.Path(v).name for key, v in found.items()})


def write_card(run: Run, config: Config, to: str, weights: str, licence: str) -> str:
    """The model card, of the run's own records."""
    page, results = Page(run), dict(run.read("results"))
    scores, levels = results.pop("metrics", {}), results.pop("reference", {})
    made = results.pop("versions", {})
    rows = {
        key: [value, levels.get(f"real_{key}"), levels.get(f"reconstruction_{key}")]
        for key, value in scores.items()
    }
    settings = results | {"jax": made.get("jax"), "device": made.get("device")}
    heads = "samples", "real images", "real images through the VAE"
    metrics = f"{table(rows, *heads)}\n\nMeasured with:\n\n{table(settings)}"
    picture = f"\n![Samples]({SAMPLES})\n" if run.sample_grids() else ""
    texts = page.header() | {"name": config.name, "vae": config.vae, "to": to}
    texts |= {"steps": config.steps, "batch_size": config.batch_size}
    texts |= {"metrics": metrics if scores else "None were measured."}
    texts |= {"resolution": config.data.resolution, "picture": picture}
    texts |= {"weights": weights, "licence": licence}
    if config.text.encoder:
        texts |= {"task": "text-to-image", "conditions": "captions"}
        texts |= {"labels": ["a photograph of a cat"], "names": "REPA's MMDiT's"}
    else:
        classes = f"{config.data.num_classes} classes"
        texts |= {"task": "unconditional-image-generation", "conditions": classes}
        texts |= {"labels": [0, 1, 2], "names": "SiT's"}
    return CARD.format_map(texts)


def push(
    workdir: str,
    to: str,
    weights: str = "ema",
    step: int | None = None,
    licence: str = "not stated",
    private: bool = False,
) -> None:
    """Send a run's network to the hub and print where it is.

    to: owner/name, made where missing; weights, step: as of `export_run`.

    Raises UserError: no such run, weights or checkpoint, or the hub does not take it.
    """
    run = Run(workdir)
    config = run.config()
    check_names(config)
    from huggingface_hub import HfApi  # takes a second

    api = HfApi(library_name="sra2_jax")
    advice = "check the name, the network, HF_HUB_OFFLINE and the token (hf auth login)"
    with explained(f"{to}: not sent to the hub", advice):
        where = str(api.create_repo(to, private=private, exist_ok=True))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_run(workdir, str(folder / WEIGHTS), weights, step, heads=True)
        for key, part in PARTS.items():
            place = config.flat()[key]
            own = Path(place).expanduser()
            if place and own.is_dir():
                (folder / part).mkdir()
                for path in (*own.glob("*.json"), *own.glob("*.safetensors")):
                    shutil.copy(path, folder / part)
                config = config.override({key: part})
        for _, picture in run.sample_grids()[-1:]:
            (folder / SAMPLES).write_bytes(picture.read_bytes())
        config = public(config)
        text = json.dumps(config.to_dict(), indent=2)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
        card = write_card(run, config, to, weights, licence)
        (folder / "README.md").write_text(card, encoding="utf-8")
        with explained(f"{to}: not sent to the hub", f"{advice}, and run again"):
            message = f"{run.folder.name}, sra2_jax"
            api.upload_folder(repo_id=to, folder_path=folder, commit_message=message)
    print(f"{where}: sent")


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add_weights(parser)
    add = parser.add_argument
    add("--to", required=True, metavar="USER/NAME", help="on the hub")
    add("--licence", default="not stated", help="of the data, for the model card")
    add("--private", action="store_true", help="a new repository only you can see")
    push(**vars(parser.parse_args()))
