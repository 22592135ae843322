"""What the LightningModules of all stages share: draws that are a function of the step, optimizer, EMA, preview."""

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.config import Optim, Stage
from ldm.training.ema import EMA
from ldm.training.optim import build_optimizer


def step_generator(
    seed: int, step: int, micro_batch: int = 0, rank: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Return the source of a training step's draws, a function of its arguments alone.

    A resumed run therefore draws what an uninterrupted one would, and ranks never share noise.
    """
    mixed = 0
    for number in (seed, step, micro_batch, rank):
        # splitmix64 (Steele et al., 2014): neighbouring steps get unrelated seeds
        mixed = (mixed ^ number) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return torch.Generator(device).manual_seed(mixed >> 1)


class StageModule(pl.LightningModule):
    """A stage's training: one network, its EMA where there is one, its optimizer.

    Args:
        network: what is trained.
        optim: optimizer and learning-rate schedule.
        max_steps: optimizer steps of the whole run.
        seed: of all draws.
        ema_decay: None for no average.
    """

    stage: Stage

    def __init__(
        self, network: nn.Module, optim: Optim, max_steps: int, seed: int, ema_decay: float | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.ema = EMA(network, ema_decay) if ema_decay is not None else None
        self.optim, self.max_steps, self.seed = optim, max_steps, seed
        self.identity: dict[str, Any] = {}  # the config that decides the weights; travels in every checkpoint

    @property
    def evaluated(self) -> Any:
        """The network to validate, draw with and export: the average, where there is one."""
        return self.ema.average if self.ema is not None else self.network

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["identity"] = self.identity

    def configure_optimizers(self) -> Any:
        return build_optimizer(self.network, self.optim, self.max_steps)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        # Lightning refuses to clip for a fused optimizer under any mixed precision. Only fp16 scales gradients, and the
        # config refuses that combination.
        if gradient_clip_val:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:  # called once an optimizer step, whatever the accumulation
            self.ema.update(self.network)

    def on_train_start(self) -> None:
        # The checkpoint of a shorter run brings the rate that its own schedule ended with: set this run's.
        for config in self.trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            for group, (base, factor) in zip(scheduler.optimizer.param_groups, rates, strict=True):
                group["lr"] = base * factor(scheduler.last_epoch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout draws from the global state; seeded apart from the step's own generator, whose draws it would repeat.
        torch.manual_seed(self.generator(batch_idx).initial_seed() ^ 1)

    def generator(self, batch_idx: int) -> torch.Generator:
        """Return the source of this training step's draws."""
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        return step_generator(self.seed, self.global_step, micro_batch, self.global_rank, self.device)

    def log_losses(self, losses: dict[str, Tensor], batch_size: int, prog_bar: str = "loss") -> None:
        """Log `<stage>/<name>` for each loss; the one named `prog_bar` is shown beside the progress bar."""
        split = "" if self.trainer.training else "val_"
        for name, value in losses.items():
            key = f"{self.stage}/{split}{name}"
            self.log(key, value.detach(), batch_size=batch_size, prog_bar=name == prog_bar, sync_dist=not self.training)

    def preview(self, num_images: int) -> tuple[Tensor, Sequence[str]] | None:
        """Return (N, 3, H, W) pictures that show how far training is, and their captions; None where there are none."""
        return None
