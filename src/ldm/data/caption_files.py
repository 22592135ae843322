"""Where the captions of a folder's pictures are: one rule for all, found by looking at the files."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ldm.data.captions import Wording
from ldm.data.metadata import METADATA, listed_captions
from ldm.errors import UserError
from ldm.progress import progress

NOT_CAPTIONS = frozenset({".caption", ".cap", ".text", ".json"})
"""Suffixes of files beside pictures that may hold captions, where they belong into NAME.txt."""


@dataclass(frozen=True)
class FolderCaptions:
    """What was found.

    Attributes:
        rule: where captions come from, for people.
        captions: by names of pictures, each with one at least.
        missing: pictures that are listed and not there, with the reason.
    """

    rule: str
    captions: dict[str, list[str]]
    missing: dict[str, str] = field(default_factory=dict)


def suffix(name: str) -> str:
    """Return the end of a file's name in lower case: ".jpg"."""
    return os.path.splitext(name)[1].lower()


def folder_captions(
    root: Path, told: str, pictures: Collection[str], others: Collection[str], caption_column: str, wording: Wording
) -> FolderCaptions:
    """Find the captions of pictures: in metadata files, in NAME.txt beside them, or else in their names.

    Args:
        root: the folder.
        told: how the user gave it, such as `data.path=pictures`.
        pictures, others: names of the files below it, relative to it.
        caption_column: of metadata files.
        wording: puts captions into words.

    Raises:
        UserError: captions are given in two ways, to a part of the pictures only, or cannot be read.
    """
    tables = sorted(name for name in others if os.path.basename(name).lower() in METADATA)
    texts = {os.path.splitext(name)[0]: name for name in others if suffix(name) == ".txt"}
    beside = {name: texts[stem] for name in pictures if (stem := os.path.splitext(name)[0]) in texts}
    if tables:
        title = _title(told, tables)
        if beside:
            raise UserError(
                f"{told}: captions are given in two ways: in {title} and, for {len(beside)} of {len(pictures)} "
                f"pictures, in NAME.txt beside them, such as {min(beside.values())}; "
                "move one of the two kinds out of the folder"
            )
        listed = listed_captions(root, tables, caption_column, wording)
        captions, missing = _placed(root, listed, pictures, f"listed in {title}")
        return FolderCaptions(f"{title}, column '{caption_column}'", captions, missing)
    if beside:
        _check_most_have_one(told, pictures, beside)
        lines = _read_sidecars(root, sorted(set(beside.values())))
        captions = {}
        for name in beside:
            worded = wording({"file_name": name}, lines[beside[name]])
            captions[name] = [text for text in worded if text] or [""]
        return FolderCaptions("NAME.txt beside NAME, each line a caption", captions)
    _check_nothing_beside(told, pictures, others)
    captions = {name: wording({"file_name": name}, [caption_of(name)]) for name in pictures}
    _check_say_something(told, captions)
    example = min(pictures)
    return FolderCaptions(f"from the names of files, such as '{captions[example][0]}' for {example}", captions)


def caption_of(name: str) -> str:
    """Make a caption of a picture's name.

    >>> caption_of("houses/red_house-03.jpg")
    'red house'
    """
    stem = os.path.splitext(os.path.basename(name))[0]
    return re.sub("[_-]+", " ", re.sub(r"[\s_-]+\(?\d+\)?$", "", stem)).strip()


def _title(told: str, tables: Sequence[str]) -> str:
    """Name the metadata files.

    Raises:
        UserError: they are of several kinds.
    """
    kinds = sorted({os.path.basename(table).lower() for table in tables})
    if len(kinds) > 1:
        raise UserError(
            f"{told}: captions are given in several ways: in {' and in '.join(kinds)} "
            f"({', '.join(tables[:4])}{', …' * (len(tables) > 4)}); move all but one kind out of the folder"
        )
    return tables[0] if len(tables) == 1 else f"{kinds[0]} of {len(tables)} folders"


def _placed(
    root: Path, listed: Mapping[str, list[str]], pictures: Collection[str], told: str
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Tell which files the listed names mean: captions of those that are there, and why others are not."""
    captions: dict[str, list[str]] = {}
    missing: dict[str, str] = {}
    composed: dict[str, str] = {}
    if not all(name in pictures for name in listed):  # some systems write é as two characters in names of files
        composed = {unicodedata.normalize("NFC", name): name for name in pictures}
    for name, texts in listed.items():
        if name not in pictures:
            name = composed.get(unicodedata.normalize("NFC", name), name)
        captions[name] = texts
        if name.startswith(("/", "../")):
            missing[name] = f"{told}, but outside the folder"
        elif name not in pictures and not os.path.isfile(root / name):
            missing[name] = f"{told}, not there"
    return captions, missing


def _check_most_have_one(told: str, pictures: Collection[str], beside: Mapping[str, str]) -> None:
    without = [name for name in pictures if name not in beside]
    if 2 * len(without) >= len(pictures):
        raise UserError(
            f"{told}: {len(beside)} of {len(pictures)} pictures have a NAME.txt beside them, such as "
            f"{min(beside.values())}, and {len(without)} have none, such as {min(without)}; give each picture its own, "
            "or move them all out of the folder to have captions from the names of files"
        )


def _check_say_something(told: str, captions: Mapping[str, list[str]]) -> None:
    (text,), num = Counter(map(tuple, captions.values())).most_common(1)[0]
    if len(captions) >= 10 and num > 0.9 * len(captions):
        raise UserError(
            f"{told}: there are no captions but the names of files, which would make {num} of {len(captions)} "
            f"'{text}', as of {min(captions)}; write a NAME.txt beside each picture, or a metadata.jsonl"
        )


def _check_nothing_beside(told: str, pictures: Collection[str], others: Collection[str]) -> None:
    doubled = [text for name in pictures if (text := f"{name}.txt") in others]
    if doubled:
        raise UserError(
            f"{told}: {len(doubled)} pictures have their caption in a file called like {min(doubled)}, which is not "
            "read: NAME.txt belongs to NAME.jpg; rename them"
        )
    stems = {os.path.splitext(name)[0] for name in pictures}
    alike = [name for name in others if suffix(name) in NOT_CAPTIONS and os.path.splitext(name)[0] in stems]
    if 2 * len(alike) >= len(pictures):
        kind, num = Counter(map(suffix, alike)).most_common(1)[0]
        raise UserError(
            f"{told}: {num} of {len(pictures)} pictures have a NAME{kind} beside them, such as {min(alike)}, which is "
            "not read: captions belong into NAME.txt or a metadata.jsonl; to have them from the names of files, "
            f"move the {kind} out of the folder"
        )


def _read_sidecars(root: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """Read the lines of text files."""

    def read(name: str) -> list[str]:
        path = os.path.join(root, name)
        try:
            with open(path, "rb") as file:
                return [line for line in re.split("[\r\n]+", file.read().decode("utf-8-sig")) if line]
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8") from error
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error

    chunks = [names[start : start + 256] for start in range(0, len(names), 256)]
    lines: dict[str, list[str]] = {}
    with progress("reading captions", len(names), "files") as advance, ThreadPoolExecutor() as pool:
        for chunk, found in zip(chunks, pool.map(lambda chunk: [*map(read, chunk)], chunks), strict=True):
            lines.update(zip(chunk, found, strict=True))
            advance(len(chunk))
    return lines
