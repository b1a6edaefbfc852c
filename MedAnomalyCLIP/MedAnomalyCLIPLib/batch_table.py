"""One table of all slices of a batch: a row for each, as CSV or Parquet.

It is made from the `result.json` of each series that is done, one at a time, and appears when it is whole.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import DependencyMissing
from .export import MANIFEST as RESULT
from .output_folder import read_result_manifest, writing

if TYPE_CHECKING:
    import pyarrow

TableFormat = Literal["csv", "parquet"]

# Name of each column, and its type in Parquet as pyarrow calls it.
_COLUMNS = {
    "study": "int64",
    "series": "int64",
    "key": "string",
    "folder": "string",
    "modality": "string",
    "axis": "string",
    "index": "int64",
    "view": "string",
    "prompt": "string",
    "score": "float64",
    "percentile": "float64",
    "image_threshold": "float64",
    "unlike": "bool_",
    "threshold": "float64",
    "area_mm2": "float64",
    "area_pixels": "int64",
    "peak_r_mm": "float64",
    "peak_a_mm": "float64",
    "peak_s_mm": "float64",
    "overlay": "string",
}
_ROWS_AT_ONCE = 50_000


def check_table_format(form: TableFormat) -> None:
    """Raise `DependencyMissing` if what writes it is not installed: before the work, not after it."""
    if form == "parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise DependencyMissing(
                "Parquet needs pyarrow: pip install pyarrow; or take --table csv"
            ) from error


def write_table(output: Path, records: Iterable[dict[str, Any]], form: TableFormat) -> Path:
    """Write `slices.csv` or `slices.parquet` into a batch's folder, in place of the earlier one.

    Args:
        output: the folder.
        records: of the series that are done.
        form: which of the two.

    Raises:
        OutputFailed: results cannot be read, or the table cannot be written.
    """
    path = output / f"slices.{form}"
    fresh = path.with_name(f".{path.name}.partial")
    rows = (row for record in records for row in _rows(output, record))
    with writing(path):
        try:
            _write_csv(fresh, rows) if form == "csv" else _write_parquet(fresh, rows)
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)
    return path


def _rows(output: Path, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    series = {
        "study": record["study"],
        "series": record["number"],
        "key": record["key"],
        "folder": record["folder"],
        "modality": record["modality"],
    }
    for told in read_result_manifest(output / record["folder"] / RESULT)["slices"]:
        r, a, s = told["peak_ras_mm"] or (None, None, None)
        row = {**told, **series, "peak_r_mm": r, "peak_a_mm": a, "peak_s_mm": s}
        yield {column: row[column] for column in _COLUMNS}


def _write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, list(_COLUMNS), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in _COLUMNS.items()])
    with parquet.ParquetWriter(path, schema, compression="zstd") as table:
        for batch in _batches(rows, schema):
            table.write_batch(batch)


def _batches(rows: Iterator[dict[str, Any]], schema: pyarrow.Schema) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow

    while chunk := list(itertools.islice(rows, _ROWS_AT_ONCE)):
        yield pyarrow.RecordBatch.from_pylist(chunk, schema=schema)
