"""The KL autoencoder (LDM, arXiv:2112.10752, §3.1): images to latents and back.

Shape letters: B batch, C latent channels, H W pixels, h w latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from ldm.nn.blocks import ACTIVATIONS, Downsample, ResBlock, SpatialAttention, Upsample
from ldm.nn.config import AUTOENCODER_OFF, choose, per_level, plain_options, read_config

NORM_EPS = 1e-6
MakeResBlock = Callable[[int, int], ResBlock]


class DiagonalGaussian:
    """The posterior q(z | image) = N(mean, diag(std²)) that `moments` describe.

    Args:
        moments: (B, 2C, h, w), mean and log-variance; the log-variance is clamped to [-30, 20] as in LDM.
    """

    def __init__(self, moments: Tensor) -> None:
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        """(B, C, h, w) standard deviation."""
        return torch.exp(0.5 * self.logvar)

    def mode(self) -> Tensor:
        """Return the most likely z, the mean (B, C, h, w)."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """Return z = mean + std · noise (Kingma & Welling, arXiv:1312.6114, §2.4), noise (B, C, h, w) from N(0, I)."""
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """Return KL(q || N(0, I)) in nats per sample, (B,): arXiv:1312.6114, Appendix B."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).flatten(1).sum(dim=1)


class Level(nn.Module):
    """Residual blocks of one size, then a change of size (none at the last level)."""

    def __init__(self, channels: Sequence[int], res_block: MakeResBlock, resize: Downsample | Upsample | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(res_block(*pair) for pair in pairwise(channels))
        # Two attributes, of which one is empty: their names are those of the parameters.
        self.downsamplers = nn.ModuleList([resize] if isinstance(resize, Downsample) else [])
        self.upsamplers = nn.ModuleList([resize] if isinstance(resize, Upsample) else [])

    def forward(self, x: Tensor) -> Tensor:
        return self.resize(self.residual(x))

    def residual(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        return x

    def resize(self, x: Tensor) -> Tensor:
        for layer in (*self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class MidBlock(nn.Module):
    """The smallest level: residual block, attention where wanted, residual block."""

    def __init__(self, channels: int, res_block: MakeResBlock, norm_num_groups: int, add_attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(res_block(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList(
            [SpatialAttention(channels, norm_num_groups, NORM_EPS)] if add_attention else []
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    """Map images (B, 3, H, W) to (B, out_channels, h, w), halving the size between levels."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int],
        layers_per_block: int,
        norm_num_groups: int,
        act_fn: str,
        mid_block_add_attention: bool,
    ) -> None:
        super().__init__()
        res_block = partial(ResBlock, norm_num_groups=norm_num_groups, norm_eps=NORM_EPS, act_fn=act_fn)
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(
                [channels[max(level - 1, 0)]] + [width] * layers_per_block,
                res_block,
                None if level == last else Downsample(width, padding=0),
            )
            for level, width in enumerate(channels)
        )
        self.mid_block = MidBlock(channels[-1], res_block, norm_num_groups, mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, channels[-1], NORM_EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.low(self.high(x))

    def high(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to features of latent size (B, C, h, w): what costs memory, and sees but near by."""
        x = self.conv_in(x)
        for block in self.down_blocks[:-1]:
            x = block(x)
        return x

    def low(self, x: Tensor) -> Tensor:
        """Do what is left to do at latent size."""
        x = self.mid_block(self.down_blocks[-1](x))
        return self.conv_out(self.conv_act(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Map latents (B, in_channels, h, w) to images (B, out_channels, H, W), doubling the size between levels."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int],
        layers_per_block: int,
        norm_num_groups: int,
        act_fn: str,
        mid_block_add_attention: bool,
    ) -> None:
        super().__init__()
        res_block = partial(ResBlock, norm_num_groups=norm_num_groups, norm_eps=NORM_EPS, act_fn=act_fn)
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(in_channels, channels[-1], 3, padding=1)
        self.mid_block = MidBlock(channels[-1], res_block, norm_num_groups, mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            Level(
                [channels[min(level + 1, last)]] + [channels[level]] * (layers_per_block + 1),
                res_block,
                Upsample(channels[level]) if level else None,
            )
            for level in reversed(range(len(channels)))
        )
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, channels[0], NORM_EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(channels[0], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.high(self.low(x))

    def low(self, x: Tensor) -> Tensor:
        """Do what is to be done at latent size: (B, in_channels, h, w) to features (B, C, h, w)."""
        return cast(Level, self.up_blocks[0]).residual(self.mid_block(self.conv_in(x)))

    def high(self, x: Tensor) -> Tensor:
        """Map features of latent size to images (B, 3, H, W): what costs memory, and sees but near by."""
        x = cast(Level, self.up_blocks[0]).resize(x)
        for block in self.up_blocks[1:]:
            x = block(x)
        return self.conv_out(self.conv_act(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Encode images as moments of a Gaussian over latents, and decode latents.

    Parameter names and options are those of diffusers' `AutoencoderKL`. Three kinds of tensor, each with its name:
    `moments` come out of `encode`; `z` goes into `decode`; `latents` = (z - shift_factor) · scaling_factor are what a
    diffusion model sees, with about unit variance.

    Args:
        in_channels: channels of the image that is encoded.
        out_channels: channels of the image that is decoded.
        down_block_types: "DownEncoderBlock2D" per level; None says the same.
        up_block_types: "UpDecoderBlock2D" per level; None says the same.
        block_out_channels: channels of each level, the first at full size and each next at half of it.
        layers_per_block: residual blocks of a level of the encoder; the decoder has one more.
        act_fn: "silu", "swish", "gelu", "relu" or "mish", inside residual blocks.
        latent_channels: C.
        norm_num_groups: groups of all GroupNorms.
        sample_size: size of the images the model was trained on; does not change the network.
        scaling_factor: latents per unit of z.
        shift_factor: z of latent 0; None is 0.
        force_upcast: advice for other tools to decode in float32; does not change the network.
        use_quant_conv: whether a 1×1 convolution ends the encoder.
        use_post_quant_conv: whether a 1×1 convolution begins the decoder.
        mid_block_add_attention: whether the smallest level has self-attention.

    Raises:
        ValueError: an option has a value that is not supported, or the block types do not fit the levels.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: Sequence[str] | None = None,
        up_block_types: Sequence[str] | None = None,
        block_out_channels: Sequence[int] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int | Sequence[int] = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ) -> None:
        config = plain_options(locals())
        super().__init__()
        self.config: dict[str, Any] = config
        choose("AutoencoderKL", "act_fn", act_fn, ACTIVATIONS)
        for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            given = kind if config[name] is None else config[name]
            config[name] = per_level("AutoencoderKL", name, given, len(block_out_channels))
            for block_type in config[name]:
                choose("AutoencoderKL", name, block_type, [kind])
        channels = list(block_out_channels)
        shared = (channels, layers_per_block, norm_num_groups, act_fn, mid_block_add_attention)
        self.encoder = Encoder(in_channels, 2 * latent_channels, *shared)
        self.decoder = Decoder(latent_channels, out_channels, *shared)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None
        self.narrow_posterior()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the network that a diffusers `config.json` describes, with fresh weights.

        Raises:
            ValueError: the file asks for something this autoencoder does not have; the option is named.
        """
        return cls(**read_config(config, cls, AUTOENCODER_OFF))

    @torch.no_grad()
    def narrow_posterior(self, logvar: float = -6.0) -> None:
        """Start with a posterior of small variance, so that the first latents are signal and not noise.

        With PyTorch's defaults it starts near N(0, I), and the decoder has nothing to learn from until the encoder
        has made itself heard: a multiple of the steps to the same reconstruction.
        """
        last = self.encoder.conv_out if self.quant_conv is None else self.quant_conv
        assert last.bias is not None
        last.weight[last.out_channels // 2 :] *= 0.1
        last.bias[last.out_channels // 2 :] = logvar

    @property
    def downscale_factor(self) -> int:
        """Pixels per latent along height and along width."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    @property
    def shift_factor(self) -> float:
        """The z of latent 0."""
        return self.config["shift_factor"] or 0.0

    def latent_size(self, image: Tensor) -> tuple[int, int]:
        """Return h and w of the latents of images (B, 3, H, W).

        Raises:
            ValueError: H or W is not divisible by `downscale_factor`.
        """
        height, width = image.shape[-2:]
        factor = self.downscale_factor
        if height % factor or width % factor:
            raise ValueError(
                f"AutoencoderKL: images of size {height}x{width} cannot be halved {factor.bit_length() - 1} times; "
                f"height and width must be divisible by {factor}"
            )
        return height // factor, width // factor

    def encode(self, image: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to moments (B, 2C, h, w); see `DiagonalGaussian`.

        Raises:
            ValueError: H or W is not divisible by `downscale_factor`.
        """
        self.latent_size(image)
        moments = self.encoder(image)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def decode(self, z: Tensor) -> Tensor:
        """Map unscaled z (B, C, h, w) to images (B, 3, H, W), about [-1, 1]; `image` takes scaled latents instead."""
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Turn moments into what a diffusion model is trained on.

        Args:
            moments: (B, 2C, h, w) from `encode`.
            noise: (B, C, h, w) from N(0, I) to sample with; None takes the mean.

        Returns:
            (B, C, h, w) latents, (z - shift_factor) · scaling_factor.
        """
        posterior = DiagonalGaussian(moments)
        z = posterior.mode() if noise is None else posterior.sample(noise)
        return (z - self.shift_factor) * self.config["scaling_factor"]

    def image(self, latents: Tensor) -> Tensor:
        """Decode scaled latents (B, C, h, w) to images (B, 3, H, W), about [-1, 1]."""
        return self.decode(latents / self.config["scaling_factor"] + self.shift_factor)

    @torch.no_grad()
    def fold_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Standardise the latents from now on: new latents = (old latents - mean) / std, per channel.

        The statistics are those of `latents(...)` as the model gives them before this call, so an earlier
        `scaling_factor` f and `shift_factor` s count: in units of z the shift is μ = s + mean / f and the scale is
        σ = std / f. With `quant_conv` and `post_quant_conv` both are folded into them,

            mean ← (mean - μ) / σ,   log-variance ← log-variance - 2 log σ,   and  z ← σ z + μ  before decoding,

        `scaling_factor` becomes 1 and `shift_factor` None. A picture's latents decode to what they did before, unless a
        log-variance crosses its clamp. Without these convolutions only a scalar can be kept: `scaling_factor` is
        divided by the standard deviation over all channels together (LDM, Appendix G), and the shift stays.

        Args:
            mean: (C,) mean of each channel of the latents over the training set.
            std: (C,) standard deviation of each channel, positive.

        Raises:
            ValueError: the statistics are not (C,), not finite, or a `std` is not positive.
        """
        num_channels = self.config["latent_channels"]
        mean, std = mean.detach().double().cpu(), std.detach().double().cpu()
        if mean.shape != (num_channels,) or std.shape != (num_channels,):
            raise ValueError(
                f"AutoencoderKL: latent statistics must be ({num_channels},), one for each latent channel; "
                f"got mean {tuple(mean.shape)} and std {tuple(std.shape)}"
            )
        if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
            raise ValueError(
                f"AutoencoderKL: latent statistics must be finite and std positive, got mean {mean.tolist()} and "
                f"std {std.tolist()}; a channel that never changes carries nothing: train the autoencoder further"
            )
        if self.quant_conv is None or self.post_quant_conv is None:
            overall_std = (std.square() + (mean - mean.mean()).square()).mean().sqrt()
            self.config["scaling_factor"] /= overall_std.item()
            return

        mu, sigma = self.shift_factor + mean / self.config["scaling_factor"], std / self.config["scaling_factor"]
        # quant_conv's outputs are (mean, log-variance); post_quant_conv's inputs are z. All in float64, rounded once.
        gain = torch.cat([1 / sigma, torch.ones_like(sigma)])
        offset = torch.cat([-mu / sigma, -2 * sigma.log()])
        weight, bias = (p.double().cpu() for p in self.quant_conv.parameters())
        load_weights(self.quant_conv, weight * gain[:, None, None, None], bias * gain + offset)
        weight, bias = (p.double().cpu() for p in self.post_quant_conv.parameters())
        load_weights(self.post_quant_conv, weight * sigma[:, None, None], bias + weight.flatten(1) @ mu)
        self.config.update(scaling_factor=1.0, shift_factor=None)


def load_weights(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    """Overwrite a convolution's parameters in place, in their own dtype and on their own device."""
    conv.load_state_dict({"weight": weight, "bias": bias})
