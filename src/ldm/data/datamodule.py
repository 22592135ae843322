"""Batches in an order that is a function of the seed alone, from any position on.

B batch, H W pixels.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytorch_lightning as pl
from torch.utils.data import DataLoader, Dataset, Sampler

from ldm.data.images import resize_and_crop, to_tensor
from ldm.data.sources import Source


class EndlessBatches(Sampler[list[int]]):
    """Cut an endless sequence of shuffles of 0..N-1 into batches.

    Batch k of a rank is a function of (seed, k, rank): a resumed run just starts at a later k. Every index comes
    exactly once in each N draws, none is dropped, and a batch may span two shuffles.

    >>> batches = iter(EndlessBatches(num_samples=4, batch_size=3, seed=0))
    >>> sorted(next(batches) + next(batches)[:1])
    [0, 1, 2, 3]
    """

    def __init__(
        self, num_samples: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, start: int = 0
    ) -> None:
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world_size, self.start = rank, world_size, start

    def __iter__(self) -> Iterator[list[int]]:
        position = (self.start * self.world_size + self.rank) * self.batch_size
        epoch, shuffled = -1, np.empty(0, dtype=np.int64)
        while True:
            batch = []
            for i in range(position, position + self.batch_size):
                if i // self.num_samples != epoch:
                    epoch = i // self.num_samples
                    shuffled = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
                batch.append(int(shuffled[i % self.num_samples]))
            yield batch
            position += self.batch_size * self.world_size


class Pictures(Dataset[dict[str, Any]]):
    """A source's pictures, cut to one size; a batch is {"image": (B, 3, H, W) in [-1, 1], "caption": list[str]}."""

    def __init__(self, source: Source, resolution: int) -> None:
        self.source, self.resolution = source, resolution

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        rows = [self.source[i] for i in indices]
        pixels = np.stack([resize_and_crop(row["image"], self.resolution) for row in rows])
        return {"image": to_tensor(pixels), "caption": [row["caption"] for row in rows]}


class DataModule(pl.LightningDataModule):
    """Endless training batches from where the trainer stands, and a fixed sequence of validation batches.

    Args:
        train, val: datasets whose `__getitems__(indices)` returns a whole batch.
        batch_size: B of each rank and micro-batch.
        seed: decides the order.
        num_workers: loader processes.
        overfit_batches: above 0, only the first so many training batches are used, again and again.
    """

    def __init__(
        self, train: Any, val: Any, batch_size: int, seed: int, num_workers: int = 0, overfit_batches: int = 0
    ) -> None:
        super().__init__()
        self.train, self.val = train, val
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self.overfit_batches = overfit_batches

    def train_dataloader(self) -> DataLoader[Any]:
        trainer = self.trainer
        assert trainer is not None
        num_samples = len(self.train)
        if self.overfit_batches:
            num_samples = min(num_samples, self.overfit_batches * self.batch_size * trainer.world_size)
        batches = EndlessBatches(
            num_samples,
            self.batch_size,
            self.seed,
            trainer.global_rank,
            trainer.world_size,
            start=trainer.global_step * trainer.accumulate_grad_batches,
        )
        return self._loader(self.train, batches)

    def val_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        indices = list(range(rank, len(self.val), world_size))
        batches = [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
        return self._loader(self.val, batches)

    def _loader(self, dataset: Any, batches: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=_whole,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )


def _whole(batch: Any) -> Any:
    return batch
