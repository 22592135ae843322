"""Which row of which file of a cache holds a view of a picture, or the context of a caption: known before any is made.

N pictures, V views of each, C latent channels, W H pixels, h w latents, L tokens, D width.
"""

import hashlib
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray

from ldm.conditioner import NULL_CAPTION, Conditioner
from ldm.data.cache_folder import Shard
from ldm.data.pictures import Pictures
from ldm.nn.autoencoder import AutoencoderKL

SHARD_ROWS = 256
SHARD_BYTES = 2**28


@dataclass(frozen=True)
class Table:
    """Rows of one shape, cut into shards.

    Args:
        name: `context`, or `moments-` and the size of the views.
        num_rows: captions or pictures in it.
        row_shape: (L, D), or (V, 2C, h, w).
        dtype: of what is stored.
    """

    name: str
    num_rows: int
    row_shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def rows_per_shard(self) -> int:
        """As many as are no more than SHARD_BYTES; the last shard may have fewer."""
        return max(1, min(SHARD_ROWS, SHARD_BYTES // (prod(self.row_shape) * self.dtype.itemsize)))

    @property
    def shards(self) -> list[Shard]:
        """The files, in the order of their rows."""
        step = self.rows_per_shard
        return [
            Shard(
                f"{self.name}-{i:05d}",
                self.name,
                begin,
                (min(step, self.num_rows - begin), *self.row_shape),
                self.dtype,
            )
            for i, begin in enumerate(range(0, self.num_rows, step))
        ]


class Layout:
    """The tables of a set: moments of pictures by the size of their views, and context of unique captions.

    Attributes:
        context: table of the captions `texts`; the first is the null caption.
        moments: tables of the pictures `members`, each in ascending order.
        table_of, row_of: (N,) where a picture lies in `moments`.
        first_caption: (N,) where a picture's captions begin in `caption_rows`, which are rows of `context`.
    """

    def __init__(self, pictures: Pictures, vae: AutoencoderKL, conditioner: Conditioner, dtype: torch.dtype) -> None:
        captions = pictures.captions
        rows: dict[str, int] = {NULL_CAPTION: 0}
        self.caption_rows = np.array([rows.setdefault(text, len(rows)) for texts in captions for text in texts])
        counts = np.fromiter(map(len, captions), np.int64, len(captions))
        self.first_caption: NDArray[np.int64] = np.cumsum(counts) - counts
        self.texts = list(rows)
        width = conditioner.text_tower.config["hidden_size"]
        self.context = Table("context", len(rows), (conditioner.max_length, width), dtype)

        sizes, self.table_of = np.unique(pictures.view_sizes, axis=0, return_inverse=True)
        self.members = [np.flatnonzero(self.table_of == table) for table in range(len(sizes))]
        self.row_of = np.empty(len(pictures), np.int64)
        for members in self.members:
            self.row_of[members] = np.arange(len(members))
        channels, factor = 2 * vae.config["latent_channels"], vae.downscale_factor
        self.sizes: list[tuple[int, int]] = [(w, h) for w, h in sizes.tolist()]
        self.moments = [
            Table(f"moments-{w}x{h}", len(members), (pictures.num_variants, channels, h // factor, w // factor), dtype)
            for (w, h), members in zip(self.sizes, self.members, strict=True)
        ]

    @property
    def shards(self) -> list[Shard]:
        """All files."""
        return [shard for table in (self.context, *self.moments) for shard in table.shards]

    @property
    def nbytes(self) -> int:
        """Size of all that is stored, in bytes."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def digest(self) -> str:
        """Hex; another one where anything lies elsewhere."""
        digest = hashlib.sha256(repr(self.shards).encode())
        for numbers in (self.table_of, self.caption_rows, self.first_caption):
            digest.update(np.ascontiguousarray(numbers, np.int64).tobytes())
        return digest.hexdigest()
