"""In which order samples come: endless batches, each a function of the seed, its number and the rank alone.

Nothing is kept between batches, so a resumed run just starts at a later one.

N samples, B batch, R ranks.
"""

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

from ldm.errors import UserError

Pick = tuple[int, int]  # a sample's index, and how often it came before: all that is drawn anew follows from both


def draws(seed: int, epochs: ArrayLike, indices: ArrayLike, salt: int) -> NDArray[np.uint64]:
    """Draw 64 random bits for each sample of an epoch: a function of the arguments, whatever is drawn beside.

    SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014) as a hash: the
    arguments are the steps, one after another.

    Args:
        seed: any integer; its lowest 64 bits count.
        epochs, indices: integers that broadcast.
        salt: tells draws for different purposes apart.

    Returns:
        uniform uint64, in the shape that `epochs` and `indices` broadcast to.

    >>> draws(seed=0, epochs=[0, 1], indices=7, salt=1) % 100
    array([ 2, 22], dtype=uint64)
    """
    mixed = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic is modulo 2**64
        for part in (seed % 2**64, salt, epochs, indices):
            mixed = mixed + (np.asarray(part).astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed = mixed ^ (mixed >> np.uint64(31))
    return np.asarray(mixed)


class Order(Protocol):
    """An endless sequence of epochs of `num_samples` picks."""

    num_samples: int

    def picks(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (N,) indices, and (N,) how often each sample came before."""
        ...


class Shuffle:
    """Every sample once an epoch, in an order that is a function of (seed, epoch).

    Raises:
        ValueError: there is no sample.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples}: nothing to shuffle")
        self.num_samples, self.seed = num_samples, seed

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """Return (N,): a permutation of 0..N-1."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)

    def picks(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return self.epoch(epoch), np.broadcast_to(np.int64(epoch), self.num_samples)


class WeightedShuffle:
    """Samples of several parts, each with its fixed share of an epoch of N picks.

    The shares N w_s / Σw are rounded to whole picks that add up to N (largest remainder, ties to the earlier part).
    A part is drawn from its own endless sequence of shuffles, so its samples come equally often: at the end of any
    epoch their counts differ by one at most. What is drawn anew for a sample goes by its part's shuffles, not epochs:
    one that comes twice in an epoch is not twice the same.

    Args:
        parts: (N,) which part each sample belongs to, from 0.
        weights: one for each part, relative to the others.
        seed: decides every draw.

    Raises:
        ValueError: there is no sample, or a part without a weight.
        UserError: a part is empty, or gets none of the picks.
    """

    def __init__(self, parts: ArrayLike, weights: Sequence[float], seed: int) -> None:
        parts = np.asarray(parts)
        if not len(parts) or parts.min() < 0 or parts.max() >= len(weights):
            raise ValueError(f"{len(parts)} samples of parts that are not all among the {len(weights)} with a weight")
        self.num_samples, self.seed = len(parts), seed
        self.members = [np.flatnonzero(parts == part) for part in range(len(weights))]
        shares = np.asarray(weights, dtype=np.float64) / np.sum(weights) * self.num_samples
        self.counts = np.floor(shares).astype(np.int64)
        rest = self.num_samples - int(self.counts.sum())
        self.counts[np.argsort(self.counts - shares, kind="stable")[:rest]] += 1
        for part, (members, count) in enumerate(zip(self.members, self.counts, strict=True)):
            if not len(members):
                raise UserError(f"source {part + 1} of the mix has no pictures to train on: take it out")
            if not count:
                raise UserError(
                    f"source {part + 1} of the mix gets none of the {self.num_samples} pictures of an epoch: "
                    f"its weight {weights[part]:g} is too small beside {max(weights):g}; raise it, or take it out"
                )

    def picks(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        indices, turns = [], []
        for part, (members, count) in enumerate(zip(self.members, self.counts.tolist(), strict=True)):
            first, stop = epoch * count, (epoch + 1) * count
            for turn in range(first // len(members), (stop - 1) // len(members) + 1):
                shuffled = self._generator(turn, part).permutation(members)
                begin = turn * len(members)
                indices.append(shuffled[max(0, first - begin) : stop - begin])
                turns.append(np.full(len(indices[-1]), turn))
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
        return np.concatenate(indices)[order], np.concatenate(turns)[order]

    def _generator(self, turn: int, part: int) -> np.random.Generator:
        # The key ends in other than 0: numpy fills short keys up with zeros, and (seed, epoch) is taken.
        return np.random.default_rng([self.seed, turn, part, 1])


class EndlessBatches(Sampler[list[Pick]]):
    """Cut an endless sequence of epochs into batches.

    Batch k of rank r is the (k R + r)-th of all: nothing is dropped, and a batch may span two epochs.

    >>> batches = iter(EndlessBatches(Shuffle(num_samples=4, seed=0), batch_size=3))
    >>> next(batches), next(batches)
    ([(2, 0), (0, 0), (1, 0)], [(3, 0), (3, 1), (0, 1)])
    """

    def __init__(self, order: Order, batch_size: int, rank: int = 0, world_size: int = 1, start: int = 0) -> None:
        self.order, self.batch_size = order, batch_size
        self.rank, self.world_size, self.start = rank, world_size, start

    def __iter__(self) -> Iterator[list[Pick]]:
        position = (self.start * self.world_size + self.rank) * self.batch_size
        current = -1
        while True:
            batch: list[Pick] = []
            while len(batch) < self.batch_size:
                epoch, offset = divmod(position + len(batch), self.order.num_samples)
                if epoch != current:
                    current, (indices, turns) = epoch, self.order.picks(epoch)
                piece = slice(offset, offset + self.batch_size - len(batch))
                batch += zip(indices[piece].tolist(), turns[piece].tolist(), strict=True)
            yield batch
            position += self.batch_size * self.world_size


class ShardShuffle:
    """Shuffle samples that lie in shards so that a rank reads few shards at a time; for any number of samples.

    An epoch: shards are shuffled and laid end to end; a rank takes its contiguous share of the N samples, cuts it into
    windows of `window` shards, and shuffles each. Every sample comes once over all ranks. Shares that cannot be equal
    go round: share (r + e) mod R of epoch e is rank r's, so no rank is ever more than one sample ahead.

    Args:
        counts: samples of each shard.
        seed: decides the order.
        window: shards that are shuffled together.

    Raises:
        ValueError: there is no sample.
    """

    def __init__(self, counts: ArrayLike, seed: int, window: int = 8) -> None:
        counts = np.asarray(counts, dtype=np.int64)
        self.num_samples, self.seed, self.window = int(counts.sum()), seed, window
        if self.num_samples < 1:
            raise ValueError(f"{len(counts)} shards hold no samples: nothing to shuffle")
        self.counts = counts[counts > 0]
        self.firsts = np.cumsum(self.counts) - self.counts  # empty shards have no indices

    def epoch(self, epoch: int, rank: int = 0, world_size: int = 1, start: int = 0) -> Iterator[NDArray[np.int64]]:
        """Give a rank's indices of an epoch from its `start`-th on, one window's at a time."""
        share = (rank + epoch) % world_size
        first, stop = (self.num_samples * (share + i) // world_size for i in range(2))
        if first + start >= stop:
            return
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.counts))
        ends = np.cumsum(self.counts[order])
        begins = ends - self.counts[order]
        low, here = np.searchsorted(ends, [first, first + start], side="right").tolist()
        high = int(np.searchsorted(ends, stop)) + 1
        for window in range(here - (here - low) % self.window, high, self.window):
            shards = slice(window, min(window + self.window, high))
            bounds = zip(
                np.maximum(begins[shards], first).tolist(),
                np.minimum(ends[shards], stop).tolist(),
                (self.firsts[order[shards]] - begins[shards]).tolist(),
                strict=True,
            )
            indices = np.concatenate([np.arange(a, b) + offset for a, b, offset in bounds])
            position = max(int(begins[window]), first)
            shuffled = np.random.default_rng([self.seed, epoch, position, 2]).permutation(indices)
            yield shuffled[max(0, first + start - position) :]


class StreamBatches(Sampler[list[Pick]]):
    """Cut a rank's endless sequence of shares of shuffled shards into batches.

    Nothing is dropped, and a batch may span two epochs. No array is larger than one window of shards.
    """

    def __init__(
        self, shuffle: ShardShuffle, batch_size: int, rank: int = 0, world_size: int = 1, start: int = 0
    ) -> None:
        self.shuffle, self.batch_size = shuffle, batch_size
        self.rank, self.world_size, self.start = rank, world_size, start

    def __iter__(self) -> Iterator[list[Pick]]:
        num, world_size = self.shuffle.num_samples, self.world_size
        # The shares of a rank lie end to end on a line of whole sets: epoch e's begins at (r + e) N // R.
        position = self.rank * num // world_size + self.start * self.batch_size
        share = ((position + 1) * world_size - 1) // num
        epoch, start = share - self.rank, position - share * num // world_size
        batch: list[Pick] = []
        while True:
            for indices in self.shuffle.epoch(epoch, self.rank, world_size, start):
                taken = 0
                while taken < len(indices):
                    piece = indices[taken : taken + self.batch_size - len(batch)].tolist()
                    batch += zip(piece, repeat(epoch))
                    taken += len(piece)
                    if len(batch) == self.batch_size:
                        yield batch
                        batch = []
            epoch, start = epoch + 1, 0
