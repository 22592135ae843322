"""Exponential moving average of a network's weights, kept as a network of its own.

Evaluation uses the average directly; weights are never swapped in and out, so no checkpoint can catch them swapped.
"""

import copy

import torch
from torch import nn


class EMA(nn.Module):
    """Average a network over optimizer steps: w̄ ← d w̄ + (1 - d) w.

    The decay is warmed up, d = min(decay, (1 + n) / (10 + n)) after n updates, so that the random start is forgotten
    (as in TensorFlow's ExponentialMovingAverage). Buffers are copied. Everything is in the state dict.

    Args:
        network: to be averaged; it is copied once, then only read.
        decay: in [0, 1).
    """

    num_updates: torch.Tensor

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.average = copy.deepcopy(network).eval().requires_grad_(False)
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self._count = 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take in the weights after one optimizer step."""
        self._count += 1
        self.num_updates.fill_(self._count)  # the count lives on the host, so that no step waits for the device
        decay = min(self.decay, (1 + self._count) / (10 + self._count))
        torch._foreach_lerp_(list(self.average.parameters()), list(network.parameters()), 1 - decay)
        for average, buffer in zip(self.average.buffers(), network.buffers(), strict=True):
            average.copy_(buffer)

    def train(self, mode: bool = True) -> "EMA":
        """Stay in eval mode: an average has no dropout."""
        return super().train(False)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._count = int(self.num_updates)
