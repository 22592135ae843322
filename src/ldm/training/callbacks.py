"""Callbacks of training: progress for people, pictures as training goes."""

import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from ldm.data.images import to_pixels
from ldm.gallery import grid, save_png
from ldm.ranks import busy, meet
from ldm.training.module import in_eval_mode


class Progress(ProgressBar):
    """A rich progress bar with images/s, losses and time left; where there is no terminal, a line now and then.

    Args:
        every: seconds between lines where there is no terminal.
    """

    def __init__(self, every: float = 15.0) -> None:
        super().__init__()
        self.every = every
        self._bar: RichProgress | None = None

    def disable(self) -> None:
        """Called by Lightning on every rank but the first."""
        self.every = float("inf")

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._start_step, self._start_time, self._last = trainer.global_step, time.monotonic(), time.monotonic()
        self._num_images = 0
        if sys.stderr.isatty() and self.every != float("inf"):
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
            )
            self._bar = RichProgress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(
                pl_module.stage, total=trainer.max_steps, completed=trainer.global_step, note=""
            )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._num_images += len(next(iter(batch.values()))) * trainer.world_size
        now = time.monotonic()
        due = now - self._last >= (0.2 if self._bar else self.every)
        if not due and trainer.global_step < trainer.max_steps:
            return
        self._last = now
        seconds = max(now - self._start_time, 1e-9)
        rate = self._num_images / seconds
        metrics = self.get_metrics(trainer, pl_module)
        note = "  ".join(
            f"{name.rpartition('/')[2]} {value:.4g}" for name, value in metrics.items() if isinstance(value, float)
        )
        note = f"{rate:,.0f} images/s  {note}"
        if self._bar:
            self._bar.update(self._task, completed=trainer.global_step, note=note)
        elif self.every != float("inf"):
            left = (trainer.max_steps - trainer.global_step) * seconds / max(trainer.global_step - self._start_step, 1)
            steps = f"{trainer.global_step}/{trainer.max_steps}"
            print(f"  {pl_module.stage:12} {steps:>13}  {note}  {left:.0f} s left", flush=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


class SampleGrid(pl.Callback):
    """Save a grid of fixed prompts from fixed noise (of the VAE: reconstructions) as training goes.

    The pictures go to `samples/<stage>/` in the run directory and to every logger that takes pictures.

    Args:
        every: optimizer steps between grids; one more is made at the end.
        num_images: pictures in a grid.
        raw: make one with the weights in training too, `step-…_raw.png`, beside that with their average.
    """

    def __init__(self, every: int, num_images: int, raw: bool = False) -> None:
        self.every, self.num_images, self.raw = every, num_images, raw
        self._last_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._last_step = trainer.global_step  # a step may be several batches: nothing has changed before its last

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every == 0 and trainer.global_step != self._last_step:
            self._save(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.global_step != self._last_step:
            self._save(trainer, pl_module)

    @torch.no_grad()
    def _save(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._last_step = trainer.global_step
        networks = {"": pl_module.evaluated}
        if self.raw and pl_module.ema is not None:
            networks["_raw"] = pl_module.network
        wholes = {suffix: pl_module.whole(network) for suffix, network in networks.items()}
        if trainer.is_global_zero:
            with busy("drawing samples"):
                for suffix, network in wholes.items():
                    self._draw(trainer, pl_module, network, suffix)
        meet()  # what comes next may be an exchange with a limit to its time

    def _draw(self, trainer: pl.Trainer, pl_module: Any, network: Any, suffix: str) -> None:
        with in_eval_mode(network):
            preview = pl_module.preview(network, self.num_images)
        if preview is None:
            return
        images, captions = preview
        pixels = list(to_pixels(images))
        picture = grid(pixels, captions=captions, scale=max(1, 128 // pixels[0].shape[1]))
        folder = Path(trainer.default_root_dir) / "samples" / pl_module.stage
        folder.mkdir(parents=True, exist_ok=True)
        save_png(folder / f"step-{trainer.global_step:06d}{suffix}.png", picture)
        name = f"{pl_module.stage}/samples{suffix}"
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):  # Weights & Biases
                logger.log_image(name, [picture], step=trainer.global_step)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name, picture, trainer.global_step, dataformats="HWC")
