"""Image files to arrays and back, and centre crops."""

import io
import math
import os

import numpy as np
from PIL import Image, PngImagePlugin

PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # bytes of a comment; Pillow refuses 1 MB
THIN = 64  # times as long as wide


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Centre crop of ADM: the square of `size` pixels that the VAE gets to see.

    Halves with BOX while the short side is at least 2 * size, resizes with BICUBIC so
    that the short side is `size`, crops the centre: uint8 (H, W, 3) -> (size, size, 3).

    Source: openai/guided-diffusion `center_crop_arr`, REPA `center-crop-dhariwal`.
    """
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * size:
        halves = (picture.width // 2, picture.height // 2)
        picture = picture.resize(halves, resample=Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = (round(x * scale) for x in picture.size)
    x, y = (width - size) // 2, (height - size) // 2
    if max(width, height) > THIN * size:
        # Gigabytes of which nothing is kept: resize the part that is, along rows and
        # then along columns. Pillow may round between the two in the other order.
        across, down = picture.width / width, picture.height / height
        left, top = (max(int(at) - 9, 0) for at in (x * across, y * down))
        span = 18 + math.ceil(size * max(across, down))
        ends = min(left + span, picture.width), min(top + span, picture.height)
        picture = picture.crop((left, top, *ends))
        start = x * across - left, y * down - top
        box = start[0], 0.0, start[0] + size * across, float(picture.height)
        picture = picture.resize((size, picture.height), Image.Resampling.BICUBIC, box)
        box = 0.0, start[1], float(size), start[1] + size * down
        return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box))
    picture = picture.resize((width, height), resample=Image.Resampling.BICUBIC)
    return np.asarray(picture)[y : y + size, x : x + size]


def square_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The central square of an image (H, W, 3), by LANCZOS to (size, size, 3).

    Source: U-ViT's `center_crop`, with which REPA's COCO was made.
    """
    h, w, _ = image.shape
    side = min(h, w)
    y, x = (h - side) // 2, (w - side) // 2
    square = Image.fromarray(image[y : y + side, x : x + side])
    return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))


# name -> the crop, and what `latents.json` says of it
CROPS = {
    "adm": (center_crop, "centre (ADM: BOX halvings, then BICUBIC)"),
    "square": (square_crop, "centre (the largest square, by LANCZOS)"),
}


def decode_rgb(file: str | os.PathLike | io.BytesIO) -> np.ndarray:
    """An image file of any mode as uint8 (H, W, 3); alpha is dropped, as upstream.

    Raises whatever Pillow raises for a file that it cannot decode.
    """
    with Image.open(file) as image:
        if image.mode.startswith("I;16"):
            # Pillow clips 16 bit greys at 255 instead of scaling them.
            grey = (np.asarray(image) >> 8).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=-1)
        if image.mode == "P" and "transparency" in image.info:
            # Pillow warns when it goes from here to RGB directly.
            return np.asarray(image.convert("RGBA").convert("RGB"))
        return np.asarray(image.convert("RGB"))


def to_png(image: np.ndarray) -> bytes:
    """A uint8 image (H, W, 3) as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()
