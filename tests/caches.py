"""Small latent caches: pictures of three shapes with several captions and views, in shards of a few rows."""

import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tiny
from ldm.data import cache_layout
from ldm.data.buckets import Buckets
from ldm.data.cache_reader import CachedLatents
from ldm.data.latents import cached_latents
from ldm.data.pictures import Pictures

SHARD_ROWS = 4
NUM = 11  # of pictures: 6, 4 and 1 of a size, so 2 + 1 + 1 shards; and 3 of 9 + 1 captions
SIDES = ((22, 20), (24, 44), (22, 20), (44, 24), (22, 20), (24, 44), (22, 20), (24, 44), (22, 20), (24, 44), (22, 20))
CAPTIONS = (
    ("a", "b"),
    ("c",),
    ("a",),
    ("d", "e", "f"),
    ("",),
    ("b", "g"),
    ("h",),
    ("a", "a"),
    ("i",),
    ("c", ""),
    ("g",),
)


class Mixed:
    """A source of pictures of three shapes, some with several captions, some with the same, some with none."""

    def __init__(self, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        self.pixels = [draw.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in SIDES]
        self.texts: list[tuple[str, ...]] = list(CAPTIONS)

    def __len__(self) -> int:
        return NUM

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.pixels[index], "captions": self.texts[index]}

    def captions(self) -> list[tuple[str, ...]]:
        return self.texts

    def sizes(self) -> Any:
        return np.array(SIDES, np.int32)

    def fingerprint(self) -> str:
        return repr(([pixels.tobytes() for pixels in self.pixels], self.texts))


def mixed(source: Any = None, **options: Any) -> Pictures:
    """Return pictures in three buckets, 12x20, 16x16 and 20x12, with four views of each."""
    settings = {"buckets": Buckets(16, 4), "crop": "random", "flip": True, "variants": 4, **options}
    return Pictures(source or Mixed(), 16, **settings)


class Counting:
    """A VAE that counts the pictures it encodes, and takes its time."""

    def __init__(self, pause: float = 0.0) -> None:
        self.vae, self.num, self.pause = tiny.vae(), 0, pause
        self.encode, self.vae.encode = self.vae.encode, self.counted

    def counted(self, image: torch.Tensor) -> torch.Tensor:
        self.num += len(image)
        time.sleep(self.pause)
        return self.encode(image)


def build(root: Path, vae: Any = None, pictures: Pictures | None = None, **options: Any) -> CachedLatents:
    pictures = pictures or mixed()
    return cached_latents(root, pictures, vae or tiny.vae(), tiny.conditioner(), **{"batch_size": 3, **options})


def folder_of(root: Path) -> Path:
    (folder,) = root.iterdir()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file, temporary ones too, but not of locks."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def serve() -> None:
    """Build caches in processes of their own, quickly: fork one for each line "pause last root" on stdin, tell its id.

    Each batch takes `pause` seconds longer. With `last` above 0 the process kills itself before that one of its calls
    that change the folder. How many views it encoded is left in the file root.id.
    """
    torch.set_num_threads(1)
    cache_layout.SHARD_ROWS = SHARD_ROWS
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended ones are gone at once
    counting = Counting()
    tiny.conditioner()(["its modules are imported"])
    print("ready", flush=True)
    for line in sys.stdin:
        pause, last, root = line.rstrip("\n").split(" ", 2)
        if child := os.fork():
            print(child, flush=True)
            continue
        try:
            os.dup2(2, 1)  # what a build prints must not come between the ids
            counting.pause = float(pause)
            die_before(int(last))
            build(Path(root), counting.vae)
            Path(f"{root}.{os.getpid()}").write_text(str(counting.num))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)


def die_before(last: int) -> None:
    calls = 0

    def watched(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    for place, name in ((os, "fsync"), (os, "replace"), (Path, "open"), (Path, "mkdir"), (Path, "unlink")):
        setattr(place, name, watched(getattr(place, name)))


if __name__ == "__main__":
    serve()
