"""Attention: self- and cross-attention are one class.

Shape letters: B batch, L query tokens, S key tokens, N heads, D width, h w height and width of a feature map.

Tokens are (B, L, D), or, where they are the positions of a feature map, (B, h, w, D): in channels_last memory a free
view of the map (B, D, h, w).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer to tokens (B, ..., D_in), with `weight` (D_out, D_in): (B, ..., D_out).

    On the CPU the positions of a feature map (B, h, w, D_in) go through a 1×1 convolution, which computes the same
    sums without a copy: it runs in oneDNN, on AMD processors about twice as fast as MKL's matrix product.
    """
    if x.ndim == 4 and x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return F.conv2d(x.permute(0, 3, 1, 2), weight[:, :, None, None], bias).permute(0, 2, 3, 1)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` that is computed by `project`."""

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.weight, self.bias)


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int, is_causal: bool = False) -> Tensor:
    """Compute multi-head scaled dot-product attention, softmax(q kᵀ / √d) v with d = D / N.

    Vaswani et al. (arXiv:1706.03762) Eq. 1.

    Args:
        q: (B, L, D) projected queries.
        k: (B, S, D) projected keys.
        v: (B, S, D) projected values.
        num_heads: N.
        is_causal: let a token see itself and earlier tokens only.

    Returns:
        (B, L, D), the heads side by side.
    """
    q, k, v = (rearrange(x, "b l (n d) -> b n l d", n=num_heads) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    return rearrange(out, "b n l d -> b l (n d)")


class Attention(nn.Module):
    """Attend from tokens to `context`, or to themselves where there is none.

    Args:
        query_dim: D, width of the tokens and of the output.
        num_heads: N, divides D.
        context_dim: width of the context; None for self-attention.
        bias: whether queries, keys and values have a bias (the autoencoder's do, the U-Net's do not).
    """

    def __init__(self, query_dim: int, num_heads: int, context_dim: int | None = None, bias: bool = False) -> None:
        super().__init__()
        if query_dim % num_heads:
            raise ValueError(f"Attention: {num_heads} heads do not divide the width {query_dim}")
        context_dim = query_dim if context_dim is None else context_dim
        self.num_heads = num_heads
        self.to_q = Linear(query_dim, query_dim, bias=bias)
        self.to_k = Linear(context_dim, query_dim, bias=bias)
        self.to_v = Linear(context_dim, query_dim, bias=bias)
        self.to_out = nn.ModuleList([Linear(query_dim, query_dim)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map tokens (B, L, D) or (B, h, w, D), with a context (B, S, context_dim) or None, to the same shape."""
        context = x if context is None else context
        q, k, v = (y.flatten(1, -2) for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out[0](attend(q, k, v, self.num_heads).view(x.shape))
