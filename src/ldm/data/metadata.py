"""Captions of a folder of pictures from its metadata.jsonl, metadata.csv or metadata.parquet."""

import csv
import json
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ldm.data.captions import Wording
from ldm.errors import UserError

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")

Rows = Iterator[tuple[str, dict[str, Any]]]
"""Where each row stands, such as "line 3", and its fields."""


def listed_captions(root: Path, tables: Sequence[str], caption_column: str, wording: Wording) -> dict[str, list[str]]:
    """Read which captions the metadata files of a folder give to which picture.

    A picture may have several: a list of texts in its row, as it is or as JSON, or several rows.

    Args:
        root: the folder.
        tables: names of the metadata files, relative to it; what they list is relative to where they lie.
        caption_column: holds the captions; `file_name` the pictures.
        wording: puts captions into words.

    Returns:
        Captions by the pictures' names relative to `root`; "" where there is none.

    Raises:
        UserError: a file cannot be read, lacks one of the columns, holds something else than texts in them, or lists
            a picture that another one lists, too.
    """
    captions: dict[str, list[str]] = {}
    for table in tables:
        path, own = root / table, dict[str, list[str]]()
        try:
            columns, rows = _read(path)
            _check_columns(path, columns, caption_column)
            for where, row in rows:
                try:
                    name = posixpath.normpath(posixpath.join(posixpath.dirname(table), _file_name(row)))
                    worded = wording(row, _texts(row[caption_column], caption_column))
                except UserError as error:
                    raise UserError(f"{path}, {where}: {error}") from error
                if name in captions:
                    raise UserError(f"{path}, {where}: {name} is listed in another metadata file, too")
                own.setdefault(name, []).extend(worded)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        captions |= own
    return {name: [text for text in texts if text] or [""] for name, texts in captions.items()}


def _check_columns(path: Path, columns: Sequence[str], caption_column: str) -> None:
    there = ", ".join(columns) or "none"
    if "file_name" not in columns:
        raise UserError(
            f"{path} has no column 'file_name', which names the pictures relative to {path.parent}; it has: {there}"
            + ("; pictures inside parquet files are read by data=hub" if path.suffix == ".parquet" else "")
        )
    if caption_column not in columns:
        raise UserError(
            f"{path} has no column '{caption_column}' (data.caption_column); it has: {there}: "
            "name the one that holds captions, or move the file away if it holds none"
        )


def _file_name(row: dict[str, Any]) -> str:
    name = row["file_name"]
    if not isinstance(name, str) or not name:
        raise UserError(f"file_name is {json.dumps(name, default=str)}, not the name of a file")
    return name


def _texts(value: Any, column: str) -> list[str]:
    """Return the captions in a cell: one text, or several in a list, which may be written as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, list) and all(isinstance(text, str) for text in parsed):
            return parsed
    texts = list(value) if isinstance(value, list) else [value]
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise UserError(
                f"the caption in column '{column}' is {type(text).__name__}, not text "
                "(data.caption_column names another column)"
            )
    return [text or "" for text in texts]


def _read(path: Path) -> tuple[list[str], Rows]:
    """Return a table's columns and its rows, read as they are asked for."""
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path)
    if path.suffix.lower() == ".csv":
        rows = _csv_rows(path)
        _, header = next(rows, ("", {}))
        return list(header), rows
    columns = list(dict.fromkeys(key for _, row in _json_rows(path) for key in row))
    empty = dict.fromkeys(columns)  # what a line leaves out is null
    return columns, ((where, empty | row) for where, row in _json_rows(path))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: not UTF-8: {error.reason}; save the file as UTF-8") from error


def _json_rows(path: Path) -> Rows:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object but {type(row).__name__}")
        yield f"line {number}", row


def _csv_rows(path: Path) -> Rows:
    """Give the rows of a CSV file, the header first."""
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    header: list[str] = []
    try:
        for values in filter(None, reader):  # an empty line has none
            header = header or values
            if len(values) != len(header):
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(values)} values under {len(header)} columns; a text that "
                    'holds a comma or a line break needs quotes around it: "a house, red"'
                )
            yield f"line {reader.line_num}", dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV: {error}") from error


def _read_parquet(path: Path) -> tuple[list[str], Rows]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, ValueError) as error:
        raise UserError(f"{path} is no parquet file: {error}") from error

    def rows() -> Rows:
        number = 0
        try:
            for batch in file.iter_batches(batch_size=1024, use_threads=False):
                for row in batch.to_pylist():
                    yield f"row {number}", row
                    number += 1
        except (pa.ArrowException, ValueError) as error:
            raise UserError(f"{path}: row {number} or one after it cannot be read: {error}") from error

    return file.schema_arrow.names, rows()
