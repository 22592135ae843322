"""The samples of a tar, read by offset: nothing is unpacked, and no name in a tar becomes a name on disk.

A sample is the members that share a key: the name up to the first dot of its last part. Only plain files count.

N samples.
"""

import functools
import os
import re
import tarfile
from pathlib import Path
from string import Formatter
from typing import IO, Any

import numpy as np

from ldm.config import ShardsSection
from ldm.data.captions import Wording
from ldm.errors import UserError
from ldm.files import file_written_atomically, parse_json

PICTURES = ("jpg", "jpeg", "jfif", "png", "webp", "avif", "gif", "bmp", "tif", "tiff")
"""Extensions of pictures; the first of them that a sample has is its picture."""

Member = tuple[str, int, int]
"""Name, where in the tar its bytes begin, and how many they are."""

_BLOCK = 512
_PACKED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7z": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


class ShardError(UserError):
    """A tar cannot be read, or has changed: nothing that is wrong with one sample."""


def list_members(file: IO[bytes], told: str) -> list[Member]:
    """List the plain files in a tar: no links, devices, folders or sparse files.

    Raises:
        UserError: it is no tar, compressed, cut off or damaged.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(_BLOCK)
    for magic, tool in _PACKED.items():
        if start.startswith(magic):
            raise UserError(f"{told} is compressed, so its members cannot be read by offset: unpack it with {tool}")
    members: list[Member] = []
    offset = 0
    try:
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:", errors="backslashreplace") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or it remembers them all
                if tar.offset <= offset:
                    raise tarfile.ReadError("a member of negative size")
                offset = tar.offset
                if member.isreg() and not member.issparse():
                    members.append((member.name, member.offset_data, member.size))
            offset = tar.offset
        # `tarfile` takes whatever is no header for the end; the end is a block of zeros, with nothing after it.
        file.seek(offset)
        end = file.read(1 << 20)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        if not offset:
            raise UserError(f"{told} is no tar file ({size} bytes)") from error
        raise UserError(_damaged(told, min(offset, size), size)) from error
    if len(end) < _BLOCK or any(end[:_BLOCK]):
        raise UserError(_damaged(told, offset, size))
    if any(end):
        raise UserError(
            f"{told} goes on after its end at byte {offset}: make each of several joined tars its own shard"
        )
    return members


def _damaged(told: str, offset: int, size: int) -> str:
    return (
        f"{told} is cut off or damaged at byte {offset} of {size}, and what came after cannot be known: "
        "copy or write it again, or take it out of data.path"
    )


class TarShard:
    """The samples of one tar on this machine.

    Args:
        path: the tar.
        told: what to call it in messages.
        config: says which member is the caption.
        kept: file that keeps the list of members; None keeps nothing.
        hold: keep the tar open as long as this object is there: it may be deleted meanwhile.

    Raises:
        UserError: it cannot be read; members of a sample are not next to each other, or there twice.
        FileNotFoundError: it is not there.
    """

    def __init__(
        self, path: Path, told: str, config: ShardsSection, kept: Path | None = None, hold: bool = False
    ) -> None:
        self.path, self.told = path, told
        self.wording = Wording(config.caption_template, config.caption_prefix, config.caption_suffix)
        key, _, self.field = config.caption_key.partition(":")
        if (key == "json") != bool(self.field):
            raise UserError(
                f"data.caption_key={config.caption_key}: name the extension of a text member, such as txt, "
                "or a field of the json member, such as json:caption"
            )
        needs_row = self.field or any(
            name != "caption" for _, name, _, _ in Formatter().parse(config.caption_template) if name
        )
        handle = _Handle(path)
        self.state = handle.state
        self._held = handle if hold else None
        self.extensions: set[str] = set()
        self.names: list[str] = []
        wanted = (PICTURES, () if self.field else (key.lower(),), ("json",) if needs_row else ())
        spans = []
        for sample_key, parts in _samples(_members(handle, told, kept), told):
            self.extensions |= parts.keys()
            found = [next((parts[name] for name in names if name in parts), None) for names in wanted]
            self.names.append(found[0][0] if found[0] else sample_key)
            spans.append([member[1:] if member else (-1, -1) for member in found])
        # (N, 3, 2): offset and size of picture, text and json; -1 where there is none
        self._spans = np.array(spans, dtype=np.int64).reshape(-1, 3, 2)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return f"{self.told}/{self.names[index]}"

    def encoded(self, index: int) -> bytes:
        """Return a picture's file.

        Raises:
            UserError: there is none.
            ShardError: the tar cannot be read, or has changed.
        """
        encoded = self._read(index, 0)
        if encoded is None:
            raise UserError(
                f"no picture (.{', .'.join(PICTURES)}) has this key, which ends at the first dot of the name"
            )
        return encoded

    def captions(self, index: int) -> list[str]:
        """Return a picture's captions in the user's words; [""] where it has none.

        Raises:
            UserError: they are no text, or no JSON; the template names what is not there.
        """
        row = parse_json(self._text(index, 2) or "{}", "its .json")
        captions = texts_of(row.get(self.field)) if self.field else [self._text(index, 1)]
        return [text for text in self.wording(row, captions) if text] or [""]

    def _text(self, index: int, part: int) -> str:
        try:
            return (self._read(index, part) or b"").decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"its caption is no UTF-8 text: {error}") from error

    def _read(self, index: int, part: int) -> bytes | None:
        offset, size = self._spans[index, part].tolist()
        if offset < 0:
            return None
        try:
            handle = self._held or _opened(self.path, self.state)
            found = os.pread(handle.number, size, offset)  # moves no position, so threads and forks may share the file
        except OSError as error:
            raise ShardError(f"{self.told} cannot be read: {error}") from error
        if len(found) < size or handle.state != self.state:
            raise ShardError(f"{self.told} has changed since it was opened: start again")
        return found


class _Handle:
    """An open file that closes when nobody needs it any more."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY)
        status = os.fstat(self.number)
        self.state = (status.st_size, status.st_mtime_ns)  # a copy's time of change tells when it was last used

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


@functools.lru_cache(maxsize=64)  # a set has more shards than a process may have open
def _opened(path: Path, state: str) -> _Handle:
    """Open a file, or give the one that was opened in this state."""
    return _Handle(path)


def _samples(members: list[Member], told: str) -> list[tuple[str, dict[str, Member]]]:
    """Group members by key, as webdataset does, in the order of the tar; extensions are in lower case."""
    samples: list[tuple[str, dict[str, Member]]] = []
    seen: set[str] = set()
    key = None
    for member in members:
        folder, slash, base = member[0].rpartition("/")
        stem, dot, extension = base.partition(".")
        if not stem or not dot or re.match(r"__[^/]*__(/|$)", member[0]):
            continue  # hidden files and notes of tools
        if folder + slash + stem != key:
            key = folder + slash + stem
            if key in seen:
                raise UserError(
                    f"{told}: the members of {key} are not next to each other; write the shard sorted: "
                    "tar --sort=name -cf shard.tar -C folder ."
                )
            seen.add(key)
            samples.append((key, {}))
        if extension.lower() in samples[-1][1]:
            raise UserError(f"{told}: {member[0]} is there twice; give each sample a key of its own")
        samples[-1][1][extension.lower()] = member
    return samples


def _members(handle: _Handle, told: str, kept: Path | None) -> list[Member]:
    """Return the members of a tar, from what is kept where that can be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = [pa.string(), pa.int64(), pa.int64()]
    if kept is not None and kept.exists():
        try:
            table = pq.read_table(kept)
            listed = list(zip(*(table[name].to_pylist() for name in ("name", "offset", "size")), strict=True))
            if table.schema.types == types and all(_lies_in(handle, member) for member in listed):
                return listed
        except Exception:  # whatever is wrong with it: listing again finds the same
            pass
    try:
        with open(os.dup(handle.number), "rb") as file:
            members = list_members(file, told)
    except OSError as error:
        raise UserError(f"{told} cannot be read: {error}") from error
    if kept is not None:
        columns = list(zip(*members, strict=True)) or [(), (), ()]
        arrays = [pa.array(column, kind) for column, kind in zip(columns, types, strict=True)]
        try:
            with file_written_atomically(kept) as out:
                pq.write_table(pa.table(arrays, names=["name", "offset", "size"]), out)
        except OSError as error:
            raise UserError(f"{kept} cannot be written: {error}") from error
    return members


def _lies_in(handle: _Handle, member: Member) -> bool:
    _, offset, size = member
    return min(offset, size) >= 0 and offset + size <= handle.state[0]


def texts_of(value: Any) -> list[str]:
    """Return the captions that a field holds: one, a list of them, or none.

    Raises:
        UserError: it holds something else.
    """
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise UserError(f"the caption is {type(text).__name__}, not text")
    return [text for text in texts if text]
