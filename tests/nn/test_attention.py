import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.nn.attention import Attention, Linear, attend


@pytest.mark.parametrize("is_causal", [False, True])
def test_attend_is_the_formula_of_the_paper(is_causal):
    q, k, v = torch.randn(3, 2, 5, 12, dtype=torch.float64)
    heads = []
    for q_n, k_n, v_n in zip(q.split(4, -1), k.split(4, -1), v.split(4, -1), strict=True):
        scores = q_n @ k_n.mT / 4**0.5
        if is_causal:
            scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ v_n)
    torch.testing.assert_close(attend(q, k, v, 3, is_causal), torch.cat(heads, -1))


@settings(max_examples=30, deadline=None)
@given(h=st.integers(1, 7), w=st.integers(1, 7), dims=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_linear_on_a_feature_map_is_nn_linear(h, w, dims):
    layer = Linear(*dims)
    x = torch.randn(2, h, w, dims[0], requires_grad=True)
    y = torch.nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), y, atol=1e-5, rtol=1e-5)
    g = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(layer(x), [x, *layer.parameters()], g),
        torch.autograd.grad(y, [x, *layer.parameters()], g),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_tokens_and_feature_maps_attend_alike():
    attention = Attention(16, num_heads=4, context_dim=6)
    x, context = torch.randn(2, 3, 5, 16), torch.randn(2, 7, 6)
    torch.testing.assert_close(attention(x.flatten(1, 2), context), attention(x, context).flatten(1, 2))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="5 heads do not divide the width 16"):
        Attention(16, num_heads=5)
