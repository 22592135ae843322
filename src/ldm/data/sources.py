"""Where captioned pictures come from. A source is indexed, knows its captions, and names its content by a hash."""

import glob
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ldm.config import Data, HubData, ShapesData
from ldm.data.images import Pixels, decode
from ldm.data.shapes import Shapes
from ldm.errors import UserError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SPLIT_FOLDERS = ("train", "validation", "val", "test")


class Source(Protocol):
    """What every source of captioned pictures offers."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return {"image": (H, W, 3) uint8 of any size, "caption": str}."""
        ...

    def captions(self) -> Sequence[str]:
        """Return all captions without decoding a picture."""
        ...

    def fingerprint(self) -> str:
        """Return a string that changes with any picture or caption."""
        ...


def open_sources(data: Data) -> tuple[Source, Source]:
    """Open the training and the validation pictures that a config names.

    Raises:
        UserError: the set, its split or a column is not there; it holds no more than `num_val` pictures.
    """
    if isinstance(data, ShapesData):
        train, val = (
            Shapes(split=split, num_images=num, resolution=data.resolution, objects=data.objects, seed=data.seed)
            for split, num in (("train", data.num_train), ("val", data.num_val))
        )
        return train, val
    if isinstance(data, HubData):
        whole: Source = HubSource(data)
    else:
        import hydra.utils

        whole = hydra.utils.instantiate(data.source.node())
    if len(whole) <= data.num_val:
        raise UserError(f"the set has {len(whole)} pictures, data.num_val={data.num_val} leaves none to train on")
    order = np.random.default_rng(0).permutation(len(whole))
    return Subset(whole, np.sort(order[data.num_val :])), Subset(whole, np.sort(order[: data.num_val]))


class Subset:
    """Some pictures of a source, by index."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[int(self.indices[index])]

    def captions(self) -> Sequence[str]:
        captions = self.source.captions()
        return [captions[i] for i in self.indices]

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.source.fingerprint().encode())
        digest.update(np.ascontiguousarray(self.indices, dtype="<i8").tobytes())
        return digest.hexdigest()


class HubSource:
    """Captioned pictures that `datasets` opens: a hub id, or a local folder of parquet files or of pictures.

    Raises:
        UserError: the set, its split or a column is not there.
    """

    def __init__(self, data: HubData) -> None:
        self.data = data
        dataset = _load(data)
        for key, column in (("image_column", data.image_column), ("caption_column", data.caption_column)):
            if column not in dataset.column_names:
                raise UserError(
                    f"{data.path} has no column '{column}' (data.{key}); it has: {', '.join(dataset.column_names)}"
                )
        if data.image_column == data.caption_column:
            raise UserError(f"data.image_column and data.caption_column are both '{data.image_column}'")
        import datasets

        dataset = dataset.select_columns([data.image_column, data.caption_column])
        try:
            # Decoding raises inside `datasets` where the picture at fault cannot be named: take bytes, do it here.
            self.dataset = dataset.cast_column(data.image_column, datasets.Image(decode=False))
        except (TypeError, ValueError, NotImplementedError) as error:  # pyarrow's own are kinds of these
            found = dataset.features[data.image_column]
            raise UserError(
                f"{data.path}: column '{data.image_column}' (data.image_column) holds no pictures but {found}"
            ) from error

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.dataset[index]
        encoded = self._encoded(row[self.data.image_column], index)
        try:
            pixels: Pixels = decode(encoded)
        except UserError as error:
            path = row[self.data.image_column]["path"]
            raise UserError(f"{self.data.path}, row {index} ({path or 'inline'}): {error}") from error
        return {"image": pixels, "caption": self._caption(row[self.data.caption_column], index)}

    def captions(self) -> Sequence[str]:
        return [self._caption(text, i) for i, text in enumerate(self.dataset[self.data.caption_column])]

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for i, row in enumerate(self.dataset):
            content = self._encoded(row[self.data.image_column], i)
            caption = str(row[self.data.caption_column]).encode()
            digest.update(len(content).to_bytes(8, "little") + content + len(caption).to_bytes(8, "little") + caption)
        return digest.hexdigest()

    def _encoded(self, image: Any, index: int) -> bytes:
        """Return a picture's file: from the row itself, or from where the row says, which may be inside an archive."""
        if image is None:
            raise UserError(f"{self.data.path}, row {index}: there is no picture in column '{self.data.image_column}'")
        if image["bytes"] is not None:
            return image["bytes"]
        import fsspec

        try:
            with fsspec.open(image["path"], "rb") if "://" in image["path"] else open(image["path"], "rb") as file:
                return file.read()
        except (OSError, ValueError) as error:
            raise UserError(f"{self.data.path}, row {index}: the picture cannot be read: {error}") from error

    def _caption(self, text: Any, index: int) -> str:
        if not isinstance(text, str):
            raise UserError(
                f"{self.data.path}, row {index}: the caption in column '{self.data.caption_column}' "
                f"is {type(text).__name__}, not text (data.caption_column names another column)"
            )
        return text


def _load(data: HubData) -> Any:
    import datasets

    folder = Path(data.path).expanduser()
    looks_local = data.path.startswith((".", "/", "~")) or data.path.count("/") > 1
    if not folder.exists() and looks_local:
        raise UserError(f"data.path={data.path}: there is no such folder (seen from {Path.cwd()})")
    if folder.is_file():
        raise UserError(f"data.path={data.path} is a file; name the folder that holds it")
    try:
        if folder.is_dir():
            return _load_folder(folder, data)
        return datasets.load_dataset(data.path, name=data.subset, split=data.split, revision=data.revision)
    except UserError:
        raise
    except Exception as error:  # `datasets` raises a dozen kinds for one cause: the set cannot be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = f"data.path={data.path} (data.split={data.split}" + (f", subset={data.subset})" if data.subset else ")")
        hint = (
            "check data.split, data.subset and the files in that folder"
            + ("; `datasets` takes its name for a pattern, so rename it" if glob.has_magic(str(folder)) else "")
            if folder.is_dir()
            else "a hub set can vanish or need a login: name a mirror with data.path=<other/id>, "
            "or a local folder with data.path=./folder"
        )
        raise UserError(f"{where} cannot be opened: {reason}; {hint}") from error


def _load_folder(folder: Path, data: HubData) -> Any:
    import datasets

    if any(folder.glob("**/*.parquet")) or _declares_files(folder / "README.md"):
        return datasets.load_dataset(str(folder), name=data.subset, split=data.split, revision=data.revision)
    splits = [name for name in SPLIT_FOLDERS if (folder / name).is_dir()]
    if splits and not (folder / data.split).is_dir():
        raise UserError(f"{folder} has no split '{data.split}' (data.split); it has: {', '.join(splits)}")
    pictures = (folder / data.split if splits else folder).resolve()
    if not any(path.suffix.lower() in IMAGE_SUFFIXES for path in pictures.rglob("*")):
        return datasets.load_dataset(str(folder), name=data.subset, split=data.split, revision=data.revision)
    # Naming the files keeps `datasets` from reading splits out of file names.
    files = f"{glob.escape(str(pictures))}/**"
    return datasets.load_dataset("imagefolder", data_files={data.split: files}, split=data.split)


def _declares_files(card: Path) -> bool:
    """Tell whether a dataset card says which files make which split."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return re.match(r"---\s*\n(.*\n)*?(configs|data_files):", text) is not None
