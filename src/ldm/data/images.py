"""Decoding that never lies: what a person sees in the file is what the network gets.

H W pixels.
"""

import io
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ldm.errors import UserError

Pixels = NDArray[np.uint8]


def decode(encoded: bytes | str | Path | Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Pixels:
    """Decode a picture to RGB as it is meant to be seen.

    EXIF rotation is applied, 16-bit and float greys are scaled to 8 bits (Pillow's own conversion clips them to
    white or black), transparency shows `background`, an animation gives its first frame.

    Args:
        encoded: the file's bytes, its path, or an opened picture.
        background: RGB seen through transparent pixels.

    Returns:
        (H, W, 3) uint8.

    Raises:
        UserError: not a picture, truncated, or of a size that could exhaust memory.
    """
    try:
        if isinstance(encoded, Image.Image):
            image = encoded
        else:
            image = Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded)
        image.load()
        with suppress(Exception):  # damaged EXIF says nothing about rotation; the picture is as good as without
            image = ImageOps.exif_transpose(image)
        return np.array(_to_rgb(image, background))
    except UnidentifiedImageError as error:
        raise UserError("not a picture: empty, or of no known format") from error
    except Exception as error:  # Pillow and its codecs raise a dozen kinds for one cause
        raise UserError(f"not a readable picture: {error}") from error


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
        # 16-bit files fill [0, 65535] and float ones [0, 1]; what leaves that is stretched from its own range
        top = 1.0 if image.mode == "F" else 65535.0
        low, high = (0.0, top) if grey.min() >= 0 and grey.max() <= top else (grey.min(), grey.max())
        image = Image.fromarray(np.round((grey - low) / (high - low or 1) * 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    return image.convert("RGB")


def resize_and_crop(pixels: Pixels, resolution: int) -> Pixels:
    """Scale the shorter side to `resolution` (antialiased Lanczos) and cut the centre square.

    Args:
        pixels: (H, W, 3) uint8.
        resolution: side of the result, pixels.

    Returns:
        (resolution, resolution, 3) uint8.
    """
    if pixels.shape[:2] == (resolution, resolution):
        return pixels
    image = Image.fromarray(pixels)
    return np.array(ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS))


def to_tensor(pixels: Pixels) -> Tensor:
    """Turn (B, H, W, C) or (H, W, C) uint8 into float32 channels-first `image` in [-1, 1]."""
    tensor = torch.from_numpy(np.ascontiguousarray(pixels)).movedim(-1, -3)
    return tensor.to(torch.float32).div_(127.5).sub_(1)


def to_pixels(image: Tensor) -> Pixels:
    """Turn (..., C, H, W) `image` in [-1, 1] into uint8 channels-last pixels, values outside clamped.

    >>> to_pixels(torch.tensor([-1.0, 0.0, 2.0]).reshape(3, 1, 1)).tolist()
    [[[0, 128, 255]]]
    """
    scaled: Any = image.detach().float().add(1).mul(127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).movedim(-3, -1).cpu().numpy()
