"""A set of samples in the making: a folder of shards that a killed program resumes."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from sra2_jax.errors import UserError

FILE = "settings.json"
IMAGES = 1024  # of a shard, about
# what may differ when a program goes on: no image depends on it
FREE = ("batch_size", "versions", "shard")


class Shards:
    """Images 0 ... count - 1, uint8 (H, W, 3), in files of `size` consecutive ones.

    Args:
      folder: made where missing; its settings.json says what the images are.
      settings: as `describe` gives them.
      count, batch: number of images, and how many are made at a time.

    Raises:
      UserError: the folder holds images made with other settings.
    """

    def __init__(
        self, folder: epath.Path, settings: dict[str, Any], count: int, batch: int
    ) -> None:
        self.folder, self.count = folder, count
        path = folder / FILE
        if path.exists():
            settings = _agree(path, settings)
        else:
            # Whole batches: whoever goes on later makes the same ones.
            settings = settings | {"shard": batch * max(1, IMAGES // batch)}
            folder.mkdir(parents=True, exist_ok=True)
            fresh = folder / f"{FILE}.tmp"
            fresh.write_text(json.dumps(settings, indent=2) + "\n")
            fresh.replace(path)
        self.settings, self.size = settings, settings["shard"]

    def _file(self, number: int) -> epath.Path:
        return self.folder / f"{number:06d}.npy"

    def indices(self, number: int) -> np.ndarray:
        """The images of a shard."""
        start = number * self.size
        return np.arange(start, min(start + self.size, self.count))

    def missing(self) -> np.ndarray:
        """Numbers of the shards that are not there yet."""
        numbers = range(-(-self.count // self.size))
        return np.array([n for n in numbers if not self._file(n).exists()], int)

    def write(self, number: int, images: np.ndarray) -> None:
        """A whole shard or none: a file is renamed once it is complete."""
        fresh = self.folder / f"{number:06d}.tmp"
        with fresh.open("wb") as file:
            np.save(file, images)
        fresh.replace(self._file(number))

    def read(self) -> Iterator[np.ndarray]:
        """All shards in order.

        Raises:
          UserError: a damaged one. It is removed: the same command makes it again.
        """
        for number in range(-(-self.count // self.size)):
            path, expected = self._file(number), len(self.indices(number))
            try:
                with path.open("rb") as file:
                    images = np.load(file, allow_pickle=False)
            except (OSError, ValueError, EOFError):
                images = np.empty(0)
            if len(images) != expected or images.dtype != np.uint8:
                path.unlink(missing_ok=True)
                raise UserError(
                    f"{path}: was damaged and is removed: run the same command again"
                )
            yield images


def _agree(path: epath.Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings in a file, refused if they make other images."""
    try:
        saved = json.loads(path.read_text())
        saved["shard"] = int(saved["shard"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: cannot be read ({type(error).__name__}): remove its folder or "
            "use another --out"
        ) from error
    now = json.loads(json.dumps(settings))
    for key in sorted((now.keys() | saved.keys()) - {*FREE}):
        if now.get(key) != saved.get(key):
            raise UserError(
                f"{path.parent} holds samples of another kind: {key} is "
                f"{saved.get(key)!r} there, {now.get(key)!r} now: use another --out or "
                "remove it"
            )
    return saved
