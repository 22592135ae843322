"""The built-in pictures: repeatable anywhere, split without leaks, and described truthfully."""

import hashlib
import os
import pickle
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data.shapes import (
    COLORS,
    JITTER,
    PALETTE,
    RADII,
    SHAPES,
    SIZES,
    SPLITS,
    UNSAID,
    Object,
    Scene,
    Shapes,
    caption,
    coverage,
    draw,
    prompts,
    scenes_of,
    unseen_pairs,
)

CANONICAL = "a large red circle on the left of a blue background"

DIGEST = """
import hashlib
from ldm.data.shapes import Shapes
digest = hashlib.sha256()
for split in ("train", "val", "unseen"):
    for objects in (1, 2):
        pictures = Shapes(split, num_images=20, resolution=32, objects=objects, seed=5)
        for i in range(20):
            digest.update(pictures[i]["image"].tobytes() + pictures[i]["captions"][0].encode())
print(digest.hexdigest())
"""


def in_order(scene: Scene) -> Scene:
    """The scene with its objects ordered, for "a above b" is "b below a"."""
    return Scene(tuple(sorted(scene.objects, key=lambda thing: thing.position, reverse=True)), scene.background)


def read_caption(text: str, objects: int) -> dict[str, object]:
    """Read a caption with a grammar of its own; what is not said is None."""
    things = re.findall(
        rf"\ba (?:(small|little|large|big) )?(?:({'|'.join(COLORS)}) )?(shape|{'|'.join(SHAPES)})\b", text
    )
    assert len(things) == objects, text
    size = {"small": "small", "little": "small", "large": "large", "big": "large"}
    background = re.findall(rf"\b(?:on|of) (?:a )?({'|'.join(COLORS)})(?: background|,|$)", text)
    assert len(background) <= 1, text
    said: dict[str, object] = {
        "sizes": [size.get(t[0]) for t in things],
        "colors": [t[1] or None for t in things],
        "shapes": [t[2] if t[2] != "shape" else None for t in things],
        "background": background[0] if background else None,
        "position": None,
        "relation": None,
    }
    if objects == 1:
        place = re.findall(r"\b(left|right|top|bottom|centre|center|middle)\b", text)
        assert len(place) <= 1, text
        if place:
            said["position"] = {"center": "centre", "middle": "centre"}.get(place[0], place[0])
    elif " and " not in text:
        (word,) = re.findall(r"\b(above|over|below|under|left of|right of)\b", text)
        said["relation"] = {"over": "above", "under": "below"}.get(word, word)
    return said


def truth(scene: Scene) -> dict[str, object]:
    pair = len(scene.objects) == 2
    return {
        "sizes": [thing.size for thing in scene.objects],
        "colors": [thing.color for thing in scene.objects],
        "shapes": [thing.shape for thing in scene.objects],
        "background": scene.background,
        "position": None if pair else scene.objects[0].position,
        "relation": scene.relation if pair else None,
    }


def test_pictures_are_the_same_in_every_process() -> None:
    digests = {
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(digests) == 1


def test_the_world_changes_only_with_its_version() -> None:
    """A cache keyed on the fingerprint would lie if scenes or captions changed and VERSION did not."""
    said = [Shapes(split, objects=k)[i]["captions"][0] for split in SPLITS for k in (1, 2) for i in range(50)]
    assert hashlib.sha256("\n".join(map(str, said)).encode()).hexdigest()[:16] == "95c2cf42f172fc73"
    assert Shapes().fingerprint() == "616602102c07079f"


def test_a_picture_depends_on_its_index_alone() -> None:
    few, many = Shapes(num_images=10, resolution=48), Shapes(num_images=10_000, resolution=48)
    for i in (9, 0, 4):
        np.testing.assert_array_equal(few[i]["image"], many[i]["image"])
        assert few[i]["captions"] == many[i]["captions"] == Shapes(resolution=64)[i]["captions"]
        assert few.scene(i) == many.scene(i)
    assert len(few) == 10
    again = pickle.loads(pickle.dumps(few))
    np.testing.assert_array_equal(again[np.int64(3)]["image"], few[3]["image"])
    assert not np.array_equal(Shapes(seed=1)[0]["image"], Shapes(seed=0)[0]["image"])


def test_iteration_ends() -> None:
    assert len(list(Shapes(num_images=7))) == 7  # type: ignore[call-overload]
    for index in (7, -1):
        with pytest.raises(IndexError, match="of 7"):
            Shapes(num_images=7)[index]


def test_fingerprint_tells_every_argument() -> None:
    variants = [
        Shapes(),
        Shapes("val"),
        Shapes(num_images=9),
        Shapes(resolution=64),
        Shapes(objects=2),
        Shapes(seed=1),
    ]
    assert len({v.fingerprint() for v in variants}) == len(variants)
    assert Shapes().fingerprint() == Shapes().fingerprint()


@pytest.mark.parametrize(
    "wrong",
    [{"split": "test"}, {"objects": 3}, {"num_images": 0}, {"resolution": 8}, {"seed": -1}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_wrong_arguments_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Shapes(**wrong)  # type: ignore[arg-type]


def test_impossible_scenes_are_refused() -> None:
    with pytest.raises(ValueError, match="oval"):
        Object("oval", "red", "small", "left")
    left, top = Object("circle", "red", "small", "left"), Object("star", "blue", "small", "top")
    for things in [(), (left, top), (left, left), (left,) * 3]:
        with pytest.raises(ValueError):
            Scene(things, "white")
    with pytest.raises(ValueError, match="relation"):
        _ = Scene((left,), "white").relation
    with pytest.raises(ValueError, match="resolution"):
        draw(Scene((left,), "white"), 8)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_one_pair_in_ten_is_kept_unseen_and_every_word_is_learned(seed: int) -> None:
    unseen = unseen_pairs(seed)
    assert len(unseen) == 5  # of 48
    assert len({shape for shape, _ in unseen}) == len({color for _, color in unseen}) == 5
    shown = [scene.objects[0] for scene in scenes_of("train", 1, seed)]
    assert {(t.shape, t.color) for t in shown} == {(s, c) for s in SHAPES for c in COLORS} - unseen
    assert {(t.size, t.position) for t in shown} == {(t.size, t.position) for t in scenes_of_all_positions()}
    assert {scene.background for scene in scenes_of("train", 1, seed)} == set(COLORS)


def scenes_of_all_positions() -> list[Object]:
    return [Object("circle", "red", size, p) for size in SIZES for p in ("left", "right", "top", "bottom", "centre")]


@pytest.mark.parametrize("objects", [1, 2])
def test_splits_are_disjoint_and_cover_the_world(objects: int) -> None:
    splits = {split: set(scenes_of(split, objects, 0)) for split in SPLITS}
    # 6 shapes, 8 colours, 2 sizes, 5 positions, 7 backgrounds; two objects: 2 axes, 48 * 47 pairs of unlike objects,
    # and 7 backgrounds where the colours agree (48 * 5 pairs), else 6.
    world = {1: 6 * 8 * 2 * 5 * 7, 2: 2 * (48 * 5 * 7 + 48 * 42 * 6)}[objects]
    assert sum(map(len, splits.values())) == len(set.union(*splits.values())) == world
    unseen = unseen_pairs(0)
    for split, scenes in splits.items():
        assert all(any((t.shape, t.color) in unseen for t in s.objects) == (split == "unseen") for s in scenes)
    assert 0.08 < len(splits["val"]) / (len(splits["val"]) + len(splits["train"])) < 0.12


@pytest.mark.parametrize("objects", [1, 2])
@pytest.mark.parametrize("split", SPLITS)
def test_pictures_stay_in_their_split(split: str, objects: int) -> None:
    pictures = Shapes(split, num_images=2000, objects=objects, seed=3)
    home = {in_order(scene) for scene in scenes_of(split, objects, 3)}
    shown = [pictures.scene(i) for i in range(len(pictures))]
    assert {in_order(scene) for scene in shown} <= home
    if objects == 2:
        assert set(Counter(s.relation for s in shown)) == {"above", "below", "left of", "right of"}
    assert all(t.color != s.background for s in shown for t in s.objects)


@pytest.mark.parametrize("objects", [1, 2])
@pytest.mark.parametrize("split", SPLITS)
def test_captions_tell_the_truth_and_mostly_the_whole_of_it(split: str, objects: int) -> None:
    pictures = Shapes(split, num_images=1500, objects=objects)
    missing: Counter[str] = Counter()
    for i in range(len(pictures)):
        said = read_caption(str(pictures[i]["captions"][0]), objects)
        for what, value in truth(pictures.scene(i)).items():
            if isinstance(value, list):
                spoken = said[what]
                assert isinstance(spoken, list)
                assert all(a in (None, b) for a, b in zip(spoken, value, strict=True)), pictures[i]["captions"][0]
                missing[what] += spoken.count(None)
            else:
                assert said[what] in (None, value), pictures[i]["captions"][0]
                missing[what] += said[what] is None
    said_of = ("colors", "shapes", "background", *(("sizes", "position") if objects == 1 else ("relation",)))
    for what in said_of:
        of = len(pictures) * (objects if what in ("colors", "shapes") else 1)
        assert missing[what] / of == pytest.approx(UNSAID[what.removesuffix("s")], abs=0.03), what


@pytest.mark.parametrize("objects", [1, 2])
def test_prompts_say_everything_of_the_split_s_own_scenes(objects: int) -> None:
    asked = prompts("val", 200, objects=objects, seed=2)
    pictures = Shapes("val", num_images=200, objects=objects, seed=2)
    for i, (text, scene) in enumerate(asked):
        said, wanted = read_caption(text, objects), truth(scene)
        if objects == 2:  # sizes of pairs go without saying
            said.pop("sizes"), wanted.pop("sizes")
        assert said == wanted
        assert scene == pictures.scene(i)
    assert prompts("val", 200, objects=objects, seed=2) == asked
    assert prompts("val", 200, objects=objects, seed=2, complete=False) != asked
    shapes = [re.sub("|".join(map(re.escape, (*COLORS, *SHAPES))), "_", text) for text, _ in asked]
    assert len(set(shapes)) > 5, "the wording varies"


def test_training_knows_the_canonical_prompt() -> None:
    scene = Scene((Object("circle", "red", "large", "left"),), "blue")
    assert scene in scenes_of("train", 1, 0)
    assert caption(scene) == CANONICAL
    assert CANONICAL in {caption(scene, np.random.default_rng(i)) for i in range(500)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_every_shape_of_a_size_has_one_area_and_a_centred_box(shape: str, size: str) -> None:
    window, alpha = coverage(shape, (0.5, 0.5), RADII[size], 256)
    canvas = np.zeros((256, 256))
    canvas[window] = alpha
    assert canvas.mean() == pytest.approx(np.pi * RADII[size] ** 2, rel=2e-3)
    for axis in (0, 1):
        (inside,) = np.nonzero(canvas.max(axis=axis) > 0.25)
        assert inside[0] + inside[-1] == pytest.approx(255, abs=1)
    np.testing.assert_allclose(canvas, canvas[:, ::-1], atol=1e-4)  # mirror images of themselves
    wide = (canvas > 0.5).sum(axis=1)
    upper, lower = wide[:128].sum(), wide[128:].sum()
    if shape == "heart":
        assert upper > 1.3 * lower
    elif shape == "triangle":
        assert lower > 2 * upper
    elif shape == "star":  # one point above, two below
        rows = np.nonzero(wide)[0]
        assert wide[rows[1]] < 4
        assert np.ptp(np.nonzero(canvas[rows[-2]] > 0.5)[0]) > 4 * wide[rows[-2]] / 2
    else:
        assert upper == lower


@pytest.mark.parametrize("objects", [1, 2])
def test_pictures_are_one_at_every_resolution(objects: int) -> None:
    coarse, fine = (Shapes(resolution=r, objects=objects) for r in (32, 128))
    for i in range(20):
        averaged = np.asarray(fine[i]["image"], np.float64).reshape(32, 4, 32, 4, 3).mean(axis=(1, 3))
        difference = np.abs(averaged - np.asarray(coarse[i]["image"], np.float64))
        assert difference.mean() < 0.75 and difference.max() < 100  # tips thinner than a pixel differ most


def test_jitter_is_small_and_none_by_default() -> None:
    scene = Scene((Object("square", "red", "large", "centre"),), "white")
    plain = draw(scene, 64)
    np.testing.assert_array_equal(plain, draw(scene, 64))
    assert plain.shape == (64, 64, 3) and plain.dtype == np.uint8
    assert tuple(plain[0, 0]) == PALETTE["white"] and tuple(plain[32, 32]) == PALETTE["red"]
    shaken = [draw(scene, 64, np.random.default_rng(i)) for i in range(50)]
    assert len({picture.tobytes() for picture in shaken}) == 50
    for spot, color in (((0, 0), "white"), ((32, 32), "red")):
        values = np.array([picture[spot] for picture in shaken], float)
        assert np.abs(values - PALETTE[color]).max() <= JITTER["color"] + 0.5
        assert values.std() > 1
