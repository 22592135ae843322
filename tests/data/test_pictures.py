import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data.buckets import BucketBatches, Buckets
from ldm.data.images import scale_and_crop, to_pixels
from ldm.data.order import Shuffle
from ldm.data.pictures import Pictures

SETTINGS = settings(max_examples=30, deadline=None)


class Drawn:
    """Random pictures of given sizes, that counts what it is asked for."""

    def __init__(self, sizes, texts=("a dog",), channels=3):
        self.shapes = np.array(sizes, np.int32)
        self.texts = [texts if isinstance(texts, tuple) else texts[i] for i in range(len(sizes))]
        rng = np.random.default_rng(0)
        self.pixels = [rng.integers(0, 256, (h, w, channels), dtype=np.uint8) for w, h in sizes]
        self.asked = Counter()

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        assert type(index) is int
        self.asked[index] += 1
        return {"image": self.pixels[index], "captions": self.texts[index]}

    def captions(self):
        self.asked["captions"] += 1
        return self.texts

    def sizes(self):
        self.asked["sizes"] += 1
        return self.shapes


def squares(num, side=16, **options):
    return Drawn([(side, side)] * num, **options)


def pixels(pictures, indices, variant=0):
    return to_pixels(pictures.images(indices, variant))


# ---------------------------------------------------------------------------------------------------------- batch


def test_a_batch():
    source = squares(6, texts=[(f"number {i}",) for i in range(6)])
    pictures = Pictures(source, 16)
    batch = pictures.__getitems__([(5, 0), (0, 3), (5, 1)])
    assert len(pictures) == 6
    assert batch["image"].shape == (3, 3, 16, 16) and batch["image"].dtype == torch.float32
    assert np.array_equal(to_pixels(batch["image"]), np.stack([source.pixels[i] for i in (5, 0, 5)]))
    assert batch["caption"] == ["number 5", "number 0", "number 5"]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_of_any_size_and_channels_are_cut_to_one_size(channels):
    source = Drawn([(16, 3), (3, 16), (40, 8), (8, 8)], channels=channels)
    batch = Pictures(source, 8).__getitems__([(i, 0) for i in range(4)])
    assert batch["image"].shape == (4, channels, 8, 8)


def test_plain_training_asks_for_pictures_only():
    source = squares(4, texts=("a", "b"))
    pictures = Pictures(source, 16)
    pictures.__getitems__([(0, 0), (3, 1)])
    assert source.asked == {0: 1, 3: 1} and pictures.bucket_of is None


def test_captions_and_sizes_are_asked_for_once():
    source = squares(4, texts=("a", "b"))
    pictures = Pictures(source, 16, buckets=Buckets(16, 8), crop="random", flip=True)
    for epoch in range(3):
        pictures.__getitems__([(0, epoch), (3, epoch)])
        pictures.caption_numbers([0, 1], [epoch, epoch])
        assert pictures.captions is source.texts and len(pictures.view_sizes) == len(pictures.bucket_of) == 4
    assert source.asked["captions"] == source.asked["sizes"] == 1


# ------------------------------------------------------------------------------------------------------- captions


@SETTINGS
@given(seed=st.integers(0, 2**40), counts=st.lists(st.integers(1, 5), min_size=1, max_size=10))
def test_the_caption_of_a_batch_is_the_one_of_that_number(seed, counts):
    texts = [tuple(f"{i}, {k}" for k in range(count)) for i, count in enumerate(counts)]
    pictures = Pictures(squares(len(counts), texts=texts), 16, seed)
    indices, epochs = np.repeat(np.arange(len(counts)), 4), np.tile(np.arange(4), len(counts))
    numbers = pictures.caption_numbers(indices, epochs)
    assert ((numbers >= 0) & (numbers < np.array(counts)[indices])).all()
    batch = pictures.__getitems__(list(zip(indices.tolist(), epochs.tolist(), strict=True)))
    assert batch["caption"] == [texts[i][k] for i, k in zip(indices, numbers, strict=True)]


def test_captions_come_equally_often_anew_in_each_epoch_and_by_the_seed():
    pictures = Pictures(squares(3, texts=("a", "b", "c")), 16, seed=1)
    numbers = pictures.caption_numbers(np.zeros(3000, int), np.arange(3000))
    assert np.bincount(numbers).min() > 900
    same = np.mean(numbers == pictures.caption_numbers(np.ones(3000, int), np.arange(3000)))
    assert 0.25 < same < 0.42
    other = Pictures(squares(3, texts=("a", "b", "c")), 16, seed=2)
    assert (other.caption_numbers(np.zeros(3000, int), np.arange(3000)) != numbers).any()


# ---------------------------------------------------------------------------------------------------------- views


def test_view_0_is_the_centre_as_it_is():
    source = Drawn([(40, 20), (20, 60)])
    for options in ({}, {"flip": True}, {"crop": "random"}, {"crop": "random", "flip": True}):
        found = pixels(Pictures(source, 16, **options), [0, 1])
        assert np.array_equal(found, np.stack([scale_and_crop(each, 16, 16) for each in source.pixels]))


def test_odd_views_are_mirrored_where_flips_are_wanted():
    source = Drawn([(40, 20), (20, 60)])
    for crop in ("centre", "random"):
        straight, flipped = Pictures(source, 16, crop=crop), Pictures(source, 16, crop=crop, flip=True)
        for variant in range(4):
            mirrored = pixels(flipped, [0, 1], variant)
            expected = pixels(straight, [0, 1], variant)
            assert np.array_equal(mirrored, expected[:, :, ::-1] if variant % 2 else expected)


def test_no_picture_is_mirrored_that_a_caption_says_left_or_right_of():
    source = squares(4, texts=[("a dog",), ("a dog", "a dog on the LEFT"), ("a right-handed man",), ("the left wing",)])
    found = pixels(Pictures(source, 16, flip=True), range(4), 1)
    assert [not np.array_equal(found[i], source.pixels[i]) for i in range(4)] == [True, False, False, False]


def test_random_views_have_places_of_their_own_along_the_long_side():
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (64, 256, 3))
    source = Drawn([(256, 64), (64, 256)])
    source.pixels = [ramp, ramp.transpose(1, 0, 2)]
    pictures = Pictures(source, 64, crop="random")
    for index, axis in ((0, 2), (1, 1)):
        lefts = np.array([pixels(pictures, [index], variant).min() for variant in range(1, 200)])
        widths = np.array([np.ptp(pixels(pictures, [index], variant), axis=axis).max() for variant in range(1, 9)])
        assert lefts.min() < 8 and lefts.max() > 184 and abs(lefts.mean() - 96) < 15 and (widths > 60).all()
    firsts = [pixels(pictures, [0, 0], [variant, variant]) for variant in (1, 2)]
    assert (firsts[0][0] == firsts[0][1]).all() and (firsts[0] != firsts[1]).any()
    assert (pixels(Pictures(source, 64, seed=1, crop="random"), [0], 1) != firsts[0][0]).any()


def test_the_two_coordinates_of_a_place_are_drawn_apart():
    pictures = Pictures(squares(1), 16, crop="random")
    x, y = pictures._places(np.zeros(2000, int), np.arange(1, 2001))
    assert abs(np.corrcoef(x, y)[0, 1]) < 0.1
    for axis in (x, y):
        assert 0 <= axis.min() < 0.01 and 0.99 < axis.max() < 1


@SETTINGS
@given(seed=st.integers(0, 2**40), crop=st.sampled_from(["centre", "random"]), flip=st.booleans())
def test_a_batch_holds_the_views_of_their_numbers(seed, crop, flip):
    pictures = Pictures(Drawn([(40, 20), (20, 60), (16, 16)]), 16, seed, crop=crop, flip=flip)
    indices, epochs = np.tile([0, 1, 2], 3), np.repeat(np.arange(3), 3)
    batch = pictures.__getitems__(list(zip(indices.tolist(), epochs.tolist(), strict=True)))
    assert torch.equal(batch["image"], pictures.images(indices, pictures.variant_numbers(indices, epochs)))


def test_views_are_drawn_from_all_or_from_those_a_cache_has():
    pictures = Pictures(squares(1), 16, crop="random")
    indices, epochs = np.zeros(4000, int), np.arange(4000)
    endless = pictures.variant_numbers(indices, epochs)
    assert len(np.unique(endless)) > 3990 and endless.min() >= 0 and endless.max() < 2**31
    assert np.bincount(pictures.variant_numbers(indices, epochs, modulo=4)).min() > 900
    assert pictures.variant_numbers(indices, epochs, modulo=1).max() == 0


def test_what_is_drawn_is_the_same_on_every_machine():
    pictures = Pictures(squares(3, texts=("a", "b", "c")), 16, seed=7, crop="random")
    assert pictures.caption_numbers([0, 1, 2], [0, 0, 5]).tolist() == [2, 1, 0]
    assert pictures.variant_numbers([0, 1, 2], [0, 0, 5]).tolist() == [909186998, 196542293, 787117279]
    x, y = pictures._places(np.arange(2), np.array([1, 2]))
    assert np.round(x, 6).tolist() == [0.51856, 0.253566] and np.round(y, 6).tolist() == [0.444168, 0.758352]


def test_how_many_views_a_cache_keeps():
    def num(**options):
        return Pictures(squares(1), 16, **options).num_variants

    assert num() == num(variants=9) == num(fixed=True, crop="random", flip=True, variants=9) == 1
    assert num(flip=True) == num(flip=True, variants=9) == 2
    assert num(crop="random") == 2 and num(crop="random", variants=4) == num(crop="random", flip=True, variants=4) == 4


def test_fixed_pictures_always_look_the_same():
    source = Drawn([(40, 20)], texts=("a", "b", "c"))
    pictures = Pictures(source, 16, crop="random", flip=True, fixed=True)
    indices, epochs = np.zeros(20, int), np.arange(20)
    assert not pictures.caption_numbers(indices, epochs).any() and not pictures.variant_numbers(indices, epochs).any()
    batch = pictures.__getitems__([(0, epoch) for epoch in range(20)])
    assert set(batch["caption"]) == {"a"}
    assert np.array_equal(to_pixels(batch["image"]), np.stack([scale_and_crop(source.pixels[0], 16, 16)] * 20))
    assert source.asked["captions"] == 0


def test_the_transform_changes_with_all_that_changes_views_and_nothing_else():
    def transform(resolution=16, seed=0, **options):
        return json.dumps(Pictures(squares(1), resolution, seed, **options).transform)

    different = [
        transform(),
        transform(resolution=8),
        transform(buckets=Buckets(16, 8)),
        transform(buckets=Buckets(16, 4)),
        transform(flip=True),
        transform(crop="random"),
        transform(crop="random", seed=1),
        transform(crop="random", variants=4),
        transform(crop="random", flip=True),
    ]
    assert len(set(different)) == len(different)
    assert transform(seed=1) == transform(variants=4) == transform()


# -------------------------------------------------------------------------------------------------------- buckets


@SETTINGS
@given(sizes=st.lists(st.tuples(st.integers(4, 90), st.integers(4, 90)), min_size=1, max_size=12))
def test_batches_of_buckets_have_the_size_of_their_bucket(sizes):
    pictures = Pictures(Drawn(sizes), 32, buckets=Buckets(32, 8), crop="random", flip=True)
    for picks, _ in zip(BucketBatches(Shuffle(len(sizes), 0), pictures.bucket_of, 3, 0), range(8), strict=False):
        width, height = pictures.buckets.sizes[pictures.bucket_of[picks[0][0]]]
        assert pictures.__getitems__(picks)["image"].shape == (3, 3, height, width)
        assert {tuple(pictures.view_sizes[index].tolist()) for index, _ in picks} == {(width, height)}


def test_views_of_two_sizes_make_no_batch():
    pictures = Pictures(Drawn([(32, 16), (16, 32)]), 32, buckets=Buckets(32, 8))
    with pytest.raises(ValueError, match=r"different sizes in one batch: \[\[24, 40\], \[40, 24\]\]"):
        pictures.__getitems__([(0, 0), (1, 0)])
    assert Pictures(Drawn([(32, 16), (16, 32)]), 32).view_sizes.tolist() == [[32, 32]] * 2
