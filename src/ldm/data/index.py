"""The index of a set: every picture is looked at once, and what was found is kept beside the set's caches.

So a broken picture is known before training begins, sizes and digests cost nothing afterwards, and a look that was
interrupted goes on where it was.

N pictures, W H pixels.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm.data import images
from ldm.errors import UserError
from ldm.files import file_written_atomically, locked
from ldm.progress import progress

KIND = {b"ldm": b"index of pictures, 1"}
"""What a kept index says of itself; the number is raised when `images.examine` finds other things."""

CHUNK = 32
SAVE_EVERY = 20.0

Found = tuple[int, int, str, int, str]
"""Of one picture: width, height, digest, likeness, fault."""


@dataclass(frozen=True, eq=False)
class Index:
    """What was found in N pictures.

    Attributes:
        names: as people know them: a path, a row.
        sizes: (N, 2) W, H as seen; 0 where the picture is broken.
        digests: SHA-256 of each picture's bytes in hex, "" where they could not be read.
        likenesses: (N,) 64-bit hashes of what the pictures look like; 0 where broken.
        faults: why a picture cannot be used, "" where it can.
    """

    names: list[str]
    sizes: NDArray[np.int32]
    digests: list[str]
    likenesses: NDArray[np.uint64]
    faults: list[str]


def digest_of(encoded: bytes) -> str:
    """Return the digest by which an index knows a picture's bytes."""
    return hashlib.sha256(encoded).hexdigest()


def look_at(
    names: Sequence[str], stamps: Sequence[str], read: Callable[[int], bytes], kept: Path | None, label: str
) -> Index:
    """Look at every picture once, and at none that is known from before.

    A picture that cannot be read or decoded is a fault in the index. What was read and is broken is remembered; what
    could not be read is tried again the next time, since the fault may have been with the disk or the network.

    Args:
        names: of N pictures, each different.
        stamps: the state of each picture, known without reading it, such as its size and time of change: a kept entry
            holds as long as name and stamp do.
        read: gives the bytes of picture i; called from several threads.
        kept: file that keeps the index, written also now and then on the way; a damaged one is made anew.
            None keeps nothing.
        label: what is going on, shown with the progress.

    Raises:
        UserError: the index cannot be written.
    """
    if kept is None:
        return _looked_at(names, stamps, read, kept, label)
    try:
        with locked(kept.with_suffix(".lock")):  # of several processes one looks, and the others read what it found
            return _looked_at(names, stamps, read, kept, label)
    except OSError as error:
        raise UserError(f"what was found out about the pictures cannot be kept in {kept}: {error}") from error


def _looked_at(
    names: Sequence[str], stamps: Sequence[str], read: Callable[[int], bytes], kept: Path | None, label: str
) -> Index:
    index, known = _recalled(names, stamps, kept)
    todo = np.flatnonzero(~known)
    if not len(todo):
        return index
    chunks = [todo[i : i + CHUNK].tolist() for i in range(0, len(todo), CHUNK)]
    saved, pause = time.monotonic(), SAVE_EVERY
    try:
        with progress(label, len(todo), "pictures") as advance, _threads() as pool:
            looks = pool.map(lambda chunk: [_look(read, i) for i in chunk], chunks)
            for chunk, found in zip(chunks, looks, strict=True):
                for i, (width, height, digest, likeness, fault) in zip(chunk, found, strict=True):
                    index.sizes[i] = width, height
                    index.digests[i], index.likenesses[i], index.faults[i] = digest, likeness, fault
                    known[i] = digest != ""
                advance(len(chunk))
                if kept is not None and time.monotonic() - saved >= pause:
                    begun = time.monotonic()
                    _save(kept, index, stamps, known)
                    saved = time.monotonic()
                    pause = max(SAVE_EVERY, 20 * (saved - begun))  # the index of millions is not written all the time
    finally:  # also on Ctrl-C
        if kept is not None:
            _save(kept, index, stamps, known)
    return index


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Give a pool of threads; when left by an exception, what has not begun is not begun."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool = ThreadPoolExecutor(min(32, max(4, cores)))  # a slow disk is waited for by some
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _look(read: Callable[[int], bytes], i: int) -> Found:
    digest = ""
    try:
        encoded = read(i)
        digest = digest_of(encoded)
        width, height, likeness = images.examine(encoded)
        return width, height, digest, likeness, ""
    except UserError as error:
        return 0, 0, digest, 0, str(error) or "cannot be used"
    except Exception as error:  # files, networks and codecs raise dozens of kinds, and one picture is not the set
        reason = getattr(error, "strerror", None) or str(error)
        return 0, 0, digest, 0, f"cannot be read: {reason or type(error).__name__}"


def _recalled(names: Sequence[str], stamps: Sequence[str], kept: Path | None) -> tuple[Index, NDArray[np.bool_]]:
    """Return an index with what is known from before, and (N,) of which pictures that is."""
    num = len(names)
    index = Index(list(names), np.zeros((num, 2), np.int32), [""] * num, np.zeros(num, np.uint64), [""] * num)
    known = np.zeros(num, np.bool_)
    table = _load(kept) if kept is not None else None
    if table is None:
        return index, known
    row_of_name = {name: row for row, name in enumerate(table["name"].to_pylist())}
    row_of = np.array([row_of_name.get(_bytes(name), -1) for name in names], np.int64)
    known = row_of >= 0
    kept_stamps = table["stamp"].to_pylist()
    known[known] = [
        kept_stamps[row] == _bytes(stamps[i])
        for i, row in zip(np.flatnonzero(known).tolist(), row_of[known].tolist(), strict=True)
    ]
    row_of = row_of[known]
    for column, name in enumerate(("width", "height")):
        index.sizes[known, column] = table[name].to_numpy()[row_of]
    index.likenesses[known] = table["likeness"].to_numpy()[row_of]
    digests, faults = table["digest"].to_pylist(), table["fault"].to_pylist()
    for i, row in zip(np.flatnonzero(known).tolist(), row_of.tolist(), strict=True):
        index.digests[i], index.faults[i] = digests[row], _text(faults[row])
    return index, known


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("name", pa.large_binary(), nullable=False),  # names of files need not be UTF-8
            pa.field("stamp", pa.large_binary(), nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("digest", pa.string(), nullable=False),
            pa.field("likeness", pa.uint64(), nullable=False),
            pa.field("fault", pa.large_binary(), nullable=False),
        ],
        metadata=KIND,
    )


def _load(kept: Path) -> Any:
    """Return the table in a kept index, or None where there is none or it is none of ours."""
    import pyarrow.parquet as pq

    try:
        with kept.open("rb") as file:
            table = pq.ParquetFile(file, page_checksum_verification=True).read(use_threads=False)
        ours = table.schema.equals(_schema()) and KIND.items() <= (table.schema.metadata or {}).items()
        return table if ours else None
    except Exception:  # whatever is wrong with it: looking again finds the same
        return None


def _save(kept: Path, index: Index, stamps: Sequence[str], known: NDArray[np.bool_]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = np.flatnonzero(known).tolist()
    columns = [
        [_bytes(index.names[i]) for i in rows],
        [_bytes(stamps[i]) for i in rows],
        index.sizes[known, 0],
        index.sizes[known, 1],
        [index.digests[i] for i in rows],
        index.likenesses[known],
        [_bytes(index.faults[i]) for i in rows],
    ]
    schema = _schema()
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with file_written_atomically(kept) as file:
            pq.write_table(pa.Table.from_arrays(arrays, schema=schema), file, write_page_checksum=True)
    except OSError as error:
        raise UserError(f"what was found out about the pictures cannot be kept in {kept}: {error}") from error


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _text(encoded: bytes) -> str:
    return encoded.decode("utf-8", "surrogatepass")
