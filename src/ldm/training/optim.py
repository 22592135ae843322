"""Optimizers with parameter groups, and learning-rate schedules counted in optimizer steps."""

import math
from importlib import import_module
from typing import Any

import torch
from torch import nn

from ldm.config import Optim
from ldm.errors import UserError

EXTRAS = {"bitsandbytes": "adam8bit", "schedulefree": "schedule_free"}  # what brings the optimizers of conf/optim


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters: matrices and kernels decay; norms, biases and single numbers do not."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def learning_rate_factor(
    step: int, schedule: str, warmup_steps: int, max_steps: int, decay_share: float = 1.0
) -> float:
    """Return the factor on the learning rate at an optimizer step: a linear warm-up, then the schedule down to zero.

    "wsd" is warm-up, stable, decay (MiniCPM, arXiv:2404.06395, section 4.2), the decay a straight line over the last
    `decay_share` of all steps: a run that is made longer goes on from any checkpoint before it.

    >>> [learning_rate_factor(step, "linear", 2, 10) for step in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    >>> [learning_rate_factor(step, "wsd", 2, 10, decay_share=0.4) for step in (0, 1, 6, 8, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    if schedule == "wsd":
        left = max(0, max_steps - step) / max(1, min(round(decay_share * max_steps), max_steps - warmup_steps))
        return min(1.0, left)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if schedule == "linear" else 1.0


def build_optimizer(module: nn.Module, optim: Optim, max_steps: int) -> dict[str, Any]:
    """Build the optimizer and schedule for the trainable parameters, in the form Lightning takes.

    Raises:
        UserError: `optim._target_` cannot be imported or does not take these arguments; says what is to be installed.
    """
    place, _, name = optim.target.rpartition(".")
    try:
        optimizer_class = getattr(import_module(place), name)
        groups = parameter_groups(module, optim.weight_decay)
        optimizer: torch.optim.Optimizer = optimizer_class(groups, lr=optim.lr, **optim.arguments)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(str(error.name))
        mend = f": pip install 'ldm[{extra}]', or take optim=adamw" if extra else ""
        raise UserError(f"optim._target_={optim.target}: {error}{mend}") from error
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"optim._target_={optim.target} with arguments {optim.arguments}: {error}") from error

    if optim.averages:
        optimizer.train()  # type: ignore[attr-defined]  # and so it stays: see `ScheduleFreeAverage`

    def factor(step: int) -> float:
        return learning_rate_factor(step, optim.schedule, optim.warmup_steps, max_steps, optim.decay_share)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
