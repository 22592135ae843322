"""Keep averages of the weights as training goes, to put others together from after it (see `ldm.weights.posthoc`)."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from ldm.config import PosthocEMA
from ldm.errors import UserError
from ldm.weights.posthoc import FOLDER, Snapshot, drop_snapshots, save_snapshot


class SaveAverages(pl.Callback):
    """Write the averages of a module's `posthoc` every so many optimizer steps, and at the end; none is removed.

    Args:
        config: how many steps.
        run_dir: whose folder `ema` holds them.
    """

    def __init__(self, config: PosthocEMA, run_dir: Path) -> None:
        self.every, self.folder = config.every, run_dir / FOLDER
        self._last = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._last = pl_module.posthoc[0].count
        if trainer.is_global_zero:
            drop_snapshots(self.folder, self._last)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Before the checkpoint of this step, which Lightning writes last: one that goes on from there misses nothing.
        count = pl_module.posthoc[0].count
        if count == self._last or (count % self.every and trainer.global_step < trainer.max_steps):
            return
        self._last = count
        for average in pl_module.posthoc:
            network = pl_module.whole(average.average)
            if not trainer.is_global_zero:
                continue
            snapshot = Snapshot(count, average.length)
            try:
                save_snapshot(self.folder, snapshot, network.state_dict(), self.every)
            except OSError as error:
                raise UserError(
                    f"{self.folder / snapshot.name} cannot be written: {error.strerror}. Make room, or keep fewer "
                    "averages (diffusion.posthoc_ema.every); the same command goes on from the last checkpoint"
                ) from error
