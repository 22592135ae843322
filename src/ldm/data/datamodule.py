"""Batches in an order that is a function of the seed alone, from any position on; failures that speak.

B batch.
"""

import atexit
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader, Dataset

from ldm.data.ahead import ahead
from ldm.data.buckets import BucketBatches
from ldm.data.order import EndlessBatches, Pick, ShardShuffle, Shuffle, StreamBatches, WeightedShuffle
from ldm.errors import UserError

READERS = 2
"""Threads that read ahead from a mapped cache."""


class DataModule(pl.LightningDataModule):
    """Endless training batches from where the trainer stands, and a fixed sequence of validation batches.

    Args:
        train, val: datasets whose `__getitems__(picks)` returns a whole batch; `bucket_of` says which samples can
            stand in one batch, None that all can.
        order: of the training samples.
        batch_size: B of each rank and micro-batch.
        num_workers: loader processes.
        overfit_batches: above 0, only the first so many training batches are used, again and again.
        content: names the set that all of it is from.

    Attributes:
        before: samples that the steps of an earlier start took beyond what they would have taken on these ranks.
    """

    def __init__(
        self,
        train: Any,
        val: Any,
        order: Shuffle | WeightedShuffle | ShardShuffle,
        batch_size: int,
        num_workers: int = 0,
        overfit_batches: int = 0,
        content: str = "",
    ) -> None:
        super().__init__()
        self.train, self.val, self.order = train, val, order
        self.batch_size, self.num_workers, self.overfit_batches = batch_size, num_workers, overfit_batches
        self.content = content
        self.before = 0

    @property
    def position(self) -> int:
        """The number of the first batch of the step in hand, on every rank."""
        trainer = self.trainer
        assert trainer is not None
        earlier = self.before // (self.batch_size * trainer.world_size)
        return trainer.global_step * trainer.accumulate_grad_batches + earlier

    def train_dataloader(self) -> DataLoader[Any]:
        trainer = self.trainer
        assert trainer is not None
        rank, world_size, start = trainer.global_rank, trainer.world_size, self.position
        order = self.order
        if self.overfit_batches:
            few = min(len(self.train), self.overfit_batches * self.batch_size * world_size)
            order = Shuffle(few, order.seed)
        if isinstance(order, ShardShuffle):
            return self._loader(self.train, StreamBatches(order, self.batch_size, rank, world_size, start))
        if self.train.bucket_of is None:
            return self._loader(self.train, EndlessBatches(order, self.batch_size, rank, world_size, start))
        batches = BucketBatches(order, self.train.bucket_of, self.batch_size, order.seed, rank, world_size, start)
        return self._loader(self.train, batches)

    def val_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        batches = self._val_batches(rank, world_size)
        if isinstance(self.trainer.strategy, ModelParallelStrategy):  # all ranks must run a network that is cut up
            batches = batches[: min(len(self._val_batches(each, world_size)) for each in range(world_size))]
        return self._loader(self.val, batches)

    def _val_batches(self, rank: int, world_size: int) -> list[list[Pick]]:
        # Where there are fewer pictures than ranks they come again: Lightning cannot do with a rank that has none.
        mine = np.arange(rank, max(len(self.val), world_size), world_size) % len(self.val)
        buckets = self.val.bucket_of
        groups = [mine] if buckets is None else [mine[buckets[mine] == bucket] for bucket in np.unique(buckets[mine])]
        cuts = [group[i : i + self.batch_size] for group in groups for i in range(0, len(group), self.batch_size)]
        # By their first sample, so that the first few batches, which may be all that is looked at, show every shape.
        return [[(int(i), 0) for i in cut] for cut in sorted(cuts, key=lambda cut: cut[0])]

    def _loader(self, dataset: Any, batches: Any) -> DataLoader[Any]:
        # A cache in memory is not waited for; a mapped one is read by threads, which hand tensors on where processes
        # would copy them. Pictures are decoded, which is work for processes.
        is_cache = hasattr(dataset, "in_memory")
        num_workers = 0 if is_cache else self.num_workers
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        comes_from_there = getattr(dataset, "device", torch.device("cpu")).type == "cuda"
        return Loader(
            Guarded(dataset),
            READERS if is_cache and not dataset.in_memory else 0,
            batch_sampler=batches,
            collate_fn=_whole,
            num_workers=num_workers,
            worker_init_fn=LeaveSignalsToParent() if num_workers else None,
            persistent_workers=num_workers > 0,
            pin_memory=on_gpu and not comes_from_there,
        )


@dataclass(frozen=True)
class Failure:
    """What went wrong in a loader process: an exception from there would come wrapped in a traceback, or not at all."""

    reason: str


class LeaveSignalsToParent:
    """Let a loader process pass over what is sent to all processes of a run: its parent stops, and ends it then.

    Called in the loader process, when it begins.
    """

    def __init__(self) -> None:
        self._parent_ends = multiprocessing.Event()
        atexit.register(self._parent_ends.set)  # runs before `multiprocessing` sends SIGTERM, and waits

    def __call__(self, worker: int) -> None:
        for signum in (signal.SIGINT, signal.SIGUSR1):
            signal.signal(signum, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if self._parent_ends.is_set() else None)


class Guarded(Dataset[Any]):
    """A dataset whose user errors come as values."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, picks: list[Pick]) -> Any:
        try:
            return self.dataset.__getitems__(picks)
        except UserError as error:
            return Failure(str(error))


@contextmanager
def explaining_lost_worker(num_workers: int) -> Iterator[None]:
    """Say what it means that a loader process is gone; the news of it may come in the middle of anything.

    Args:
        num_workers: how many there are.

    Raises:
        UserError: one is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a loader process is gone: {str(error).splitlines()[0]} Such processes are mostly killed for want of "
            f"memory: fewer of them (data.num_workers={num_workers} now) or smaller batches need less. The same "
            "command goes on from the last checkpoint"
        ) from error


class Loader(DataLoader[Any]):
    """A DataLoader that ends with a message where a picture cannot be had or a loader process is gone.

    Args:
        dataset: gives values or failures.
        num_threads: that read ahead in this process, in place of loader processes; 0 for none.
        options: see `DataLoader`.

    Attributes:
        waited: seconds that have gone by in asking for batches.
    """

    def __init__(self, dataset: Guarded, num_threads: int = 0, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.num_threads = num_threads
        self.waited = 0.0

    def _read(self, picks: list[Pick]) -> Any:
        batch = self.dataset.__getitems__(picks)  # type: ignore[attr-defined]
        if self.pin_memory and isinstance(batch, dict):
            return {key: value.pin_memory() for key, value in batch.items()}
        return batch

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.num_threads:
            assert self.batch_sampler is not None
            batches: Iterator[Any] = ahead(self._read, self.batch_sampler, self.num_threads)
        else:
            batches = super().__iter__()
        while True:
            asked = time.perf_counter()
            with explaining_lost_worker(self.num_workers):
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                except (OSError, EOFError) as error:  # its memory went with it while a batch was handed over
                    if not self.num_workers:
                        raise
                    raise RuntimeError(f"DataLoader worker has left a batch half handed over ({error}).") from error
            if isinstance(batch, Failure):
                raise UserError(batch.reason)
            self.waited += time.perf_counter() - asked
            yield batch


def _whole(batch: Any) -> Any:
    return batch
