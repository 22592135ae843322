"""The conditional U-Net (LDM, arXiv:2112.10752, §3.3): a denoiser of latents that reads a context.

Shape letters: B batch, C channels, h w height and width of the latents, L tokens of context, D width of the context.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.nn.blocks import ACTIVATIONS, Downsample, ResBlock, TimestepEmbedding, Upsample, timestep_embedding
from ldm.nn.config import UNET_INERT, UNET_OFF, choose, per_level, plain_options, read_config
from ldm.nn.transformer import SpatialTransformer

MakeResBlock = Callable[[int, int], ResBlock]
MakeTransformer = Callable[[int], SpatialTransformer]


class DownBlock(nn.Module):
    """One level on the way down: residual blocks, each with its transformer where the level has attention."""

    def __init__(
        self,
        channels: Sequence[int],
        res_block: MakeResBlock,
        transformer: MakeTransformer | None,
        downsample: Downsample | None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(res_block(*pair) for pair in pairwise(channels))
        self.attentions = nn.ModuleList(transformer(c) for c in channels[1:] if transformer)
        self.downsamplers = nn.ModuleList([downsample] if downsample else [])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        """Return the map for the next level; every map on the way is appended to `skips`."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, emb)
            if self.attentions:
                x = self.attentions[i](x, context)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x


class MidBlock(nn.Module):
    """The lowest level: residual block, transformer, residual block."""

    def __init__(self, channels: int, res_block: MakeResBlock, transformer: MakeTransformer) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(res_block(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([transformer(channels)])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, h, w)."""
        x = self.resnets[0](x, emb)
        x = self.attentions[0](x, context)
        return self.resnets[1](x, emb)


class UpBlock(nn.Module):
    """One level on the way up: as `DownBlock`, with a map from the way down joined to each block's input."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        skip_channels: Sequence[int],
        res_block: MakeResBlock,
        transformer: MakeTransformer | None,
        upsample: Upsample | None,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (len(skip_channels) - 1)
        self.resnets = nn.ModuleList(
            res_block(width + skip, out_channels) for width, skip in zip(widths, skip_channels, strict=True)
        )
        self.attentions = nn.ModuleList(transformer(out_channels) for _ in skip_channels if transformer)
        self.upsamplers = nn.ModuleList([upsample] if upsample else [])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        """Return the map for the next level; the maps joined on the way are taken off the end of `skips`."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), emb)
            if self.attentions:
                x = self.attentions[i](x, context)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class UNet(nn.Module):
    """Predict, from noisy latents, a timestep and a context, what the schedule's parameterization asks for.

    Parameter names and options are those of diffusers' `UNet2DConditionModel`; every option of Stable Diffusion 1.x
    and 2.x is here. For training from nothing, the last convolution of each residual branch and of the network starts
    at zero, so that every block begins as the identity (`zero_module` in LDM's openaimodel.py, after guided diffusion,
    arXiv:2105.05233).

    Args:
        sample_size: height and width of the latents the model was trained on; does not change the network.
        in_channels: channels of `x_t`; more than `out_channels` where the model also sees a mask or another picture.
        out_channels: channels of the prediction.
        block_out_channels: channels of each level, the first at full size and each next at half of it.
        layers_per_block: residual blocks of a level on the way down; on the way up there is one more.
        down_block_types: per level, "CrossAttnDownBlock2D" or "DownBlock2D".
        mid_block_type: "UNetMidBlock2DCrossAttn".
        up_block_types: per level from the smallest up, "CrossAttnUpBlock2D" or "UpBlock2D".
        cross_attention_dim: D, width of the context.
        attention_head_dim: *number* of attention heads, for all levels or for each; the name is a historical error
            of diffusers that every published config.json carries on.
        transformer_layers_per_block: transformer blocks per residual block, for all levels or for each.
        use_linear_projection: store the transformers' outer projections as linear layers (SD 2.x), not convolutions.
        norm_num_groups: groups of all GroupNorms.
        norm_eps: epsilon of the residual blocks' GroupNorms.
        act_fn: "silu", "swish", "gelu", "relu" or "mish".
        dropout: rate inside residual blocks.
        flip_sin_to_cos: cosines first in the time embedding.
        freq_shift: see `timestep_embedding`.
        downsample_padding: 1 symmetric, 0 right and bottom only.
        upcast_attention: kept for other tools; the fused attention here accumulates scores in float32 anyway.

    Raises:
        ValueError: an option has a value that is not supported, or per-level options differ in length.
    """

    def __init__(
        self,
        sample_size: int | Sequence[int] | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        down_block_types: Sequence[str] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        mid_block_type: str = "UNetMidBlock2DCrossAttn",
        up_block_types: Sequence[str] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        cross_attention_dim: int = 1280,
        attention_head_dim: int | Sequence[int] = 8,
        transformer_layers_per_block: int | Sequence[int] = 1,
        use_linear_projection: bool = False,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        act_fn: str = "silu",
        dropout: float = 0.0,
        flip_sin_to_cos: bool = True,
        freq_shift: float = 0,
        downsample_padding: int = 1,
        upcast_attention: bool = False,
    ) -> None:
        config = plain_options(locals())
        super().__init__()
        self.config: dict[str, Any] = config
        check_options(config)
        channels, num_levels = list(block_out_channels), len(block_out_channels)
        heads = per_level("UNet", "attention_head_dim", attention_head_dim, num_levels)
        depths = per_level("UNet", "transformer_layers_per_block", transformer_layers_per_block, num_levels)
        time_dim = 4 * channels[0]
        self.act = ACTIVATIONS[act_fn]
        self.gradient_checkpointing = False  # True: keep less for the backward pass, and compute it again there

        res_block = partial(
            ResBlock,
            time_dim=time_dim,
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
            act_fn=act_fn,
            dropout=dropout,
        )

        def transformer(level: int) -> MakeTransformer:
            return partial(
                SpatialTransformer,
                num_heads=heads[level],
                context_dim=cross_attention_dim,
                num_layers=depths[level],
                norm_num_groups=norm_num_groups,
                use_linear_projection=use_linear_projection,
            )

        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], time_dim, act_fn)

        skips = [channels[0]]
        self.down_blocks = nn.ModuleList()
        for level, (kind, width) in enumerate(zip(down_block_types, channels, strict=True)):
            is_last = level == num_levels - 1
            self.down_blocks.append(
                DownBlock(
                    [skips[-1]] + [width] * layers_per_block,
                    res_block,
                    transformer(level) if kind == "CrossAttnDownBlock2D" else None,
                    None if is_last else Downsample(width, downsample_padding),
                )
            )
            skips += [width] * (layers_per_block + (not is_last))

        self.mid_block = MidBlock(channels[-1], res_block, transformer(num_levels - 1))

        below = channels[-1]
        self.up_blocks = nn.ModuleList()
        for kind, level in zip(up_block_types, reversed(range(num_levels)), strict=True):
            self.up_blocks.append(
                UpBlock(
                    below,
                    channels[level],
                    [skips.pop() for _ in range(layers_per_block + 1)],
                    res_block,
                    transformer(level) if kind == "CrossAttnUpBlock2D" else None,
                    Upsample(channels[level]) if level else None,
                )
            )
            below = channels[level]

        self.conv_norm_out = nn.GroupNorm(norm_num_groups, channels[0], norm_eps)
        self.conv_out = nn.Conv2d(channels[0], out_channels, 3, padding=1)
        self.zero_residual_branches()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the network that a diffusers `config.json` describes, with fresh weights.

        Raises:
            ValueError: the file asks for something this U-Net does not have; the option is named.
        """
        return cls(**read_config(config, cls, UNET_OFF, UNET_INERT))

    @property
    def downscale_factor(self) -> int:
        """Height and width of the latents must be divisible by this number."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    @property
    def sees_mask(self) -> bool:
        """Whether it is made for inpainting: it is shown a mask and the masked picture beside the latents."""
        return self.config["in_channels"] == 2 * self.config["out_channels"] + 1

    @torch.no_grad()
    def zero_residual_branches(self) -> None:
        """Set the last layer of every residual branch, and of the network, to zero."""
        last_layers: list[nn.Module] = [self.conv_out]
        for module in self.modules():
            if isinstance(module, ResBlock):
                last_layers.append(module.conv2)
            elif isinstance(module, SpatialTransformer):
                last_layers.append(module.proj_out)
        for layer in last_layers:
            for parameter in layer.parameters():
                parameter.zero_()

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """Predict from noisy latents.

        Args:
            x_t: (B, in_channels, h, w), h and w divisible by `downscale_factor`.
            t: (B,) or 0-d, int or float training timesteps.
            context: (B, L, D) text states.

        Returns:
            (B, out_channels, h, w).

        Raises:
            ValueError: a shape is wrong; the message names it.
        """
        self.check_shapes(x_t, t, context)
        emb = timestep_embedding(
            t.expand(len(x_t)), self.config["block_out_channels"][0], self.config["flip_sin_to_cos"],
            self.config["freq_shift"],
        )  # fmt: skip
        emb = self.act(self.time_embedding(emb.to(x_t.dtype)))

        x = self.conv_in(x_t)
        skips = [x]
        run = _checkpointed if self.gradient_checkpointing and torch.is_grad_enabled() else _run
        for block in self.down_blocks:
            x = run(block, x, emb, context, skips)
        x = self.mid_block(x, emb, context)
        for block in self.up_blocks:
            x = run(block, x, emb, context, skips)
        return self.conv_out(self.act(self.conv_norm_out(x)))

    def check_shapes(self, x_t: Tensor, t: Tensor, context: Tensor) -> None:
        """Raise a ValueError that says which input of `forward` has a wrong shape."""
        channels, dim, factor = self.config["in_channels"], self.config["cross_attention_dim"], self.downscale_factor
        if x_t.ndim != 4 or x_t.shape[1] != channels:
            raise ValueError(f"UNet: x_t must be (B, {channels}, h, w), got {tuple(x_t.shape)}")
        height, width = x_t.shape[2:]
        if height % factor or width % factor:
            raise ValueError(
                f"UNet: latents of size {height}x{width} cannot be halved {factor.bit_length() - 1} times; "
                f"height and width must be divisible by {factor}"
            )
        if t.ndim > 1 or (t.ndim == 1 and len(t) != len(x_t)):
            raise ValueError(f"UNet: t must be ({len(x_t)},) or 0-d, got {tuple(t.shape)}")
        if context.ndim != 3 or len(context) != len(x_t) or context.shape[2] != dim:
            raise ValueError(f"UNet: context must be ({len(x_t)}, L, {dim}), got {tuple(context.shape)}")


def _run(block: nn.Module, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
    out: Tensor = block(x, emb, context, skips)
    return out


def _checkpointed(block: nn.Module, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
    """Run a block of the way down or up, keeping its inputs alone (arXiv:1604.06174); what it does to `skips` too."""

    def again(x: Tensor, emb: Tensor, context: Tensor, *before: Tensor) -> tuple[Tensor, ...]:
        after = list(before)  # the block takes from it and adds to it: each time anew
        return block(x, emb, context, after), *after

    x, *skips[:] = checkpoint(again, x, emb, context, *skips, use_reentrant=False)
    return x


def check_options(config: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the first option of a U-Net with a value that is not supported."""
    choose("UNet", "act_fn", config["act_fn"], ACTIVATIONS)
    choose("UNet", "mid_block_type", config["mid_block_type"], ["UNetMidBlock2DCrossAttn"])
    choose("UNet", "downsample_padding", config["downsample_padding"], [0, 1])
    for name in ("layers_per_block", "cross_attention_dim", "norm_num_groups"):
        if not isinstance(config[name], int):
            raise ValueError(f"UNet: option {name}={config[name]!r} is not supported (only one whole number)")
    num_levels = len(config["block_out_channels"])
    for name, kinds in (
        ("down_block_types", ["CrossAttnDownBlock2D", "DownBlock2D"]),
        ("up_block_types", ["CrossAttnUpBlock2D", "UpBlock2D"]),
    ):
        for kind in per_level("UNet", name, config[name], num_levels):
            choose("UNet", name, kind, kinds)
