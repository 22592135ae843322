import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from ldm.nn.blocks import Downsample, ResBlock, SpatialAttention, Upsample, timestep_embedding


@pytest.mark.parametrize("dim", [8, 9, 64])
@pytest.mark.parametrize("flip_sin_to_cos", [False, True])
@pytest.mark.parametrize("freq_shift", [0, 1])
def test_timestep_embedding_agrees_with_diffusers(dim, flip_sin_to_cos, freq_shift):
    t = torch.tensor([0.0, 1.0, 17.5, 999.0])
    expected = get_timestep_embedding(t, dim, flip_sin_to_cos, freq_shift)
    torch.testing.assert_close(timestep_embedding(t, dim, flip_sin_to_cos, freq_shift), expected, atol=1e-4, rtol=0)


def test_integer_and_half_timesteps_are_embedded_in_float32():
    t = torch.tensor([3, 512])
    expected = timestep_embedding(t.float(), 32)
    assert expected.dtype == torch.float32
    assert torch.equal(timestep_embedding(t, 32), expected)
    assert torch.equal(timestep_embedding(t.bfloat16(), 32), expected)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (ResBlock(8, 16, norm_num_groups=4), (2, 16, 6, 4)),
        (Downsample(8, padding=0), (2, 8, 3, 2)),
        (Downsample(8, padding=1), (2, 8, 3, 2)),
        (Upsample(8), (2, 8, 12, 8)),
        (SpatialAttention(8, 4, 1e-6), (2, 8, 6, 4)),
    ],
)
def test_shape_and_memory_format(layer, shape):
    layer = layer.to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 6, 4)
    y = layer(x.to(memory_format=torch.channels_last))
    assert y.shape == shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer.to(memory_format=torch.contiguous_format)(x), y, atol=1e-5, rtol=1e-5)


def test_dropout_acts_in_training_only():
    block, x = ResBlock(8, 8, norm_num_groups=4, dropout=0.5), torch.randn(1, 8, 4, 4)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))
