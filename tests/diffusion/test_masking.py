import pytest
import torch

from ldm.diffusion.masking import MaskedDenoiser
from ldm.diffusion.samplers import SAMPLERS

SIGMAS = torch.tensor([9.0, 4.0, 1.5, 0.5, 0.1, 0.0], dtype=torch.float64)


def draws(num=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 4, 6, 6, generator=generator, dtype=torch.float64) for _ in range(num)]


def half():
    mask = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    mask[..., 3:] = 1
    return mask


def denoise(x, sigma):
    """A denoiser in which every latent sees every other."""
    return torch.tanh(x / (1 + sigma**2) + x.mean((1, 2, 3), keepdim=True))


def run(sampler, masked, x):
    generator = torch.Generator().manual_seed(5)
    return SAMPLERS[sampler](
        masked, x, SIGMAS, lambda x: torch.randn(x.shape, generator=generator, dtype=torch.float64)
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_kept_comes_out_as_it_was(sampler):
    x_0, noise, _ = draws()
    found = run(sampler, MaskedDenoiser(denoise, x_0, noise, half()), x_0 + 9.0 * noise)
    torch.testing.assert_close(found[..., :3], x_0[..., :3], rtol=1e-9, atol=1e-9)
    assert (found[..., 3:] - x_0[..., 3:]).abs().mean() > 0.1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_lies_under_the_mask_decides_nothing_from_pure_noise(sampler):
    x_0, noise, _ = draws()
    other = torch.where(half() == 1, torch.randn_like(x_0), x_0)
    found = [run(sampler, MaskedDenoiser(denoise, each, noise, half(), 9.0), 9.0 * noise) for each in (x_0, other)]
    torch.testing.assert_close(*found)


def test_the_inner_denoiser_sees_the_kept_part_at_this_noise_level():
    x_0, noise, x = draws()
    seen = []

    def spy(x, sigma):
        seen.append(x)
        return denoise(x, sigma)

    masked = MaskedDenoiser(spy, x_0, noise, half(), hidden_at=9.0)
    masked(x, 9.0)
    assert torch.equal(seen[0], x)
    masked(x, 4.0)
    assert torch.equal(seen[1][..., 3:], x[..., 3:])
    torch.testing.assert_close(seen[1][..., :3], (x_0 + 4.0 * noise)[..., :3])


def test_a_soft_mask_blends():
    x_0, noise, x = draws()
    masked = MaskedDenoiser(
        lambda x, sigma: torch.full_like(x, 3.0), x_0, noise, torch.full((1, 1, 6, 6), 0.25).double()
    )
    torch.testing.assert_close(masked(x, 1.0), 0.75 * x_0 + 0.25 * 3.0)


def test_masks_of_one_and_zero():
    x_0, noise, x = draws()
    one, zero = torch.ones(1, 1, 6, 6).double(), torch.zeros(1, 1, 6, 6).double()
    assert torch.equal(MaskedDenoiser(denoise, x_0, noise, one)(x, 2.0), denoise(x, 2.0))
    assert torch.equal(MaskedDenoiser(denoise, x_0, noise, zero)(x, 2.0), x_0)
