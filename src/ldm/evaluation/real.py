"""The real pictures of a run: its training and its held-out split, opened as the run opened them.

N pictures, C channels, H W pixels.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ldm.config import CustomData, CustomSection, Data, MixData, ShapesData
from ldm.data.images import Pixels, to_channels, to_pixels
from ldm.data.pictures import Pictures
from ldm.data.sources import Subset, known, open_sources
from ldm.errors import UserError


class RealPictures:
    """A split of the pictures that a run was trained on, as squares of its resolution.

    Args:
        source: whose pictures.
        resolution: side in pixels.
        background: RGB that is seen through transparent pixels.
    """

    def __init__(self, source: Any, resolution: int, background: tuple[int, int, int]) -> None:
        self.views = Pictures(source, resolution, fixed=True)
        self.background = background

    def __len__(self) -> int:
        return len(self.views)

    @property
    def captions(self) -> Sequence[Sequence[str]]:
        return self.views.captions

    def images(self, indices: Any) -> Tensor:
        """Return (N, C, H, W) in [-1, 1], as the VAE sees them."""
        return self.views.images(indices)

    def rgb(self, indices: Any) -> Pixels:
        """Return (N, H, W, 3) uint8, as a person sees them."""
        return to_rgb(to_pixels(self.images(indices)), self.background)

    def name(self, index: int) -> str | int:
        """Return what a person calls a picture: its file, or its number."""
        return index if self._known is None else self._known.names[index]

    @cached_property
    def _known(self) -> Any:
        return known(self.views.source)


def open_real(data: Data, channels: int, cache: Path | None, num: int) -> dict[str, RealPictures]:
    """Open the splits of a run.

    Args:
        data: the run's config of it.
        channels: C, as the VAE sees them.
        cache: folder with what was found out about the set; None has it found out again.
        num: held-out pictures of the built-in world, which has no end of them.

    Returns:
        "train", "val" whose captions are the prompts, and "fresh": of the built-in world as many other held-out
        pictures, of other sets "val" again.

    Raises:
        UserError: the pictures cannot be had, or come out of code.
    """
    parts = data.sources.values() if isinstance(data, MixData) else [data]
    if any(isinstance(part, CustomData | CustomSection) for part in parts):
        raise UserError(
            "the run was trained on data=custom, whose pictures come out of code that its config.yaml names: that file "
            "is read as data, and nothing in it is run; keep the pictures in a folder to train on them and to compare"
        )
    if isinstance(data, ShapesData):
        data = data.model_copy(update={"num_val": 2 * num})
    sources = open_sources(data, channels, cache)
    train, val = (RealPictures(source, data.resolution, data.background) for source in sources)
    if not isinstance(data, ShapesData):
        return {"train": train, "val": val, "fresh": val}
    parts_of_val = (Subset(sources[1], part) for part in np.split(np.arange(2 * num), 2))  # type: ignore[arg-type]
    first, second = (RealPictures(part, data.resolution, data.background) for part in parts_of_val)
    return {"train": train, "val": first, "fresh": second}


def to_rgb(pictures: Pixels, background: tuple[int, int, int]) -> Pixels:
    """Show (N, H, W, C) pictures as a person sees them: grey as grey, alpha over the background; (N, H, W, 3)."""
    if pictures.shape[-1] == 3:
        return pictures
    return np.stack([to_channels(picture, 3, background) for picture in pictures])
