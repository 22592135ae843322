"""Small captioned sets in every form, and the configs that name them. Picture number i is i in red."""

import csv
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from ldm.config import FolderData, HubData, ShardsData

# How pictures are fed, as conf/data/_pictures.yaml has it.
FEEDING: dict[str, Any] = {
    "resolution": 32, "batch_size": 4, "num_workers": 0, "num_val": 1, "max_bad": 0.01,
    "cache": False, "cache_dtype": "fp32", "cache_on_device": False,
    "buckets": False, "crop": "centre", "flip": False, "variants": 4, "background": (255, 255, 255),
}  # fmt: skip
WORDING = {"caption_template": "{caption}", "caption_prefix": "", "caption_suffix": ""}
NAMES = ["a.png", "my picture test.png", "x-train.png", "validation.png", "b c.PNG", "é.png"]


def hub_data(path: Path | str, **options: Any) -> HubData:
    names = {"subset": None, "split": "train", "revision": None, "image_column": "image", "caption_column": "text"}
    values = {**FEEDING, **WORDING, "kind": "hub", "path": str(path), **names, "streaming": False, **options}
    return HubData(**values)


def folder_data(path: Path | str, **options: Any) -> FolderData:
    values = {**FEEDING, **WORDING, "kind": "folder", "path": str(path), "caption_column": "text", **options}
    return FolderData(**values)


def shards_data(path: Path | str, **options: Any) -> ShardsData:
    values = {**FEEDING, **WORDING, "kind": "shards", "path": str(path), "caption_key": "txt", "streaming": False}
    return ShardsData(**{**values, **options})


def png(color: tuple[int, int, int] = (1, 2, 3), size: tuple[int, int] = (8, 8), suffix: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, suffix)
    return file.getvalue()


def pngs(num: int) -> list[bytes]:
    return [png((i, 0, 0)) for i in range(num)]


def texts(num: int) -> list[str]:
    return [f"caption {i}" for i in range(num)]


def picture_folder(folder: Path, names: Sequence[str] = NAMES, metadata: str | None = "jsonl") -> Path:
    """Write pictures and a metadata file with their captions."""
    rows = [{"file_name": name, "text": f"caption {i}"} for i, name in enumerate(names)]
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png((i, 0, 0)))
    if metadata == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif metadata == "csv":
        with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
    return folder


def sidecar_folder(folder: Path, images: Sequence[bytes], captions: Sequence[str]) -> Path:
    """Write 0000.png beside 0000.txt and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        (folder / f"{i:04d}.png").write_bytes(image)
        (folder / f"{i:04d}.txt").write_text(caption + "\n", encoding="utf-8")
    return folder


def parquet_folder(
    folder: Path,
    num: int = 5,
    name: str = "train.parquet",
    images: Sequence[bytes | None] | None = None,
    **columns: Any,
) -> Path:
    """Write a parquet file as `datasets` does."""
    images = pngs(num) if images is None else images
    rows = {
        "image": [image if image is None else {"bytes": image, "path": None} for image in images],
        "text": texts(len(images)),
        **columns,
    }
    folder.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict(rows)
    table.cast_column("image", datasets.Image()).to_parquet(folder / name)
    return folder


def shard_folder(folder: Path, images: Sequence[bytes], captions: Sequence[str], size: int = 3) -> Path:
    """Write tar files of `size` samples each, as webdataset has them."""
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(images), size):
        with tarfile.open(folder / f"{start // size:03d}.tar", "w") as tar:
            for i in range(start, min(start + size, len(images))):
                for suffix, content in (("png", images[i]), ("txt", captions[i].encode())):
                    member = tarfile.TarInfo(f"{i:04d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def pairs(source: Any) -> set[tuple[int, str]]:
    """Return the red and the first caption of every picture."""
    return {(int(row["image"][0, 0, 0]), row["captions"][0]) for row in (source[i] for i in range(len(source)))}


def expected(num: int) -> set[tuple[int, str]]:
    return {(i, f"caption {i}") for i in range(num)}
