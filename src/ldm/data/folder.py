"""A folder of pictures as a source: pictures anywhere below it, and one rule for all that says where captions are.

N pictures, W H pixels.
"""

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from ldm.config import FolderSection
from ldm.data.caption_files import folder_captions, suffix
from ldm.data.captions import Wording
from ldm.data.images import Pixels
from ldm.data.index import look_at
from ldm.data.indexed import Indexed
from ldm.data.remote import local_state
from ldm.errors import UserError
from ldm.ranks import say_once
from ldm.redact import printable

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"})
NOT_READ = frozenset({".heic", ".heif", ".jxl", ".svg", ".psd", ".dng", ".cr2", ".nef", ".arw"})
"""Suffixes of pictures that there is no decoder for."""
OTHER_SETS = {".parquet": "hub", ".arrow": "hub", ".tar": "shards"}
VALIDATION = ("validation", "val", "test")


class FolderSource(Indexed):
    """Pictures of a folder, sorted by name, with captions from metadata.*, from NAME.txt, or from their names.

    Args:
        config: where, and how captions are worded.
        decode: turns a picture's file into pixels.
        cache: folder that keeps what was found out about the pictures; None keeps nothing.

    Raises:
        UserError: the folder is not there or has no pictures; captions are given in two ways, or cannot be read.
    """

    def __init__(self, config: FolderSection, decode: Callable[[bytes], Pixels], cache: Path | None) -> None:
        self.root, self.decode = Path(os.path.expanduser(config.path)), decode
        told = f"data.path={config.path}"
        pictures, others = list_files(self.root, told)
        if not pictures:
            raise UserError(_no_pictures(told, others))
        _say_what_is_taken(config.path, pictures, others)
        wording = Wording(config.caption_template, config.caption_prefix, config.caption_suffix)
        found = folder_captions(self.root, told, pictures, others, config.caption_column, wording)
        say_once(f"  captions of {printable(config.path)}: {printable(found.rule)}")
        for name in found.captions.keys() - pictures.keys() - found.missing.keys():
            pictures[name] = local_state(os.stat(self.root / name))  # listed, of another suffix
        names = sorted({*pictures, *found.missing})
        self.texts = [tuple(found.captions.get(name, ("",))) for name in names]

        def read(i: int) -> bytes:
            if names[i] in found.missing:
                raise UserError(found.missing[names[i]])
            return (self.root / names[i]).read_bytes()

        key = hashlib.sha256(os.fsencode(os.path.abspath(self.root))).hexdigest()[:16]
        kept = None if cache is None else cache / f"folder-{key}.parquet"
        stamps = [pictures.get(name, "") for name in names]
        self.index = look_at(names, stamps, read, kept, f"looking at {printable(config.path)}")

    def read(self, index: int) -> bytes:
        return (self.root / self.index.names[index]).read_bytes()

    def told(self, index: int) -> str:
        return str(self.root / self.index.names[index])


def list_files(root: Path, told: str) -> tuple[dict[str, str], set[str]]:
    """List what lies below a folder. What is hidden is passed over, and no folder is entered twice.

    Args:
        root: the folder.
        told: how the user gave it, such as `data.path=pictures`.

    Returns:
        The names of pictures, relative to `root`, with stamps that change when a file does ("" where it is a link to
        nothing); the names of all other files.

    Raises:
        UserError: the folder, or one below it, is not there or cannot be read.
    """
    if not os.path.isdir(root):
        missing = "there is no such folder; a set of the hub is read by data=hub"
        what = "is a file; name the folder that holds it" if root.is_file() else missing
        raise UserError(f"{told}: {what} (seen from {Path.cwd()})")
    pictures, others = dict[str, str](), set[str]()
    entered: set[tuple[int, int]] = set()
    folders, links = [""], list[str]()
    while folders or links:
        if not folders:  # all real folders have been entered: a link leads to something new, or nowhere
            links.sort(reverse=True)
            folders.append(links.pop())
        folder = folders.pop()
        try:
            state = os.stat(root / folder)
            if (state.st_dev, state.st_ino) in entered:
                continue
            entered.add((state.st_dev, state.st_ino))
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    name = folder + entry.name
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(f"{name}/")
                    elif entry.is_symlink() and os.path.isdir(entry.path):
                        links.append(f"{name}/")
                    elif suffix(name) not in PICTURES:
                        others.add(name)
                    elif (stamp := _stamp_of(entry)) is not None:
                        pictures[name] = stamp
        except OSError as error:
            raise UserError(
                f"{told}: the folder {root / folder} cannot be read: {error.strerror or error}; "
                "make it readable (chmod -R u+rX), or move it away"
            ) from error
    return pictures, others


def _stamp_of(entry: os.DirEntry[str]) -> str | None:
    """Return a file's stamp, "" where its link leads nowhere; None where it is a pipe or the like."""
    try:
        state = entry.stat()
    except OSError:
        return ""
    return local_state(state) if stat.S_ISREG(state.st_mode) else None


def _no_pictures(told: str, others: Iterable[str]) -> str:
    """Say that there are no pictures, and what there is."""
    kinds = Counter(suffix(name) or "files without suffix" for name in others)
    if not kinds:
        return f"{told}: the folder is empty; put pictures and their captions into it"
    there = ", ".join(f"{kind} ({num})" for kind, num in kinds.most_common(5))
    hints = {f"data={OTHER_SETS[kind]} reads {kind}" for kind in kinds if kind in OTHER_SETS}
    hint = "; ".join(sorted(hints)) or "convert them to one of these, or name another folder"
    return f"{told}: no pictures ({', '.join(sorted(PICTURES))}) are in it or below; there are: {there}; {hint}"


def _say_what_is_taken(path: str, pictures: Iterable[str], others: Iterable[str]) -> None:
    """Print what a user may not expect: that splits are taken together, that some pictures cannot be read."""
    top = {name.split("/", 1)[0] for name in pictures if "/" in name}
    if "train" in top and (held_out := [f"{name}/" for name in VALIDATION if name in top]):
        say_once(
            f"  of {printable(path)} train/ and {', '.join(held_out)} are taken together: data.num_val pictures "
            "of all are held out; to train on train/ alone, name it in data.path"
        )
    passed_over = Counter(suffix(name) for name in others if suffix(name) in NOT_READ)
    for kind, num in passed_over.most_common():
        say_once(f"  of {printable(path)} {num} {kind} are passed over: no decoder, convert them to .png or .jpg")
