"""The reader of pictures: right on true pictures, at chance on noise, and precise about what is wrong."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ldm.data.shapes import COLORS, POSITIONS, SHAPES, SIZES, SPLITS, Object, Scene, Shapes, draw
from ldm.evaluation.prompt_accuracy import ATTRIBUTES, judge, read_scene, score

Image = NDArray[np.floating]


def true_pictures(num: int, resolution: int, objects: int = 1) -> tuple[list[NDArray[np.uint8]], list[Scene]]:
    """Fresh pictures, a third out of each split."""
    splits = [Shapes(split, num, resolution, objects, seed=11) for split in SPLITS]
    chosen = [(splits[i % 3], i) for i in range(num)]
    return [np.asarray(split[i]["image"]) for split, i in chosen], [split.scene(i) for split, i in chosen]


def degrade(image: NDArray[np.uint8], rng: np.random.Generator, blur: float = 0.6, noise: float = 0.04) -> Image:
    """Blur (standard deviation in pixels), then add noise (in units of the range), in [-1, 1]."""
    kernel = np.exp(-0.5 * (np.arange(-3, 4) / blur) ** 2)
    out = np.pad(image / 127.5 - 1, ((3, 3), (3, 3), (0, 0)), mode="edge")
    for axis in (0, 1):
        out = np.apply_along_axis(np.convolve, axis, out, kernel / kernel.sum(), mode="valid")
    return np.clip(out + 2 * noise * rng.standard_normal(out.shape), -1, 1)


@pytest.mark.parametrize(
    ("objects", "resolution", "least"), [(1, 32, 0.995), (1, 48, 0.995), (1, 64, 0.995), (2, 64, 0.99)]
)
def test_true_pictures_are_read_right(objects: int, resolution: int, least: float) -> None:
    right = score(*true_pictures(1000, resolution, objects))
    assert set(right) == {*ATTRIBUTES[objects], "all"}
    assert right["all"] >= least, right


@pytest.mark.parametrize(("objects", "resolution"), [(1, 32), (1, 64), (2, 64)])
def test_blur_and_noise_are_borne(objects: int, resolution: int) -> None:
    images, scenes = true_pictures(200, resolution, objects)
    rng = np.random.default_rng(0)
    right = score([degrade(image, rng) for image in images], scenes)
    assert right["all"] >= 0.97, right


@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
@pytest.mark.parametrize("objects", [1, 2])
def test_noise_is_read_at_chance(kind: str, objects: int) -> None:
    """Each attribute is right once in so many answers, give or take four standard errors and 0.03 for uneven splits.

    Of two objects both must be right: at most twice (the better pairing counts) one in so many squared; and a relation
    is right by chance no more often than one in four.
    """
    num = 500
    scenes = true_pictures(num, 32, objects)[1]
    rng = np.random.default_rng(1)
    noise = rng.uniform(-1, 1, (num, 3, 32, 32)) if kind == "uniform" else rng.normal(0, 0.5, (num, 3, 32, 32))
    right = score(np.clip(noise, -1, 1), scenes)
    assert right["all"] <= 0.02
    answers = {"shape": 6, "color": 8, "background": 8, "size": 2, "position": 5, "relation": 4}
    for what in ATTRIBUTES[objects]:
        chance = 1 / answers[what]
        if what == "relation":
            assert right[what] <= chance, right
        elif objects == 2 and what in ("shape", "color"):
            assert right[what] <= 2 * chance**2 + 0.04, (what, right)
        else:
            assert abs(right[what] - chance) <= 4 * np.sqrt(chance * (1 - chance) / num) + 0.03, (what, right)


def test_a_blank_picture_shows_nothing_asked_for() -> None:
    images, scenes = true_pictures(60, 32)
    blank = [np.full_like(image, np.median(image, axis=(0, 1))) for image in images]
    right = score(blank, scenes)
    assert right["background"] == 1.0 and right["color"] == right["all"] == 0.0


objects = st.builds(
    Object, st.sampled_from(SHAPES), st.sampled_from(COLORS), st.sampled_from(SIZES), st.sampled_from(list(POSITIONS))
)
resolutions = st.sampled_from([32, 48, 64])
seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=150, deadline=None)
@given(st.data(), objects, seeds, resolutions)
def test_one_wrong_attribute_is_the_one_found_wrong(
    data: st.DataObject, thing: Object, seed: int, resolution: int
) -> None:
    background = data.draw(st.sampled_from([c for c in COLORS if c != thing.color]))
    asked = Scene((thing,), background)
    changes: dict[str, list[str]] = {
        "shape": [s for s in SHAPES if s != thing.shape],
        "color": [c for c in COLORS if c not in (thing.color, background)],
        "background": [c for c in COLORS if c not in (thing.color, background)],
        "size": [s for s in SIZES if s != thing.size],
        "position": [p for p in POSITIONS if p != thing.position],
    }
    what = data.draw(st.sampled_from([*changes, "nothing"]))
    drawn = asked
    if what == "background":
        drawn = replace(asked, background=data.draw(st.sampled_from(changes[what])))
    elif what != "nothing":
        drawn = replace(asked, objects=(replace(thing, **{what: data.draw(st.sampled_from(changes[what]))}),))
    verdict = judge(draw(drawn, resolution, np.random.default_rng(seed)), asked)
    assert [a for a in ATTRIBUTES[1] if not verdict[a]] == ([] if what == "nothing" else [what])
    assert verdict["all"] == (what == "nothing")


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(0, 9999), seeds, resolutions)
def test_of_two_objects_the_wrong_attribute_is_found(
    data: st.DataObject, index: int, seed: int, resolution: int
) -> None:
    asked = Shapes("train", 10_000, objects=2).scene(index)
    one, other = asked.objects
    used = {one.color, other.color, asked.background}
    what = data.draw(st.sampled_from(["shape", "color", "background", "swap", "turn", "nothing"]))
    drawn = asked
    if what in ("shape", "color"):
        values = (
            [s for s in SHAPES if s not in (one.shape, other.shape)] if what == "shape" else sorted({*COLORS} - used)
        )
        changed = replace(one, **{what: data.draw(st.sampled_from(values))})
        drawn = Scene((changed, other), asked.background)
    elif what == "background":
        drawn = replace(asked, background=data.draw(st.sampled_from(sorted({*COLORS} - used))))
    elif what == "swap":
        drawn = Scene((replace(one, position=other.position), replace(other, position=one.position)), asked.background)
    elif what == "turn":
        sides = ("top", "bottom") if one.position in ("left", "right") else ("left", "right")
        turned = tuple(replace(o, position=p) for o, p in zip((one, other), sides, strict=True))
        drawn = Scene(turned, asked.background)
    verdict = judge(draw(drawn, resolution, np.random.default_rng(seed)), asked)
    wrong = {"nothing": [], "swap": ["relation"], "turn": ["relation"]}.get(what, [what])
    assert [a for a in ATTRIBUTES[2] if not verdict[a]] == wrong


def test_arrays_and_tensors_of_either_layout_are_read_alike() -> None:
    (image,), (scene,) = true_pictures(1, 64)
    floats = (image / 127.5 - 1).astype(np.float32)
    chw = torch.from_numpy(floats).permute(2, 0, 1)
    large = np.kron(image, np.ones((5, 5, 1), np.uint8))
    for same in (
        image,
        floats,
        chw,
        chw.requires_grad_(),
        chw.bfloat16(),
        torch.from_numpy(image),
        1.2 * floats,
        large,
    ):
        assert read_scene(same) == scene


def test_what_is_no_picture_is_refused() -> None:
    bad = np.full((32, 32, 3), np.nan)
    for image in (np.zeros((32, 32)), np.zeros((32, 48, 3)), np.zeros((8, 8, 3)), np.zeros((32, 32, 3), int), bad):
        with pytest.raises(ValueError, match="a picture"):
            read_scene(image)
    with pytest.raises(ValueError, match="objects=3"):
        read_scene(np.zeros((32, 32, 3)), objects=3)


def test_scores_need_matching_pictures_and_scenes() -> None:
    (one_image,), (one,) = true_pictures(1, 32)
    (two_image,), (two,) = true_pictures(1, 32, objects=2)
    for images, scenes in (
        ([], []),
        ([one_image], []),
        ([one_image], [one, one]),
        ([one_image, two_image], [one, two]),
    ):
        with pytest.raises(ValueError):
            score(images, scenes)
    assert score([one_image, 255 - one_image], [one, one])["background"] == 0.5


def test_the_reader_needs_no_network() -> None:
    code = "import sys, ldm.evaluation.prompt_accuracy; print('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    answer = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
