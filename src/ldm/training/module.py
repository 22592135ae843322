"""What the LightningModules of all stages share: draws that are a function of the step, optimizer, averages, preview.

An optimizer step whose losses or gradients are not finite changes nothing: it ends the run or is left out.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ldm.config import Optim, PosthocEMA, Stage
from ldm.errors import UserError
from ldm.training.checkpointing import VERSION
from ldm.training.ema import EMA, PowerEMA, ScheduleFreeAverage
from ldm.training.failures import SkippedStep, check_weights, describe, name_samples, not_finite
from ldm.training.optim import build_optimizer
from ldm.training.sharding import shard, whole

T = TypeVar("T")


def step_generator(
    seed: int, step: int, micro_batch: int = 0, rank: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Return the source of a training step's draws, a function of its arguments alone.

    A resumed run therefore draws what an uninterrupted one would.
    """
    mixed = 0
    for number in (seed, step, micro_batch, rank):
        # splitmix64 (Steele et al., 2014): neighbouring steps get unrelated seeds
        mixed = (mixed ^ number) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return torch.Generator(device).manual_seed(mixed >> 1)


def randn(num: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw `num` rows of the shape that (B, ...) has, from N(0, 1), where the generator is."""
    return torch.randn(num, *shape[1:], generator=generator, device=generator.device)


def rows(draw: Callable[[int], Tensor], batch: int, share: tuple[int, int]) -> Tensor:
    """Return a rank's rows of what is drawn for the batches of all ranks together.

    So that a batch of 8 is trained in the same way by one rank, as 4 on each of two, or as 2 on each of four.

    Args:
        draw: draws so many rows, (n, ...).
        batch: B, of each rank.
        share: the rank and the number of ranks.

    Returns:
        (B, ...).
    """
    rank, world_size = share
    if world_size == 1:
        return draw(batch)
    return draw(batch * world_size)[rank * batch : (rank + 1) * batch].clone()  # the rest need not be kept


class StageModule(pl.LightningModule):
    """A stage's training: one network, its averages where there are any, its optimizer.

    Args:
        network: what is trained.
        optim: optimizer and learning-rate schedule.
        max_steps: optimizer steps of the whole run.
        seed: of all draws.
        ema_decay: None for no average.
        posthoc_ema: which more averages are kept; nothing in training looks at them.

    Attributes:
        max_skipped: optimizer steps that may be left out because something in them is not finite; None looks at none.
        num_skipped: so many have been.
        stepped: whether the last optimizer step changed the weights.
        validated: of the step that a run goes on from, whether its validation was done, where there is one.
        share: this rank and the number of ranks that a step's draws are made for.
        batch: samples of an optimizer step, of all micro-batches and ranks.
    """

    stage: Stage

    def __init__(
        self,
        network: nn.Module,
        optim: Optim,
        max_steps: int,
        seed: int,
        ema_decay: float | None = None,
        posthoc_ema: PosthocEMA | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.ema: EMA | ScheduleFreeAverage | None = None
        if optim.averages:
            self.ema = ScheduleFreeAverage(network)
        elif ema_decay is not None:
            self.ema = EMA(network, ema_decay)
        lengths = posthoc_ema.lengths if posthoc_ema else []
        self.posthoc = nn.ModuleList(PowerEMA(network, length) for length in lengths)
        self.optim, self.max_steps, self.seed = optim, max_steps, seed
        self.max_skipped: int | None = None
        self.num_skipped, self.stepped = 0, True
        self.validated = True
        self.share, self.batch, self._samples = (0, 1), 1, 0
        self._micro_batch = 0
        self._captions: list[Sequence[str] | None] = []  # of each micro-batch of this step, where it holds them
        self._terms: list[tuple[int, dict[str, Tensor]]] = []  # what each micro-batch made of the loss
        self.identity: dict[str, Any] = {}  # the config that decides the weights; travels in every checkpoint

    @property
    def evaluated(self) -> Any:
        """The network to validate, draw with and export: the average, where there is one."""
        return self.ema.average if self.ema is not None else self.network

    @property
    def samples(self) -> int:
        """So many samples were trained on, on all ranks, those of steps with another batch before included."""
        return self._samples + self.trainer.global_step * self.batch

    def configure_model(self) -> None:
        """Cut the network and its averages up over the ranks, where the strategy is to."""
        if self.device_mesh is not None:
            averages = [average.average for average in (self.ema, *self.posthoc) if average is not None]
            for network in (self.network, *averages):
                shard(network, self.device_mesh["data_parallel"])

    def whole(self, network: Any) -> Any:
        """Return a network that one rank alone can use, on the first rank; all ranks must ask."""
        return whole(network, self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_weights(self.stage, checkpoint["global_step"], checkpoint["state_dict"])
        checkpoint["version"] = VERSION
        checkpoint["identity"] = self.identity
        checkpoint["num_skipped"] = self.num_skipped
        checkpoint["batch"], checkpoint["samples"] = self.batch, self.samples
        checkpoint["validated"] = not self.trainer.validating

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.validated = bool(checkpoint.get("validated", True))
        self.num_skipped = int(checkpoint.get("num_skipped", 0))
        step = int(checkpoint["global_step"])
        self._samples = int(checkpoint.get("samples", step * self.batch)) - step * self.batch
        if self._samples:
            self.trainer.datamodule.before = self._samples  # type: ignore[attr-defined]

    @property
    def checkpoint_size(self) -> int:
        """About the bytes of a checkpoint in float32: the weights, Adam's two moments and the averages."""
        averages = (self.ema is not None) + len(self.posthoc)
        return 4 * sum(p.numel() for p in self.network.parameters()) * (3 + averages)

    def configure_optimizers(self) -> Any:
        return build_optimizer(self.network, self.optim, self.max_steps)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        # Lightning refuses to clip for a fused optimizer under any mixed precision. Only fp16 scales gradients, and the
        # config refuses that combination.
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if not self.usable(parameters, gradient_clip_val):
            raise SkippedStep

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().optimizer_step(*args, **kwargs)
        except SkippedStep:
            scaler = self._scaler
            if scaler is not None and not getattr(self.trainer.optimizers[0], "_step_supports_amp_scaling", False):
                scaler.update()  # it has unscaled these gradients, and would refuse the next
        if not self.stepped:  # called once an optimizer step, whatever the accumulation
            return
        if isinstance(self.ema, ScheduleFreeAverage):
            self.ema.follow(self.network, self.trainer.optimizers[0])
        elif self.ema is not None:
            self.ema.update(self.network)
        for average in self.posthoc:
            average.update(self.network)  # type: ignore[operator]

    def usable(self, parameters: Sequence[nn.Parameter], clip_norm: float | None) -> bool:
        """Clip the gradients; return whether they and the losses that they come from are finite on all ranks.

        The host waits for the device once. All ranks return the same.

        Args:
            parameters: whose gradients an optimizer is about to follow.
            clip_norm: that the gradients are scaled down to; None leaves them.

        Raises:
            UserError: they are not finite, and no more steps may be left out.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if clip_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        self.stepped = True
        if self.max_skipped is None:
            return True
        values = [value.float() for _, terms in self._terms for value in terms.values()]
        finite = torch.stack([torch.stack([norm.float(), *values]).isfinite().all(), norm.isfinite()])
        if torch.distributed.is_initialized():
            finite = finite.to(torch.uint8)
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        all_finite, norm_finite = finite.tolist()
        if all_finite:
            return True
        self.stepped = False
        scaler = self._scaler
        if scaler is not None and not norm_finite and scaler.get_scale() > 1 and not self._faults():
            return True  # scaled beyond what fp16 holds: the scaler leaves this step out, and scales less
        self._leave_out()
        return False

    @property
    def _scaler(self) -> Any:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _faults(self) -> list[str]:
        """Say what is not finite in the losses, of all ranks, and in which samples."""
        faults = []
        for micro_batch, terms in self._terms:
            if bad := describe(terms):
                faults.append(f"{bad}, in {name_samples(self.trainer, micro_batch, self._captions[micro_batch])}")
        return gathered(faults)

    def _leave_out(self) -> None:
        faults = self._faults()
        if not faults:
            batches = [name_samples(self.trainer, i, captions) for i, captions in enumerate(self._captions)]
            faults = [f"the gradient is not finite, in {'; '.join(gathered(batches))}"]
        self.num_skipped += 1
        message = not_finite(self.stage, self.global_step + 1, faults, self.num_skipped, self.max_skipped or 0)
        if self.num_skipped > (self.max_skipped or 0):
            raise UserError(message)
        if self.global_rank == 0:
            print(message, flush=True)

    def on_train_start(self) -> None:
        self.share = (self.global_rank, self.trainer.world_size)
        for optimizer in self.trainer.optimizers:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    same = isinstance(value, Tensor) and value.shape == parameter.shape
                    # Fused optimizers go through memory: channels_last here, and not in a checkpoint of FSDP's.
                    if same and value.stride() != parameter.stride():
                        state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        # The checkpoint of a shorter run brings the rate that its own schedule ended with: set this run's.
        for config in self.trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            for group, (base, factor) in zip(scheduler.optimizer.param_groups, rates, strict=True):
                group["lr"] = base * factor(scheduler.last_epoch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        if self._micro_batch == 0:
            self._terms, self._captions = [], []
        self._captions.append(batch.get("caption") if isinstance(batch, Mapping) else None)
        # Dropout draws from the global state; seeded apart from the step's own generator, whose draws it would repeat.
        of_rank = step_generator(self.seed, self.global_step, self._micro_batch, self.global_rank)
        torch.manual_seed(of_rank.initial_seed() ^ 1)

    def generator(self, batch_idx: int) -> torch.Generator:
        """Return the source of this training step's draws, the same on all ranks: each takes its `rows` of them."""
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        return step_generator(self.seed, self.global_step, micro_batch, device=self.device)

    def rows(self, draw: Callable[[int], Tensor], batch: int) -> Tensor:
        """Return `rows` of a draw in training; validation's draws are the rank's own."""
        return rows(draw, batch, self.share if self.training else (0, 1))

    def log_losses(self, losses: dict[str, Tensor], batch_size: int, prog_bar: str = "loss") -> None:
        """Log `<stage>/<name>` for each loss; the one named `prog_bar` is shown beside the progress bar."""
        split = "" if self.trainer.training else "val_"
        if self.trainer.training:
            self._terms.append((self._micro_batch, {name: value.detach() for name, value in losses.items()}))
        for name, value in losses.items():
            key = f"{self.stage}/{split}{name}"
            self.log(key, value.detach(), batch_size=batch_size, prog_bar=name == prog_bar, sync_dist=not self.training)

    def flops_per_image(self, batch: Any) -> int:
        """Count the floating-point operations of a training step for one picture of such a batch.

        The network's are forward and backward, as often as the mathematics needs them: what gradient checkpointing
        computes again is not counted.
        """
        raise NotImplementedError

    def preview(self, network: Any, num_images: int) -> tuple[Tensor, Sequence[str]] | None:
        """Return (N, 3, H, W) pictures that show how far training is, and their captions; None where there are none.

        Args:
            network: the average (`evaluated`), or the one in training (`network`), in eval mode.
            num_images: N at most.
        """
        return None


@contextmanager
def in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Let a network that is in training be looked at."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


def gathered(items: list[T]) -> list[T]:
    """Return the items of all ranks, in their order; all must call it."""
    if not torch.distributed.is_initialized():
        return items
    found: list[list[T]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(found, items)
    return [item for of_rank in found for item in of_rank]
