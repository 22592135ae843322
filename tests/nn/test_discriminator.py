"""B batch, C channels, H W pixels, h w patches."""

import pytest
import torch
from torch import nn

from ldm.nn.discriminator import PatchDiscriminator


def test_it_has_the_published_size():
    """CycleGAN's and pix2pix's 70×70 discriminator has 2.765 M parameters, those of norms aside."""
    published = sum(p.numel() for p in PatchDiscriminator().parameters() if p.ndim == 4) + 64 + 1
    assert published == 3 * 64 * 16 + 64 + (64 * 128 + 128 * 256 + 256 * 512) * 16 + 512 * 16 + 1 == 2_763_841


@pytest.mark.parametrize(("num_layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_its_patch_and_no_more(num_layers, patch):
    """pix2pix, Appendix 6.1.2: 16×16, 34×34 (of its code) and 70×70. Norms, which see all, are taken out."""
    discriminator = PatchDiscriminator(channels=8, num_layers=num_layers)
    for i, layer in enumerate(discriminator.layers):
        if isinstance(layer, nn.GroupNorm):
            discriminator.layers[i] = nn.Identity()
    image = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logits = discriminator.double()(image.double())
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    seen = (image.grad[0].abs().sum(0) > 0).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [patch, patch]


@pytest.mark.parametrize(("height", "width", "expected"), [(256, 256, (30, 30)), (64, 32, (6, 2)), (24, 24, (1, 1))])
def test_shapes(height, width, expected):
    assert PatchDiscriminator(channels=4)(torch.zeros(2, 3, height, width)).shape == (2, 1, *expected)


def test_channels_double_up_to_eight_times():
    convolutions = [layer for layer in PatchDiscriminator(1, 4, 5).layers if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [4, 8, 16, 32, 32, 32, 1]
    assert [layer.stride[0] for layer in convolutions] == [2, 2, 2, 2, 2, 1, 1]


def test_a_verdict_does_not_depend_on_the_batch_or_on_what_was_seen():
    discriminator = PatchDiscriminator(channels=8).train()
    image = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first = discriminator(image[:1])
    torch.testing.assert_close(discriminator(image)[:1], first)
    torch.testing.assert_close(discriminator.eval()(image[:1]), first)
    assert not list(discriminator.buffers())


def test_first_weights():
    torch.manual_seed(0)
    weights = [p.detach().flatten() for p in PatchDiscriminator().parameters() if p.ndim == 4]
    assert float(torch.cat(weights).std()) == pytest.approx(0.02, rel=0.02)
