"""A source's pictures as the model sees them: scaled, cut to size, mirrored or not, each with one of its captions.

What the model sees of a picture is one of its numbered views. View 0 is the centre as it is; odd ones are mirrored
where that is asked for and changes nothing a caption says; where crops are random each but view 0 has its own place.

N pictures, B batch, C channels, H W pixels.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.buckets import Buckets
from ldm.data.captions import says_side
from ldm.data.images import Pixels, scale_and_crop, to_tensor
from ldm.data.order import Pick, draws
from ldm.data.sources import Source

CAPTION, VARIANT, PLACE = range(3)  # salts of draws


class Pictures(Dataset[dict[str, Any]]):
    """A dataset of views; a batch is {"image": (B, C, H, W) in [-1, 1], "caption": list[str]}.

    Args:
        source: pictures and captions.
        resolution: side of the views, pixels; with buckets, of the square one.
        seed: decides captions, views and places.
        buckets: shapes of views; None cuts all to squares.
        crop: "centre", or "random": somewhere along the side that is too long.
        flip: mirror odd views, unless a caption of the picture says left or right.
        variants: how many views a cache keeps of each picture where crops are random; 1 counts as 2.
        fixed: always show view 0 and the first caption, as for validation.
    """

    def __init__(
        self,
        source: Source,
        resolution: int,
        seed: int = 0,
        buckets: Buckets | None = None,
        crop: Literal["centre", "random"] = "centre",
        flip: bool = False,
        variants: int = 1,
        fixed: bool = False,
    ) -> None:
        self.source, self.resolution, self.seed, self.buckets = source, resolution, seed, buckets
        self.crop, self.flip, self.variants, self.fixed = crop, flip, variants, fixed

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, picks: Sequence[Pick]) -> dict[str, Any]:
        """Return the views and captions that picks, (index, epoch), stand for; all of one size.

        Raises:
            ValueError: the views differ in size.
        """
        indices, epochs = np.asarray(picks).T
        image, captions = self._views(indices, self.variant_numbers(indices, epochs))
        chosen = self._draw(indices, epochs, CAPTION).tolist()
        return {"image": image, "caption": [texts[i % len(texts)] for texts, i in zip(captions, chosen, strict=True)]}

    def images(self, indices: ArrayLike, variant: ArrayLike = 0) -> Tensor:
        """Return (B, C, H, W) in [-1, 1]: of each picture the view of that number; all of one size.

        Raises:
            ValueError: the views differ in size.
        """
        return self._views(np.asarray(indices), np.asarray(variant))[0]

    @cached_property
    def captions(self) -> Sequence[Sequence[str]]:
        """All captions of each picture."""
        return self.source.captions()

    @cached_property
    def view_sizes(self) -> NDArray[np.int32]:
        """(N, 2): W, H of each picture as the model sees it."""
        if self.buckets is None:
            return np.full((len(self), 2), self.resolution, dtype=np.int32)
        return self.buckets.sizes[self.bucket_of]

    @cached_property
    def bucket_of(self) -> NDArray[np.int64] | None:
        """(N,): the bucket of each picture, None where all have one size."""
        return self.buckets.assign(self.source.sizes()) if self.buckets is not None else None

    @property
    def num_variants(self) -> int:
        """How many views a cache keeps of each picture."""
        if self.fixed or (self.crop == "centre" and not self.flip):
            return 1
        if self.crop == "centre":
            return 2
        num = max(self.variants, 2)
        return num + num % 2 if self.flip else num  # half of them are mirrored

    @property
    def transform(self) -> dict[str, Any]:
        """All that decides the views besides the source, as JSON."""
        return {
            "resolution": self.resolution,
            "buckets": self.buckets.sizes.tolist() if self.buckets is not None else None,
            "crop": self.crop,
            "flip": self.flip,
            "variants": self.num_variants,
            "seed": self.seed if self.crop == "random" else None,
        }

    def caption_numbers(self, indices: ArrayLike, epochs: ArrayLike) -> NDArray[np.int64]:
        """Draw which of its captions each picture has in an epoch: (B,) of (B,) and (B,)."""
        numbers = self._draw(indices, epochs, CAPTION)
        return numbers if self.fixed else numbers % self._num_captions[np.asarray(indices)]

    def variant_numbers(self, indices: ArrayLike, epochs: ArrayLike, modulo: int | None = None) -> NDArray[np.int64]:
        """Draw which view is seen of each picture in an epoch: (B,) of (B,) and (B,).

        Args:
            indices, epochs: of the picks.
            modulo: how many views there are to choose from; None means no end of them.
        """
        return self._draw(indices, epochs, VARIANT) % (modulo or 2**31)

    @cached_property
    def _num_captions(self) -> NDArray[np.int64]:
        return np.array([len(texts) for texts in self.captions])

    def _draw(self, indices: ArrayLike, epochs: ArrayLike, salt: int) -> NDArray[np.int64]:
        if self.fixed:
            return np.zeros(np.shape(indices), dtype=np.int64)
        return (draws(self.seed, epochs, indices, salt) >> np.uint64(1)).astype(np.int64)

    def _views(self, indices: NDArray[np.int64], variants: NDArray[np.int64]) -> tuple[Tensor, list[Sequence[str]]]:
        """Return the views, and all captions of each picture."""
        width, height = self._view_size(indices)
        variants = np.broadcast_to(variants, indices.shape)
        places = zip(*(axis.tolist() for axis in self._places(indices, variants)), strict=True)
        mirrored = ((variants % 2 == 1) & self.flip).tolist()
        pixels: list[Pixels] = []
        captions: list[Sequence[str]] = []
        for index, place, mirror in zip(indices.tolist(), places, mirrored, strict=True):
            row = self.source[index]
            mirror = mirror and not any(map(says_side, row["captions"]))
            pixels.append(scale_and_crop(row["image"], width, height, place, mirror))
            captions.append(row["captions"])
        return to_tensor(np.stack(pixels)), captions

    def _view_size(self, indices: NDArray[np.int64]) -> tuple[int, int]:
        if self.buckets is None:
            return self.resolution, self.resolution
        sizes = self.view_sizes[indices]
        if (sizes != sizes[0]).any():
            raise ValueError(f"views of different sizes in one batch: {np.unique(sizes, axis=0).tolist()}")
        return int(sizes[0, 0]), int(sizes[0, 1])

    def _places(
        self, indices: NDArray[np.int64], variants: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return where the cuts lie: (B,) x and (B,) y in [0, 1]."""
        if self.crop == "centre":
            centre = np.full(indices.shape, 0.5)
            return centre, centre
        bits = draws(self.seed, variants, indices, PLACE)
        x, y = ((half % np.uint64(2**32)) / 2**32 for half in (bits, bits >> np.uint64(32)))
        return np.where(variants == 0, 0.5, x), np.where(variants == 0, 0.5, y)
