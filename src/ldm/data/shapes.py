"""The built-in captioned pictures: one or two plain shapes on a plain background, drawn on the fly.

A world small enough for a laptop to learn and crisp enough for `ldm.evaluation.prompt_accuracy` to tell from the
pixels alone whether a picture shows what its caption says. Nothing is stored: picture i of a split is a function of
(seed, split, i), the same on every machine, and exists at any resolution.

    H W pixels; lengths are fractions of the picture's side, x to the right and y down from the top left corner.

Never mirror or crop these pictures: captions say left, right, top and bottom.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import cos, pi, sin, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Raise this whenever the same scene would be drawn, worded, or split differently: caches are keyed on it.
VERSION = 2

SPLITS = ("train", "val", "unseen")
PALETTE = {
    "red": (220, 30, 35),
    "green": (30, 155, 60),
    "blue": (30, 60, 220),
    "yellow": (245, 220, 40),
    "cyan": (50, 210, 230),
    "pink": (245, 95, 200),
    "white": (243, 243, 243),
    "black": (15, 15, 15),
}
COLORS = tuple(PALETTE)
# All shapes of one size have one area, that of a circle with this radius: size and shape are told apart.
RADII = {"small": 0.19, "large": 0.28}
SIZES = tuple(RADII)
# Direction from the picture's centre to the centre of the shape's bounding box.
POSITIONS = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "centre": (0, 0)}
OFFSET = {1: 0.18, 2: 0.26}  # how far in that direction, by number of objects
SHRINK = {1: 1.0, 2: 0.85}  # of the radius, by number of objects: two never touch
RELATIONS = {("top", "bottom"): "above", ("bottom", "top"): "below", ("left", "right"): "left of"} | {
    ("right", "left"): "right of"
}
# Half-widths of the uniform jitter: position (fraction of the side), radius (relative), colour (of 255).
JITTER = {"position": 0.015, "radius": 0.04, "color": 9.0}

# The first wording of each is the canonical one.
WORDS = {
    "small": ("small", "little"),
    "large": ("large", "big"),
    "left": ("on the left", "at the left"),
    "right": ("on the right", "at the right"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "centre": ("in the centre", "in the middle", "in the center"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
}
# How often a training caption leaves an attribute out.
UNSAID = {"size": 0.1, "position": 0.1, "background": 0.1, "relation": 0.08, "color": 0.04, "shape": 0.04}

Array = NDArray[np.floating[Any]]


def _circle(x: Array, y: Array) -> Array:
    return np.sqrt(x * x + y * y) - 1


def _square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - sqrt(pi) / 2


def _triangle(x: Array, y: Array) -> Array:
    circumradius = sqrt(pi / (3 * sqrt(3) / 4))
    y = y - circumradius / 4  # from the centre of the bounding box to the centroid
    return np.maximum(y, np.abs(x) * (sqrt(3) / 2) - y / 2) - circumradius / 2


def _star(x: Array, y: Array) -> Array:
    """Fold the plane onto one of the ten congruent right halves of a point, then measure to its one edge."""
    inner, (s, c) = 0.5, (sin(pi / 5), cos(pi / 5))  # inner over outer radius; half of a fifth of a turn
    outer = sqrt(pi / (5 * inner * s))
    x, y = np.abs(x), (1 - c) / 2 * outer - y  # y up, from the star's own centre
    for _ in range(2):  # mirror on the axis of the valley to the right of the upper point
        beyond = np.maximum(c * x - s * y, 0)
        x, y = np.abs(x - 2 * c * beyond), y + 2 * s * beyond
    # The edge runs from the tip (0, outer) to the valley (s, c) * inner * outer.
    normal = np.array([1 - inner * c, inner * s]) / sqrt(1 + inner * inner - 2 * inner * c)
    return np.float32(normal[0]) * x + np.float32(normal[1]) * (y - outer)


def _cross(x: Array, y: Array) -> Array:
    arm = sqrt(9 * pi / 20)  # half the length of a bar; a bar is three times as long as wide
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - arm, np.minimum(x, y) - arm / 3)


def _heart(x: Array, y: Array) -> Array:
    """A square standing on its corner, and half discs over its two upper sides."""
    side = sqrt(pi / (1 + pi / 4))
    top, bottom = side * (sqrt(2) / 4 + 0.5), side * sqrt(2) / 2
    x, y = np.abs(x), (top - bottom) / 2 - y  # y up, from the square's centre
    square = (x + np.abs(y)) / sqrt(2) - side / 2
    lobe = side * sqrt(2) / 4
    return np.minimum(square, np.sqrt((x - lobe) ** 2 + (y - lobe) ** 2) - side / 2)


# Distance to the outline (negative inside) of the shape of area π whose bounding box is centred on the origin,
# exact at the edges and below the true distance beyond sharp corners. x is (1, W), y is (H, 1).
OUTLINES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "heart": _heart,
}
SHAPES = tuple(OUTLINES)
_EXTENT = 1.45  # no shape reaches farther from the centre of its bounding box, along x or y, than this many radii


@dataclass(frozen=True, order=True)
class Object:
    """One shape of a scene: names out of SHAPES, COLORS, SIZES and POSITIONS."""

    shape: str
    color: str
    size: str
    position: str

    def __post_init__(self) -> None:
        _check("shape", self.shape, SHAPES)
        _check("color", self.color, COLORS)
        _check("size", self.size, SIZES)
        _check("position", self.position, tuple(POSITIONS))


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one object, or two that face each other across the centre, and the background's colour."""

    objects: tuple[Object, ...]
    background: str

    def __post_init__(self) -> None:
        _check("background", self.background, COLORS)
        if len(self.objects) not in OFFSET:
            raise ValueError(f"a scene has 1 or 2 objects, not {len(self.objects)}")
        if len(self.objects) == 2 and (self.objects[0].position, self.objects[1].position) not in RELATIONS:
            positions = " and ".join(o.position for o in self.objects)
            raise ValueError(f"two objects stand left and right or top and bottom, not {positions}")

    @property
    def relation(self) -> str:
        """Where the first of two objects stands: "above", "below", "left of" or "right of" the second."""
        if len(self.objects) != 2:
            raise ValueError("a scene of one object has no relation")
        return RELATIONS[self.objects[0].position, self.objects[1].position]


def draw(scene: Scene, resolution: int, rng: np.random.Generator | None = None) -> NDArray[np.uint8]:
    """Draw a scene, anti-aliased, at any resolution.

    Args:
        scene: what to draw.
        resolution: pixels per side, 16 or more.
        rng: jitters place, size and colours a little, alike at every resolution; None draws the exact class centres.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: `resolution` is below 16.
    """
    if resolution < 16:
        raise ValueError(f"resolution={resolution}: shapes cannot be told apart below 16 pixels; use 32 or more")
    count = len(scene.objects)
    jitter = rng.uniform(-1, 1, 3 + 6 * count) if rng is not None else np.zeros(3 + 6 * count)
    background = np.array(PALETTE[scene.background]) + JITTER["color"] * jitter[:3]
    image = np.empty((resolution, resolution, 3), np.uint8)
    image[:] = np.rint(background)
    for thing, wobble in zip(scene.objects, jitter[3:].reshape(count, 6), strict=True):
        color = np.array(PALETTE[thing.color]) + JITTER["color"] * wobble[:3]
        radius = SHRINK[count] * RADII[thing.size] * (1 + JITTER["radius"] * wobble[3])
        center = 0.5 + OFFSET[count] * np.array(POSITIONS[thing.position]) + JITTER["position"] * wobble[4:]
        window, alpha = coverage(thing.shape, (float(center[0]), float(center[1])), radius, resolution)
        contrast = (color - background).astype(np.float32)
        image[window] = np.rint(background.astype(np.float32) + alpha[..., None] * contrast)
    return image


def coverage(
    shape: str, center: tuple[float, float], radius: float, resolution: int
) -> tuple[tuple[slice, slice], Array]:
    """Compute how much of each pixel a shape covers.

    Args:
        shape: one of SHAPES.
        center: (x, y) of the centre of the shape's bounding box.
        radius: of the circle with the shape's area.
        resolution: pixels per side of the picture.

    Returns:
        The window (rows, columns) of the picture the shape lies in, and (window height, window width) in [0, 1].
    """
    centers = _pixel_centers(resolution)
    reach = _EXTENT * radius * resolution + 1
    first = [max(0, int(c * resolution - reach)) for c in center]
    last = [max(0, int(c * resolution + reach) + 1) for c in center]
    columns, rows = slice(first[0], last[0]), slice(first[1], last[1])
    x = (centers[None, columns] - np.float32(center[0])) * np.float32(1 / radius)
    y = (centers[rows, None] - np.float32(center[1])) * np.float32(1 / radius)
    # An edge that passes a pixel's centre at distance d (in pixels) covers about 1/2 - d of it.
    return (rows, columns), np.clip(0.5 - OUTLINES[shape](x, y) * np.float32(radius * resolution), 0, 1)


def caption(scene: Scene, rng: np.random.Generator | None = None, complete: bool = False) -> str:
    """Put a scene into words that are true of it.

    Args:
        scene: what to describe.
        rng: chooses the wording and, unless `complete`, now and then leaves an attribute out (UNSAID). None gives the
            canonical wording, which is always complete.
        complete: say every attribute.

    >>> caption(Scene((Object("circle", "red", "large", "left"),), "blue"))
    'a large red circle on the left of a blue background'
    >>> pair = Object("circle", "red", "small", "top"), Object("square", "blue", "small", "bottom")
    >>> caption(Scene(pair, "green"))
    'a red circle above a blue square on a green background'
    """

    def pick(wordings: Sequence[str]) -> str:
        return wordings[int(rng.random() * len(wordings))] if rng is not None else wordings[0]

    def said(attribute: str) -> bool:
        return complete or rng is None or rng.random() >= UNSAID[attribute]

    def name(thing: Object, size: bool) -> str:
        adjectives = [pick(WORDS[thing.size])] if size and said("size") else []
        adjectives += [thing.color] if said("color") else []
        return " ".join(["a", *adjectives, thing.shape if said("shape") else "shape"])

    what, where = name(scene.objects[0], size=len(scene.objects) == 1), ""
    if len(scene.objects) == 2:
        what += f" {pick(WORDS[scene.relation]) if said('relation') else 'and'} {name(scene.objects[1], size=False)}"
    elif said("position"):
        where = pick(WORDS[scene.objects[0].position])
    background = scene.background if said("background") else ""
    on, of = f"on a {background} background", f"of a {background} background"
    if background and where:
        brief = f"{what} on {background}, {where}"
        return pick((f"{what} {where} {of}", brief, f"{what} {where}, {on}", f"{on}, {what} {where}"))
    if background:
        return pick((f"{what} {on}", f"{what} on {background}", f"{on}, {what}"))
    return pick((f"{what} {where}", f"{where}, {what}")) if where else what


class Shapes:
    """A map-style dataset of {"image": (H, W, C) uint8, "captions": (str,)}, drawn when asked for.

    Splits are disjoint in what they show:
        train   everything else, with captions that sometimes leave an attribute out;
        val     scenes (shape, colour, size, position and background together; for two objects both shapes, colours,
                background and places) of which about one in ten, chosen by a hash, is kept from training; each of
                their (shape, colour) pairs does occur in training;
        unseen  scenes with one of the 5 in 48 (shape, colour) pairs that never occur in the other two splits, though
                each shape and each colour does, with other partners.

    Args:
        split: "train", "val" or "unseen".
        num_images: length; a scene comes back now and then, with other jitter.
        resolution: pixels per side.
        objects: 1 or 2 shapes in a picture.
        seed: decides what is held out, and every draw.
        channels: 3 for RGB; 1 gives grey, 4 adds an opaque alpha.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        split: str = "train",
        num_images: int = 50_000,
        resolution: int = 32,
        objects: int = 1,
        seed: int = 0,
        channels: int = 3,
    ) -> None:
        _check("split", split, SPLITS)
        _check("objects", objects, tuple(OFFSET))
        if num_images < 1 or resolution < 16 or seed < 0:
            raise ValueError(
                f"num_images={num_images}, resolution={resolution}, seed={seed}: "
                "num_images is at least 1, resolution at least 16, and seed is not negative"
            )
        self.split, self.num_images, self.resolution = split, num_images, resolution
        self.objects, self.seed, self.channels = objects, seed, channels

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene, rng = self._draw_scene(index)
        text = caption(scene, rng)
        pixels = draw(scene, self.resolution, rng)
        if self.channels != 3:
            from ldm.data.images import to_channels  # with torch, which nothing else here needs

            pixels = to_channels(pixels, self.channels)
        return {"image": pixels, "captions": (text,)}

    def captions(self) -> list[tuple[str]]:
        """Return all captions, without drawing."""
        return [(caption(*self._draw_scene(index)),) for index in range(self.num_images)]

    def sizes(self) -> NDArray[np.int32]:
        """Return W, H of all pictures, (N, 2)."""
        return np.full((self.num_images, 2), self.resolution, np.int32)

    def scene(self, index: int) -> Scene:
        """Return what picture `index` shows."""
        return self._draw_scene(index)[0]

    def fingerprint(self) -> str:
        """Return a hash of all that decides the pictures and captions, equal on every machine: a key for caches."""
        own = (self.split, self.num_images, self.resolution, self.objects, self.seed)
        world = (VERSION, PALETTE, RADII, POSITIONS, OFFSET, SHRINK, JITTER, WORDS, UNSAID, SHAPES)
        return f"{_hash(own, world):016x}" + (f"-{self.channels}" if self.channels != 3 else "")

    def _draw_scene(self, index: int) -> tuple[Scene, np.random.Generator]:
        """Return the scene, and the generator that goes on to describe and draw it."""
        if not 0 <= index < self.num_images:
            raise IndexError(f"picture {index} of {self.num_images}")
        rng = _generator(self.seed, SPLITS.index(self.split), int(index))
        scenes = scenes_of(self.split, self.objects, self.seed)
        first, second = rng.random(2)
        scene = scenes[int(first * len(scenes))]
        # Either object of a pair may be named first: "a above b" is "b below a".
        return (scene if second < 0.5 else Scene(scene.objects[::-1], scene.background)), rng


def prompts(split: str, num: int, objects: int = 1, seed: int = 0, complete: bool = True) -> list[tuple[str, Scene]]:
    """Ask for the scenes of a split's first `num` pictures, each with a caption of fresh wording.

    With `complete` each caption says all that `prompt_accuracy.judge` checks.
    """
    pictures = Shapes(split, num_images=num, objects=objects, seed=seed)
    scenes = [pictures.scene(i) for i in range(num)]
    wording = len(SPLITS) + SPLITS.index(split)  # a stream of its own
    return [(caption(scene, _generator(seed, wording, i), complete), scene) for i, scene in enumerate(scenes)]


@lru_cache
def unseen_pairs(seed: int = 0) -> frozenset[tuple[str, str]]:
    """Return the (shape, colour) pairs kept for the split "unseen": 5 of 48, no shape and no colour twice."""
    chosen: list[tuple[str, str]] = []
    for shape, color in sorted(product(SHAPES, COLORS), key=lambda pair: _hash(seed, "pair", pair)):
        if len(chosen) < 5 and all(shape != s and color != c for s, c in chosen):
            chosen.append((shape, color))
    return frozenset(chosen)


@lru_cache
def scenes_of(split: str, objects: int = 1, seed: int = 0) -> tuple[Scene, ...]:
    """List the scenes of a split; of two objects, the upper or the left one comes first."""
    scenes = []
    for scene in _all_scenes(objects):
        if any((thing.shape, thing.color) in unseen_pairs(seed) for thing in scene.objects):
            home = "unseen"
        else:
            home = "val" if _hash(seed, "scene", scene) % 10 == 0 else "train"
        if home == split:
            scenes.append(scene)
    return tuple(scenes)


def _all_scenes(objects: int) -> list[Scene]:
    things: list[tuple[Object, ...]]
    if objects == 1:
        things = [(Object(*names),) for names in product(SHAPES, COLORS, SIZES, POSITIONS)]
    else:  # two large ones would touch
        things = [
            (Object(*one, "small", sides[0]), Object(*other, "small", sides[1]))
            for sides in (("top", "bottom"), ("left", "right"))
            for one, other in product(product(SHAPES, COLORS), repeat=2)
            if one != other
        ]
    return [Scene(t, color) for t in things for color in COLORS if all(color != thing.color for thing in t)]


@lru_cache
def _pixel_centers(resolution: int) -> Array:
    return ((np.arange(resolution) + 0.5) / resolution).astype(np.float32)


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def _hash(*parts: object) -> int:
    """Return 64 bits that depend on the parts' text alone; Python's own hash differs from process to process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def _check(what: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{what}={value!r}: choose one of {', '.join(map(str, allowed))}")
