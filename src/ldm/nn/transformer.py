"""The transformer between the U-Net's convolutions (LDM, arXiv:2112.10752, §3.3 and Table 15).

Shape letters: B batch, C channels, h w height and width of a feature map, L tokens of context, D width of the context.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.nn.attention import Attention, Linear, project


class GEGLU(nn.Module):
    """Gated linear unit with GELU:  (x W + b) ⊗ GELU(x V + c).  Shazeer (arXiv:2002.05202) Eq. 5."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = Linear(in_dim, 2 * out_dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width, and back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # The Identity keeps the place, and so the parameter names, of the dropout that other implementations have.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, feed-forward; each after a LayerNorm and with a residual."""

    def __init__(self, dim: int, num_heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, num_heads, context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Map tokens (B, h, w, C) and context (B, L, D) to (B, h, w, C)."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """See a feature map as tokens, transform them under a context, and add the result to the map.

    Args:
        channels: C.
        num_heads: heads of each attention, divides C.
        context_dim: D.
        num_layers: transformer blocks.
        norm_num_groups: groups of the GroupNorm at the entrance.
        use_linear_projection: whether the projections at both ends are stored as linear layers (SD 2.x) or as 1×1
            convolutions (SD 1.x). They compute the same.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int,
        context_dim: int,
        num_layers: int = 1,
        norm_num_groups: int = 32,
        use_linear_projection: bool = False,
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_num_groups, channels, eps=1e-6)
        self.proj_in, self.proj_out = (
            Linear(channels, channels) if use_linear_projection else nn.Conv2d(channels, channels, 1) for _ in range(2)
        )
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, num_heads, context_dim) for _ in range(num_layers)
        )

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Map (B, C, h, w) and context (B, L, D) to (B, C, h, w)."""
        tokens = rearrange(self.norm(x), "b c h w -> b h w c").contiguous()  # no copy in channels_last
        # A 1×1 convolution's weight (C, C, 1, 1), flattened, is that of a linear layer.
        tokens = project(tokens, self.proj_in.weight.flatten(1), self.proj_in.bias)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        tokens = project(tokens, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return x + rearrange(tokens, "b h w c -> b c h w")
