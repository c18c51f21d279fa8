"""Batches placed on the devices ahead of time, in a background thread."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np


class DevicePrefetcher:
    """Iterator and context manager of `prefetch_to_device`."""

    def __init__(
        self, iterator: Iterator[Mapping[str, np.ndarray]], sharding: Any, size: int
    ) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, not {size}")
        self._queue: queue.Queue[Any] = queue.Queue(size)
        stop = threading.Event()
        thread = threading.Thread(
            target=_place,
            args=(iterator, sharding, self._queue, stop),
            name="prefetch_to_device",
            daemon=True,
        )
        # Runs on close(), on garbage collection and at exit, so that no thread is
        # inside JAX or TensorFlow while the interpreter goes down. The thread holds
        # no reference to self.
        self._close = weakref.finalize(self, _stop, stop, thread)
        thread.start()

    def __iter__(self) -> DevicePrefetcher:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        if not self._close.alive:
            raise StopIteration
        batch, error = self._queue.get()
        if error is not None:
            self.close()
            raise error
        return batch

    def close(self) -> None:
        """Stop the thread and wait for it; further calls do nothing."""
        self._close()

    def __enter__(self) -> DevicePrefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def prefetch_to_device(
    iterator: Iterator[Mapping[str, np.ndarray]], sharding: Any, size: int = 2
) -> DevicePrefetcher:
    """Place batches on the devices ahead of time, in a background thread.

    Args:
      iterator: local rows of global batches, as `batches` yields them.
      sharding: jax.sharding.Sharding that splits the leading axis of every array.
      size: batches that wait on the devices.

    Returns:
      Iterator of dicts of global jax.Array. Close it, or use it in a `with`.

    Raises:
      Exception: while iterating, whatever the iterator or the placement raised.
      ValueError: size below 1.
    """
    return DevicePrefetcher(iterator, sharding, size)


def _place(
    iterator: Iterator[Mapping[str, np.ndarray]],
    sharding: Any,
    ready: queue.Queue[Any],
    stop: threading.Event,
) -> None:
    """Body of the thread: (batch, None) for each batch, then (None, the end)."""
    try:
        for batch in iterator:
            arrays = {
                name: jax.make_array_from_process_local_data(sharding, value)
                for name, value in batch.items()
            }
            if not _put(ready, (arrays, None), stop):
                return
        end: BaseException = StopIteration()
    except BaseException as error:
        end = error
    _put(ready, (None, end), stop)


def _put(ready: queue.Queue[Any], item: Any, stop: threading.Event) -> bool:
    """Whether the item found room before the consumer closed."""
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False


def _stop(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    # The garbage collector may run this in the thread itself. The limit is for a read
    # that hangs (network disks): the thread is a daemon and dies with the process.
    if thread is not threading.current_thread():
        thread.join(timeout=10)
