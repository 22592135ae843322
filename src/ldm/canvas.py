"""What img2img, inpainting and outpainting draw upon: pixels in, tensors out.

H W pixels, C channels of a picture, h w latents.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import reduce
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from ldm.data.images import WHITE, Colour, Pixels, decode, scale_and_crop, to_channels, to_pil, to_tensor
from ldm.errors import UserError

Picture = str | Path | bytes | Image.Image | Pixels
Mask = NDArray[np.float32]
SIDES = ("left", "top", "right", "bottom")


@dataclass(frozen=True, eq=False)
class Canvas:
    """The picture that is drawn upon, and where.

    Attributes:
        pixels: (H, W, C) uint8, the input picture in its place; what outpainting adds repeats the picture's edge.
        mask: (H, W) in [0, 1]; 1 is repainted, 0 is kept. None: all of it is drawn (img2img).
    """

    pixels: Pixels
    mask: Mask | None


def make_canvas(
    init_image: Picture,
    mask: Picture | None = None,
    *,
    height: int | None,
    width: int | None,
    factor: int,
    default_size: int,
    outpaint: str | None = None,
    mask_blur: int = 0,
    channels: int = 3,
) -> Canvas:
    """Read a picture and a mask, bring them to a size that the model draws, and grow them for outpainting.

    Reading: see `ldm.data.images.decode`. A mask counts by its grey value: white is repainted, black is kept, greys
    are blended. Transparent pixels of a mask are white, as they are in pictures; where that would leave nothing but
    white (white strokes on a transparent layer) they are black.

    Size, of the picture before outpainting:

    - `height` and `width`: the picture is scaled to cover them and its centre is cut out; nothing is distorted.
    - one of them: the other follows from the picture's proportions, rounded to a multiple of `factor`.
    - neither: the picture is not scaled but cut at its edges to multiples of `factor`, so that what the mask keeps
      is kept to the bit. With `outpaint` it is not even cut.

    The mask goes the same way. It may be of another size than the picture if it has its proportions.

    Outpainting: the canvas grows by so many pixels, all of which are repainted. With a mask, what it says about the
    picture holds as well.

    Edges: `mask_blur` softens the mask on its white side only: each pixel is multiplied by min(1, d / mask_blur), with
    d its distance from the border to black in pixels. Black stays black; stripes thinner than 2 · mask_blur are
    nowhere wholly white. For outpainting the white first grows into the picture by `mask_blur`: all that is new is
    drawn fully, and the soft edge lies on the picture.

    Args:
        init_image: path, the file's bytes, a PIL picture, or a uint8 array (H, W) or (H, W, C), C 1, 3 or 4.
        mask: the same; None repaints everything, or with `outpaint` what is new.
        height, width: pixels, multiples of `factor`.
        factor: heights and widths that the model draws are multiples of it.
        default_size: side in pixels of the pictures that the model was trained on.
        outpaint: pixels to add on each side, see `parse_outpaint`.
        mask_blur: pixels; without a border between black and white it changes nothing.
        channels: C of the picture that the model takes: 1, 3 or 4.

    Raises:
        UserError: a picture cannot be read; the mask has other proportions or nothing white; a size is no multiple of
            `factor`; no size is given and the picture's own is far from `default_size`; `outpaint` is not understood.
    """
    if mask_blur < 0:
        raise UserError(f"mask_blur={mask_blur}: the soft edge of a mask is 0 pixels wide or more")
    added = None if outpaint is None else parse_outpaint(outpaint)
    pixels = read(init_image, "init_image", channels)
    grey = None if mask is None else read_mask(mask, pixels.shape[:2])

    if height is not None or width is not None:
        size = wanted_size(pixels.shape[:2], height, width, factor)
        pixels = scale_and_crop(pixels, size[1], size[0])
        grey = None if grey is None else fit_mask(grey, size)
    else:
        size = own_size(pixels.shape[:2], factor, default_size, name_of(init_image, "init_image"), added is not None)
        pixels = cut(pixels, size)
        grey = None if grey is None else cut(grey, size)

    weights: Mask | None = None if grey is None else grey.astype(np.float32) / np.float32(255)
    if added is not None:
        pixels, weights = grow(pixels, weights, added, factor, mask_blur)
    elif mask is not None and weights is not None and not weights.any():
        raise UserError(f"{name_of(mask, 'mask')}: the picture is cut to {in_words(size)}, and nothing white is in it")
    if weights is not None and mask_blur:
        weights = soften(weights, mask_blur)
    return Canvas(pixels, weights)


def latent_mask(mask: Mask, downscale: int) -> Tensor:
    """Turn a mask of pixels (H, W) into one of latents: a cell is repainted as much as its most repainted pixel.

    Args:
        mask: (H, W) in [0, 1].
        downscale: pixels per latent along each side, a divisor of H and W.

    Returns:
        (1, 1, h, w) float32.
    """
    cells = reduce(mask, "(h y) (w x) -> 1 1 h w", "max", y=downscale, x=downscale)
    return torch.from_numpy(np.ascontiguousarray(cells, dtype=np.float32))


def masked_image(canvas: Canvas) -> Tensor:
    """Return what an inpainting U-Net sees of the picture: (1, C, H, W) in [-1, 1], and 0 where mask >= 0.5."""
    mask = np.ones(canvas.pixels.shape[:2], np.float32) if canvas.mask is None else canvas.mask
    return to_tensor(canvas.pixels)[None] * torch.from_numpy(mask < 0.5)


def composite(canvas: Canvas, image: Tensor) -> Tensor:
    """Lay what was drawn over the picture.

    Args:
        canvas: the picture, and the mask by which it is blended.
        image: (C, H, W) in [-1, 1], what was drawn, in as many channels as the model gives.

    Returns:
        (C, H, W) float32 in [-1, 1]. Where the mask is 0, `to_pixels` of it are the canvas's pixels, exactly; where
        it is 1, those of `image`.
    """
    image = image.float().clamp(-1, 1)
    if canvas.mask is None:
        return image
    mask = torch.from_numpy(canvas.mask).to(image.device)
    below = to_tensor(to_channels(canvas.pixels, len(image))).to(image.device)
    return torch.lerp(below, image, mask)  # exact at both of its ends


def parse_outpaint(text: str) -> dict[str, int]:
    """Read how many pixels to add on which side.

    >>> parse_outpaint("left:64, bottom:32")
    {'left': 64, 'top': 0, 'right': 0, 'bottom': 32}

    Raises:
        UserError: an unknown side or one said twice, a value that is no whole number from 0 to 99999, or nothing to
            add at all.
    """
    pattern = rf"\s*({'|'.join(SIDES)})\s*:\s*([0-9]{{1,5}})\s*"
    found = [re.fullmatch(pattern, part) for part in text.split(",")]
    pairs = [(match[1], int(match[2])) for match in found if match]
    added = {side: 0 for side in SIDES} | dict(pairs)
    if len(pairs) < len(found) or len({side for side, _ in pairs}) < len(pairs) or not any(added.values()):
        raise UserError(
            f"outpaint={text}: write the sides to add to and how many pixels, such as outpaint=left:64,right:32; "
            f"the sides are {', '.join(SIDES)}, each once at most, and one must be above 0"
        )
    return added


# ---------------------------------------------------------------------------------------------------------- reading


def read(picture: Picture, argument: str, channels: int, background: Colour = WHITE) -> Pixels:
    """Decode a picture in any of the forms that `make_canvas` takes, to (H, W, channels)."""
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or picture.shape[2:] not in ((), (1,), (3,), (4,)):
            raise UserError(
                f"{argument}: an array must be uint8 of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), "
                f"got {picture.dtype} of shape {picture.shape}"
            )
        if not picture.size:
            raise UserError(f"{argument}: the array is empty, its shape is {picture.shape}")
        picture = to_pil(picture.reshape(*picture.shape[:2], -1))
    try:
        return decode(picture, background, channels)
    except UserError as error:
        raise UserError(f"{name_of(picture, argument)}: {error}") from error


def read_mask(mask: Picture, size: tuple[int, ...]) -> Pixels:
    """Return the grey values (H, W) of a mask, resized to the picture's `size` if it has its proportions."""
    over_white = read(mask, "mask", channels=1)
    pixels = over_white if over_white.min() < 255 else read(mask, "mask", channels=1, background=(0, 0, 0))
    grey = pixels[..., 0]
    if not grey.any():
        raise UserError(f"{name_of(mask, 'mask')}: it is black all over; paint white what is to be repainted")
    (height, width), (mask_height, mask_width) = size, grey.shape
    # Sides are whole numbers: one picture scaled from the other may be off by half a pixel along each.
    off = abs(height * mask_width - width * mask_height)
    if 2 * off > max(height + width, mask_height + mask_width):
        raise UserError(
            f"{name_of(mask, 'mask')}: it is {in_words(grey.shape)}, init_image is {in_words(size)}; "
            "give a mask of the picture's size, or of its proportions"
        )
    return fit_mask(grey, size)


def name_of(picture: Picture, argument: str) -> str:
    """Say which argument, and which file if it is one."""
    return f"{argument}={picture}" if isinstance(picture, str | Path) else argument


def in_words(size: tuple[int, ...]) -> str:
    return f"{size[1]} px wide and {size[0]} high"


# ------------------------------------------------------------------------------------------------------------- size


def wanted_size(original: tuple[int, ...], height: int | None, width: int | None, factor: int) -> tuple[int, int]:
    """Complete a size of which at least one side is given; `original` is the picture's (height, width)."""
    given = {side: value for side, value in (("height", height), ("width", width)) if value is not None}
    if any(value < 1 or value % factor for value in given.values()):
        words = " ".join(f"{side}={value}" for side, value in given.items())
        raise UserError(f"{words}: this model draws sizes divisible by {factor}")
    if height is None:
        assert width is not None
        return nearest(width * original[0] / original[1], factor), width
    return height, nearest(height * original[1] / original[0], factor) if width is None else width


def own_size(
    original: tuple[int, ...], factor: int, default_size: int, name: str, outpainting: bool
) -> tuple[int, int]:
    """Return the size of a picture that is not to be scaled: its own, or what is left when it is cut."""
    short, long = min(original), max(original)
    if long > 4 * default_size or short < max(default_size / 2, factor):
        height, width = (nearest(default_size * side / short, factor) for side in original)
        raise UserError(
            f"{name}: the picture is {in_words(original)}, the model was trained at {default_size}; "
            f"to scale the picture say height={height} width={width}"
        )
    height, width = (side if outpainting else side // factor * factor for side in original)
    return height, width


def nearest(length: float, factor: int) -> int:
    """Round to a multiple of `factor` that is not 0."""
    return max(round(length / factor), 1) * factor


def fit_mask(grey: Pixels, size: tuple[int, ...]) -> Pixels:
    """Scale a mask (H, W) to cover `size`, a height and a width, and cut out the centre."""
    if grey.shape == tuple(size):
        return grey
    bilinear = Image.Resampling.BILINEAR  # Lanczos would ring into black
    return np.array(ImageOps.fit(Image.fromarray(grey), (size[1], size[0]), bilinear))


def cut(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Cut the centre of `size` out of (H, W, C) or (H, W)."""
    top, left = (pixels.shape[0] - size[0]) // 2, (pixels.shape[1] - size[1]) // 2
    return pixels[top : top + size[0], left : left + size[1]]


# ------------------------------------------------------------------------------------------------------------- mask


def grow(pixels: Pixels, mask: Mask | None, added: dict[str, int], factor: int, mask_blur: int) -> tuple[Pixels, Mask]:
    """Add white to the mask and copies of the edge to the picture; see `make_canvas` about `mask_blur`."""
    height, width = pixels.shape[:2]
    total = height + added["top"] + added["bottom"], width + added["left"] + added["right"]
    if total[0] % factor or total[1] % factor:
        fitting = dict(added)
        for length, sides in zip(total, (("bottom", "top"), ("right", "left")), strict=True):
            side = max(sides, key=lambda side: added[side])
            fitting[side] += -length % factor
        asked, fits = (
            ",".join(f"{side}:{value}" for side, value in each.items() if value) for each in (added, fitting)
        )
        raise UserError(
            f"outpaint={asked}: the canvas would be {in_words(total)}, and this model draws sizes divisible by "
            f"{factor}; outpaint={fits} fits"
        )
    around = (added["top"], added["bottom"]), (added["left"], added["right"])
    new = np.pad(np.zeros((height, width), bool), around, constant_values=True)
    kept = np.zeros((height, width), np.float32) if mask is None else mask
    # Half a pixel more than `mask_blur`: `soften` then gives all that is new its full weight, at corners too.
    near = distance(new, mask_blur + 1) < mask_blur + 0.5
    return np.pad(pixels, (*around, (0, 0)), mode="edge"), np.where(near, np.float32(1), np.pad(kept, around))


def soften(mask: Mask, blur: int) -> Mask:
    """Make the mask rise from 0 at the border to black to its own value at `blur` pixels from there."""
    # The border runs between two pixels, half a pixel from the centre of each.
    return mask * np.clip((distance(mask == 0, blur + 1) - 0.5) / blur, 0, 1, dtype=np.float32)


def distance(region: NDArray[np.bool_], limit: int) -> NDArray[np.float32]:
    """Return each pixel's Euclidean distance (H, W) to the nearest of `region`; where that is beyond `limit`, more."""
    # The square is separable: min_y (Δy² + min_x Δx²), here down the columns and then, turned over, along the rows.
    limit = min(limit, max(region.shape))
    square = np.where(region, np.float32(0), np.float32(np.inf))
    for _ in range(2):
        padded = np.pad(square, ((limit, limit), (0, 0)), constant_values=np.inf)
        for shift in range(-limit, limit + 1):
            moved = padded[limit + shift : limit + shift + len(square)]
            square = np.minimum(square, moved + shift**2)
        square = square.T
    return np.sqrt(square)
