"""Folders of images with captions."""

import hashlib
import json
from functools import partial
from pathlib import Path

from sra2_jax.data.images import Entry, ImageSource, any_of, list_images, text_of
from sra2_jax.data.pixels import decode_rgb
from sra2_jax.errors import UserError, explained


def captioned(spec: str, captions: str) -> ImageSource:
    """The images below a folder that have captions, without classes.

    captions: "txt", of NAME.txt beside NAME.jpg, a caption a line; or a file as COCO's,
    {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}.

    Raises UserError: no folder, no image with a caption, or another file.
    """
    folder, texts = Path(spec), dict[Path, list[str]]()
    if captions != "txt":
        with explained(f"{captions}: no captions as COCO's", "see sra2 encode --help"):
            found = json.loads(Path(captions).read_text(encoding="utf-8"))
            names = {row["id"]: Path(row["file_name"]) for row in found["images"]}
            for row in found["annotations"]:
                lines = " ".join(row["caption"].split())
                texts.setdefault(names[row["image_id"]], []).append(lines)
    images, _ = list_images(folder)
    if captions == "txt":
        for path in images:
            file = (folder / path).with_suffix(".txt")
            text = file.read_text("utf-8-sig", "replace") if file.exists() else ""
            texts[path] = [line.strip() for line in text.splitlines() if line.strip()]
    files = [path for path in images if texts.get(path)]
    if not files:
        raise UserError(f"{folder}: none of its {len(images)} images has a caption")

    def entry(index: int) -> Entry:
        path = files[index]
        return Entry(index, text_of(path), 0, partial(decode_rgb, folder / path))

    listing = json.dumps([[text_of(path), texts[path]] for path in files])
    return ImageSource(
        str(folder),
        len(files),
        1,
        (),
        any_of(entry, len(files)),
        hashlib.sha256(listing.encode()).hexdigest(),
        left_out=f"{n} images without caption"
        if (n := len(images) - len(files))
        else "",
        captions=lambda index: texts[files[index]],
    )
