"""The autoencoder in tiles: large pictures in the memory of smaller ones, without seams.

B batch, C channels, H W pixels, h w latents, N patches, G groups of channels. A cell is one latent, or the pixels that
belong to it.

Nearly all memory goes into the levels above latent size (`Encoder.high`, `Decoder.high`). They are convolutions, which
see only some cells far; what sees the whole picture, attention, works at latent size and runs on all of it at once. To
give what the whole gives, a tile needs two things: a margin as wide as the convolutions reach, and in its GroupNorms
the statistics of the whole picture instead of its own. With both, neighbours agree to rounding wherever they overlap:
there are no seams, and nothing to blend.

The statistics are estimated. Small patches spread evenly over the picture run through the levels as one batch, in
which each GroupNorm normalises all patches together; that costs as much as two more tiles. What remains is a smooth
difference from the whole. FIGURES
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, pairwise, product
from math import ceil, prod
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ldm.nn.autoencoder import AutoencoderKL, Decoder, Encoder

PATCH = 6  # cells along each side of a patch
RIM = 1  # cells around a patch that do not count: convolutions have seen zeros there instead of the picture
NUM_SAMPLES = 2  # batches of patches, each of as many cells as a tile

Statistics = dict[nn.Module, tuple[Tensor, Tensor]]  # mean and variance (G,) of what enters each GroupNorm


@torch.no_grad()
def decode_tiled(vae: AutoencoderKL, z: Tensor, tile: int, overlap: int | None = None) -> Tensor:
    """Decode as `vae.decode` does, in the memory of the picture itself and of one tile. There is no gradient.

    Args:
        vae: the autoencoder.
        z: (B, C, h, w), unscaled.
        tile: cells along each side of a tile; a picture that is not larger is decoded whole.
        overlap: cells that a tile sees beyond its own on each side; None for as many as the convolutions reach. Fewer
            are faster and leave seams.

    Returns:
        (B, 3, H, W), about [-1, 1].

    Raises:
        ValueError: `tile` is below 1 or `overlap` below 0.
    """
    overlap = checked_overlap(vae, tile, overlap)
    if max(z.shape[-2:]) <= tile:
        return vae.decode(z)
    x = vae.decoder.low(z if vae.post_quant_conv is None else vae.post_quant_conv(z))
    return in_tiles(vae.decoder, x, (1, vae.downscale_factor), tile, overlap)


@torch.no_grad()
def encode_tiled(vae: AutoencoderKL, image: Tensor, tile: int, overlap: int | None = None) -> Tensor:
    """Encode as `vae.encode` does, in the memory of the picture itself and of one tile. There is no gradient.

    Args:
        vae: the autoencoder.
        image: (B, 3, H, W) in [-1, 1].
        tile, overlap: cells, not pixels; see `decode_tiled`.

    Returns:
        (B, 2C, h, w) moments.

    Raises:
        ValueError: `tile` is below 1 or `overlap` below 0; H or W is not divisible by `downscale_factor`.
    """
    overlap = checked_overlap(vae, tile, overlap)
    if max(vae.latent_size(image)) <= tile:
        return vae.encode(image)
    moments = vae.encoder.low(in_tiles(vae.encoder, image, (vae.downscale_factor, 1), tile, overlap))
    return moments if vae.quant_conv is None else vae.quant_conv(moments)


class Span(NamedTuple):
    """A tile along one side of the picture, in cells: what it gives, and what it sees for that."""

    start: int
    stop: int
    seen_start: int
    seen_stop: int

    def given(self, scale: int) -> slice:
        return slice(self.start * scale, self.stop * scale)

    def seen(self, scale: int) -> slice:
        return slice(self.seen_start * scale, self.seen_stop * scale)

    def given_of_seen(self, scale: int) -> slice:
        return slice((self.start - self.seen_start) * scale, (self.stop - self.seen_start) * scale)


def spans(length: int, tile: int, overlap: int) -> list[Span]:
    """Divide `length` into as few parts as `tile` allows, of nearly equal length."""
    num = ceil(length / tile)
    edges = [i * length // num for i in range(num + 1)]
    return [Span(a, b, max(a - overlap, 0), min(b + overlap, length)) for a, b in pairwise(edges)]


def checked_overlap(vae: AutoencoderKL, tile: int, overlap: int | None) -> int:
    """Return `overlap`, or for None how many cells the convolutions of the levels above latent size reach."""
    # A level has at most c = 2 · layers_per_block + 3 of them, 3×3, each reaching one pixel of its level. What is r
    # pixels far at one level is r / 2 far at the next smaller one, whose own convolutions add c: so never above 2c, and
    # c at latent size.
    reach = 2 * vae.config["layers_per_block"] + 3
    overlap = reach if overlap is None else overlap
    if tile < 1 or overlap < 0:
        raise ValueError(f"tile={tile}, overlap={overlap}: tiles are at least 1 latent wide and overlap by 0 or more")
    return overlap


def in_tiles(network: Encoder | Decoder, x: Tensor, scales: tuple[int, int], tile: int, overlap: int) -> Tensor:
    """Run `network.high` tile by tile, with GroupNorm statistics that all tiles of a picture share.

    Args:
        network: whose levels above latent size are run.
        x: (B, C, h · scale, w · scale).
        scales: pixels for each cell of `x` and of the result, along each side.
        tile, overlap: cells.
    """
    scale, out_scale = scales
    height, width = (length // scale for length in x.shape[-2:])
    out: Tensor | None = None
    for i, picture in enumerate(x.split(1)):
        samples = spread_patches(picture, scale, (tile + 2 * overlap) ** 2)
        with fixed_statistics(network, estimate_statistics(network, samples, RIM * scale)):
            for rows, columns in product(spans(height, tile, overlap), spans(width, tile, overlap)):
                seen = network.high(picture[..., rows.seen(scale), columns.seen(scale)])
                if out is None:
                    out = seen.new_empty(len(x), seen.shape[1], height * out_scale, width * out_scale)
                given = seen[0, :, rows.given_of_seen(out_scale), columns.given_of_seen(out_scale)]
                out[i, :, rows.given(out_scale), columns.given(out_scale)] = given
    assert out is not None
    return out


# ------------------------------------------------------------------------------------------------------- statistics


def spread_patches(picture: Tensor, scale: int, budget: int) -> list[Tensor]:
    """Cut patches from a picture, spread evenly over it.

    Args:
        picture: (1, C, h · scale, w · scale).
        scale: pixels for each cell, along each side.
        budget: cells of which each batch may have so many.

    Returns:
        Up to `NUM_SAMPLES` batches (N, C, PATCH · scale, PATCH · scale). All patches are smaller along a side along
        which the picture is.
    """
    lengths = [length // scale for length in picture.shape[-2:]]
    sides = [min(PATCH, length) for length in lengths]
    most = NUM_SAMPLES * max(budget // prod(sides), 1)

    def num_patches(step: int) -> int:
        return prod((length - side) // step + 1 for length, side in zip(lengths, sides, strict=True))

    step = next(step for step in count(PATCH - 2 * RIM) if num_patches(step) <= most)
    top, left = ((length - side) % step // 2 * scale for length, side in zip(lengths, sides, strict=True))
    windows = picture[..., top:, left:].unfold(2, sides[0] * scale, step * scale)
    windows = windows.unfold(3, sides[1] * scale, step * scale)
    patches = rearrange(windows, "1 c rows columns y x -> (rows columns) c y x")
    return [patches[first::NUM_SAMPLES] for first in range(min(NUM_SAMPLES, len(patches)))]


def estimate_statistics(network: Encoder | Decoder, samples: list[Tensor], rim: int) -> Statistics:
    """Run batches of patches through `network.high`, each normalised together, and pool what the GroupNorms see.

    `rim` is the number of pixels of a patch, on each side, that do not count.
    """
    found: defaultdict[nn.Module, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def normalize_together(norm: nn.GroupNorm, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        (x,) = inputs
        own_rim = rim * x.shape[-1] // sample.shape[-1]
        rows, columns = (
            slice(own_rim, length - own_rim) if length > 2 * own_rim else slice(None) for length in x.shape[-2:]
        )
        groups = x[..., rows, columns].float().unflatten(1, (norm.num_groups, -1))
        variance, mean = torch.var_mean(groups, dim=(0, 2, 3, 4), correction=0)
        found[norm].append((mean, variance))
        normalize(norm, x, mean, variance, output)

    with hooked(network, normalize_together):
        for sample in samples:
            network.high(sample)
    statistics = {}
    for norm, each in found.items():
        means, variances = (torch.stack(values) for values in zip(*each, strict=True))
        mean = means.mean(dim=0)
        statistics[norm] = mean, (variances + (means - mean).square()).mean(dim=0)
    return statistics


@contextmanager
def fixed_statistics(network: Encoder | Decoder, statistics: Statistics) -> Iterator[None]:
    """Let the GroupNorms normalise by given statistics instead of their input's own."""

    def normalize_as_given(norm: nn.GroupNorm, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        normalize(norm, inputs[0], *statistics[norm], output)

    with hooked(network, normalize_as_given):
        yield


@contextmanager
def hooked(network: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    """Call `hook(norm, inputs, output)` after each GroupNorm."""
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    handles = [norm.register_forward_hook(hook) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def normalize(norm: nn.GroupNorm, x: Tensor, mean: Tensor, variance: Tensor, out: Tensor) -> None:
    """Overwrite `out` by the GroupNorm of x (N, C, H, W) with the given mean and variance (G,)."""
    per_group = norm.num_channels // norm.num_groups
    mean, variance = (repeat(each, "g -> (g c) 1 1", c=per_group) for each in (mean, variance))
    scale = norm.weight[:, None, None] * torch.rsqrt(variance + norm.eps)
    torch.addcmul(norm.bias[:, None, None] - mean * scale, x, scale, out=out)
