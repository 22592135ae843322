"""Both ends of classifier-free guidance (arXiv:2207.12598): caption dropout and the guided denoiser.

B batch, C channels, h w latents, L tokens, D width.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor


def _expand_null(null_context: Tensor, context: Tensor) -> Tensor:
    """Give every sample of `context` its null context, in context's dtype and device."""
    try:
        return null_context.to(context).expand_as(context)
    except RuntimeError as error:
        raise ValueError(
            f"null_context of shape {tuple(null_context.shape)} does not fit context of shape {tuple(context.shape)}; "
            "encode both with the same text encoder and pad both to the same number of tokens"
        ) from error


def drop_captions(context: Tensor, null_context: Tensor, drop: Tensor) -> Tensor:
    """Swap the captions of single samples for the null caption (arXiv:2207.12598 Alg. 1, line 3).

    Works on text states, so it serves cached ones as well as fresh.

    Args:
        context: (B, L, D).
        null_context: (L, D) or (1, L, D), the states of the null caption.
        drop: (B,) bool, true where the caption goes.

    Returns:
        (B, L, D) in context's dtype.

    Raises:
        ValueError: `drop` is not (B,) bool, or `null_context` does not fit.

    >>> context, null_context = torch.ones(3, 1, 2), torch.zeros(1, 2)
    >>> drop_captions(context, null_context, torch.tensor([False, True, False]))[:, 0].tolist()
    [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]
    """
    if drop.shape != context.shape[:1] or drop.dtype != torch.bool:
        raise ValueError(
            f"drop must be bool of shape ({len(context)},), one per sample; "
            f"it is {drop.dtype} of shape {tuple(drop.shape)}"
        )
    return torch.where(rearrange(drop, "b -> b 1 1"), _expand_null(null_context, context), context)


class GuidedDenoiser:
    """Guide a denoiser towards its context and away from the null context: `denoise(x, sigma) -> x̂_0` for a sampler.

    arXiv:2207.12598 Eq. 6 in terms of x̂_0:  D = D_null + w (D_cond - D_null), with w the `guidance_scale`, which is
    the paper's 1 + w. w = 1 is no guidance and runs the network on the condition alone; otherwise both halves run as
    one batch.

    Args:
        denoiser: D(x, sigma, context) -> x̂_0.
        context: (B, L, D).
        null_context: (1, L, D), or (B, L, D) with a negative prompt for each sample.
        guidance_scale: w.

    Raises:
        ValueError: `null_context` does not fit `context`.
    """

    def __init__(
        self,
        denoiser: Callable[[Tensor, float, Tensor], Tensor],
        context: Tensor,
        null_context: Tensor,
        guidance_scale: float,
    ) -> None:
        self.denoiser = denoiser
        self.guidance_scale = guidance_scale
        self.context = context
        if guidance_scale != 1:
            self.context = torch.cat([_expand_null(null_context, context), context])

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Estimate x_0 for x: (B, C, h, w) in the coordinates x_0 + sigma·ε."""
        if self.guidance_scale == 1:
            return self.denoiser(x, sigma, self.context)
        null, cond = self.denoiser(torch.cat([x, x]), sigma, self.context).chunk(2)
        return null + self.guidance_scale * (cond - null)
