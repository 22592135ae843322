"""Row groups of parquet files as shards of a stream, whether the files are on the hub, behind a URL or in a folder.

S row groups.
"""

from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np
from fsspec.core import url_to_fs

from ldm.config import HubSection
from ldm.data.captions import Wording
from ldm.data.hub import unreachable
from ldm.data.remote import Copies, each, is_local, open_file, patiently, recalled, state
from ldm.data.tar import texts_of
from ldm.errors import UserError

CONVERTED = "refs/convert/parquet"
"""The branch in which the hub keeps a parquet copy of a set."""


class RowGroup:
    """The samples of one row group, or of some of its columns."""

    def __init__(self, table: Any, told: str, config: HubSection) -> None:
        self.table, self.told, self.config = table, told, config
        self.wording = Wording(config.caption_template, config.caption_prefix, config.caption_suffix)
        self.others = [name for name in table.column_names if name != config.image_column]

    def __len__(self) -> int:
        return self.table.num_rows

    def name(self, index: int) -> str:
        return f"{self.told}, row {index}"

    def encoded(self, index: int) -> bytes:
        """Return a picture's file.

        Raises:
            UserError: the row holds none.
        """
        cell = self._cell(self.config.image_column, index)
        found = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(found, bytes):
            raise UserError(f"there is no picture in column '{self.config.image_column}'; files beside it are not read")
        return found

    def captions(self, index: int) -> list[str]:
        """Return a picture's captions in the user's words; [""] where it has none.

        Raises:
            UserError: they are no text.
        """
        row = {name: self._cell(name, index) for name in self.others}
        captions = [text for name in _caption_columns(self.config) for text in texts_of(row[name])]
        return [text for text in self.wording(row, captions) if text] or [""]

    def _cell(self, column: str, index: int) -> Any:
        try:
            return self.table[column][index].as_py()
        except ValueError as error:  # also pyarrow's own kinds
            raise UserError(f"column '{column}' cannot be read: {error}") from error


class RowGroups:
    """The row groups of a split; each is copied to the disk while it is in use, where all processes map it.

    Args:
        config: the set, and the names of its columns.
        cache: folder for copies, and for what the files' footers say; None keeps nothing.
        keep: copies to keep.

    Attributes:
        counts: (S,) rows of each.

    Raises:
        UserError: the set or its split cannot be had, is no parquet, or lacks a column.
    """

    def __init__(self, config: HubSection, cache: Path | None, keep: int) -> None:
        self.config = config
        self.urls = parquet_files(config)
        self.states = each(state, self.urls, "asking for the state of files", "files")
        self.columns = self._columns()
        kept = None if cache is None else cache / "footers.jsonl"
        counts = recalled(_rows, _are_counts, self.urls, self.states, kept, "reading the footers of parquet files")
        self.counts = np.array([count for groups in counts for count in groups], dtype=np.int64)
        self._file = np.repeat(np.arange(len(self.urls)), [len(groups) for groups in counts])
        self._group = np.concatenate([np.arange(len(groups)) for groups in counts])
        self._copies = Copies.temporary(cache, keep)

    def told(self, number: int) -> str:
        return f"{self.urls[self._file[number]]}, row group {self._group[number]}"

    def files(self) -> list[tuple[str, str]]:
        """Return name and size of each file."""
        return [
            (url.rpartition("/")[2], mark.partition(" ")[0]) for url, mark in zip(self.urls, self.states, strict=True)
        ]

    def open(self, number: int) -> RowGroup:
        """Give a row group.

        Raises:
            UserError: it cannot be read.
        """
        import pyarrow as pa

        def write(part: Path) -> None:
            table = self._read(number, self.columns)
            with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)

        while True:
            path = self._copies.get(self.told(number), self.states[self._file[number]], write)
            try:
                with pa.memory_map(str(path)) as source:
                    return RowGroup(pa.ipc.open_file(source).read_all(), self.told(number), self.config)
            except FileNotFoundError:  # another process has just made room
                continue

    def open_captions(self, number: int) -> RowGroup:
        """Give a row group without its pictures."""
        columns = [name for name in self.columns if name != self.config.image_column]
        return RowGroup(self._read(number, columns), self.told(number), self.config)

    def _read(self, number: int, columns: list[str]) -> Any:
        import pyarrow.parquet as pq

        def read() -> Any:
            with open_file(self.urls[self._file[number]]) as file:
                table = pq.ParquetFile(file).read_row_group(int(self._group[number]), columns, use_threads=False)
            if any(len(column) != self.counts[number] for column in table.columns):
                raise UserError(
                    f"{self.told(number)} is damaged: it does not hold the {self.counts[number]} rows that it should"
                )
            return table

        return patiently(read, f"{self.told(number)} cannot be read")

    def _columns(self) -> list[str]:
        """Return the columns that are needed."""
        fields = [name for _, name, _, _ in Formatter().parse(self.config.caption_template) if name]
        needed = {
            self.config.image_column: "image_column",
            **dict.fromkeys(_caption_columns(self.config), "caption_column"),
            **{name: "caption_template" for name in fields if name != "caption"},
        }
        there = _footer(self.urls[0]).schema.to_arrow_schema().names
        for column, key in needed.items():
            if column not in there:
                raise UserError(f"{self.config.path} has no column '{column}' (data.{key}); it has: {', '.join(there)}")
        return list(needed)


def parquet_files(config: HubSection) -> list[str]:
    """Return the parquet files of a set's split, as `datasets` finds them; behind a URL, all there are.

    Raises:
        UserError: the set or its split cannot be had, or is no parquet.
    """
    if not is_local(config.path):

        def find() -> list[str]:
            pattern = config.path if config.path.endswith(".parquet") else f"{config.path.rstrip('/')}/**/*.parquet"
            files, path = url_to_fs(pattern)
            return sorted(files.unstrip_protocol(name) for name in files.glob(path))

        urls = patiently(find, f"data.path={config.path} cannot be listed")
        if not urls:
            raise UserError(f"data.path={config.path}: there are no .parquet files")
        return urls
    import datasets

    folder = Path(config.path).expanduser()
    try:
        path = str(folder.absolute()) if folder.is_dir() else config.path  # "parquet" would be the name of a loader
        builder = datasets.load_dataset_builder(path, name=config.subset, revision=config.revision)
    except Exception as error:  # `datasets` raises a dozen kinds for one cause: the set cannot be had
        raise unreachable(config, error) from error
    files = builder.config.data_files or {}
    names = [str(name) for name in files.get(config.split, ())]
    if files and not names:
        raise UserError(
            f"{config.path} has no split '{config.split}' (data.split); it has: {', '.join(map(str, files))}"
        )
    if not names or not all(name.endswith(".parquet") for name in names):
        way = (
            "a folder of pictures or tars needs no streaming: data=folder or data=shards"
            if folder.is_dir()
            else f"of most sets the hub keeps such a copy: data.revision={CONVERTED}"
        )
        raise UserError(f"data.streaming=true reads parquet files, and {config.path} is made of others; {way}")
    return names


def _caption_columns(config: HubSection) -> list[str]:
    return [config.caption_column] if isinstance(config.caption_column, str) else config.caption_column


def _footer(url: str) -> Any:
    import pyarrow.parquet as pq

    def read() -> Any:
        with open_file(url) as file:
            return pq.ParquetFile(file).metadata

    return patiently(read, f"{url} cannot be read as parquet")


def _are_counts(groups: Any) -> bool:
    return isinstance(groups, list) and all(type(count) is int and 0 <= count < 2**40 for count in groups)


def _rows(url: str) -> list[int]:
    footer = _footer(url)
    return [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
