from fractions import Fraction
from itertools import chain, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data.buckets import BucketBatches, Buckets, crop_loss
from ldm.data.order import Shuffle, WeightedShuffle
from ldm.errors import UserError

seeds = st.integers(0, 2**40)
SETTINGS = settings(max_examples=60, deadline=None)
tables = st.builds(
    lambda factor, times, max_ratio: Buckets(factor * times, factor, max_ratio),
    st.sampled_from([1, 4, 8, 64]),
    st.integers(1, 24),
    st.sampled_from([1.0, 1.5, 2.0, 4.0]),
)
pictures = st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=20)


def flat(lists):
    return list(chain.from_iterable(lists))


# ---------------------------------------------------------------------------------------------------------- table


@SETTINGS
@given(tables)
def test_buckets_are_symmetric_have_the_square_and_about_one_area(buckets):
    sizes = [tuple(size) for size in buckets.sizes.tolist()]
    side, factor = buckets.resolution, buckets.factor
    assert (side, side) in sizes and len(set(sizes)) == len(sizes)
    assert sizes == sorted(sizes, key=lambda size: size[0] / size[1])
    assert [(h, w) for w, h in sizes[::-1]] == sizes
    for w, h in sizes:
        assert w % factor == h % factor == 0
        assert max(w, h) <= buckets.max_ratio * min(w, h)
        # neither side can be longer
        assert w * h <= side**2 < min((w + factor) * h, w * (h + factor))


@SETTINGS
@given(tables)
def test_no_shape_that_would_do_is_missing(buckets):
    side, factor = buckets.resolution, buckets.factor
    for h in range(factor, side + 1, factor):
        w = max(w for w in range(h, side**2 // h + 1, factor) if w * h <= side**2)
        assert ([w, h] in buckets.sizes.tolist()) == (w <= buckets.max_ratio * h)


def test_a_resolution_that_cannot_be_halved_is_refused_with_the_next_that_can():
    with pytest.raises(UserError, match=r"data.resolution=500.*multiples of 64; use data.resolution=512"):
        Buckets(500, 64)
    with pytest.raises(ValueError, match="max_ratio"):
        Buckets(512, 64, max_ratio=0.5)


@SETTINGS
@given(tables, pictures)
def test_each_picture_goes_to_the_nearest_and_of_two_to_the_squarer(buckets, sizes):
    def distance(width, height, bucket):
        w, h = map(int, bucket)
        ratio = Fraction(width * h, height * w)
        return max(ratio, 1 / ratio), max(w, h) / min(w, h)

    found = buckets.assign(np.array(sizes, np.int32))
    for size, bucket in zip(sizes, found, strict=True):
        assert min(distance(*size, each) for each in buckets.sizes) == distance(*size, buckets.sizes[bucket])


def test_ties_go_to_the_squarer():
    buckets = Buckets(12, 1, max_ratio=16)
    at = buckets.sizes.tolist().index([16, 9])
    assert buckets.sizes[at + 1].tolist() == [18, 8]  # 2 is as far from 16/9 as from 18/8
    sizes = np.array([[2000, 1000], [2001, 1000], [1000, 2000], [1000, 2001]], np.int32)
    assert buckets.sizes[buckets.assign(sizes)].tolist() == [[16, 9], [18, 8], [9, 16], [8, 18]]


@SETTINGS
@given(tables, pictures)
def test_a_picture_on_its_side_goes_to_the_bucket_on_its_side(buckets, sizes):
    upright = np.array(sizes, np.int32)
    assert (buckets.assign(upright[:, ::-1]) == len(buckets.sizes) - 1 - buckets.assign(upright)).all()


@SETTINGS
@given(tables, pictures)
def test_crop_loss_is_what_covering_cuts_away(buckets, sizes):
    views = buckets.sizes[buckets.assign(np.array(sizes, np.int32))]
    loss = crop_loss(np.array(sizes, np.int32), views)
    for (width, height), (w, h), lost in zip(sizes, views.tolist(), loss, strict=True):
        scale = max(Fraction(w, width), Fraction(h, height))
        assert lost == pytest.approx(float(1 - w * h / (scale * width * scale * height)), abs=1e-12)


def test_within_the_range_of_ratios_little_is_cut_away():
    buckets = Buckets(512, 64)
    ratios = np.linspace(0.5, 2, 300)
    sizes = np.stack([1000 * np.sqrt(ratios), 1000 / np.sqrt(ratios)], axis=1).astype(np.int32)
    assert crop_loss(sizes, buckets.sizes[buckets.assign(sizes)]).max() < 0.17
    assert crop_loss(sizes, np.full_like(sizes, 512)).max() > 0.49


def test_a_million_pictures_are_assigned_at_once():
    sizes = np.random.default_rng(0).integers(100, 5000, (1_000_000, 2), dtype=np.int32)
    assert Buckets(512, 8).assign(sizes).shape == (1_000_000,)


def test_the_table_for_people():
    sizes = np.array([[512, 512]] * 5 + [[900, 700]] * 3 + [[300, 100]], np.int32)
    assert Buckets(512, 64).table(sizes, batch_size=2).splitlines() == [
        "   bucket  pictures  batches  mean crop  worst crop",
        "512 x 512         5        3       0.0%        0.0%",
        "576 x 448         3        2       0.0%        0.0%",
        "640 x 384         1        1      44.4%       44.4%",
        "      all         9        6       4.9%       44.4%",
    ]
    assert [line.split()[-3] for line in Buckets(512, 64).table(sizes, 2, world_size=2).splitlines()[1:]] == list(
        "2114"
    )


# -------------------------------------------------------------------------------------------------------- batches

sets = {
    "bucket_of": st.lists(st.integers(0, 4), min_size=1, max_size=40).map(np.array),
    "batch_size": st.integers(1, 8),
    "seed": seeds,
    "world_size": st.integers(1, 4),
}


def steps_of(bucket_of, width):
    return int(sum(-(-count // width) for count in np.bincount(bucket_of)))


def first(num_batches, *args, **kwargs):
    return list(islice(BucketBatches(*args, **kwargs), num_batches))


def all_ranks(num_batches, order, bucket_of, batch_size, seed, world_size, start=0):
    """The picks of each step, of all ranks."""
    ranks = [
        first(num_batches, order, bucket_of, batch_size, seed, rank, world_size, start) for rank in range(world_size)
    ]
    return [flat(batches) for batches in zip(*ranks, strict=True)]


@SETTINGS
@given(**sets)
def test_every_picture_comes_once_an_epoch_and_the_rest_is_the_stated_fill(bucket_of, batch_size, seed, world_size):
    width = batch_size * world_size
    num_steps = steps_of(bucket_of, width)
    order = Shuffle(len(bucket_of), seed)
    steps = all_ranks(2 * num_steps, order, bucket_of, batch_size, seed, world_size)
    for epoch in range(2):
        mine = steps[epoch * num_steps : (epoch + 1) * num_steps]
        assert all(len(step) == width for step in mine)
        shuffled = order.epoch(epoch)
        for bucket in np.unique(bucket_of):
            members = shuffled[bucket_of[shuffled] == bucket].tolist()
            filled = (members * (width + 1))[: -(-len(members) // width) * width]
            expected = {tuple((i, epoch) for i in filled[k : k + width]) for k in range(0, len(filled), width)}
            assert {tuple(step) for step in mine if bucket_of[step[0][0]] == bucket} == expected
        assert {index for step in mine for index, _ in step} == set(range(len(bucket_of)))


@SETTINGS
@given(**sets)
def test_all_ranks_have_the_same_bucket_in_a_step(bucket_of, batch_size, seed, world_size):
    order = Shuffle(len(bucket_of), seed)
    for step in all_ranks(12, order, bucket_of, batch_size, seed, world_size):
        assert len(step) == batch_size * world_size
        assert len({bucket_of[index] for index, _ in step}) == 1


@SETTINGS
@given(**sets)
def test_ranks_share_no_picture_of_a_step_that_is_not_filled(bucket_of, batch_size, seed, world_size):
    order = Shuffle(len(bucket_of), seed)
    num_steps = steps_of(bucket_of, batch_size * world_size)
    steps = all_ranks(num_steps, order, bucket_of, batch_size, seed, world_size)
    for bucket, count in enumerate(np.bincount(bucket_of)):
        whole = [step for step in steps if bucket_of[step[0][0]] == bucket and len(set(step)) == len(step)]
        assert len(whole) >= count // (batch_size * world_size)


@SETTINGS
@given(**sets, start=st.integers(0, 60), weights=st.none() | st.tuples(st.floats(1, 9), st.floats(1, 9)))
def test_starting_later_is_skipping(bucket_of, batch_size, seed, world_size, start, weights):
    num_samples = max(20, len(bucket_of))
    bucket_of = np.resize(bucket_of, num_samples)
    order = (
        Shuffle(num_samples, seed) if weights is None else WeightedShuffle(np.arange(num_samples) % 2, weights, seed)
    )
    whole = all_ranks(start + 3, order, bucket_of, batch_size, seed, world_size)
    assert all_ranks(3, order, bucket_of, batch_size, seed, world_size, start) == whole[start:]


@SETTINGS
@given(seed=seeds, weights=st.tuples(st.floats(1, 9), st.floats(1, 9)), batch_size=st.integers(1, 8))
def test_the_picks_of_a_weighted_epoch_all_come(seed, weights, batch_size):
    bucket_of = np.arange(30) % 4
    order = WeightedShuffle(np.arange(30) % 3 // 2, weights, seed)
    indices, turns = order.picks(0)
    num_steps = steps_of(bucket_of[indices], batch_size)
    drawn = flat(first(num_steps, order, bucket_of, batch_size, seed))
    assert set(drawn) == set(zip(indices.tolist(), turns.tolist(), strict=True))


def test_buckets_are_mixed_and_each_epoch_anew():
    bucket_of = np.repeat([0, 1], 200)
    steps = [bucket_of[step[0][0]] for step in first(100, Shuffle(400, 0), bucket_of, 8, 0)]
    assert 5 < sum(steps[:25]) < 20
    assert steps[:50] != steps[50:]


def test_batches_are_the_same_on_every_machine():
    bucket_of = np.array([0, 1, 0, 1, 0])
    batches = first(3, Shuffle(5, 0), bucket_of, 2, seed=0)
    assert batches == first(3, Shuffle(5, 0), bucket_of, 2, seed=0)
    assert batches == [[(3, 0), (1, 0)], [(2, 0), (4, 0)], [(0, 0), (2, 0)]]


def test_a_late_start_is_quick():
    order, bucket_of = Shuffle(100_000, 0), np.arange(100_000) % 9
    late = first(1, order, bucket_of, 16, seed=0, start=10**12)
    assert len(late[0]) == 16 and late[0][0][1] > 10**8
