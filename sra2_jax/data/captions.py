"""Images with captions: folders, webdataset's tars, Hugging Face's Parquet."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from sra2_jax.config import DIGITS
from sra2_jax.data import digits
from sra2_jax.data.images import SUFFIXES, Entry, ImageSource, list_images, text_of
from sra2_jax.data.pixels import decode_rgb
from sra2_jax.data.tables import by_number, opened
from sra2_jax.errors import UserError, explained

# of an image: its name, its captions, and what decodes it
Row = tuple[str, list[str], Callable[[], np.ndarray]]


def captioned(spec: str, captions: str, split: str = "train") -> ImageSource:
    """The images of a source that have captions, without classes.

    split: of the digits, which have captions of their own; captions: of a folder or of
    .tar files "txt", NAME.txt beside NAME.jpg, a caption a line; of .parquet or .arrow,
    whose images are the column "image", another column, texts or lists of them; or a
    file as COCO's, {"images": [{"id", "file_name"}], "annotations": [{"image_id",
    "caption"}]}.

    Raises UserError: no image with a caption, or what cannot be read.
    """
    path = Path(spec)

    def files(suffix: str) -> list[Path]:
        there = path.rglob(f"*{suffix}") if path.is_dir() else [path]
        return sorted(file for file in there if file.suffix == suffix)

    tables: list[Path] = []
    rows: list[Row] = []
    with explained(f"{spec}: captions cannot be read", "see sra2 encode --help"):
        if spec in DIGITS:
            pictures = zip(*digits.load_captioned(split, spec), strict=True)
            rows = [
                (f"{spec}/{split}/{number}", texts, partial(np.asarray, image))
                for number, (image, texts) in enumerate(pictures)
            ]
        elif tables := files(".parquet") or files(".arrow"):
            rows = list(_tables(tables, captions))
        elif tars := files(".tar"):
            rows = list(_tars(tars))
        else:
            rows = list(_folder(path, captions))
    whole = [row for row in rows if row[1]]
    if not whole:
        raise UserError(f"{spec}: none of its {len(rows)} images has a caption")

    def entries(indices: Sequence[int] | None = None) -> Iterator[Entry]:
        wanted = range(len(whole)) if indices is None else indices
        for index in sorted(wanted) if tables else wanted:
            name, _, load = whole[index]
            yield Entry(index, name, 0, load)

    listing = json.dumps([[name, texts] for name, texts, _ in whole])
    bare = len(rows) - len(whole)
    return ImageSource(
        spec,
        len(whole),
        1,
        (),
        entries,
        hashlib.sha256(listing.encode()).hexdigest(),
        at_once=16 if tables else 1,
        left_out=f"{bare} images without caption" if bare else "",
        captions=lambda index: whole[index][1],
    )


def _lines(text: bytes) -> list[str]:
    lines = text.decode("utf-8-sig", "replace").splitlines()
    return [line.strip() for line in lines if line.strip()]


def _folder(folder: Path, captions: str) -> Iterator[Row]:
    texts: dict[Path, list[str]] = {}
    if captions != "txt":
        found = json.loads(Path(captions).read_text(encoding="utf-8"))
        names = {row["id"]: Path(row["file_name"]) for row in found["images"]}
        for row in found["annotations"]:
            line = " ".join(row["caption"].split())
            texts.setdefault(names[row["image_id"]], []).append(line)
    for path in list_images(folder)[0]:
        file = (folder / path).with_suffix(".txt")
        if captions == "txt" and file.exists():
            texts[path] = _lines(file.read_bytes())
        load = partial(decode_rgb, folder / path)
        yield text_of(path), texts.get(path, []), load


def _tars(tars: list[Path]) -> Iterator[Row]:
    """A sample are the members whose names are alike up to the first dot."""

    def piece(tar: Path, member: tarfile.TarInfo) -> bytes:
        with tar.open("rb") as file:
            file.seek(member.offset_data)
            return file.read(member.size)

    def load(tar: Path, member: tarfile.TarInfo) -> np.ndarray:
        return decode_rgb(io.BytesIO(piece(tar, member)))

    for tar in tars:
        samples: dict[str, dict[str, tarfile.TarInfo]] = {}
        with tarfile.open(tar, "r:") as file:
            for member in filter(tarfile.TarInfo.isfile, file):
                name = PurePosixPath(member.name)
                stem, _, suffix = name.name.partition(".")
                own = samples.setdefault(str(name.with_name(stem)), {})
                own[f".{suffix}".lower()] = member
        for stem, own in samples.items():
            image = next((own[s] for s in SUFFIXES if s in own), None)
            if image:
                texts = _lines(piece(tar, own[".txt"])) if ".txt" in own else []
                yield f"{tar.name}/{stem}", texts, partial(load, tar, image)


def _tables(files: list[Path], captions: str) -> Iterator[Row]:
    found = [(path, part) for path in files for part in opened(path)]
    images = by_number([part for _, part in found], ["image"])

    def load(number: int, row: int) -> np.ndarray:
        image = images(number)["image"][row].as_py()
        data = image if isinstance(image, bytes) else image["bytes"]
        return decode_rgb(io.BytesIO(data))

    for number, (path, (_, names, read)) in enumerate(found):
        if captions not in names:
            raise ValueError(f"its columns are {names}")
        for row, texts in enumerate(read([captions])[captions].to_pylist()):
            lines = [texts] if isinstance(texts, str) else texts or []
            lines = [" ".join(line.split()) for line in lines]
            own = [line for line in lines if line]
            yield f"{path.name}/{number}/{row}", own, partial(load, number, row)
