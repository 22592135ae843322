"""Prompt accuracy: read from the pixels alone what a picture of the built-in world shows, and compare with the prompt.

The reader is analysis by synthesis: the outlines that drew the training pictures (`ldm.data.shapes`) are laid over the
picture at every place, in many sizes, and the best match is what it shows. It knows neither network nor caption.

    H W pixels, K templates (shapes × radii); lengths are fractions of the picture's side.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import pi
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm.data.shapes import OFFSET, PALETTE, POSITIONS, RADII, SHAPES, Object, Scene, coverage

ATTRIBUTES = {
    1: ("shape", "color", "background", "size", "position"),
    2: ("shape", "color", "background", "relation"),
}

# The search goes a third beyond what is ever drawn, so that a shape of odd size is read by its outline all the same.
_RADII = np.geomspace(RADII["small"] / 1.33, RADII["large"] * 1.33, 8)
_REACH = 0.32  # farthest distance, along x or y, of a shape's centre from the picture's that is searched

Array = NDArray[np.floating[Any]]


def score(images: Iterable[Any], scenes: Sequence[Scene]) -> dict[str, float]:
    """Measure how many pictures show what was asked for.

    Args:
        images: pictures as `read_scene` takes them, for instance a (B, 3, H, W) tensor in [-1, 1].
        scenes: what each should show; all with one object, or all with two.

    Returns:
        For each attribute (ATTRIBUTES) and for "all" of them together, the fraction of pictures that have it right.

    Raises:
        ValueError: there is nothing to score, the numbers differ, or scenes of one and two objects are mixed.
    """
    images = list(images)
    if not scenes or len(images) != len(scenes):
        raise ValueError(f"{len(images)} pictures for {len(scenes)} scenes: give one scene for each picture, and any")
    if len({len(scene.objects) for scene in scenes}) > 1:
        raise ValueError("scenes of one and of two objects differ in what is asked: score them apart")
    verdicts = [judge(image, scene) for image, scene in zip(images, scenes, strict=True)]
    return {what: float(np.mean([verdict[what] for verdict in verdicts])) for what in verdicts[0]}


def judge(image: Any, scene: Scene) -> dict[str, bool]:
    """Tell which attributes of `scene` one picture has right, and whether it has "all".

    Of two objects both must be right. Each object found is held against the object asked for that it resembles more,
    so that a pair with its places swapped is wrong in its relation only.
    """
    found = read_scene(image, objects=len(scene.objects))
    right = {"background": found.background == scene.background}
    if len(scene.objects) == 1:
        asked, seen = scene.objects[0], found.objects[0]
        right |= {what: getattr(asked, what) == getattr(seen, what) for what in ("shape", "color", "size", "position")}
    else:
        in_place = sorted(scene.objects, key=lambda thing: POSITIONS[thing.position])
        pairings = [list(zip(found.objects, order, strict=True)) for order in (in_place, in_place[::-1])]
        likeness = [sum((a.shape == b.shape) + (a.color == b.color) for a, b in pairs) for pairs in pairings]
        pairs = pairings[int(likeness[1] > likeness[0])]
        right["shape"] = all(seen.shape == asked.shape for seen, asked in pairs)
        right["color"] = all(seen.color == asked.color for seen, asked in pairs)
        # Where neither pairing is the better one, nothing can be said to stand where it should.
        along = all(seen.position == asked.position for seen, asked in pairs)
        right["relation"] = along and likeness[0] > likeness[1]
    right = {what: right[what] for what in ATTRIBUTES[len(scene.objects)]}
    return right | {"all": all(right.values())}


def read_scene(image: Any, objects: int = 1) -> Scene:
    """Name what a picture shows, from its pixels alone.

    Always answers, be the picture noise: with the best match. So a smudge counts as what it resembles most, and an
    object beyond those looked for goes unnoticed. Should nothing stand out, the object has the background's colour.

    Args:
        image: (H, W, 3) uint8, or (3, H, W) or (H, W, 3) float in [-1, 1]; array or tensor, H = W ≥ 16.
        objects: how many shapes to look for, 1 or 2; of two, the left or the upper one comes first.

    Raises:
        ValueError: the picture is of another shape, or not finite, or `objects` is neither 1 nor 2.
    """
    if objects not in ATTRIBUTES:
        raise ValueError(f"objects={objects}: the reader knows pictures of 1 or 2 shapes")
    pixels = _to_pixels(image)
    background = _border_color(pixels)
    contrast = pixels - background
    if objects == 1:
        shape, color, radius, center = _read_object(contrast, background)
        size = min(RADII, key=lambda name: abs(np.log(radius / RADII[name])))
        offset = (center - 0.5) / OFFSET[1]
        position = min(POSITIONS, key=lambda name: float(np.sum((offset - POSITIONS[name]) ** 2)))
        return Scene((Object(shape, color, size, position),), _nearest_color(background))
    axis, cut = _split(contrast)
    along = np.arange(len(pixels)).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
    sides = ("top", "bottom") if axis == 0 else ("left", "right")
    halves = (_read_object(contrast * half, background) for half in (along < cut, along >= cut))
    pair = (Object(shape, color, "small", side) for (shape, color, *_), side in zip(halves, sides, strict=True))
    return Scene(tuple(pair), _nearest_color(background))


def _read_object(contrast: Array, background: Array) -> tuple[str, str, float, Array]:
    """Return shape, colour, radius and centre (x, y) of what stands out in (H, W, 3) picture minus background."""
    resolution = len(contrast)
    # A blurred or blended pixel lies between both colours: the farthest from the background are the object's inside.
    distance = np.linalg.norm(contrast, axis=-1)
    few = max(1, int(0.25 * pi * RADII["small"] ** 2 * distance.size))
    farthest = np.partition(distance, -few, axis=None)[-few]
    color = np.median(contrast[distance >= 0.7 * farthest], axis=0)
    # How far each pixel lies on the way from background to object; the ends are drawn in, against noise.
    alpha = np.clip(0.5 + 1.6 * (contrast @ color / max(float(color @ color), 1e-6) - 0.5), 0, 1)

    # ‖alpha - template‖² for all templates at all places: ‖alpha‖² is common, the cross term a circular correlation.
    spectra, energy = _templates(resolution)
    correlation = np.fft.irfft2(np.fft.rfft2(alpha) * spectra, s=alpha.shape)
    reach = int(_REACH * resolution)
    shifts = np.arange(-reach, reach + 1)
    error = energy - 2 * correlation[:, shifts[:, None], shifts[None, :]]
    error = error.reshape(len(SHAPES), len(_RADII), len(shifts), len(shifts))

    fits = [_refine(volume) for volume in error]
    best = int(np.argmin([least for least, _ in fits]))
    step, row, column = fits[best][1]
    radius = float(_RADII[0] * (_RADII[1] / _RADII[0]) ** step)
    center = 0.5 + (np.array([column, row]) - reach) / resolution
    return SHAPES[best], _nearest_color(background + color), radius, center


def _refine(error: Array) -> tuple[float, list[float]]:
    """Return the least value of a volume and where it lies, between grid points: a parabola along each axis."""
    index = np.unravel_index(int(np.argmin(error)), error.shape)
    least = float(error[index])
    place = [float(i) for i in index]
    for axis, i in enumerate(index):
        if 0 < i < error.shape[axis] - 1:
            before, here, after = np.moveaxis(error, axis, 0)[i - 1 : i + 2][(slice(None), *np.delete(index, axis))]
            slope, bend = (after - before) / 2, max(float(before + after - 2 * here), 1e-9)
            place[axis] -= slope / bend
            least -= slope**2 / (2 * bend)
    return least, place


@lru_cache
def _templates(resolution: int) -> tuple[NDArray[np.complexfloating[Any, Any]], Array]:
    """Return the conjugate spectra (K, H, W // 2 + 1) of centred templates, and their energies (K, 1, 1)."""
    templates = np.zeros((len(SHAPES) * len(_RADII), resolution, resolution), np.float32)
    for k, template in enumerate(templates):
        window, alpha = coverage(SHAPES[k // len(_RADII)], (0.5, 0.5), float(_RADII[k % len(_RADII)]), resolution)
        template[window] = alpha
    return np.conj(np.fft.rfft2(templates)), np.sum(templates**2, axis=(1, 2))[:, None, None]


def _split(contrast: Array) -> tuple[int, int]:
    """Find the cut between two objects: 0 and a row, or 1 and a column, that the objects avoid as well as can be."""
    distance = np.linalg.norm(contrast, axis=-1)
    few = max(1, int(0.25 * pi * RADII["small"] ** 2 * distance.size))
    mask = np.clip(distance / max(float(np.partition(distance, -few, axis=None)[-few]), 1e-6) - 0.2, 0, None)
    resolution = len(mask)
    middle = np.arange(int(0.35 * resolution), int(0.65 * resolution) + 1)
    # Of equally empty places the one nearest the middle; the tie-break is small against any object.
    tie = 1e-3 * np.abs(middle - resolution / 2)
    costs = [mask.sum(axis=1 - axis)[middle] + tie for axis in (0, 1)]
    axis = int(np.argmin([cost.min() for cost in costs]))
    return axis, int(middle[np.argmin(costs[axis])])


def _border_color(pixels: Array) -> Array:
    """Return the median colour of the picture's rim, where at most the tip of a shape reaches."""
    width = max(1, len(pixels) // 24)
    inside = np.zeros(pixels.shape[:2], bool)
    inside[width:-width, width:-width] = True
    return np.median(pixels[~inside], axis=0)


def _nearest_color(color: Array) -> str:
    return min(PALETTE, key=lambda name: float(np.sum((color - np.array(PALETTE[name]) / 255) ** 2)))


def _to_pixels(image: Any) -> Array:
    """Return a picture as (H, W, 3) float32 in [0, 1], large ones shrunk to at least 64 pixels a side."""
    if hasattr(image, "detach"):  # a tensor, without importing torch for it
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    pixels = np.asarray(image)
    if pixels.ndim == 3 and pixels.shape[0] == 3 != pixels.shape[-1]:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.shape[0] != pixels.shape[1] or len(pixels) < 16:
        raise ValueError(f"a picture is (H, W, 3) or (3, H, W) with H = W of at least 16, not {np.shape(image)}")
    if pixels.dtype == np.uint8:
        pixels = pixels.astype(np.float32) / 255
    elif np.issubdtype(pixels.dtype, np.floating) and np.isfinite(pixels).all():
        pixels = np.clip(pixels.astype(np.float32) / 2 + 0.5, 0, 1)
    else:
        raise ValueError(f"a picture holds uint8, or finite floats in [-1, 1]; this one, of {pixels.dtype}, does not")
    if (box := len(pixels) // 64) > 1:
        side = len(pixels) // box
        pixels = pixels[: side * box, : side * box].reshape(side, box, side, box, 3).mean(axis=(1, 3))
    return pixels
