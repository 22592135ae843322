"""What an inpainting U-Net is trained with: random masks, and how it is shown a picture with holes.

B batch, C channels of a picture, H W pixels, h w latents.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ldm.training.module import rows

ALL, NONE, RECTANGLES = 0.25, 0.05, 0.35
"""Shares of the masks; the rest are strokes. A quarter hide all, as Stable Diffusion's inpainting was trained."""

NUM_RECTANGLES, NUM_SEGMENTS = 3, 10


def random_masks(
    batch: int, height: int, width: int, generator: torch.Generator, share: tuple[int, int] = (0, 1)
) -> Tensor:
    """Draw masks: rectangles, free-form strokes (arXiv:1806.03589 §3.4), everything, or nothing.

    Args:
        batch: B.
        height, width: H and W.
        generator: source of all draws; the result lies on its device.
        share: whose rows these are of all ranks' draws, see `rows`.

    Returns:
        (B, 1, H, W) float32, 1 where the picture is hidden and to be drawn, else 0.
    """
    device = generator.device

    def uniform(*shape: int) -> Tensor:
        return rows(lambda num: torch.rand(num, *shape, generator=generator, device=device), batch, share)

    kind = uniform(1, 1)
    y = torch.arange(height, device=device)[:, None] + 0.5
    x = torch.arange(width, device=device) + 0.5
    hidden = torch.where(
        kind < ALL + NONE + RECTANGLES,
        _rectangles(uniform(NUM_RECTANGLES, 5), y, x),
        _strokes(uniform(NUM_SEGMENTS + 2, 2), y, x),
    )
    hidden = (hidden | (kind < ALL)) & ~((kind >= ALL) & (kind < ALL + NONE))
    return rearrange(hidden.float(), "b h w -> b 1 h w")


def _rectangles(draws: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Turn (B, n, 5) uniform draws into masks (B, H, W) of one to n rectangles, each side 0.1 to 0.6 of the picture."""
    size = 0.1 + 0.5 * draws[..., :2]
    begin = draws[..., 2:4] * (1 - size)
    picture = torch.tensor([len(y), len(x)], device=y.device)
    (top, left), (bottom, right) = (
        rearrange(corner * picture, "b n side -> side n b 1 1").unbind() for corner in (begin, begin + size)
    )
    is_there = rearrange(draws[..., 4], "b n -> n b 1 1") < 0.5
    is_there[0] = True
    return (is_there & (y >= top) & (y < bottom) & (x >= left) & (x < right)).any(0)


def _strokes(draws: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Turn (B, n + 2, 2) uniform draws into masks (B, H, W) of one stroke of n segments, round at its joints."""
    side = min(len(y), len(x))
    start, brush = draws[:, 0], draws[:, 1, :1]
    radius = rearrange((0.03 + 0.07 * brush) * side, "b 1 -> b 1 1").clamp(min=0.8)
    turn = (draws[:, 2:, 0] * 2 - 1) * math.pi
    turn[:, 1:] *= 0.6  # it begins anywhere, bends, and seldom turns back
    angle = turn.cumsum(1)
    length = (0.08 + 0.17 * draws[:, 2:, 1]) * side
    size = torch.tensor([len(y), len(x)], device=y.device)
    at = start * size
    hidden = torch.zeros(len(draws), len(y), x.shape[-1], dtype=torch.bool, device=y.device)
    for i in range(angle.shape[1]):
        step = length[:, i, None] * torch.stack([angle[:, i].sin(), angle[:, i].cos()], dim=1)
        to = (at + step).clamp(min=torch.zeros_like(size), max=size)
        (y_0, x_0), (dy, dx) = (rearrange(v, "b side -> side b 1 1").unbind() for v in (at, to - at))
        # The nearest point of the segment, as a part of its way.
        part = (((y - y_0) * dy + (x - x_0) * dx) / (dy**2 + dx**2).clamp(min=1e-6)).clamp(0, 1)
        hidden |= (y - y_0 - part * dy) ** 2 + (x - x_0 - part * dx) ** 2 <= radius**2
        at = to
    return hidden


def latent_masks(masks: Tensor, downscale: int) -> Tensor:
    """Turn masks of pixels (B, 1, H, W) into those of latents (B, 1, h, w): hidden where any of its pixels is."""
    return F.max_pool2d(masks, downscale)


def seeing(unet: Callable[..., Tensor], seen: Tensor | None) -> Callable[..., Tensor]:
    """Show a U-Net the mask and the masked picture's latents behind x_t, in the order of Stable Diffusion's inpainting.

    Args:
        unet: unet(x_t, t, context).
        seen: (B, 1 + C, h, w): mask, latents of the masked picture; None for a U-Net that sees x_t alone.
    """
    if seen is None:
        return unet
    return lambda x_t, t, context: unet(torch.cat([x_t, seen.to(x_t.dtype)], dim=1), t, context)
