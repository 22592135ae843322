"""Averages of a network's weights, kept as networks of their own.

Evaluation uses the average directly; weights are never swapped in and out, so no checkpoint can catch them swapped.
"""

import copy
from typing import Any

import torch
from torch import nn

from ldm.training.sharding import local
from ldm.weights.posthoc import exponent


class Average(nn.Module):
    """Average a network over optimizer steps: w̄ ← d w̄ + (1 - d) w. Buffers are copied; all is in the state dict.

    Args:
        network: to be averaged; it is copied once, then only read.
    """

    num_updates: torch.Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.average = copy.deepcopy(network).eval().requires_grad_(False)
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.count = 0  # on the host, so that no step waits for the device

    def decay_at(self, count: int) -> float:
        """Return d of the update of this number, from 1 on."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take in the weights after one optimizer step."""
        self.count += 1
        self.num_updates.fill_(self.count)
        weight = 1 - self.decay_at(self.count)
        averages, weights = (local(list(each.parameters())) for each in (self.average, network))
        torch._foreach_lerp_(averages, weights, weight)
        for average, buffer in zip(self.average.buffers(), network.buffers(), strict=True):
            average.copy_(buffer)

    def train(self, mode: bool = True) -> "Average":
        """Stay in eval mode: an average has no dropout."""
        return super().train(False)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.count = int(self.num_updates)


class EMA(Average):
    """Exponential moving average.

    The decay is warmed up, d = min(decay, (1 + n) / (10 + n)) after n updates, so that the random start is forgotten
    (as in TensorFlow's ExponentialMovingAverage).

    Args:
        network: see `Average`.
        decay: in [0, 1).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__(network)
        self.decay = decay

    def decay_at(self, count: int) -> float:
        return min(self.decay, (1 + count) / (10 + count))


class ScheduleFreeAverage(Average):
    """The average x that a schedule-free optimizer evaluates at, beside the point y that it takes gradients at.

    arXiv:2405.15682, section 1:  y = (1 - β) z + β x,  of which the optimizer holds y (as the weights) and z. Its own
    `eval()` would put x in the place of y and, going back, round.
    """

    @torch.no_grad()
    def follow(self, network: nn.Module, optimizer: Any) -> None:
        """Take in weights and optimizer after one step."""
        self.count += 1
        self.num_updates.fill_(self.count)
        averages: list[torch.Tensor] = list(self.average.parameters())
        torch._foreach_copy_(averages, list(network.parameters()))
        place = {id(parameter): average for parameter, average in zip(network.parameters(), averages, strict=True)}
        for group in optimizer.param_groups:
            moved = [parameter for parameter in group["params"] if "z" in optimizer.state[parameter]]
            ends = [optimizer.state[parameter]["z"] for parameter in moved]
            torch._foreach_lerp_([place[id(parameter)] for parameter in moved], ends, 1 - 1 / group["betas"][0])
        for average, buffer in zip(self.average.buffers(), network.buffers(), strict=True):
            average.copy_(buffer)


class PowerEMA(Average):
    """Average whose length is a share of the time trained, and which forgets the random start at once.

    EDM2 (arXiv:2312.02696) section 3.1:  w̄(t) = (γ + 1) / t^(γ+1) ∫₀ᵗ τ^γ w(τ) dτ,  by steps  d = (1 - 1/t)^(γ+1).

    Args:
        network: see `Average`.
        length: σ_rel in (0, 0.288], the standard deviation of the profile as a share of t.
    """

    def __init__(self, network: nn.Module, length: float) -> None:
        super().__init__(network)
        self.length, self.exponent = length, exponent(length)

    def decay_at(self, count: int) -> float:
        return (1 - 1 / count) ** (self.exponent + 1)
