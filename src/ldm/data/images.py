"""Decoding that never lies: what a person sees in the file is what the network gets.

H W pixels.
"""

import io
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
    white), transparency shows `background`, an animation gives its first frame.

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
        image = ImageOps.exif_transpose(image)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"not a readable picture: {error}") from error
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image, dtype=np.float64)
        # 16-bit files fill [0, 65535]; wider integers and floats are stretched from their own range
        low, high = (0.0, 65535.0) if grey.min() >= 0 and grey.max() <= 65535 else (grey.min(), grey.max())
        image = Image.fromarray(np.round((grey - low) / max(high - low, 1e-12) * 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(canvas, image)
    return np.asarray(image.convert("RGB"))


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
    return np.asarray(ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS))


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
