"""A folder of safetensors files that any number of processes fill together, and in which damage is found.

A file holds one tensor, and its name ends in the digest of its bytes: it tells by itself whether it is whole. Each is
written by one process, the one that holds the lock of its name, to a temporary file that is renamed when it is on the
disk. The manifest, written last, names them all. Killed at any moment, whole files stay and nothing else counts.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ldm.errors import UserError
from ldm.progress import Advance, progress

MANIFEST = "manifest.json"
TENSOR = "rows"
LOCKS = ".locks"
CHECKERS = 4


@dataclass(frozen=True)
class Shard:
    """One file: some rows of a table.

    Args:
        name: of the file, less its digest.
        table: of the table.
        begin: its first row there.
        shape: of its tensor, rows first.
        dtype: of its tensor.
    """

    name: str
    table: str
    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of its tensor in bytes."""
        return prod(self.shape) * self.dtype.itemsize


class CacheFolder:
    """The files of a cache.

    Args:
        folder: of this cache alone; it need not be there yet.
        shards: all that belong into it.
        remedy: what to do where there is no room for them, the end of a sentence.

    Attributes:
        paths: the file of each shard that is there and whole, by the shard's name.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], remedy: str) -> None:
        self.folder, self.shards, self.remedy = folder, shards, remedy
        files = sorted(folder.glob("*.safetensors"))
        with progress("checking the cache", len(files), "files") as advance, ThreadPoolExecutor(CHECKERS) as pool:
            whole = []
            for path, good in zip(files, pool.map(_is_whole, files), strict=True):
                whole += [path] if good else []
                advance()
        found = {_shard_name(path): path for path in whole}
        self.paths = {shard.name: found[shard.name] for shard in shards if shard.name in found}

    @property
    def missing(self) -> list[Shard]:
        """The shards that are not there, or damaged."""
        return [shard for shard in self.shards if shard.name not in self.paths]

    def check_space(self) -> None:
        """Find out before any work is done that what is missing does not fit.

        Raises:
            UserError: the disk has less room; the message gives both numbers.
        """
        wanted = sum(shard.nbytes for shard in self.missing)
        there = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        if wanted > free:
            raise UserError(
                f"the latent cache needs {wanted / 1e9:.2f} GB more in {self.folder}, and {free / 1e9:.2f} GB are free "
                f"there: {self.remedy}"
            )

    def fill(self, kind: Sequence[Shard], make: Callable[[Shard, Advance], Tensor], label: str, unit: str) -> int:
        """Make those of some shards that are missing, together with other processes that do the same.

        What another process is at is passed over, and waited for when there is nothing else left to do; if that
        process fails or dies, it is made here.

        Args:
            kind: shards of this folder.
            make: returns a shard's tensor, and says how many of `unit` are done meanwhile: as many as it has rows.
            label, unit: see `progress`.

        Returns:
            The number of rows made by this process.

        Raises:
            UserError: a file cannot be written.
        """
        made, passed_over = 0, []
        missing = [shard for shard in kind if shard.name not in self.paths]
        if not missing:
            return 0
        with progress(label, sum(shard.shape[0] for shard in missing), unit) as advance:
            for shard in missing:
                with self._lock(shard.name, wait=False) as mine:
                    if mine:
                        made += self._settle(shard, make, advance)
                    else:
                        passed_over.append(shard)
            if passed_over:
                print(f"  waiting for other processes, which encode the last {unit}: {self.folder}", flush=True)
            for shard in passed_over:
                with self._lock(shard.name, wait=True):
                    made += self._settle(shard, make, advance)
        return made

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write the manifest where it is not there, or not as it should be.

        Args:
            facts: JSON about the content, for who looks into the folder.
        """
        files = [self.paths[shard.name].name for shard in self.shards]
        content = (json.dumps({**facts, "files": files}, indent=1) + "\n").encode()
        path = self.folder / MANIFEST
        if not path.exists() or path.read_bytes() != content:
            with self._lock(MANIFEST, wait=True):
                self._write(path, content, self.folder / f".{MANIFEST}.tmp")

    def _settle(self, shard: Shard, make: Callable[[Shard, Advance], Tensor], advance: Advance) -> int:
        """Make a shard, holding its lock, unless another process was faster; return the number of rows made."""
        for path in self.folder.glob(f"{shard.name}-*.safetensors"):
            if _is_whole(path):
                self.paths[shard.name] = path
                advance(shard.shape[0])
                return 0
            print(f"  {path} is damaged and is made anew", flush=True)
            path.unlink()
        content = save({TENSOR: make(shard, advance)})
        path = self.folder / f"{shard.name}-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
        # Who holds the lock is the only one to write under this temporary name: what a killed process left is reused.
        self._write(path, content, self.folder / f".{shard.name}.tmp")
        self.paths[shard.name] = path
        return shard.shape[0]

    def _write(self, path: Path, content: bytes, temporary: Path) -> None:
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if not isinstance(error, OSError):
                raise
            reason = f"{self.folder} cannot be written: {error.strerror}"
            if error.errno in (ENOSPC, EDQUOT):
                wanted = sum(shard.nbytes for shard in self.missing)
                reason = f"no space is left for the latent cache in {self.folder}, {wanted / 1e9:.2f} GB are missing. "
                reason += f"What is written is kept, and the same command goes on from there: {self.remedy}"
            raise UserError(reason) from error

    @contextmanager
    def _lock(self, name: str, wait: bool) -> Iterator[bool]:
        """Hold a lock of this name; give False where another process holds it and is not waited for.

        It goes with the process that holds it, however that ends. The files stay: one that was removed could be
        locked by a process that had opened it before, and its successor of the same name by another.
        """
        try:
            (self.folder / LOCKS).mkdir(parents=True, exist_ok=True)
            file = (self.folder / LOCKS / name).open("w")
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written: {error.strerror}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            except OSError as error:
                raise UserError(f"{self.folder} is on a disk without file locks: {error.strerror}") from error
            yield True


def _shard_name(path: Path) -> str:
    return path.stem.rpartition("-")[0]


def _is_whole(path: Path) -> bool:
    """Tell whether a file's bytes are those that its name tells of; what cannot be read is not whole."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16] == path.stem.rpartition("-")[2]
    except OSError:
        return False
