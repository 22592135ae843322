"""PSNR and SSIM against their formulas."""

import pytest
import torch

from ldm.evaluation.reconstruction import BEST_PSNR, psnr, ssim


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    true = torch.randint(0, 256, (3, 3, 16, 16), generator=generator)
    return (true + torch.randint(-30, 31, true.shape, generator=generator)).clamp(0, 255).byte(), true.byte()


def test_psnr_of_each_picture():
    found, true = pair()
    error = (found.double() - true.double()).square().mean((1, 2, 3))
    assert torch.allclose(psnr(found, true), 10 * torch.log10(255**2 / error))
    assert psnr(true, true).tolist() == [BEST_PSNR] * 3


def test_ssim_of_each_picture():
    """Of two flat pictures only the luminance term is left: (2ab + C_1) / (a² + b² + C_1)."""
    flat = torch.full((2, 1, 16, 16), 60, dtype=torch.uint8)
    other = torch.full((2, 1, 16, 16), 180, dtype=torch.uint8)
    c = (0.01 * 255) ** 2
    assert ssim(flat, other).tolist() == pytest.approx([(2 * 60 * 180 + c) / (60**2 + 180**2 + c)] * 2, abs=1e-6)
    found, true = pair()
    values = ssim(found, true)
    assert values.shape == (3,) and (values < 0.99).all() and (values > 0.5).all()
    assert torch.allclose(ssim(true, true), torch.ones(3).double())
    assert torch.allclose(ssim(found[1:2], true[1:2]), values[1:2])  # whatever the others are
