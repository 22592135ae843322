"""Floating-point operations: how many a network takes, counted, and how many a device makes a second, measured."""

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ldm.nn.attention import project
from ldm.weights.folder import WithoutInit

N = TypeVar("N", bound=nn.Module)
# Of the matrix products, by the precision of training.
DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def twin(network: N) -> N:
    """Return a network of the same make on the meta device, which has shapes alone: counting takes no memory.

    What is frozen in one is in the other. It is never compiled.
    """
    config: Any = network.config
    with torch.device("meta"), WithoutInit():
        copy = type(network)(**config)
    for its, given in zip(copy.parameters(), network.parameters(), strict=True):
        its.requires_grad_(given.requires_grad)
    return copy


def on_meta(tensor: Tensor) -> Tensor:
    """Return the first sample of a batch as a shape (1, ...) on the meta device."""
    return torch.empty_like(tensor[:1], device="meta")


def count_flops(work: Callable[[], Any]) -> int:
    """Return the floating-point operations of matrix products, convolutions and attention in some work.

    A multiplication and an addition are two; norms, activations and the optimizer, which move memory, are left out.
    A tensor that is returned is gone back from, if it has a gradient: a training step.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        output = work()
        if isinstance(output, Tensor) and output.requires_grad:
            output.sum().backward()
    return counter.get_total_flops()


@lru_cache
def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Measure the floating-point operations a second of a large matrix product, as the networks compute theirs.

    The best of what fits into some time is returned, measured once in a process. The host waits for the device.
    """
    side = 1024 if device.type == "cpu" else 8192
    tokens = torch.randn(1, 32, side // 32, side, device=device, dtype=dtype)
    weight = torch.randn(side, side, device=device, dtype=dtype)
    best, started = 0.0, time.perf_counter()
    with torch.no_grad():
        project(tokens, weight, None)  # loads the library
        while not best or time.perf_counter() - started < seconds:
            _wait_for(device)
            begun = time.perf_counter()
            project(tokens, weight, None)
            _wait_for(device)
            best = max(best, 2 * side**3 / (time.perf_counter() - begun))
    return best


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
