"""Tar shards as webdataset writes them, as a source: each is listed once, and its pictures are read by offset.

N samples.
"""

import glob
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from fsspec.core import url_to_fs

from ldm.config import ShardsSection
from ldm.data.images import Pixels
from ldm.data.index import look_at
from ldm.data.indexed import Indexed
from ldm.data.remote import Copies, copy_file, digest_of, each, is_local, patiently, state
from ldm.data.tar import ShardError, TarShard
from ldm.errors import UserError

_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


def find_shards(path: str | Sequence[str]) -> list[str]:
    """Return the shards that a path means, sorted.

    Args:
        path: a tar, a folder of them, a pattern with `*` or with braces ("set/{000..099}.tar", "{a,b}.tar"), a URL of
            any of these that fsspec knows (s3://, gs://, https://, memory://), or a list of such.

    Raises:
        UserError: there is nothing of that name.
    """
    patterns = [path] if isinstance(path, str) else path
    return sorted({url for pattern in patterns for url in _find(pattern)})


def _find(pattern: str) -> list[str]:
    pattern = os.path.expanduser(pattern.removeprefix("file://"))
    # A name that is there is no pattern, whatever signs are in it.
    options = [pattern] if is_local(pattern) and os.path.exists(pattern) else _expand(pattern)
    found = [url for option in options for url in (_find_near(option) if is_local(option) else _find_far(option))]
    if not found:
        packed = is_local(pattern) and any(Path(pattern).glob("*.t*gz"))
        reason = (
            "they are compressed and cannot be read by offset: gunzip them" if packed else f"seen from {Path.cwd()}"
        )
        raise UserError(f"data.path={pattern}: there are no .tar files ({reason})")
    return found


def _find_near(option: str) -> list[str]:
    if os.path.isdir(option):
        return [str(path) for path in Path(option).glob("*.tar")]
    return [option] if os.path.exists(option) or not glob.has_magic(option) else glob.glob(option, recursive=True)


def _find_far(option: str) -> list[str]:
    if option.partition("?")[0].endswith(".tar") and not re.search(r"[*\[]", option):
        return [option]
    pattern = option if re.search(r"[*\[]", option) else f"{option.rstrip('/')}/*.tar"

    def find() -> list[str]:
        files, path = url_to_fs(pattern)
        return [files.unstrip_protocol(name) for name in files.glob(path)]

    return patiently(find, f"data.path={option} cannot be listed")


def _expand(pattern: str) -> list[str]:
    """Write out braces as a shell does: ranges of numbers, and lists."""
    braces = _BRACES.search(pattern)
    if braces is None:
        return [pattern]
    first, last, choices = braces.groups()
    if choices is not None:
        options = choices.split(",")
    else:
        padded = any(number.startswith("0") and number != "0" for number in (first, last))
        width = max(len(first), len(last)) if padded else 0
        low, high = sorted((int(first), int(last)))
        options = [f"{number:0{width}d}" for number in range(low, high + 1)]
    return [url for option in options for url in _expand(pattern[: braces.start()] + option + pattern[braces.end() :])]


class TarSource(Indexed):
    """Captioned pictures in tar shards: shards in the order of their names, samples in that of the tar.

    A far shard is first copied whole into the cache.

    Args:
        config: where the shards are, and which member is the caption.
        decode: turns a picture's file into pixels.
        cache: folder that keeps copies, lists of members and what was found out about the pictures; None keeps nothing.

    Raises:
        UserError: there is no shard, one cannot be read, or no picture has a caption.
    """

    def __init__(self, config: ShardsSection, decode: Callable[[bytes], Pixels], cache: Path | None) -> None:
        self.config, self.decode = config, decode
        urls = find_shards(config.path)
        self._kept = None if cache is None else Copies(cache / "shards").folder
        self._copies = None
        if not all(map(is_local, urls)):
            self._copies = Copies.temporary(None) if cache is None else Copies(cache / "shards")
        states = each(state, urls, "asking for the state of shards", "shards")
        self.shards = each(self._open, list(zip(urls, states, strict=True)), "listing shards", "shards")
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.texts: list[list[str]] = []
        faults = {}
        for shard in self.shards:
            for i in range(len(shard)):
                try:
                    self.texts.append(shard.captions(i))
                except ShardError:
                    raise
                except UserError as error:
                    faults[len(self.texts)] = str(error)
                    self.texts.append([""])
        if len(self.texts) > len(faults) and not any(texts != [""] for texts in self.texts):
            extensions = sorted(set().union(*(shard.extensions for shard in self.shards)))
            raise UserError(
                f"data.caption_key={config.caption_key}: no picture in {config.path} has such a caption; "
                f"there are members .{', .'.join(extensions)}"
            )
        names = [shard.name(i) for shard in self.shards for i in range(len(shard))]
        stamps = [stamp for shard, stamp in zip(self.shards, states, strict=True) for _ in range(len(shard))]
        index = None if cache is None else cache / f"shards-{digest_of(*urls)[:16]}.parquet"
        self.index = look_at(names, stamps, self.read, index, "looking at pictures in shards")
        for i, fault in faults.items():
            self.index.faults[i] = self.index.faults[i] or fault

    def read(self, index: int) -> bytes:
        shard = int(np.searchsorted(self.ends, index, side="right"))
        return self.shards[shard].encoded(index - int(self.ends[shard]) + len(self.shards[shard]))

    def _open(self, known: tuple[str, str]) -> TarShard:
        url, stamp = known
        path = Path(url)
        if not is_local(url):
            assert self._copies is not None
            path = self._copies.get(url, stamp, lambda part: copy_file(url, part))
        kept = None if self._kept is None else self._kept / f"{digest_of(url, stamp)}.members"
        return TarShard(path, url, self.config, kept)
