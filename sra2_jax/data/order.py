"""The order of examples: a function of the seed and the step alone.

An epoch is a permutation of the shards, cut into blocks that hold `shuffle_buffer`
records or more; the records of a block come in a permutation of all of them. Encoding
puts the images into shards by a permutation too, so that a block is a sample of the
whole. Batch k is rows k * batch_size and on of the epochs one after the other. What a
reader needs at a time is a block: remote shards are read whole, once an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


def permutation(count: int, *key: int) -> np.ndarray:
    """int64 (count,), a permutation that depends on the key.

    Of raw numbers of Philox: NumPy promises that these stay, and not its shuffles.
    """
    seed, *which = key
    numbers = np.random.Philox(np.random.SeedSequence(seed, spawn_key=tuple(which)))
    return np.argsort(numbers.random_raw(count), kind="stable")


@dataclass(frozen=True)
class Order:
    """What the order of the batches of a dataset follows from.

    batch_size: rows of the GLOBAL batch; shuffle_buffer: records to mix, at least.
    """

    batch_size: int
    seed: int
    shuffle_buffer: int
    split: str = "train"

    @classmethod
    def of(cls, config: Any) -> Order:
        """That of a run."""
        return cls(config.batch_size, config.seed, config.data.shuffle_buffer)

    def blocks(self, counts: Sequence[int], start: int = 0) -> Iterator[np.ndarray]:
        """The rows from batch `start` on, without end, block by block: int64 (n, 2),
        the shard and the number of the record in it.

        counts: records of each shard, at least one in all.
        """
        sizes = np.array(counts)
        epoch, skip = divmod(start * self.batch_size, int(sizes.sum()))
        while True:
            for number, shards in enumerate(self._shards(sizes, epoch), 1):
                if (size := int(sizes[shards].sum())) > skip:
                    rows = [(s, np.arange(sizes[s])) for s in shards]
                    pairs = np.concatenate(
                        [np.stack([np.full(len(n), s), n], 1) for s, n in rows]
                    )
                    yield pairs[permutation(size, self.seed, epoch, number)][skip:]
                skip = max(skip - size, 0)
            epoch += 1

    def _shards(self, sizes: np.ndarray, epoch: int) -> list[list[int]]:
        """The shards of each block of an epoch. A last block that is too small is one
        with the block before."""
        blocks: list[list[int]] = [[]]
        held = 0  # records, in the last block
        for shard in permutation(len(sizes), self.seed, epoch, 0).tolist():
            if held >= self.shuffle_buffer:
                blocks.append([])
                held = 0
            blocks[-1].append(shard)
            held += int(sizes[shard])
        if len(blocks) > 1 and held < self.shuffle_buffer:
            small = blocks.pop()
            blocks[-1] += small
        return blocks
