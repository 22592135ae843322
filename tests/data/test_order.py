import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ldm.data.order import EndlessBatches, ShardShuffle, Shuffle, StreamBatches, WeightedShuffle, draws
from ldm.errors import UserError

seeds = st.integers(0, 2**40)
sizes = {"num_samples": st.integers(1, 50), "batch_size": st.integers(1, 20), "seed": seeds}
SETTINGS = settings(max_examples=60, deadline=None)


def endless(num_batches, num_samples, batch_size, seed, rank=0, world_size=1, start=0):
    return list(islice(EndlessBatches(Shuffle(num_samples, seed), batch_size, rank, world_size, start), num_batches))


def flat(lists):
    return list(chain.from_iterable(lists))


def indices_of(batches):
    return [index for index, _ in flat(batches)]


# ---------------------------------------------------------------------------------------------------------- draws


def splitmix64(*parts):
    """The same in whole numbers of any length."""
    mixed = 0
    for part in parts:
        mixed = (mixed + (part + 1) * 0x9E3779B97F4A7C15) % 2**64
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
        mixed ^= mixed >> 31
    return mixed


def test_draws_are_those_of_splitmix64():
    # the first outputs of the published generator that is seeded with 0
    assert splitmix64(0) == 0xE220A8397B1DCDAF and splitmix64(1) == 0x6E789E6AA1B965F4


@SETTINGS
@given(seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**31), indices=st.lists(st.integers(0, 2**40)), salt=seeds)
def test_draws_of_many_are_those_of_each(seed, epoch, indices, salt):
    found = draws(seed, epoch, np.array(indices, np.int64), salt)
    assert found.dtype == np.uint64
    assert found.tolist() == [splitmix64(seed, salt, epoch, index) for index in indices]


def test_draws_broadcast():
    table = draws(3, np.arange(4)[:, None], np.arange(5), salt=0)
    assert table.shape == (4, 5) and draws(3, 2, 1, salt=0).shape == ()
    assert table[2, 1] == draws(3, 2, 1, salt=0)


@pytest.mark.filterwarnings("error")
def test_draws_are_uniform_and_independent():
    table = draws(0, np.arange(40)[:, None], np.arange(5000), salt=0)
    assert len(np.unique(table)) == table.size
    bits = (table[..., None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean((0, 1)) - 0.5).max() < 0.006  # five standard deviations
    for other in (draws(1, np.arange(40)[:, None], np.arange(5000), 0), draws(0, 0, np.arange(5000), 1), table[1:]):
        rows = table[: len(other)] if other.ndim == 2 else table[0]
        assert abs(np.corrcoef(rows.ravel() / 2**64, other.ravel() / 2**64)[0, 1]) < 0.07


# -------------------------------------------------------------------------------------------------------- shuffle


@SETTINGS
@given(**sizes)
def test_every_index_comes_exactly_once_in_each_n_draws(num_samples, batch_size, seed):
    num_batches = -(-3 * num_samples // batch_size)
    drawn = flat(endless(num_batches, num_samples, batch_size, seed))
    for epoch in range(3):
        picks = drawn[epoch * num_samples : (epoch + 1) * num_samples]
        assert sorted(picks) == [(index, epoch) for index in range(num_samples)]


@SETTINGS
@given(**sizes)
def test_batches_are_full(num_samples, batch_size, seed):
    assert {len(batch) for batch in endless(7, num_samples, batch_size, seed)} == {batch_size}


@SETTINGS
@given(**sizes, world_size=st.integers(1, 5))
def test_ranks_share_out_the_order_of_one_rank_with_the_whole_batch(num_samples, batch_size, seed, world_size):
    together = endless(4, num_samples, batch_size * world_size, seed)
    ranks = [endless(4, num_samples, batch_size, seed, rank, world_size) for rank in range(world_size)]
    assert [flat(batches) for batches in zip(*ranks, strict=True)] == together


@SETTINGS
@given(**sizes, world_size=st.integers(1, 4), start=st.integers(0, 30), data=st.data())
def test_starting_later_is_skipping(num_samples, batch_size, seed, world_size, start, data):
    rank = data.draw(st.integers(0, world_size - 1))
    whole = endless(start + 3, num_samples, batch_size, seed, rank, world_size)
    assert endless(3, num_samples, batch_size, seed, rank, world_size, start) == whole[start:]


def test_order_can_be_gone_through_again():
    batches = EndlessBatches(Shuffle(10, seed=1), 3)
    assert list(islice(batches, 5)) == list(islice(batches, 5))


def test_seeds_and_epochs_are_shuffled_apart():
    orders = [tuple(Shuffle(100, seed).epoch(epoch)) for seed in range(5) for epoch in range(5)]
    orders.append(tuple(range(100)))
    assert len(set(orders)) == len(orders)


def test_order_is_the_same_on_every_machine():
    assert endless(2, 6, 4, seed=0) == [[(3, 0), (2, 0), (5, 0), (4, 0)], [(0, 0), (1, 0), (1, 1), (4, 1)]]


def test_order_is_the_same_in_every_process():
    code = (
        "from itertools import islice\n"
        "from ldm.data.order import *\n"
        "orders = EndlessBatches(Shuffle(9, 5), 4), EndlessBatches(WeightedShuffle([0, 0, 1, 1], [1, 3], 5), 4)\n"
        "print([list(islice(each, 5)) for each in (*orders, StreamBatches(ShardShuffle([3, 4, 5], 5, 2), 4))])\n"
        "print(draws(5, [0, 1], 7, 3).tolist())\n"
    )
    ran = [
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": hashes}, capture_output=True, text=True)
        for hashes in ("1", "2")
    ]
    assert ran[0].stdout == ran[1].stdout and ran[0].stdout.count("\n") == 2, ran[0].stderr


def test_nothing_cannot_be_shuffled():
    with pytest.raises(ValueError, match="nothing to shuffle"):
        Shuffle(0, seed=0)


# ------------------------------------------------------------------------------------------------ weighted shuffle


@st.composite
def mixes(draw):
    """Which part each sample belongs to, and weights that give each part something."""
    counts = draw(st.lists(st.integers(5, 20), min_size=1, max_size=4))
    parts = draw(st.permutations(np.repeat(np.arange(len(counts)), counts).tolist()))
    weights = [draw(st.floats(1, 10)) for _ in counts]
    assume(min(weights) / sum(weights) * len(parts) >= 1)
    return parts, weights


@SETTINGS
@given(mix=mixes(), seed=seeds, epoch=st.integers(0, 1000))
def test_each_part_has_its_share_of_every_epoch(mix, seed, epoch):
    parts, weights = np.array(mix[0]), np.array(mix[1])
    order = WeightedShuffle(parts, mix[1], seed)
    indices, _ = order.picks(epoch)
    assert len(indices) == order.num_samples == len(parts)
    found = np.bincount(parts[indices], minlength=len(weights))
    assert found.tolist() == order.counts.tolist()
    assert np.abs(found - weights / weights.sum() * len(parts)).max() < 1


@SETTINGS
@given(mix=mixes(), seed=seeds, num_epochs=st.integers(1, 12))
def test_samples_of_a_part_come_equally_often_and_are_told_apart(mix, seed, num_epochs):
    parts = np.array(mix[0])
    order = WeightedShuffle(parts, mix[1], seed)
    picks = flat(zip(*(each.tolist() for each in order.picks(epoch)), strict=True) for epoch in range(num_epochs))
    assert len(set(picks)) == len(picks)
    times = np.bincount([index for index, _ in picks], minlength=len(parts))
    for part in range(len(mix[1])):
        mine = times[parts == part]
        assert mine.max() - mine.min() <= 1
    for index, turn in picks:
        assert 0 <= turn < times[index]


@SETTINGS
@given(mix=mixes(), batch_size=st.integers(1, 20), world_size=st.integers(1, 4), start=st.integers(0, 20), seed=seeds)
def test_weighted_batches_are_shared_out_and_begin_anywhere(mix, batch_size, world_size, start, seed):
    order = WeightedShuffle(*mix, seed)
    together = list(islice(EndlessBatches(order, batch_size * world_size), start + 2))
    ranks = [list(islice(EndlessBatches(order, batch_size, rank, world_size, start), 2)) for rank in range(world_size)]
    assert [flat(batches) for batches in zip(*ranks, strict=True)] == together[start:]


def test_shares_are_rounded_by_the_largest_remainder():
    assert WeightedShuffle([0, 1, 2, 0, 1, 2, 0], [1, 1, 1], seed=0).counts.tolist() == [3, 2, 2]
    assert WeightedShuffle([0] * 9 + [1], [0.25, 0.75], seed=0).counts.tolist() == [3, 7]
    assert WeightedShuffle([0] * 90 + [1] * 10, [200, 100], seed=0).counts.tolist() == [67, 33]


def test_parts_are_mixed_within_an_epoch():
    parts = np.repeat([0, 1], 500)
    indices, _ = WeightedShuffle(parts, [1, 1], seed=0).picks(0)
    assert 200 < parts[indices[:500]].sum() < 300


def test_parts_are_not_shuffled_alike():
    indices, _ = WeightedShuffle(np.repeat([0, 1, 2, 2], 100), [1, 1, 6], seed=0).picks(0)
    firsts = [set((indices[indices // 100 == part] % 100).tolist()) for part in (0, 1)]
    assert len(firsts[0]) == len(firsts[1]) == 50 and firsts[0] != firsts[1]


@pytest.mark.parametrize(
    ("parts", "weights", "message"),
    [
        ([0, 0, 0, 1], [1000, 1], r"source 2 of the mix gets none of the 4 pictures .* weight 1 .* beside 1000"),
        ([0, 0, 2], [1, 1, 1], "source 2 of the mix has no pictures"),
    ],
)
def test_a_part_that_would_never_come_is_named(parts, weights, message):
    with pytest.raises(UserError, match=message):
        WeightedShuffle(parts, weights, seed=0)


@pytest.mark.parametrize(("parts", "weights"), [([], [1]), ([0, 1], [1]), ([-1, 0], [1])])
def test_parts_without_a_weight_are_refused(parts, weights):
    with pytest.raises(ValueError, match="not all among"):
        WeightedShuffle(parts, weights, seed=0)


# --------------------------------------------------------------------------------------------------------- shards


shards = {
    "counts": st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    "seed": seeds,
    "window": st.integers(1, 5),
    "world_size": st.integers(1, 6),
}


def share(shuffle, *args):
    return flat(indices.tolist() for indices in shuffle.epoch(*args))


@SETTINGS
@given(**shards, epoch=st.integers(0, 50))
def test_ranks_have_every_sample_of_the_shards_once(counts, seed, window, world_size, epoch):
    shuffle = ShardShuffle(counts, seed, window)
    shares = [share(shuffle, epoch, rank, world_size) for rank in range(world_size)]
    assert sorted(flat(shares)) == list(range(sum(counts)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@SETTINGS
@given(**shards, epoch=st.integers(0, 50), start=st.integers(0, 60), data=st.data())
def test_a_share_can_begin_anywhere(counts, seed, window, world_size, epoch, start, data):
    rank = data.draw(st.integers(0, world_size - 1))
    shuffle = ShardShuffle(counts, seed, window)
    assert share(shuffle, epoch, rank, world_size, start) == share(shuffle, epoch, rank, world_size)[start:]


@SETTINGS
@given(**shards, batch_size=st.integers(1, 12), start=st.integers(0, 20), data=st.data())
def test_stream_batches_are_the_shares_end_to_end(counts, seed, window, world_size, batch_size, start, data):
    rank = data.draw(st.integers(0, world_size - 1))
    shuffle = ShardShuffle(counts, seed, window)
    batches = list(islice(StreamBatches(shuffle, batch_size, rank, world_size, start), 4))
    assert {len(batch) for batch in batches} == {batch_size}
    line, epoch = [], 0
    while len(line) < (start + 4) * batch_size:
        line += [(index, epoch) for index in share(shuffle, epoch, rank, world_size)]
        epoch += 1
    assert flat(batches) == line[start * batch_size :][: 4 * batch_size]


@SETTINGS
@given(**shards, batch_size=st.integers(1, 12), num_batches=st.integers(1, 30))
def test_streams_lose_nothing_repeat_nothing_and_stay_together(
    counts, seed, window, world_size, batch_size, num_batches
):
    shuffle = ShardShuffle(counts, seed, window)
    ranks = [
        flat(islice(StreamBatches(shuffle, batch_size, rank, world_size), num_batches)) for rank in range(world_size)
    ]
    times = Counter(flat(ranks))
    assert set(times.values()) == {1}  # no pick twice, on whatever rank
    # Ranks that have drawn equally much stand at the same place of their epochs, but for a sample.
    epochs = [max(epoch for _, epoch in picks) for picks in ranks]
    for epoch in range(min(epochs)):
        assert sorted(index for index, at in times if at == epoch) == list(range(sum(counts)))
    drawn = num_batches * batch_size * world_size
    assert all(abs(epoch - (drawn - 1) // sum(counts)) <= 1 + world_size // sum(counts) for epoch in epochs)


def test_a_rank_reads_few_shards_at_a_time():
    shuffle = ShardShuffle([100] * 40, seed=0, window=4)
    windows = list(shuffle.epoch(3, rank=1, world_size=2))
    assert [len(window) for window in windows] == [400] * 5
    shards_of = [set(window // 100) for window in windows]
    assert [len(each) for each in shards_of] == [4] * 5 and len(set.union(*shards_of)) == 20
    for window in windows:  # shuffled through and through, and each anew
        assert len(set((window[:100] // 100).tolist())) == 4
    assert (windows[0] % 100 != windows[1] % 100).any()


def test_epochs_and_seeds_shuffle_shards_apart():
    orders = {tuple(share(ShardShuffle([5] * 20, seed, window=1), epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert len({tuple(index // 5 for index in order[::5]) for order in orders}) == 9


def test_two_billion_samples_need_no_large_array():
    counts = np.full(2**17, 2**14)
    tracemalloc.start()
    began = time.perf_counter()
    shuffle = ShardShuffle(counts, seed=0)
    assert shuffle.num_samples == 2**31
    for start in (0, 2**22 - 3, 2**40):
        batches = islice(StreamBatches(shuffle, 256, rank=3, world_size=4, start=start), 4)
        picks = flat(batches)
        assert len(set(picks)) == 1024 and all(0 <= index < 2**31 for index, _ in picks)
    assert time.perf_counter() - began < 5
    assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("counts", [[], [0, 0]])
def test_shards_without_samples_are_refused(counts):
    with pytest.raises(ValueError, match="nothing to shuffle"):
        ShardShuffle(counts, seed=0)
