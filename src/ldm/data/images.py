"""Decoding that never lies: what a person sees in the file is what the network gets.

B batch, H W pixels, C channels: 1 grey, 3 RGB, 4 RGBA.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from ldm.errors import UserError

Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int]

WHITE: Colour = (255, 255, 255)
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Said here once and for all, since filters are not a thread's own: the limit is checked, with a reason.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
MOST_PIXELS = 89_478_485  # where Pillow begins to warn: a picture of so many takes a gigabyte on its way

# The common ones first, the rest is imported when the first of them is met. Not EPS and its like, which start another
# program, nor formats without a signature, which take any bytes for a picture.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "AVIF", "TIFF", "JPEG2000", "ICO", "PSD", "DDS", "QOI")

# What people find in place of a picture: how it begins, and what to tell them.
NO_PICTURES = {
    (b"<!doctype html", b"<html", b"<head"): "an HTML page saved as a picture; download the picture itself",
    (b"<svg", b"<?xml"): "an SVG drawing or other XML, which holds no pixels; export it as PNG",
    (b"%!ps", b"%pdf"): "PostScript or PDF, which hold no pixels; export it as PNG",
    (b"version https://git-lfs",): "a Git LFS pointer in place of the picture; run `git lfs pull`",
}

# EXIF's orientation: how to turn what is stored into what is seen.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Examined(NamedTuple):
    """What `examine` finds: size in pixels as seen, and 64 bits, most of them equal in pictures that look alike."""

    width: int
    height: int
    likeness: int


def decode(
    encoded: bytes | str | Path | Image.Image, background: Colour = WHITE, channels: int = 3, at_least: int = 0
) -> Pixels:
    """Decode a picture as it is meant to be seen.

    EXIF's orientation is applied, colours come out in sRGB whatever profile they are stored in (a damaged profile is
    passed over), 16-bit and float greys are scaled to 8 bits (Pillow's own conversion clips them to white or black),
    an animation gives its first frame.

    Args:
        encoded: the file's bytes, its path, or an opened picture.
        background: RGB seen through transparent pixels.
        channels: 1 for luminance, 3 for RGB, 4 for RGBA, which keeps transparency and does not show the background.
        at_least: pixels; a JPEG may come out at 1/2, 1/4 or 1/8 of its size as long as no side is below this, in less
            time. 0 decodes whole pictures.

    Returns:
        (H, W, channels) uint8.

    Raises:
        UserError: not a picture, truncated, or of a size that could exhaust memory. The message is the reason alone:
            which file it is, the caller knows.
        ValueError: `channels` is none of 1, 3 and 4.
    """
    if channels not in MODES:
        raise ValueError(f"channels={channels}: pictures have 1 (grey), 3 (RGB) or 4 (RGBA)")
    with _told_as_faults():
        image = _open(encoded)
        if at_least:
            image.draft(None, (at_least, at_least))
        return _from_pil(_as_seen(image, channels, background))


def examine(encoded: bytes) -> Examined:
    """Read a whole picture, as cheaply as finds every fault that `decode` would raise on.

    Returns:
        Its size as seen, and its likeness: the bits say whether grey rises between neighbours, from left to right, of
        8 rows of 9 cells. Few bits differ between copies of one picture in other sizes and formats.

    Raises:
        UserError: as `decode` does.
    """
    with _told_as_faults():
        image = _open(encoded)
        width, height = image.size
        drafted = image.draft("L", (16, 16)) is not None  # only JPEGs are
        grey = _as_seen(image, 1, WHITE)
        if not drafted:
            width, height = grey.size
        elif _orientation(image) in (5, 6, 7, 8):
            width, height = height, width
        cells = np.asarray(grey.resize((9, 8), Image.Resampling.BOX))
    rises = np.packbits(cells[:, 1:] > cells[:, :-1])
    return Examined(width, height, int.from_bytes(rises.tobytes()))


@contextmanager
def _told_as_faults() -> Iterator[None]:
    """Turn whatever Pillow and its codecs raise, a dozen kinds for one cause, into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        told = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"not a readable picture: {told}") from error


def _open(encoded: bytes | str | Path | Image.Image) -> Image.Image:
    """Open a picture without decoding it."""
    if isinstance(encoded, Image.Image):
        image = encoded
    else:
        data = encoded if isinstance(encoded, bytes) else Path(encoded).read_bytes()
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError as error:
            raise UserError(f"not a picture: {_what_else(data)}") from error
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise UserError(
            f"not a readable picture: {width}x{height} are {width * height:,} pixels, and more than {MOST_PIXELS:,} "
            "may be a decompression bomb; if it is none, scale it down"
        )
    return image


def _what_else(data: bytes) -> str:
    if not data:
        return "the file is empty, 0 bytes"
    if data[4:11] in (b"ftyphei", b"ftyphev", b"ftypmif"):
        return "HEIC, which Pillow does not read; convert it to JPEG or PNG"
    start = data[:256].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    found = (told for beginnings, told in NO_PICTURES.items() if start.startswith(beginnings))
    return next(found, "of no known format, or damaged in its first bytes")


def _orientation(image: Image.Image) -> Any:
    with suppress(Exception):  # damaged EXIF says nothing about rotation; the picture is as good as without
        return image.getexif().get(ExifTags.Base.Orientation)
    return None


def _as_seen(image: Image.Image, channels: int, background: Colour) -> Image.Image:
    """Load a picture, turn it, and bring it to the mode that has so many channels."""
    image.load()
    profile = image.info.get("icc_profile")
    if (turn := TURNS.get(_orientation(image))) is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I") or image.mode == "F":
        image = _in_8_bits(image)
    base, alpha = ("L" if image.mode in ("1", "L", "LA") else "RGB"), None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert(base)
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert(base)
    if profile and (transform := _to_srgb(profile, image.mode)):
        image = transform.apply(image)
    if image.mode == "CMYK":
        image = image.convert("RGB")
    if channels == 4:
        image = image.convert("RGB")
        image.putalpha(255 if alpha is None else alpha)
    elif alpha is not None:
        over = Image.new("RGB", image.size, background)
        over.paste(image.convert("RGB"), mask=alpha)
        image = over
    mode = MODES[channels]
    return image if image.mode == mode else image.convert(mode)


def _in_8_bits(image: Image.Image) -> Image.Image:
    grey = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
    # 16-bit files fill [0, 65535] and float ones [0, 1]; what leaves that is stretched from its own range
    top = 1.0 if image.mode == "F" else 65535.0
    low, high = (0.0, top) if grey.min() >= 0 and grey.max() <= top else (grey.min(), grey.max())
    found = Image.fromarray(np.round((grey - low) / (high - low or 1) * 255).astype(np.uint8))
    if isinstance(clear := image.info.get("transparency"), int):  # this grey is transparent
        found.putalpha(Image.fromarray(np.where(grey == clear, 0, 255).astype(np.uint8)))
    return found


@lru_cache(maxsize=32)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return what turns colours of a profile into sRGB; None where they are sRGB, or the profile is of no use."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode == "CMYK":
            return transform
        # There are dozens of profiles that say sRGB in other words: ask what it does to 16 x 16 x 16 colours.
        levels = np.arange(0, 256, 17, dtype=np.uint8)
        colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(64, 64, 3)
        given = Image.fromarray(colours).convert(mode)
        changes = np.asarray(transform.apply(given), dtype=int) - np.asarray(given.convert("RGB"), dtype=int)
        return transform if np.abs(changes).max() > 2 else None
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None


def _from_pil(image: Image.Image) -> Pixels:
    pixels = np.array(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def to_pil(pixels: Pixels) -> Image.Image:
    """Turn (H, W, C) uint8 into a picture of mode L, RGB or RGBA."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def to_channels(pixels: Pixels, channels: int, background: Colour = WHITE) -> Pixels:
    """Give a picture that was drawn, not decoded, another number of channels, as `decode` does.

    Args:
        pixels: (H, W, C) uint8 in sRGB.
        channels: 1, 3 or 4.
        background: RGB seen through transparent pixels where the result has no alpha.

    Returns:
        (H, W, channels) uint8; `pixels` itself where it has as many.
    """
    if pixels.shape[-1] == channels:
        return pixels
    return decode(to_pil(pixels), background, channels)


def scale_and_crop(
    pixels: Pixels, width: int, height: int, place: tuple[float, float] = (0.5, 0.5), mirrored: bool = False
) -> Pixels:
    """Scale to cover (antialiased Lanczos) and cut, in one step: nothing is distorted, no side is filled up.

    Args:
        pixels: (H, W, C) uint8. With alpha, transparent pixels do not shine into their neighbours.
        width, height: of the result.
        place: where the cut lies along x and along y: 0 is left or top, 1 right or bottom.
        mirrored: turn left and right of what was cut.

    Returns:
        (height, width, C) uint8; `pixels` itself where there is nothing to do.
    """
    if (old := pixels.shape[:2]) != (height, width):
        left, top = ((old[1] - width) * place[0], (old[0] - height) * place[1])
        if min(old[1] - width, old[0] - height) == 0 and min(left, top) >= 0 and left % 1 == top % 1 == 0:
            pixels = pixels[int(top) : int(top) + height, int(left) : int(left) + width]  # whole pixels: no scaling
        else:
            pixels = _from_pil(ImageOps.fit(to_pil(pixels), (width, height), Image.Resampling.LANCZOS, centering=place))
    return np.ascontiguousarray(pixels[:, ::-1] if mirrored else pixels)


def to_tensor(pixels: Pixels) -> Tensor:
    """Turn (B, H, W, C) or (H, W, C) uint8 into float32 channels-first `image` in [-1, 1]."""
    scaled = np.divide(pixels, np.float32(127.5), dtype=np.float32)
    scaled -= 1
    return torch.from_numpy(scaled).movedim(-1, -3)


def to_pixels(image: Tensor) -> Pixels:
    """Turn (..., C, H, W) `image` in [-1, 1] into uint8 channels-last pixels, values outside clamped.

    >>> to_pixels(torch.tensor([-1.0, 0.0, 2.0]).reshape(3, 1, 1)).tolist()
    [[[0, 128, 255]]]
    """
    scaled: Any = image.detach().float().add(1).mul(127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).movedim(-3, -1).cpu().numpy()
