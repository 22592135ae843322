"""Both ends of classifier-free guidance (arXiv:2207.12598): caption dropout and the guided denoiser.

B batch, C channels, h w latents, L tokens, D width.
"""

import math
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser


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
    the paper's 1 + w. Both halves run as one batch. Where w = 1 or outside of the interval there is no guidance, and
    the network runs on the condition alone.

    Args:
        denoiser: a `Denoiser`; where `rescale` is 0, any D(x, sigma, context) -> x̂_0.
        context: (B, L, D).
        null_context: (1, L, D), or (B, L, D) with a negative prompt for each sample.
        guidance_scale: w.
        rescale: φ in [0, 1], how far the network's guided prediction is brought back to the standard deviation that
            it has without guidance (arXiv:2305.08891 §3.4); 0 leaves it as it is.
        interval: guide where low < sigma <= high only (arXiv:2404.07724 §3).

    Raises:
        ValueError: `null_context` does not fit `context`, or `rescale` or `interval` is out of range.
    """

    def __init__(
        self,
        denoiser: Callable[[Tensor, float, Tensor], Tensor],
        context: Tensor,
        null_context: Tensor,
        guidance_scale: float,
        rescale: float = 0.0,
        interval: tuple[float, float] = (0.0, math.inf),
    ) -> None:
        if not 0 <= rescale <= 1:
            raise ValueError(f"rescale is {rescale}; choose 0 (off) to 1")
        if not 0 <= interval[0] < interval[1]:
            raise ValueError(f"interval is {interval}; need 0 <= low < high, noise levels")
        self.denoiser = denoiser
        self.guidance_scale, self.rescale, self.interval = guidance_scale, rescale, interval
        self.context = context
        if guidance_scale != 1:
            self.both = torch.cat([_expand_null(null_context, context), context])

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Estimate x_0 for x: (B, C, h, w) in the coordinates x_0 + sigma·ε."""
        low, high = self.interval
        if self.guidance_scale == 1 or not low < sigma <= high:
            return self.denoiser(x, sigma, self.context)
        null, cond = self.denoiser(torch.cat([x, x]), sigma, self.both).chunk(2)
        guided = null + self.guidance_scale * (cond - null)
        return self._rescaled(guided, cond, x, sigma) if self.rescale else guided

    def _rescaled(self, guided: Tensor, cond: Tensor, x: Tensor, sigma: float) -> Tensor:
        # The paper's x_cfg and x_pos are what the network predicts, v or ε, not x̂_0.
        assert isinstance(self.denoiser, Denoiser)
        guided, cond = (self.denoiser.to_prediction(denoised, x, sigma) for denoised in (guided, cond))
        # x_rescaled = x_cfg · std(x_pos) / std(x_cfg), and of that φ x_rescaled + (1 - φ) x_cfg
        ratio = cond.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
        return self.denoiser.to_denoised(guided * (self.rescale * ratio + 1 - self.rescale), x, sigma)
