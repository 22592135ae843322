"""What the U-Net and the autoencoder are built of.

Shape letters: B batch, C channels, h w height and width of a feature map.

All blocks keep the memory format of their input. In channels_last, the map (B, C, h, w) as tokens (B, h, w, C) is a
free view.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.nn.attention import Attention

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "mish": F.mish,
}


def timestep_embedding(t: Tensor, dim: int, flip_sin_to_cos: bool = True, freq_shift: float = 0) -> Tensor:
    """Embed timesteps as sines and cosines of geometrically spaced frequencies.

    Vaswani et al. (arXiv:1706.03762) §3.5, as in DDPM (arXiv:2006.11239):  ω_i = 10000^(-i / (dim/2 - freq_shift)).

    Args:
        t: (B,) int or float.
        dim: width of the embedding; an odd one ends in a zero.
        flip_sin_to_cos: cosines before sines.
        freq_shift: 0 (Stable Diffusion) or 1 (DDPM: the last frequency is exactly 1/10000).

    Returns:
        (B, dim) float32.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) * exponent)
    first, second = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat([first, second], dim=1), (0, dim % 2))


class TimestepEmbedding(nn.Module):
    """Two-layer perceptron on the sinusoidal embedding: (B, in_dim) to (B, out_dim)."""

    def __init__(self, in_dim: int, out_dim: int, act_fn: str = "silu") -> None:
        super().__init__()
        self.act = ACTIVATIONS[act_fn]
        self.linear_1 = nn.Linear(in_dim, out_dim)
        self.linear_2 = nn.Linear(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(x)))


class ResBlock(nn.Module):
    """Residual block: (norm, activation, convolution) twice, the time embedding added in between.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; where they differ, a 1×1 convolution carries the skip connection.
        time_dim: width of the time embedding; None for a block without one.
        norm_num_groups: groups of the GroupNorms.
        norm_eps: their epsilon.
        act_fn: a key of `ACTIVATIONS`.
        dropout: rate before the second convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_dim: int | None = None,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        act_fn: str = "silu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.act = ACTIVATIONS[act_fn]
        self.norm1 = nn.GroupNorm(norm_num_groups, in_channels, norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None if time_dim is None else nn.Linear(time_dim, out_channels)
        self.norm2 = nn.GroupNorm(norm_num_groups, out_channels, norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """Map (B, C_in, h, w) to (B, C_out, h, w); `emb` (B, time_dim) is the *activated* time embedding.

        All blocks of a network share the activation of the time embedding, so the network applies it once.
        """
        h = self.conv1(self.act(self.norm1(x)))
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(emb)[:, :, None, None]
        h = self.conv2(self.dropout(self.act(self.norm2(h))))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Halve height and width by a strided 3×3 convolution.

    Args:
        channels: C.
        padding: 1 pads all four sides (U-Net); 0 pads right and bottom only (autoencoder).
    """

    def __init__(self, channels: int, padding: int = 1) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, h/2, w/2)."""
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, 2h, 2w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class SpatialAttention(Attention):
    """Self-attention over the positions of a feature map, one head, with its own norm and residual (autoencoder)."""

    def __init__(self, channels: int, norm_num_groups: int, norm_eps: float) -> None:
        super().__init__(channels, num_heads=1, bias=True)
        self.group_norm = nn.GroupNorm(norm_num_groups, channels, norm_eps)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map (B, C, h, w) to (B, C, h, w)."""
        tokens = super().forward(rearrange(self.group_norm(x), "b c h w -> b h w c").contiguous(), context)
        return x + rearrange(tokens, "b h w c -> b c h w")
