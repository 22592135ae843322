"""How fast a stage trains, and how much of the device that is."""

import time
from typing import Any

import pytorch_lightning as pl

from ldm.training.flops import DTYPES, matmul_rate


class Throughput(pl.Callback):
    """Log how fast training is: to `metrics.csv` and every other logger, as `<stage>/<figure>`.

    | figure | is |
    |---|---|
    | `images_per_second` | of all devices together |
    | `gflops_per_image` | of a training step: the network forward and backward, frozen parts forward |
    | `utilization` | of the rate at which the device multiplies large matrices, measured once; in [0, 1] |
    | `data_wait` | share of the time in which the loader was waited for, in [0, 1] |

    The time is that of steps, of waiting for their batches and of writing checkpoints, not of validation and previews.
    It is the host's: no step waits for the device on this account. The first batch of a run warms up and does not
    count. Operations are counted for the pictures of the batch at hand, once (buckets are of about one size).

    Args:
        every: optimizer steps from one row to the next.
    """

    def __init__(self, every: int = 50) -> None:
        self.every = every

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._is_warm, self._last_step, self._flops = False, trainer.global_step, 0
        self._start_anew(trainer)

    def _start_anew(self, trainer: pl.Trainer) -> None:
        self._seconds, self._num_images, self._waited_before = 0.0, 0, _waited(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._begun = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self._is_warm:
            self._is_warm = True
            self._start_anew(trainer)
            return
        self._seconds += time.perf_counter() - self._begun
        self._num_images += len(next(iter(batch.values()))) * trainer.world_size
        step = trainer.global_step
        if step == self._last_step or step % self.every:
            return
        self._last_step = step
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(self._figures(trainer, pl_module, batch), step - 1)  # as Lightning counts
        self._start_anew(trainer)

    def _figures(self, trainer: pl.Trainer, module: Any, batch: Any) -> dict[str, float]:
        waited = _waited(trainer) - self._waited_before
        rate = self._num_images / (self._seconds + waited)
        self._flops = self._flops or module.flops_per_image(batch)
        dtype = DTYPES.get(str(trainer.precision))
        possible = matmul_rate(module.device, dtype or module.dtype) * trainer.world_size
        figures = {
            "images_per_second": rate,
            "gflops_per_image": self._flops / 1e9,
            "utilization": rate * self._flops / possible,
            "data_wait": waited / (self._seconds + waited),
        }
        return {f"{module.stage}/{name}": value for name, value in figures.items()}


def _waited(trainer: pl.Trainer) -> float:
    """Return the seconds that the loader has been waited for."""
    loader: Any = trainer.train_dataloader
    return float(loader.waited)
