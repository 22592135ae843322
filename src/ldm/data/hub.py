"""Captioned pictures that `datasets` opens: a hub id, or a local folder of parquet files and the like."""

import glob
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm.config import HubSection
from ldm.data.captions import Wording
from ldm.data.folder import PICTURES
from ldm.data.images import Pixels
from ldm.data.index import look_at
from ldm.data.indexed import Indexed
from ldm.data.remote import local_state
from ldm.errors import UserError


class HubSource(Indexed):
    """The rows of a set, as `datasets` keeps it on disk.

    Args:
        config: what to open, and the names of its columns.
        decode: turns a picture's file into pixels.
        cache: folder that keeps what was found out about the pictures; None keeps nothing.

    Raises:
        UserError: the set, its split or a column is not there; a caption is no text.
    """

    def __init__(self, config: HubSection, decode: Callable[[bytes], Pixels], cache: Path | None) -> None:
        self.config, self.decode = config, decode
        self.wording = Wording(config.caption_template, config.caption_prefix, config.caption_suffix)
        dataset = load(config)
        self.caption_columns = [config.caption_column] if isinstance(config.caption_column, str) else (
            config.caption_column
        )  # fmt: skip
        needed = [("image_column", config.image_column), *(("caption_column", name) for name in self.caption_columns)]
        for key, column in needed:
            if column not in dataset.column_names:
                raise UserError(
                    f"{config.path} has no column '{column}' (data.{key}); it has: {', '.join(dataset.column_names)}"
                )
        if config.image_column in self.caption_columns:
            raise UserError(f"data.image_column and data.caption_column are both '{config.image_column}'")
        import datasets

        try:
            # Decoding raises inside `datasets` where the picture at fault cannot be named: take bytes, do it here.
            self.dataset = dataset.cast_column(config.image_column, datasets.Image(decode=False))
        except (TypeError, ValueError, NotImplementedError) as error:  # pyarrow's own are kinds of these
            found = dataset.features[config.image_column]
            raise UserError(
                f"{config.path}: column '{config.image_column}' (data.image_column) holds no pictures but {found}"
            ) from error
        self.images = self.dataset.select_columns([config.image_column])
        self.texts = self._worded()
        state = str(dataset._fingerprint)
        names = [f"{config.path}, row {i}" for i in range(len(dataset))]
        kept = None
        if cache is not None:
            kept = cache / f"hub-{hashlib.sha256(f'{state} {config.image_column}'.encode()).hexdigest()[:16]}.parquet"
        stamps = [state + beside for beside in self._states_beside()]
        self.index = look_at(names, stamps, self.read, kept, f"looking at {config.path}")

    def read(self, index: int) -> bytes:
        """Return a picture's file: from the row itself, or from where the row says, which may be inside an archive."""
        image = self.images[index][self.config.image_column]
        if image is None:
            raise UserError(f"there is no picture in column '{self.config.image_column}'")
        if image["bytes"] is not None:
            return image["bytes"]
        if not _may_read(image["path"], self.config.path):
            raise UserError(
                f"its row names the file {image['path']}, which is neither in the set's folder nor in what `datasets` "
                "unpacked: it is not read; copy it into the folder, or its bytes into the row"
            )
        import fsspec

        try:
            with fsspec.open(image["path"], "rb") if "://" in image["path"] else open(image["path"], "rb") as file:
                return file.read()
        except ValueError as error:  # no such protocol
            raise UserError(f"the picture cannot be read: {error}") from error

    def _states_beside(self) -> list[str]:
        """Return the state of each picture's file where it lies beside the set; "" where it is in the row."""
        import pyarrow.compute as pc

        column = self.dataset.data.column(self.config.image_column)
        inside = pc.is_valid(pc.struct_field(column, "bytes")).to_pylist()
        paths = pc.struct_field(column, "path").to_pylist()
        states = []
        for is_inside, path in zip(inside, paths, strict=True):
            beside = not is_inside and path is not None and os.path.isfile(path)
            states.append(f" {local_state(os.stat(path))}" if beside else "")
        return states

    def _worded(self) -> list[list[str]]:
        # Other columns may hold pictures too, which would be decoded.
        named = [name for _, name in self.wording.parts if name in self.dataset.column_names]
        needed = [name for name in dict.fromkeys([*self.caption_columns, *named]) if name != self.config.image_column]
        worded, unread = [], dict.fromkeys(self.dataset.column_names)  # whose names alone are told
        rows = iter(self.dataset.select_columns(needed))
        for i in range(len(self.dataset)):
            try:
                row = next(rows)
            except Exception as error:  # damaged bytes may fail anywhere
                raise UserError(f"{self.config.path}, row {i} or one after it cannot be read: {error}") from error
            texts = [text for name in self.caption_columns for text in self._texts(row[name], name, i)]
            fields = {**unread, **row}
            worded.append([text for text in self.wording(fields, texts) if text] or [""])
        return worded

    def _texts(self, value: Any, column: str, index: int) -> list[str]:
        """Return the captions that one cell holds: a text, several, or none."""
        texts = list(value) if isinstance(value, list | tuple) else [value]
        if any(text is not None and not isinstance(text, str) for text in texts):
            raise UserError(
                f"{self.config.path}, row {index}: the caption in column '{column}' is {type(texts[0]).__name__}, "
                "not text (data.caption_column names another column)"
            )
        return [text or "" for text in texts] or [""]


def _may_read(path: str, folder: str) -> bool:
    """Tell whether a row's path, or that of the archive which it says the picture is in, may be opened.

    A set from anywhere must not bring other files of this machine into training.
    """
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    protocol, _, name = path.rpartition("::")[2].rpartition("://")
    if protocol not in ("", "file", "local"):
        return True
    caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE)
    roots = [os.path.abspath(os.path.expanduser(root)) for root in (folder, *map(str, caches))]
    return any(os.path.commonpath([os.path.abspath(name), root]) == root for root in roots)


def load(config: HubSection) -> Any:
    """Open the set itself with `datasets`.

    Raises:
        UserError: it cannot be had.
    """
    import datasets

    folder = Path(config.path).expanduser()
    looks_local = config.path.startswith((".", "/", "~")) or config.path.count("/") > 1
    if not folder.exists() and looks_local:
        raise UserError(f"data.path={config.path}: there is no such folder (seen from {Path.cwd()})")
    if folder.is_file():
        raise UserError(f"data.path={config.path} is a file; name the folder that holds it")
    try:
        path = str(folder.absolute()) if folder.is_dir() else config.path  # "parquet" would be the name of a loader
        return datasets.load_dataset(path, name=config.subset, split=config.split, revision=config.revision)
    except Exception as error:  # `datasets` raises a dozen kinds for one cause: the set cannot be had
        raise unreachable(config, error) from error


def unreachable(config: HubSection, error: Exception) -> UserError:
    """Say that a set cannot be opened, and what to do about it."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    where = f"data.path={config.path} (data.split={config.split}" + (
        f", subset={config.subset})" if config.subset else ")"
    )
    folder = Path(config.path).expanduser()
    if folder.is_dir():
        hint = "check data.split, data.subset and the files in that folder"
        if glob.has_magic(str(folder)):
            hint += "; `datasets` takes its name for a pattern, so rename it"
    else:
        hint = (
            "a hub set can vanish or need a login: name a mirror with data.path=<other/id>, "
            "or a local folder with data=folder data.path=./folder"
        )
    return UserError(f"{where} cannot be opened: {reason}; {hint}")


def picture_folder(config: HubSection) -> Path | None:
    """Return the folder of a set that is pictures on disk, or of the split that is asked for; None for any other set.

    Such a folder is read by `FolderSource`: `datasets` would take splits from names. All of it is taken, unless a split
    other than the default is named, which must be a folder in it.

    Raises:
        UserError: it has no folder of that split's name.
    """
    folder = Path(config.path).expanduser()
    if not folder.is_dir() or _declares_files(folder / "README.md"):
        return None
    if any(path.name != "metadata.parquet" for path in folder.glob("**/*.parquet")):
        return None
    if not any(path.suffix.lower() in PICTURES for path in folder.rglob("*")):
        return None
    if config.split == "train":  # the default, which says nothing
        return folder
    if not (folder / config.split).is_dir():
        there = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "none"
        raise UserError(f"{folder} has no split '{config.split}' (data.split): of folders it has {there}")
    return folder / config.split


def _declares_files(card: Path) -> bool:
    """Tell whether a dataset card says which files make which split."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return re.match(r"---\s*\n(.*\n)*?(configs|data_files):", text) is not None
