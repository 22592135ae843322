"""Sets that do not fit the disk or a machine: read shard by shard, without looking at each picture first.

A shard is a tar, or a row group of a parquet file. Tars that are far away, and all row groups, are copied to the disk
for as long as they are in use, once for all loader workers.

N samples, S shards.
"""

import copy
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ldm.config import HubSection, ShardsSection
from ldm.data.images import Pixels
from ldm.data.parquet import RowGroups
from ldm.data.remote import Copies, add_line, copy_file, each, is_local, open_file, patiently, recalled, state
from ldm.data.shards import find_shards
from ldm.data.tar import ShardError, TarShard
from ldm.errors import UserError
from ldm.files import parse_json

WINDOW = 8
"""Shards that a process has open: as many as `order.ShardShuffle` shuffles together. Twice as many copies are kept."""

ENOUGH = 200
"""Pictures after which their share of broken ones means something."""

MOST_SAMPLES = 2**40
"""Of a shard, so that numbers of many add up to one that a machine can hold."""

SIZES = "sizes.json"
"""File beside tars that says how many samples each holds: {"000.tar": 10000}."""


class Shard(Protocol):
    """Samples at hand; those that cannot be used raise a UserError."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def encoded(self, index: int) -> bytes: ...

    def captions(self, index: int) -> list[str]: ...


class Shards(Protocol):
    """What a stream is made of."""

    counts: NDArray[np.int64]

    def told(self, number: int) -> str: ...

    def open(self, number: int) -> Shard: ...

    def open_captions(self, number: int) -> Shard: ...

    def files(self) -> list[tuple[str, str]]:
        """Return name and size of each file."""
        ...


class Stream:
    """Captioned pictures of many shards, of which few are at hand.

    A picture that cannot be used is replaced by the next good one of its shard.

    Args:
        shards: where the pictures are.
        decode: turns a picture's file into pixels.
        max_bad: share of pictures that are broken or without caption that ends the reading.
        report: file to which broken pictures are added as "name<TAB>reason"; None writes nothing.

    Attributes:
        counts: (S,) samples of each shard.
    """

    def __init__(self, shards: Shards, decode: Callable[[bytes], Pixels], max_bad: float, report: Path | None) -> None:
        self.shards, self.decode, self.max_bad, self.report = shards, decode, max_bad, report
        self.firsts = np.zeros_like(shards.counts)  # of each shard, where our samples begin
        self.counts = shards.counts
        self._begin()

    def _begin(self) -> None:
        self._open = functools.lru_cache(WINDOW)(self.shards.open)
        self._ends = np.cumsum(self.counts)
        self._bad: dict[tuple[int, int], str] = {}  # shard and sample that this process has met, and what is wrong
        self._seen = self._empty = 0

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, content: dict[str, Any]) -> None:
        vars(self).update(content)
        self._begin()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return {"image": (H, W, C) uint8 of any size, "captions": one or several str}.

        Raises:
            UserError: a shard cannot be read; too many pictures so far were broken or without caption.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard, first, count = self._open(number), int(self.firsts[number]), int(self.counts[number])
        place = index - int(self._ends[number]) + count
        for i in range(place, place + count):
            sample = first + i % count
            if (number, sample) in self._bad:
                continue
            try:
                row = {"image": self.decode(shard.encoded(sample)), "captions": shard.captions(sample)}
            except ShardError:  # no fault of the picture: another in its place would make it another run
                raise
            except UserError as error:
                self._note(number, sample, shard.name(sample), str(error))
                continue
            if i == place:
                self._count(empty=row["captions"] == [""])
            return row
        raise UserError(f"{self.shards.told(number)}: none of {count} pictures can be used: {self._last()}")

    def captions(self, limit: int = 10_000) -> Sequence[Sequence[str]]:
        """Return the captions of the first `limit` pictures, without those that cannot be read.

        Raises:
            UserError: none of them can.
        """
        found: list[list[str]] = []
        fault = None
        for shard, sample in islice(self._samples(), limit):
            try:
                found.append(shard.captions(sample))
            except UserError as error:
                fault = UserError(f"{shard.name(sample)}: {error}")
        if fault is not None and not found:
            raise fault
        return found

    def fingerprint(self) -> str:
        """Return a hash of the shards' names and sizes, and of which of their samples are ours."""
        digest = hashlib.sha256(repr(self.shards.files()).encode("utf-8", "surrogatepass"))
        digest.update(np.stack([self.firsts, self.counts]).astype("<i8").tobytes())
        return digest.hexdigest()

    def part(self, first: int, last: int) -> "Stream":
        """Return samples first..last-1 as a stream of its own; shards keep their numbers."""
        begins = self._ends - self.counts
        part = copy.copy(self)
        part.firsts = self.firsts + np.clip(first - begins, 0, self.counts)
        part.counts = np.clip(np.minimum(last, self._ends) - np.maximum(first, begins), 0, None)
        part._begin()
        return part

    def _samples(self) -> Iterator[tuple[Shard, int]]:
        for number in np.flatnonzero(self.counts).tolist():
            shard, first = self.shards.open_captions(number), int(self.firsts[number])
            yield from ((shard, sample) for sample in range(first, first + int(self.counts[number])))

    def _note(self, number: int, sample: int, name: str, fault: str) -> None:
        told = name if name.isprintable() else repr(name)
        self._bad[number, sample] = f"{told}: {fault}"
        if self.report is not None:
            add_line(self.report, f"{told}\t{' '.join(fault.split())}")
        self._count()

    def _count(self, empty: bool = False) -> None:
        self._seen += 1
        self._empty += empty
        if self._seen < ENOUGH or max(len(self._bad), self._empty) <= self.max_bad * self._seen:
            return
        found = [f"{len(self._bad)} cannot be used (the last: {self._last()})"] if self._bad else []
        found += (
            [f"{self._empty} have no caption (data.caption_key or data.caption_column says where they are)"]
            if self._empty
            else []
        )
        listed = f"; broken ones are listed in {self.report}" if self._bad and self.report is not None else ""
        raise UserError(
            f"of {self._seen} pictures read so far {' and '.join(found)}, and data.max_bad={self.max_bad:g} allows "
            f"{self.max_bad:.1%} of each{listed}. Mend them, or allow more with data.max_bad=…"
        )

    def _last(self) -> str:
        return list(self._bad.values())[-1] if self._bad else ""


class TarShards:
    """Tars as a stream's shards.

    Args:
        config: where they are, and which member is the caption.
        cache: folder for copies of far ones, and for how many samples each holds; None keeps nothing.

    Raises:
        UserError: there is none, or one cannot be read.
    """

    def __init__(self, config: ShardsSection, cache: Path | None) -> None:
        self.config, self.urls = config, find_shards(config.path)
        states = each(state, self.urls, "asking for the state of shards", "shards")
        self.state_of = dict(zip(self.urls, states, strict=True))
        self._copies = None if all(map(is_local, self.urls)) else Copies.temporary(cache, 2 * WINDOW)
        stated = _stated(self.urls)
        rest = [url for url in self.urls if url not in stated]
        kept = None if cache is None else cache / "shard-sizes.jsonl"
        label = f"counting samples of shards that no {SIZES} tells of"
        states = [self.state_of[url] for url in rest]
        listed = recalled(lambda url: len(self._opened(url)), _is_count, rest, states, kept, label)
        stated |= dict(zip(rest, listed, strict=True))
        self.counts = np.array([stated[url] for url in self.urls], dtype=np.int64)

    def told(self, number: int) -> str:
        return self.urls[number]

    def files(self) -> list[tuple[str, str]]:
        return [(_split(url)[1], state.partition(" ")[0]) for url, state in self.state_of.items()]

    def open(self, number: int) -> TarShard:
        """Give a shard.

        Raises:
            UserError: it cannot be read, or holds another number of samples than before.
        """
        shard = self._opened(self.urls[number])
        if len(shard) != self.counts[number]:
            raise UserError(
                f"{shard.told} holds {len(shard)} samples and not {self.counts[number]}: it has changed since the run "
                f"began, or the {SIZES} beside it is wrong"
            )
        return shard

    open_captions = open

    def _opened(self, url: str) -> TarShard:
        while True:
            path = Path(url)
            if self._copies is not None and not is_local(url):
                path = self._copies.get(url, self.state_of[url], lambda part: copy_file(url, part))
            try:
                return TarShard(path, url, self.config, hold=True)
            except FileNotFoundError as error:
                if is_local(url):
                    raise UserError(f"{url} is no longer there") from error
                # another process has just made room: copy it again


def open_stream(
    config: ShardsSection | HubSection,
    decode: Callable[[bytes], Pixels],
    cache: Path | None,
    max_bad: float,
    report: Path | None,
) -> Stream:
    """Open a set as a stream: only the shards are counted.

    Raises:
        UserError: the set cannot be had, is made of neither tars nor parquet files, or lacks a column.
    """
    shards: Shards = TarShards(config, cache) if config.kind == "shards" else RowGroups(config, cache, 2 * WINDOW)
    return Stream(shards, decode, max_bad, report)


def hold_out(stream: Stream, num_val: int) -> tuple[Stream, Stream]:
    """Split off the last `num_val` samples for validation."""
    cut = len(stream) - num_val
    return stream.part(0, cut), stream.part(cut, len(stream))


def _stated(urls: Sequence[str]) -> dict[str, int]:
    """Return the numbers of samples that files beside the shards state."""
    stated = {}
    for folder in sorted({_split(url)[0] for url in urls}):
        where = f"{folder}/{SIZES}"
        for name, number in parse_json(_read_if_there(where) or "{}", where).items():
            if not _is_count(number):
                raise UserError(f"{where}: {name} has {number!r} samples; state a whole number, or remove the file")
            stated[folder, name] = number
    return {url: stated[_split(url)] for url in urls if _split(url) in stated}


def _is_count(number: Any) -> bool:
    return type(number) is int and 0 <= number < MOST_SAMPLES


def _split(url: str) -> tuple[str, str]:
    folder, _, name = url.rpartition("/")
    return folder or ".", name


def _read_if_there(url: str) -> str | None:
    def read() -> str | None:
        try:
            with open_file(url) as file:
                return file.read().decode("utf-8-sig")
        except Exception as error:
            # 403 is what object stores answer over https where there is nothing
            if isinstance(error, FileNotFoundError | PermissionError) or getattr(error, "status", None) in (403, 404):
                return None
            raise

    return patiently(read, f"{url} cannot be read")
