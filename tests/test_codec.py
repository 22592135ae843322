import pytest
import torch

import tiny
from ldm import codec
from ldm.codec import Codec
from ldm.errors import UserError


def latents(num=3, height=8, width=12, seed=0):
    return torch.randn(num, 4, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.inference_mode():
        yield


def test_it_is_the_vae_s_own_encoding_and_decoding():
    vae = tiny.vae()
    image = vae.image(latents()).clamp(-1, 1)
    torch.testing.assert_close(Codec(vae).decode(latents()), image)
    torch.testing.assert_close(Codec(vae).encode(image), vae.encode(image))


@pytest.mark.parametrize(
    ("pixels", "batches"), [(16 * 24, [1] * 5), (16 * 24 * 2, [2, 2, 1]), (10**6, [5]), (1, [1] * 5)]
)
def test_a_batch_goes_in_slices(pixels, batches, monkeypatch):
    vae, seen = tiny.vae(), []
    expected = vae.image(latents(5)).clamp(-1, 1)
    decode = vae.decode
    monkeypatch.setattr(codec, "SLICE", pixels)
    monkeypatch.setattr(vae, "decode", lambda z: (seen.append(len(z)), decode(z))[1])
    torch.testing.assert_close(Codec(vae).decode(latents(5)), expected)
    assert seen == batches


def overflowing():
    """A VAE whose decoder leaves the range of fp16 on its way, and comes back."""
    vae = tiny.vae()
    with torch.no_grad():
        vae.decoder.conv_in.weight *= 1e5  # the norms after it do not care
    return vae


@pytest.mark.parametrize("tile", [None, 16])
def test_a_vae_that_overflows_in_fp16_runs_in_fp32(tile):
    whole, half = Codec(overflowing()), Codec(overflowing().half())
    assert not half.vae.image(latents().half()).isfinite().all()
    found = half.decode(latents(), tile)
    assert found.dtype == torch.float32 and next(half.vae.parameters()).dtype == torch.float16
    assert (found - whole.decode(latents(), tile)).abs().max() < 0.05


def test_pictures_that_do_not_overflow_stay_as_they_are(monkeypatch):
    """A picture does not depend on those it is drawn with."""
    half = Codec(tiny.vae().half())
    expected, decode = half.decode(latents()), half.vae.decode
    others = [False, True, False]

    def overflow(z):
        image = decode(z)
        return image.masked_fill(torch.tensor(others)[:, None, None, None], torch.inf) if len(z) == 3 else image

    monkeypatch.setattr(half.vae, "decode", overflow)
    found = half.decode(latents())
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    assert not torch.equal(found[1], expected[1]) and (found[1] - expected[1]).abs().max() < 0.05


def test_a_vae_that_does_not_overflow_stays_in_fp16():
    half = Codec(tiny.vae().half())
    assert half.decode(latents()).isfinite().all() and half.encode(torch.zeros(1, 3, 16, 16)).isfinite().all()
    assert next(half.vae.parameters()).dtype == torch.float16


def test_latents_that_are_not_finite_are_said_to_be():
    spoilt = latents()
    spoilt[1, 2, 3, 4] = float("nan")
    with pytest.raises(UserError, match=r"not finite.*dtype=bf16 or fp32"):
        Codec(tiny.vae()).decode(spoilt)


def test_tiles_are_about_the_whole():
    image = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    both = Codec(tiny.vae())
    moments = both.encode(image)
    assert both.encode(image, tile=32).shape == moments.shape
    assert (both.encode(image, tile=32) - moments).square().mean() < 0.01 * moments.square().mean()
    assert both.decode(latents(2, 32, 48), tile=32).shape == (2, 3, 64, 96)
