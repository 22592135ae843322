"""Where captioned pictures come from. A source is indexed, knows its captions, and names its content by a hash.

N pictures, W H pixels.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ldm.config import CustomSection, Data, FolderSection, HubSection, MixData, ShapesData, ShardsSection, Wording
from ldm.data.folder import FolderSource
from ldm.data.hub import HubSource, picture_folder
from ldm.data.images import WHITE, Colour, Pixels, decode, to_channels
from ldm.data.index import Index
from ldm.data.order import ShardShuffle, Shuffle, WeightedShuffle
from ldm.data.shapes import Shapes
from ldm.data.shards import TarSource
from ldm.data.stream import Stream, hold_out, open_stream
from ldm.errors import UserError
from ldm.files import file_written_atomically
from ldm.plugins import build
from ldm.ranks import say_once


class Source(Protocol):
    """What every source of captioned pictures offers."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return {"image": (H, W, C) uint8 of any size, "captions": one or several str}."""
        ...

    def captions(self) -> Sequence[Sequence[str]]:
        """Return the captions of every picture without decoding one; of a stream, those of its first pictures."""
        ...

    def sizes(self) -> NDArray[np.int32]:
        """Return (N, 2): W, H of every picture without decoding one."""
        ...

    def fingerprint(self) -> str:
        """Return a string that changes with any picture or caption."""
        ...


def open_sources(
    data: Data, channels: int = 3, cache: Path | None = None, report: Path | None = None
) -> tuple[Source | Stream, Source | Stream]:
    """Open the training and the validation pictures that a config names.

    Args:
        data: the config.
        channels: C of the pictures: 1, 3 or 4.
        cache: folder that keeps what was found out about a set; None keeps nothing.
        report: file that names the pictures that are left out, and why; None writes nothing.

    Raises:
        UserError: the set, its split or a column is not there; it holds no more than `num_val` pictures; more than
            `max_bad` of its pictures are broken or without caption.
    """
    if isinstance(data, ShapesData):
        train, val = (
            Shapes(split, num, data.resolution, data.objects, data.seed, channels)
            for split, num in (("train", data.num_train), ("val", data.num_val))
        )
        return train, val
    # A picture that is scaled down by half at least looks the same: its file may be decoded at that scale.
    read = partial(decode, channels=channels, background=data.background, at_least=2 * data.resolution)
    if isinstance(data, HubSection | ShardsSection) and data.streaming:
        stream = open_stream(data, read, cache, data.max_bad, report)
        _check_num_val(len(stream), data.num_val)
        return hold_out(stream, data.num_val)
    if report is not None:
        report.unlink(missing_ok=True)
    whole: Source
    if isinstance(data, MixData):
        parts = {name: open_source(part, read, cache) for name, part in data.sources.items()}
        good = _without_faults(parts, data.max_bad, report)
        whole = Mix(good, [part.weight for part in data.sources.values()])
    else:
        (whole,) = _without_faults({"": open_source(data, read, cache)}, data.max_bad, report)
    _check_captions(whole, data.max_bad)
    _check_num_val(len(whole), data.num_val)
    order = np.random.default_rng(0).permutation(len(whole))
    cuts = (np.sort(order[data.num_val :]), np.sort(order[: data.num_val]))
    kept, held_out = (Subset(whole, cut, channels, data.background) for cut in cuts)
    return kept, held_out


def known(source: Any) -> Index | None:
    """Return what is known of each picture, in a source's order; None of one that is drawn, streamed or custom."""
    if isinstance(source, Subset):
        if (whole := known(source.source)) is None:
            return None
        chosen = source.indices.tolist()
        names, digests, faults = ([each[i] for i in chosen] for each in (whole.names, whole.digests, whole.faults))
        return Index(names, whole.sizes[chosen], digests, whole.likenesses[chosen], faults)
    if isinstance(source, Mix):
        parts = [part for part in map(known, source.parts) if part is not None]
        if len(parts) < len(source.parts):
            return None
        names, digests, faults = (
            [item for part in parts for item in getattr(part, field)] for field in ("names", "digests", "faults")
        )
        sizes, likenesses = (np.concatenate([getattr(part, f) for part in parts]) for f in ("sizes", "likenesses"))
        return Index(names, sizes, digests, likenesses, faults)
    return getattr(source, "index", None)


def content(source: Any) -> str:
    """Return a hash of a whole set, whichever part of it a source is and however its pictures are decoded."""
    return source.source.fingerprint() if isinstance(source, Subset) else source.fingerprint()


def training_order(source: Source | Stream, seed: int) -> Shuffle | WeightedShuffle | ShardShuffle:
    """Return the order in which a source's pictures are trained on."""
    if isinstance(source, Stream):
        return ShardShuffle(source.counts, seed)
    indices, whole = np.arange(len(source)), source
    while isinstance(whole, Subset):
        indices, whole = whole.indices[indices], whole.source
    if isinstance(whole, Mix):
        return WeightedShuffle(whole.part_of(indices), whole.weights, seed)
    return Shuffle(len(source), seed)


class Subset:
    """Some pictures of a source, by index.

    Args:
        source: the whole.
        indices: which of its pictures.
        channels, background: how they are decoded, as a part of the fingerprint; what a source of the user's own gives
            is brought to it. None leaves them as they are.
    """

    def __init__(
        self, source: Source, indices: NDArray[np.int64], channels: int | None = None, background: Colour = WHITE
    ) -> None:
        self.source, self.indices, self.channels, self.background = source, indices, channels, background

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.source[int(self.indices[index])]
        if self.channels is None:
            return item
        return {**item, "image": to_channels(item["image"], self.channels, self.background)}

    def captions(self) -> Sequence[Sequence[str]]:
        captions = self.source.captions()
        return [captions[i] for i in self.indices]

    def sizes(self) -> NDArray[np.int32]:
        return self.source.sizes()[self.indices]

    def fingerprint(self) -> str:
        reading = f"{self.channels} channels over {tuple(self.background)}"
        digest = hashlib.sha256(f"{self.source.fingerprint()} {reading}".encode())
        digest.update(np.ascontiguousarray(self.indices, dtype="<i8").tobytes())
        return digest.hexdigest()


class Mix:
    """Several sources, one after another, each with its share of the training samples."""

    def __init__(self, parts: Sequence[Source], weights: Sequence[float]) -> None:
        self.parts, self.weights = parts, list(weights)
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def part_of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self.ends, indices, side="right")

    def __getitem__(self, index: int) -> dict[str, Any]:
        part = int(self.part_of(np.asarray(index)))
        return self.parts[part][index - int(self.ends[part]) + len(self.parts[part])]

    def captions(self) -> Sequence[Sequence[str]]:
        return [captions for part in self.parts for captions in part.captions()]

    def sizes(self) -> NDArray[np.int32]:
        return np.concatenate([part.sizes() for part in self.parts])

    def fingerprint(self) -> str:
        return hashlib.sha256(" ".join(part.fingerprint() for part in self.parts).encode()).hexdigest()


def open_source(section: Any, read: Callable[[bytes], Pixels], cache: Path | None) -> Source:
    """Open one source, whatever is wrong with its single pictures.

    Args:
        section: the part of a config that says where it is.
        read: turns a picture's file into pixels.
        cache: folder that keeps what was found out about the pictures; None keeps nothing.

    Raises:
        UserError: the set, its split or a column is not there.
    """
    if isinstance(section, FolderSection):
        return FolderSource(section, read, cache)
    if isinstance(section, ShardsSection):
        return TarSource(section, read, cache)
    if isinstance(section, HubSection):
        if (folder := picture_folder(section)) is None:
            return HubSource(section, read, cache)
        if not isinstance(section.caption_column, str):
            raise UserError(f"data.caption_column={section.caption_column}: a folder of pictures has one column of "
                            "captions, of which a row may hold a list")  # fmt: skip
        if section.image_column != "image":
            raise UserError(f"{folder} has no column '{section.image_column}' (data.image_column): it is a folder of "
                            "pictures, whose column is called 'image'")  # fmt: skip
        own = {name: getattr(section, name) for name in (*Wording.model_fields, "caption_column")}
        return FolderSource(FolderSection(kind="folder", path=str(folder), **own), read, cache)
    assert isinstance(section, CustomSection)
    return build(section.source.node())


def _without_faults(sources: Mapping[str, Any], max_bad: float, report: Path | None) -> list[Source]:
    """Leave out the pictures that cannot be used, and list them under the names of their sources.

    Raises:
        UserError: they are more than a share of `max_bad` of all.
    """
    indexes = {label: source.index for label, source in sources.items() if hasattr(source, "index")}
    faults = [
        (f"{label}: {name}" if label else name, fault)
        for label, index in indexes.items()
        for name, fault in zip(index.names, index.faults, strict=True)
        if fault
    ]
    if not faults:
        return list(sources.values())
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{name!r}\t{fault}\n" if not name.isprintable() else f"{name}\t{fault}\n" for name, fault in faults]
        with file_written_atomically(report) as file:
            file.write("".join(lines).encode("utf-8", errors="backslashreplace"))
    num = sum(len(index.names) for index in indexes.values())
    told = f"{len(faults)} of {num} pictures ({len(faults) / num:.1%}) cannot be used"
    listed = f", listed in {report}" if report is not None else ""
    if len(faults) > max_bad * num:
        examples = "\n".join(f"  {name}: {fault}" for name, fault in faults[:5])
        raise UserError(
            f"{told}, and data.max_bad={max_bad:g} allows {max_bad:.1%}{listed}:\n{examples}\n"
            "Mend or remove them, or allow more with data.max_bad=…"
        )
    say_once(f"  {told} and are left out{listed}")
    return [
        Subset(source, np.flatnonzero([not fault for fault in indexes[label].faults])) if label in indexes else source
        for label, source in sources.items()
    ]


def _check_captions(source: Source, max_bad: float) -> None:
    captions = source.captions()
    empty = [i for i, texts in enumerate(captions) if not any(texts)]
    if len(empty) > max_bad * len(captions):
        raise UserError(
            f"{len(empty)} of {len(captions)} pictures ({len(empty) / len(captions):.1%}) have no caption, such as "
            f"{', '.join(_name(source, i) for i in empty[:5])}; data.max_bad={max_bad:g} allows {max_bad:.1%}. Is "
            "data.caption_column (of shards data.caption_key) right, do caption files end in .txt?"
        )


def _name(source: Any, index: int) -> str:
    """Return what a person calls a picture."""
    if isinstance(source, Subset):
        return _name(source.source, int(source.indices[index]))
    if isinstance(source, Mix):
        part = int(source.part_of(np.asarray(index)))
        return _name(source.parts[part], index - int(source.ends[part]) + len(source.parts[part]))
    return source.index.names[index] if hasattr(source, "index") else f"picture {index}"


def _check_num_val(num: int, num_val: int) -> None:
    if num <= num_val:
        raise UserError(f"the set has {num} pictures, data.num_val={num_val} leaves none to train on")
