"""Batches from a cache of moments and context that is whole: from its files, from RAM or from a device.

N pictures, V views of each, B batch, C latent channels, h w latents, L tokens, D width.
"""

import os
import re
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.cache_folder import TENSOR, CacheFolder
from ldm.data.cache_layout import Layout, Table
from ldm.data.order import Pick
from ldm.data.pictures import Pictures
from ldm.errors import UserError
from ldm.progress import progress

MEMORY_INFO = Path("/proc/meminfo")
MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
MEMORY_USED = Path("/sys/fs/cgroup/memory.current")


class CachedLatents(Dataset[dict[str, Tensor]]):
    """A cache; a batch is {"moments": (B, 2C, h, w), "context": (B, L, D)} in float32.

    Args:
        pictures: what was encoded.
        layout, folder: where it lies; all of it is there.
        memory: "disk" maps the files; a device holds all of it and gives batches there; "auto" holds it in RAM if it is
            no more than half of what is free, and otherwise maps the files.
        num_readers: processes of this machine that share the RAM, each with a copy of its own.

    Attributes:
        bucket_of: see `Pictures`.
        null_context: (1, L, D), of the null caption.
        nbytes: size of what is stored.
        folder: where it is stored.
        in_memory: whether it is held; then reading takes no time that a loader process could save.
        device: of its batches.

    Raises:
        UserError: the device has no room for it.
    """

    def __init__(
        self,
        pictures: Pictures,
        layout: Layout,
        folder: CacheFolder,
        memory: Literal["auto", "disk"] | torch.device = "auto",
        num_readers: int = 1,
    ) -> None:
        self.pictures, self.bucket_of, self.nbytes = pictures, pictures.bucket_of, layout.nbytes
        self.folder = folder.folder
        if memory == "auto":
            memory = torch.device("cpu") if layout.nbytes * num_readers <= available_memory() / 2 else "disk"
        self.in_memory = memory != "disk"
        self.device = memory if isinstance(memory, torch.device) else torch.device("cpu")
        self._num_variants = pictures.num_variants
        self._table_of, self._row_of = layout.table_of, layout.row_of
        self._first_caption, self._caption_rows = layout.first_caption, layout.caption_rows
        self._context = Rows(layout.context, layout.context.row_shape, folder)
        self._moments = [Rows(table, table.row_shape[1:], folder) for table in layout.moments]
        if self.in_memory:
            self._hold()
        self.null_context = self._context.take(np.zeros(1, np.int64))

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitems__(self, picks: Sequence[Pick]) -> dict[str, Tensor]:
        """Return what picks, (index, epoch), stand for; all of one view size.

        Raises:
            ValueError: the views differ in size.
            UserError: a file of the cache has been taken away or changed meanwhile.
        """
        indices, epochs = np.asarray(picks, np.int64).T
        tables = self._table_of[indices]
        if (tables != tables[0]).any():
            raise ValueError(f"pictures {indices.tolist()} are of more than one size and make no batch")
        variants = self.pictures.variant_numbers(indices, epochs, modulo=self._num_variants)
        captions = self._first_caption[indices] + self.pictures.caption_numbers(indices, epochs)
        return {
            "moments": self._moments[tables[0]].take(self._row_of[indices] * self._num_variants + variants),
            "context": self._context.take(self._caption_rows[captions]),
        }

    def _hold(self) -> None:
        tables = (self._context, *self._moments)
        try:
            with progress("reading the cache into memory", sum(len(rows.paths) for rows in tables), "files") as advance:
                for rows in tables:
                    rows.hold(self.device)
                    advance(len(rows.paths))
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the latent cache of {self.nbytes / 1e9:.2f} GB does not fit into the memory of {self.device}: "
                "data.cache_on_device=false, or store less (data.cache_dtype=bf16)"
            ) from error


class Rows:
    """The rows of a table: mapped from its files, or held as one tensor.

    Args:
        table: which one.
        row_shape: of a row as it is read: each row of the table is one of these, or several in a stack.
        folder: where its files are.
    """

    def __init__(self, table: Table, row_shape: tuple[int, ...], folder: CacheFolder) -> None:
        self.paths = [folder.paths[shard.name] for shard in table.shards]
        self._shapes = {folder.paths[shard.name]: shard.shape for shard in table.shards}
        self.row_shape, self.dtype = row_shape, table.dtype
        stacked = prod(table.row_shape) // prod(row_shape)
        self.num_rows, self.rows_per_part = table.num_rows * stacked, table.rows_per_shard * stacked
        self.parts: list[Tensor] = []
        self.held = False

    def __getstate__(self) -> dict[str, Any]:
        # A process that is sent this maps the files itself: sent along, they would be copied into shared memory.
        return self.__dict__ if self.held else {**self.__dict__, "parts": []}

    def hold(self, device: torch.device) -> None:
        """Read all rows into one tensor on a device."""
        rows = torch.empty((self.num_rows, *self.row_shape), dtype=self.dtype, device=device)
        for begin, path in zip(range(0, self.num_rows, self.rows_per_part), self.paths, strict=True):
            rows[begin : begin + self.rows_per_part] = self._mapped(path)
        self.parts, self.rows_per_part, self.held = [rows], self.num_rows, True

    def take(self, numbers: NDArray[np.int64]) -> Tensor:
        """Return the rows of these numbers in float32, a tensor of its own."""
        self.parts = self.parts or [self._mapped(path) for path in self.paths]
        if len(self.parts) == 1:
            index = torch.from_numpy(numbers).to(self.parts[0].device)
            return self.parts[0].index_select(0, index).float()
        places = [divmod(number, self.rows_per_part) for number in numbers.tolist()]
        return torch.stack([self.parts[part][row] for part, row in places]).float()

    def _mapped(self, path: Path) -> Tensor:
        try:
            rows = load_file(path)[TENSOR]
            if rows.shape != self._shapes[path] or rows.dtype != self.dtype:
                raise ValueError(f"it holds {tuple(rows.shape)} in {rows.dtype}. Remove it")
            return rows.view(-1, *self.row_shape)
        except Exception as error:  # one of safetensors' cannot be pickled, and would hang a loader process
            raise UserError(f"{path} cannot be read any more, the same command makes it anew: {error}") from None


def available_memory() -> int:
    """Return how many bytes of RAM this process could still take, as far as the system and its container tell."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", MEMORY_INFO.read_text()) if MEMORY_INFO.exists() else None
    available = int(found[1]) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, used = (path.read_text().strip() if path.exists() else "max" for path in (MEMORY_LIMIT, MEMORY_USED))
    return available if "max" in (limit, used) else min(available, int(limit) - int(used))
