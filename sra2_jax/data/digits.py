"""The 1,797 handwritten digits of scikit-learn as small RGB images, and back.

They come inside scikit-learn (UCI "Optical Recognition of Handwritten Digits", 8x8
pixels with values 0..16), so a whole training run can be tried without a download.
"""

import numpy as np
from PIL import Image

from sra2_jax.errors import UserError

SIDE = 8
FACTOR = 4  # 8x8 digits become 32x32 images
TEST_SIZE = 360
SPLIT_SEED = 0
SPLITS = ("train", "test")


def load_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one half of a fixed split, stratified by label.

    split: "train" (1,437 digits) or "test" (the other 360).

    Returns uint8 images (N, 32, 32, 3), ink white on black, the three channels equal,
    and int64 labels (N,) in 0..9. Raises UserError: no such split.
    """
    if split not in SPLITS:
        raise UserError(f"digits: no split {split!r}; choose {' or '.join(SPLITS)}")
    from sklearn import datasets  # takes two seconds
    from sklearn.model_selection import train_test_split

    digits = datasets.load_digits()
    halves = train_test_split(
        np.arange(len(digits.target)),
        test_size=TEST_SIZE,
        stratify=digits.target,
        random_state=SPLIT_SEED,
    )
    chosen = np.sort(halves[SPLITS.index(split)])
    images = np.stack([_enlarge(digits.images[i]) for i in chosen])
    return images, digits.target[chosen].astype(np.int64)


def to_8x8(images: np.ndarray) -> np.ndarray:
    """The digits behind images: mean over the channels and over boxes of 4x4 pixels.

    images: uint8 (N, 32, 32, 3). Returns float32 (N, 64) in [0, 1], row-major.
    """
    boxes = images.reshape(-1, SIDE, FACTOR, SIDE, FACTOR, 3)
    means = boxes.mean(axis=(2, 4, 5), dtype=np.float32) / 255
    return means.reshape(-1, SIDE * SIDE)


def _enlarge(digit: np.ndarray) -> np.ndarray:
    """One digit (8, 8) in 0..16 to uint8 (32, 32, 3) in 0..255, bicubic."""
    grey = Image.fromarray(np.round(digit * (255 / 16)).astype(np.uint8))
    side = SIDE * FACTOR
    large = np.asarray(grey.resize((side, side), Image.Resampling.BICUBIC))
    return np.repeat(large[:, :, None], 3, axis=2)
