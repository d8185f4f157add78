"""Parquet files: a run is a row group. The footer says all of it."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from shoal.errors import InvalidRequest, ShoalError
from shoal.streaming.formats.source import Extent


def runs(name: str, file: pa.NativeFile) -> list[Extent]:
    """The row groups of a Parquet file. Raises as `examine`."""
    return examine(name, file)[1]


def examine(name: str, file: pa.NativeFile) -> tuple[pa.Schema, list[Extent]]:
    """The schema of a Parquet file, and its row groups. Reads its footer only, and once.

    Raises:
        InvalidRequest: it is none.
    """
    metadata = footer(name, file)
    found = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        spans = [_span(group.column(column)) for column in range(group.num_columns)]
        start, end = min((low for low, _ in spans), default=0), max((high for _, high in spans), default=0)
        found.append(Extent(number, group.num_rows, start, end))
    try:
        return metadata.schema.to_arrow_schema(), found
    except (pa.ArrowException, OSError) as error:
        raise InvalidRequest(f"{name} has columns that Arrow does not know ({error}): leave it out") from error


def footer(name: str, file: pa.NativeFile) -> pq.FileMetaData:
    """A file's footer. Raises InvalidRequest where it has none."""
    try:
        return pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, ShoalError):
            raise
        raise InvalidRequest(f"{name} is no Parquet file ({error}): leave it out of the pattern") from error


def _span(column: pq.ColumnChunkMetaData) -> tuple[int, int]:
    # The dictionary, where there is one, lies before the data.
    start = column.dictionary_page_offset or column.data_page_offset
    return start, start + column.total_compressed_size


class Reader:
    """The row groups of one object. Not for several threads at once.

    Args:
        metadata: its footer, where that was read before.
    """

    def __init__(
        self, name: str, file: pa.NativeFile, columns: list[str] | None, metadata: pq.FileMetaData | None = None
    ) -> None:
        self._name, self._columns = name, columns
        try:
            self._opened = pq.ParquetFile(file, metadata=metadata, pre_buffer=True)
        except (pa.ArrowException, OSError) as error:
            raise InvalidRequest(f"{name} is no Parquet file ({error})") from error

    def table(self, run: Extent) -> pa.Table:
        """The rows of a run, decoded. Raises InvalidRequest where it cannot be read."""
        try:
            # Whoever reads a run reads others beside it.
            return self._opened.read_row_group(run.number, columns=self._columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, ShoalError):
                raise
            raise InvalidRequest(f"row group {run.number} of {self._name} cannot be read: {error}") from error
