"""Tables of Hugging Face's datasets, .arrow and .parquet, a part at a time."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

from sra2_jax.errors import explained

# of a part of a table: rows, names of columns, names -> record batch
Part = tuple[int, list[str], Callable[[Sequence[str]], Any]]


def opened(path: Path) -> Iterator[Part]:
    """The parts of a file. Raises UserError: the package that reads it is missing."""
    install = "pip install -e '.[arrow]'"
    with explained("Arrow and Parquet need it", install, ModuleNotFoundError):
        import pyarrow
        from pyarrow import ipc, parquet

    def group(number: int, columns: Sequence[str]) -> Any:
        with parquet.ParquetFile(path) as file:
            table = file.read_row_group(number, list(columns))
        return table.combine_chunks().to_batches()[0]

    if path.suffix == ".parquet":
        with parquet.ParquetFile(path) as file:
            names, about = file.schema_arrow.names, file.metadata
        for i in range(about.num_row_groups):
            yield about.row_group(i).num_rows, names, partial(group, i)
        return
    mapped = pyarrow.memory_map(str(path))
    try:
        batches = list(ipc.open_stream(mapped))
    except pyarrow.ArrowInvalid:  # the other of Arrow's formats
        file = ipc.open_file(mapped)
        batches = [file.get_batch(i) for i in range(file.num_record_batches)]
    for batch in batches:
        yield batch.num_rows, batch.schema.names, batch.select


def by_number(parts: Sequence[Part], columns: Sequence[str]) -> Callable[[int], Any]:
    """Columns of part i, for many threads that read one part after the other."""
    lock, read = Lock(), lru_cache(2)(lambda part: parts[part][2](columns))

    def locked(part: int) -> Any:
        with lock:
            return read(part)

    return locked
