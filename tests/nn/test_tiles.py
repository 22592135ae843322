import weakref
from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tiny
from ldm.nn import tiles
from ldm.nn.tiles import (
    NUM_SAMPLES,
    PATCH,
    Sample,
    decode_tiled,
    encode_tiled,
    estimate_statistics,
    normalize,
    spans,
    spread_patches,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def levels(*channels: int, **options):
    types = {"down_block_types": None, "up_block_types": None}
    return tiny.vae(block_out_channels=channels, **types, **options)


def decode(vae, z, *tile):
    with torch.no_grad():
        return decode_tiled(vae, z, *tile) if tile else vae.decode(z)


def encode(vae, image, *tile):
    with torch.no_grad():
        return encode_tiled(vae, image, *tile) if tile else vae.encode(image)


def difference(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, in units of the expected tensor's own variation."""
    return float((found - expected).square().mean().sqrt() / expected.std())


def without_norms(vae):
    """What is left are convolutions, and tiles that see far enough give exactly what the whole gives."""
    for module in list(vae.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    return vae


@pytest.mark.parametrize("channels", [(4,), (4, 8), (4, 4, 8), (4, 4, 4, 4)], ids=len)
@pytest.mark.parametrize("layers_per_block", [1, 2])
@pytest.mark.parametrize(("size", "tile"), [((9, 20), 6), ((3, 17), 16), ((13, 13), 4)])
def test_tiles_see_as_far_as_the_convolutions_reach(channels, layers_per_block, size, tile):
    vae = without_norms(levels(*channels, layers_per_block=layers_per_block)).double()
    z, image = noise(2, 4, *size).double(), noise(2, 3, *(length * vae.downscale_factor for length in size)).double()
    torch.testing.assert_close(decode(vae, z, tile), decode(vae, z), atol=1e-12, rtol=0)
    torch.testing.assert_close(encode(vae, image, tile), encode(vae, image), atol=1e-12, rtol=0)
    if len(channels) > 1:
        assert difference(decode(vae, z, tile, 0), decode(vae, z)) > 0.01
        assert difference(encode(vae, image, tile, 0), encode(vae, image)) > 0.01


@pytest.mark.parametrize("size", [(8, 8), (5, 8), (1, 1)])
def test_a_picture_that_fits_a_tile_is_not_divided(size):
    vae = tiny.vae()
    z, image = noise(2, 4, *size), noise(2, 3, 2 * size[0], 2 * size[1])
    assert torch.equal(decode(vae, z, 8), decode(vae, z))
    assert torch.equal(encode(vae, image, 8), encode(vae, image))


@pytest.mark.parametrize("options", [{}, {"use_quant_conv": False, "use_post_quant_conv": False}], ids=["", "no quant"])
@pytest.mark.parametrize(("size", "tile"), [((40, 40), 16), ((23, 60), 20), ((48, 12), 16), ((2, 50), 12)])
def test_of_homogeneous_pictures_tiles_give_nearly_what_the_whole_gives(options, size, tile):
    vae = tiny.vae(**options)
    z, image = noise(2, 4, *size), noise(2, 3, 2 * size[0], 2 * size[1])
    assert decode(vae, z, tile).shape == decode(vae, z).shape
    assert difference(decode(vae, z, tile), decode(vae, z)) < 0.05
    assert difference(encode(vae, image, tile), encode(vae, image)) < 0.02


def two_worlds(*shape: int) -> Tensor:
    """Strong noise on the left, a faint one around another value on the right."""
    x = noise(*shape)
    half = shape[-1] // 2
    x[..., half:] = 0.1 * x[..., half:] + 1.5
    return x


@pytest.mark.parametrize("vae", [tiny.vae(), levels(8, 8, 16, layers_per_block=2)], ids=["two levels", "three"])
def test_tiles_share_the_statistics_of_the_whole(monkeypatch, vae):
    factor = vae.downscale_factor
    z, image = two_worlds(1, 4, 48, 48), two_worlds(1, 3, 48 * factor, 48 * factor)
    shared = [difference(decode(vae, z, 16), decode(vae, z)), difference(encode(vae, image, 16), encode(vae, image))]
    monkeypatch.setattr(tiles, "normalize", lambda *_: None)  # each tile by its own statistics
    own = [difference(decode(vae, z, 16), decode(vae, z)), difference(encode(vae, image, 16), encode(vae, image))]
    assert max(shared) < 0.12
    assert all(ours < 0.4 * theirs for ours, theirs in zip(shared, own, strict=True))


def jumps_at_borders(found: Tensor, expected: Tensor, tile: int, scale: int) -> float:
    """How much the difference to the whole jumps where tiles meet, relative to its jumps everywhere."""
    jumps = (found - expected).diff(dim=-1).abs().mean(dim=(0, 1, 2))
    length = found.shape[-1] // scale
    borders = [span.stop * scale - 1 for span in spans(length, tile, 0)][:-1]
    assert borders
    return float(jumps[borders].mean() / jumps.mean())


@pytest.mark.parametrize("picture", [noise, two_worlds])
def test_jumps_where_tiles_meet_are_like_those_elsewhere(monkeypatch, picture):
    vae = tiny.vae()
    z, image = picture(1, 4, 60, 92), picture(1, 3, 120, 184)
    whole, moments = decode(vae, z), encode(vae, image)

    def seams(overlap: int | None = None) -> tuple[float, float]:
        return (
            jumps_at_borders(decode(vae, z, 12, overlap), whole, 12, 2),
            jumps_at_borders(encode(vae, image, 12, overlap), moments, 12, 1),
        )

    assert max(seams()) < 1.15
    assert jumps_at_borders(decode(vae, z, 12), torch.zeros_like(whole), 12, 2) < 1.2  # of the picture itself
    # The measure finds seams where there are some.
    assert seams(overlap=0)[0] > 3 and seams(overlap=0)[1] > 1.6
    monkeypatch.setattr(tiles, "normalize", lambda *_: None)  # each tile by its own statistics
    assert seams()[0] > 1.2


@pytest.mark.parametrize("vae", [tiny.vae(), levels(8, 8, 16, layers_per_block=2)], ids=["two levels", "three"])
def test_with_the_same_statistics_it_does_not_matter_where_tiles_meet(monkeypatch, vae):
    monkeypatch.setattr(tiles, "spread_patches", lambda picture, scale, _: spread_patches(picture, scale, 400))
    factor = vae.downscale_factor
    z, image = two_worlds(1, 4, 20, 37), two_worlds(1, 3, 20 * factor, 37 * factor)
    for direction, x in ((decode, z), (encode, image)):
        expected = direction(vae, x, 36)
        for tile in (3, 8, 19):
            torch.testing.assert_close(direction(vae, x, tile), expected, atol=1e-4, rtol=1e-4)


def test_a_picture_is_the_same_in_every_batch():
    vae, z, image = tiny.vae(), two_worlds(3, 4, 20, 31), two_worlds(3, 3, 40, 62)
    z[1] *= 3
    for i in range(3):
        alone, together = decode(vae, z[i : i + 1], 8), decode(vae, z, 8)[i : i + 1]
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
        alone, together = encode(vae, image[i : i + 1], 8), encode(vae, image, 8)[i : i + 1]
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


class PeakMemory(TorchDispatchMode):
    """Count the bytes of all tensors alive at one time, of those made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata)
                self.peak = max(self.peak, sum(self.alive.values()))
        return result


def peak_memory(function, *args) -> int:
    with PeakMemory() as memory:
        function(*args)
    return memory.peak


@pytest.mark.parametrize("direction", [decode, encode])
def test_memory_is_that_of_a_tile_and_of_the_picture(direction):
    vae = levels(8, 8, 8, 8)
    whole, tiled = {}, {}
    for side in (40, 80):
        x = noise(1, 4, side, side) if direction is decode else noise(1, 3, 8 * side, 8 * side)
        whole[side], tiled[side] = peak_memory(direction, vae, x), peak_memory(direction, vae, x, 10)
    assert tiled[80] < 0.25 * whole[80]
    assert tiled[80] - tiled[40] < 0.1 * (whole[80] - whole[40])  # what grows is the picture, and what has latent size


def test_without_a_gradient_and_in_the_format_and_dtype_it_comes_in():
    vae = tiny.vae().to(torch.bfloat16, memory_format=torch.channels_last)
    z = noise(1, 4, 24, 24).to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_()
    image = noise(1, 3, 48, 48).to(torch.bfloat16, memory_format=torch.channels_last)
    for found, expected in (
        (decode_tiled(vae, z, 12), decode(vae, z)),
        (encode_tiled(vae, image, 12), encode(vae, image)),
    ):
        assert found.dtype == torch.bfloat16 and not found.requires_grad
        assert difference(found.float(), expected.float()) < 0.15


def test_the_network_is_left_as_it_was():
    vae, z = tiny.vae(), noise(1, 4, 12, 12)
    before = decode(vae, z)
    decode(vae, z, 8)
    with pytest.raises(RuntimeError):
        decode(vae, noise(1, 5, 12, 12), 8)
    vae.decoder.conv_out = nn.Conv2d(5, 3, 3, padding=1)  # fails while hooks are set
    with pytest.raises(RuntimeError):
        decode(vae, z, 8)
    assert not any(module._forward_hooks for module in vae.modules())
    vae.decoder.conv_out = tiny.vae().decoder.conv_out
    assert torch.equal(decode(vae, z), before)


@pytest.mark.parametrize(("tile", "overlap"), [(0, None), (-3, None), (8, -1)])
def test_tiles_that_make_no_sense_are_refused(tile, overlap):
    with pytest.raises(ValueError, match=rf"tile={tile}, overlap={3 if overlap is None else overlap}"):
        decode_tiled(tiny.vae(layers_per_block=0), noise(1, 4, 12, 12), tile, overlap)
    with pytest.raises(ValueError, match=rf"tile={tile}, overlap="):
        encode_tiled(tiny.vae(), noise(1, 3, 24, 24), tile, overlap)


def test_a_size_that_cannot_be_halved_is_refused():
    with pytest.raises(ValueError, match=r"size 25x24 .* divisible by 2"):
        encode_tiled(tiny.vae(), noise(1, 3, 25, 24), 8)


@given(st.integers(1, 500), st.integers(1, 99), st.integers(0, 20))
def test_spans_cover_a_side_once_and_see_beyond(length, tile, overlap):
    found = spans(length, tile, overlap)
    assert found[0].start == 0 and found[-1].stop == length
    assert all(a.stop == b.start for a, b in pairwise(found))
    widths = [span.stop - span.start for span in found]
    assert min(widths) >= 1 and max(widths) <= tile and max(widths) - min(widths) <= 1
    for span in found:
        assert span.seen_start == max(span.start - overlap, 0) and span.seen_stop == min(span.stop + overlap, length)
        inside = torch.arange(length)[span.seen(1)][span.given_of_seen(1)]
        assert torch.equal(inside, torch.arange(length)[span.given(1)])


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(36, 900), st.sampled_from([1, 2]))
def test_patches_are_spread_evenly_within_their_budget(height, width, budget, scale):
    picture = torch.arange(float(height * width * scale**2)).view(1, 1, height * scale, width * scale)
    samples = spread_patches(picture, scale, budget)
    sides = min(PATCH, height), min(PATCH, width)
    assert 1 <= len(samples) <= NUM_SAMPLES
    for sample in samples:
        assert sample.patches.shape[1:] == (1, sides[0] * scale, sides[1] * scale)
        assert sample.counts.shape == (len(sample.patches), *sides)
        assert 0 < len(sample.patches) * prod(sides) <= budget
    patches, counts = (torch.cat(each) for each in zip(*samples, strict=True))
    corners = patches[:, 0, 0, 0].long()
    assert len(corners.unique()) == len(corners)
    rows, columns = torch.arange(sides[0] * scale), torch.arange(sides[1] * scale)
    inside = rows[:, None] * width * scale + columns  # what a patch holds, from its first pixel on
    assert torch.equal(patches[:, 0].long(), corners[:, None, None] + inside)
    tops, lefts = corners // (width * scale) // scale, corners % (width * scale) // scale
    for starts, side, length in ((tops, sides[0], height), (lefts, sides[1], width)):
        starts = starts.unique()
        assert starts[0] == 0 and starts[-1] == length - side  # from edge to edge
        if len(starts) > 1:
            assert starts.diff().max() - starts.diff().min() <= 1
    for top, left, count in zip(tops, lefts, counts, strict=True):
        expected = torch.zeros(height, width)
        expected[top : top + sides[0], left : left + sides[1]] = 1
        # What counts is what is no rim of the patch, or at the picture's own edge.
        for start, side, length, cells in ((top, sides[0], height, expected), (left, sides[1], width, expected.T)):
            if start > 0:
                cells[start] = 0
            if start + side < length:
                cells[start + side - 1] = 0
        assert torch.equal(count, expected[top : top + sides[0], left : left + sides[1]])


def test_a_picture_of_one_patch_has_its_own_statistics():
    """Then tiles give what the whole gives, to rounding."""
    vae = levels(8, 8, 16, layers_per_block=2)
    z, image = two_worlds(1, 4, 6, 5), two_worlds(1, 3, 24, 20)
    torch.testing.assert_close(decode(vae, z, 3), decode(vae, z), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(encode(vae, image, 3), encode(vae, image), atol=1e-4, rtol=1e-4)


def test_samples_are_pooled_to_the_statistics_of_them_all(scramble):
    network = nn.Module()
    network.norm = scramble(nn.GroupNorm(2, 4))
    network.high = network.norm
    halves = [Sample(noise(3, 4, 6, 6, seed=i) * (i + 1) + i, torch.ones(3, 6, 6)) for i in range(2)]
    with torch.no_grad():
        ((mean, variance),) = estimate_statistics(network, halves).values()
    groups = torch.cat([half.patches for half in halves]).view(6, 2, -1).transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, groups.mean(1))
    torch.testing.assert_close(variance, groups.var(1, correction=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalize_by_its_own_statistics_is_the_group_norm(scramble, dtype):
    norm = scramble(nn.GroupNorm(4, 8, 0.5))
    x = (3 * noise(1, 8, 5, 7) + 2).to(dtype)
    groups = x.float().view(4, -1)
    out = torch.empty_like(x)
    with torch.no_grad():
        normalize(norm, x, groups.mean(1), groups.var(1, correction=0), out)
        torch.testing.assert_close(out, norm(x.float()).to(dtype))
