"""Helpers for comparing networks with those of diffusers and transformers."""

from collections.abc import Callable

import pytest
import torch
from torch import nn


@pytest.fixture(scope="session")
def scramble() -> Callable[[nn.Module], nn.Module]:
    """Give every parameter a random value, norms and biases too, so that no two of them can be mistaken."""

    def apply(module: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim < 2:
                    parameter.copy_(float("norm" in name and name.endswith("weight")) + 0.1 * noise)
                else:
                    parameter.copy_(noise * parameter[0].numel() ** -0.5)
        return module.eval()

    return apply


@pytest.fixture(scope="session")
def anatomy() -> Callable[[nn.Module], dict]:
    """List a network's parameters with their shapes, and its norms with their settings."""

    def describe(module: nn.Module) -> dict:
        settings = {name: m.eps for name, m in module.named_modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)}
        groups = {name: m.num_groups for name, m in module.named_modules() if isinstance(m, nn.GroupNorm)}
        return {"shapes": {k: p.shape for k, p in module.named_parameters()}, "eps": settings, "groups": groups}

    return describe
