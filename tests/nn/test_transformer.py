import pytest
import torch
from diffusers import Transformer2DModel

from ldm.nn.transformer import SpatialTransformer


@pytest.mark.parametrize("use_linear_projection", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_parity_with_diffusers(scramble, anatomy, use_linear_projection, memory_format):
    theirs = scramble(
        Transformer2DModel(
            4,
            8,
            in_channels=32,
            num_layers=2,
            cross_attention_dim=12,
            norm_num_groups=8,
            use_linear_projection=use_linear_projection,
        )
    )
    ours = SpatialTransformer(
        32,
        num_heads=4,
        context_dim=12,
        num_layers=2,
        norm_num_groups=8,
        use_linear_projection=use_linear_projection,
    )
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert anatomy(ours) == anatomy(theirs)
    x, context = torch.randn(2, 32, 5, 3).to(memory_format=memory_format), torch.randn(2, 7, 12)
    with torch.no_grad():
        y = ours(x, context)
        torch.testing.assert_close(y, theirs(x, context).sample, atol=1e-4, rtol=0)
    assert y.is_contiguous(memory_format=memory_format)
