"""Aspect-ratio buckets: a few picture shapes of about equal area, and batches of one shape each.

N pictures, K buckets, W H pixels, B batch, R ranks.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from ldm.data.order import Order, Pick, Shuffle
from ldm.errors import UserError


class Buckets:
    """Sizes that the network can take, one for each aspect ratio, from tall over square to wide.

    For each height H up to `resolution` the widest W with W H <= resolution², both multiples of `factor` and
    W / H <= max_ratio; and the same turned on its side.

    Args:
        resolution: side of the square, pixels.
        factor: what W and H must be multiples of.
        max_ratio: longer side over shorter side, at most.

    Raises:
        UserError: `resolution` is no multiple of `factor`.
        ValueError: `max_ratio` is below 1.

    >>> Buckets(resolution=512, factor=64).sizes.tolist()
    [[384, 640], [448, 576], [512, 512], [576, 448], [640, 384]]
    """

    def __init__(self, resolution: int, factor: int, max_ratio: float = 2.0) -> None:
        if resolution % factor:
            near = max(1, round(resolution / factor)) * factor
            raise UserError(
                f"data.resolution={resolution}: VAE and U-Net halve pictures so often that sides must be multiples of "
                f"{factor}; use data.resolution={near}"
            )
        if max_ratio < 1:
            raise ValueError(f"max_ratio={max_ratio}: longer over shorter side is at least 1")
        heights = np.arange(resolution, 0, -factor)
        widths = resolution**2 // heights // factor * factor
        wide = np.stack([widths, heights], axis=1)[widths <= max_ratio * heights].astype(np.int32)
        self.resolution, self.factor, self.max_ratio = resolution, factor, max_ratio
        self.sizes: NDArray[np.int32] = np.concatenate([wide[:0:-1, ::-1], wide])  # (K, 2): W, H

    def assign(self, sizes: NDArray[np.int32]) -> NDArray[np.int64]:
        """Find the bucket of each picture: the nearest by the logarithm of W / H, of two as near the squarer.

        Args:
            sizes: (N, 2) W, H.

        Returns:
            (N,) rows of `self.sizes`.
        """
        square = len(self.sizes) // 2
        wide = self.sizes[square:].astype(np.float64)
        long, short = sizes.max(axis=1).astype(np.float64), sizes.min(axis=1).astype(np.float64)
        steps = np.zeros(len(sizes), dtype=np.int64)
        # Beyond the geometric mean of two neighbours' ratios the wider one is nearer. Products of whole numbers tell
        # a tie for what it is, where logarithms would not.
        for (w1, h1), (w2, h2) in pairwise(wide):
            steps += long**2 * (h1 * h2) > short**2 * (w1 * w2)
        return square + np.where(sizes[:, 0] > sizes[:, 1], steps, -steps)

    def table(self, sizes: NDArray[np.int32], batch_size: int, world_size: int = 1) -> str:
        """Say for people what becomes of pictures: buckets in use, pictures, batches an epoch and rank, crop loss.

        Args:
            sizes: (N, 2) W, H of the pictures.
            batch_size: B of each rank.
            world_size: R.
        """
        bucket_of = self.assign(sizes)
        loss = crop_loss(sizes, self.sizes[bucket_of])
        lines: list[tuple[str, ...]] = [("bucket", "pictures", "batches", "mean crop", "worst crop")]
        num_batches = _num_steps(bucket_of, batch_size * world_size)
        for bucket in np.unique(bucket_of):
            mine, (width, height) = loss[bucket_of == bucket], self.sizes[bucket]
            counts = (len(mine), int(num_batches[bucket]))
            lines.append((f"{width} x {height}", *map(str, counts), f"{mine.mean():.1%}", f"{mine.max():.1%}"))
        total = (len(loss), int(num_batches.sum()))
        lines.append(("all", *map(str, total), f"{loss.mean():.1%}", f"{loss.max():.1%}"))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def crop_loss(sizes: NDArray[np.int32], views: NDArray[np.int32]) -> NDArray[np.float64]:
    """Compute which share of each picture is cut away when it is scaled to cover its view.

    Args:
        sizes, views: (N, 2) W, H of the pictures and of their views.

    Returns:
        (N,) in [0, 1).
    """
    ratios, wanted = (s[:, 0] / s[:, 1] for s in (sizes, views))
    return 1 - np.minimum(ratios, wanted) / np.maximum(ratios, wanted)


class BucketBatches(Sampler[list[Pick]]):
    """Cut an endless sequence of epochs into batches of one bucket each, in an order that (seed, epoch) decides.

    An epoch takes ceil(n / (B R)) steps of a bucket with n picks; in each step all R ranks have that bucket. What is
    missing to the last step's B R picks is filled with the bucket's first picks of the same epoch, again and again
    where there are too few. Nothing is dropped.

    Args:
        order: of the samples.
        bucket_of: bucket of each sample, by its index.
        batch_size: B of each rank.
        seed: decides the order of the steps.
        rank, world_size: which of how many processes.
        start: number of the first batch.
    """

    def __init__(
        self,
        order: Order,
        bucket_of: NDArray[np.int64],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> None:
        self.order, self.bucket_of, self.batch_size, self.seed = order, bucket_of, batch_size, seed
        self.rank, self.world_size, self.start = rank, world_size, start

    def __iter__(self) -> Iterator[list[Pick]]:
        epoch, skip = self._find(self.start)
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        while True:
            indices, turns = self.order.picks(epoch)
            for places in self._steps(indices, epoch)[skip:, mine]:
                yield list(zip(indices[places].tolist(), turns[places].tolist(), strict=True))
            epoch, skip = epoch + 1, 0

    def _find(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step, and its number there."""
        epoch, num_steps = 0, self._num_steps(0)
        if isinstance(self.order, Shuffle):  # every epoch has the same samples
            return divmod(step, num_steps)
        while step >= num_steps:
            epoch, step = epoch + 1, step - num_steps
            num_steps = self._num_steps(epoch)
        return epoch, step

    def _num_steps(self, epoch: int) -> int:
        indices, _ = self.order.picks(epoch)
        return int(_num_steps(self.bucket_of[indices], self.batch_size * self.world_size).sum())

    def _steps(self, indices: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """Return (steps, B R): places in `indices`, of one bucket in each row."""
        buckets = self.bucket_of[indices]
        by_bucket = np.argsort(buckets, kind="stable")
        bounds = np.flatnonzero(np.diff(buckets[by_bucket])) + 1
        width = self.batch_size * self.world_size
        # np.resize fills up by starting over
        rows = [np.resize(members, (-(-len(members) // width), width)) for members in np.split(by_bucket, bounds)]
        return np.random.default_rng([self.seed, epoch, 0, 3]).permutation(np.concatenate(rows))


def _num_steps(bucket_of: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Return how many rows of `width` picks each bucket fills, the last one perhaps in part."""
    return -(-np.bincount(bucket_of) // width)
