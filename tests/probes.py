"""Callbacks that tests plug into runs by `_target_`, in this process and in others (with tests/ on PYTHONPATH)."""

import os
import signal
import time
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl


class Stopped(Exception):
    """A crash that the test asked for."""


class StopAt(pl.Callback):
    """Crash in a stage after an optimizer step, before anything else of that step is done."""

    def __init__(self, stage: str, step: int) -> None:
        self.stage, self.step = stage, step

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        if pl_module.stage == self.stage and trainer.global_step == self.step:
            raise Stopped


class StopInValidation(StopAt):
    """Crash in the validation after an optimizer step."""

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        pass

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if pl_module.stage == self.stage and trainer.global_step == self.step:
            raise Stopped


class KillAt(pl.Callback):
    """Die without a word in a stage at an optimizer step; once, which the marker file remembers."""

    def __init__(self, stage: str, step: int, marker: str, signum: int = signal.SIGKILL) -> None:
        self.stage, self.step, self.marker, self.signum = stage, step, Path(marker), signum

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.stage == self.stage and trainer.global_step == self.step and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), self.signum)
            time.sleep(0.1)


class Record(pl.Callback):
    """Note what each micro-batch and optimizer step does, for tests in the same process."""

    rows: ClassVar[list[dict[str, Any]]] = []
    weights: ClassVar[dict[str, list[dict[str, Any]]]] = {}  # of each stage's network, after each micro-batch

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        row = {
            "stage": pl_module.stage,
            "step": trainer.global_step,
            "loss": float(outputs["loss"]),
            "rate": trainer.optimizers[0].param_groups[0]["lr"],
            "updates": None if pl_module.ema is None else int(pl_module.ema.num_updates),
            "accumulate": trainer.accumulate_grad_batches,
        }
        self.rows.append(row)
        state = {name: tensor.detach().clone() for name, tensor in pl_module.network.state_dict().items()}
        self.weights.setdefault(pl_module.stage, []).append(state)
