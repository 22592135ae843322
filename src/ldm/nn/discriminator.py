"""The patch discriminator (pix2pix, arXiv:1611.07004, §3.2.2): tell real pictures from reconstructions, patch by patch.

B batch, H W pixels, h w patches.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Judge overlapping patches of an image; of 70×70 pixels with three layers, as in pix2pix (Appendix 6.1.2).

    The layers are those of taming-transformers (arXiv:2012.09841), which latent diffusion took over, but for the norms:
    these are group norms, so that the verdict on a picture depends neither on the others in its batch nor on the rank,
    and judging leaves no trace in running statistics. The first weights are drawn from N(0, 0.02²), as in pix2pix.

    Args:
        in_channels: of the image.
        channels: of the first layer; the next ones have twice as many each, up to eight times.
        num_layers: layers that halve the size.
    """

    def __init__(self, in_channels: int = 3, channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        widths = [channels * min(2**level, 8) for level in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level, (before, after) in enumerate(pairwise(widths), start=1):
            stride = 2 if level < num_layers else 1
            layers += [
                nn.Conv2d(before, after, 4, stride, padding=1, bias=False),
                nn.GroupNorm(max(1, after // 16), after),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        self.apply(_draw)

    def forward(self, image: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, 1, h, w), the larger the more real."""
        return self.layers(image)


@torch.no_grad()
def _draw(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
