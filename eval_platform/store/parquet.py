"""How is a small Parquet file read? Without threads."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq


def read_parquet(body: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The table in `body`. Raises pa.ArrowException when it is none.

    `pq.read_table` starts Arrow's thread pools. A process that ends soon after, while one of their threads is still
    starting, is aborted by the C++ runtime ("terminate called without an active exception", exit code 134: seen in 2
    of 150 short runs on a busy machine, pyarrow 26). These files are read in milliseconds by the calling thread.
    """
    with pq.ParquetFile(pa.BufferReader(body)) as file:
        return file.read(columns=None if columns is None else list(columns), use_threads=False)
