"""Pictures to latents and back, within memory and within the range of half precision.

B batch, C channels, h w latents, H W pixels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.nn.autoencoder import AutoencoderKL
from ldm.nn.tiles import decode_tiled, encode_tiled

SLICE = 512 * 512  # pixels at once: more of them save no time and cost memory


class Codec:
    """Run a VAE over a batch in slices, over large pictures in tiles where asked, and in float32 where fp16 overflows.

    Args:
        vae: in eval mode, on its device, in the dtype to begin with.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae

    def encode(self, image: Tensor, tile: int | None = None) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to moments (B, 2C, h, w) in float32.

        Args:
            image: H and W divisible by the VAE's factor.
            tile: side in pixels of the tiles to work in; None works on whole pictures.
        """

        def run(part: Tensor) -> Tensor:
            return self.vae.encode(part) if tile is None else encode_tiled(self.vae, part, self._cells(tile))

        return self._run(run, image, image[0, 0].numel())

    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """Map scaled latents (B, C, h, w) to images (B, 3, H, W) in [-1, 1] in float32.

        Raises:
            UserError: the latents are not finite.
        """
        if not latents.isfinite().all():
            raise UserError("the latents are not finite: where the U-Net ran in fp16, try dtype=bf16 or fp32")

        def run(part: Tensor) -> Tensor:
            z = part / self.vae.config["scaling_factor"] + self.vae.shift_factor
            return self.vae.decode(z) if tile is None else decode_tiled(self.vae, z, self._cells(tile))

        return self._run(run, latents, latents[0, 0].numel() * self.vae.downscale_factor**2).clamp(-1, 1)

    def _cells(self, tile: int) -> int:
        return max(1, tile // self.vae.downscale_factor)

    def _run(self, run: Callable[[Tensor], Tensor], batch: Tensor, pixels: int) -> Tensor:
        weight = next(self.vae.parameters())
        given = batch.to(weight.device, weight.dtype, memory_format=torch.channels_last)
        found = torch.cat([run(part).float() for part in given.split(max(1, SLICE // pixels))])
        over = ~found.flatten(1).isfinite().all(dim=1)
        if weight.dtype is torch.float16 and over.any():
            # These alone, so that a picture does not depend on those it is drawn with; fp16 goes to float32 and back.
            self.vae.float()
            try:
                found[over] = self._run(run, batch[over.to(batch.device)], pixels)
            finally:
                self.vae.half()
        return found
