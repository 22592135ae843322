"""Inpainting as a denoiser around a denoiser: what a mask keeps is known, so it is not asked for.

B batch, C channels, h w latents.
"""

from torch import Tensor

from ldm.diffusion.steps import Denoise


class MaskedDenoiser:
    """Repaint what a mask allows and keep the rest: D'(x, sigma) = m D(x', sigma) + (1 - m) x_0.

    The inner denoiser sees the kept part as the forward process leaves it, x' = m x + (1 - m) (x_0 + sigma·ε), always
    with one and the same ε, as "blended" inpainting does after each step (arXiv:2111.14818; in latents,
    arXiv:2206.02779). Every sampler moves each latent by what the denoiser says of it, so the kept part needs no care
    of theirs.

    Args:
        denoise: D(x, sigma) -> x̂_0.
        x_0: (B, C, h, w) latents of the picture.
        noise: (B, C, h, w) ε.
        mask: (1, 1, h, w) or (B, 1, h, w) in [0, 1]; 1 is repainted.
        hidden_at: at this sigma, the first of a run from pure noise, the kept part is not shown. It is what diffusers
            does at full strength, and so gives its pictures.
    """

    def __init__(
        self, denoise: Denoise, x_0: Tensor, noise: Tensor, mask: Tensor, hidden_at: float | None = None
    ) -> None:
        self.denoise = denoise
        self.x_0, self.noise, self.mask = x_0, noise, mask
        self.hidden_at = hidden_at

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Estimate x_0 for x: (B, C, h, w) in the coordinates x_0 + sigma·ε."""
        if sigma != self.hidden_at:
            x = self.keep(x, self.x_0 + sigma * self.noise)
        return self.keep(self.denoise(x, sigma), self.x_0)

    def keep(self, painted: Tensor, kept: Tensor) -> Tensor:
        """Blend two (B, C, h, w) by the mask: `painted` where it is 1."""
        return self.mask * painted + (1 - self.mask) * kept
