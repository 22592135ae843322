"""Helpers for comparing networks with those of diffusers and transformers."""

from collections.abc import Callable

import pytest
from torch import nn

from tiny import scrambled


@pytest.fixture(scope="session")
def scramble() -> Callable[[nn.Module], nn.Module]:
    """Give every parameter a random value, norms and biases too, so that no two of them can be mistaken."""
    return scrambled


@pytest.fixture(scope="session")
def anatomy() -> Callable[[nn.Module], dict]:
    """List a network's parameters with their shapes, and its norms with their settings."""

    def describe(module: nn.Module) -> dict:
        settings = {name: m.eps for name, m in module.named_modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)}
        groups = {name: m.num_groups for name, m in module.named_modules() if isinstance(m, nn.GroupNorm)}
        return {"shapes": {k: p.shape for k, p in module.named_parameters()}, "eps": settings, "groups": groups}

    return describe
