import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.nn.blocks import ResBlock
from ldm.nn.transformer import SpatialTransformer
from ldm.nn.unet import UNet
from nn.configs import SD15_UNET, SD21_UNET, SDXL_UNET

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"


def scaled_down(config: dict, **changes) -> dict:
    return {
        **config,
        "block_out_channels": [32, 64, 64, 64],
        "norm_num_groups": 8,
        "cross_attention_dim": 24,
        **changes,
    }


def levels(kinds: list[str], **options) -> dict:
    """Options of a U-Net whose levels are of the given kinds, the same on the way up."""
    ups = [kind.replace("Down", "Up") for kind in reversed(kinds)]
    return {
        "down_block_types": kinds,
        "up_block_types": ups,
        "norm_num_groups": 4,
        "cross_attention_dim": 24,
        **options,
    }


VARIANTS = {
    "sd15": scaled_down(SD15_UNET),
    "sd21": scaled_down(SD21_UNET, attention_head_dim=[2, 4, 8, 8]),
    "inpainting": scaled_down(SD15_UNET, in_channels=9),
    "one level": levels([CROSS], block_out_channels=[32], layers_per_block=1),
    "one level without attention": levels([PLAIN], block_out_channels=[32], layers_per_block=1),
    "attention below": levels([PLAIN, CROSS], block_out_channels=[16, 32], attention_head_dim=4),
    "attention above": levels([CROSS, PLAIN, PLAIN], block_out_channels=[32, 16, 48], attention_head_dim=2),
    "deep transformers": levels([CROSS, CROSS], block_out_channels=[16, 32], transformer_layers_per_block=2),
    "depth per level": levels([CROSS, CROSS], block_out_channels=[16, 32], transformer_layers_per_block=[1, 3]),
    "three layers": levels([PLAIN, CROSS], block_out_channels=[16, 32], layers_per_block=3),
    "sine first": levels([PLAIN], block_out_channels=[16], flip_sin_to_cos=False, freq_shift=1),
    "gelu": levels([CROSS, PLAIN], block_out_channels=[16, 32], act_fn="gelu", norm_eps=1e-3),
    "asymmetric padding": levels([PLAIN, PLAIN], block_out_channels=[16, 32], downsample_padding=0),
    "uneven": levels([CROSS], block_out_channels=[16], in_channels=5, out_channels=7, dropout=0.3),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_parity_with_diffusers(scramble, variant):
    theirs = scramble(UNet2DConditionModel.from_config(VARIANTS[variant]))
    ours = UNet.from_config(VARIANTS[variant]).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    f = ours.downscale_factor
    for (height, width), t in {(f, f): torch.tensor(981), (2 * f, 3 * f): torch.tensor([0, 17])}.items():
        x_t, context = torch.randn(2, ours.config["in_channels"], height, width), torch.randn(2, 7, 24)
        with torch.no_grad():
            expected = theirs(x_t, t, context).sample
            assert expected.std() > 0.01
            torch.testing.assert_close(ours(x_t, t, context), expected, atol=1e-4, rtol=0)


def test_gradients_agree_with_diffusers(scramble):
    theirs = scramble(UNet2DConditionModel.from_config(VARIANTS["sd15"]))
    ours = UNet.from_config(VARIANTS["sd15"])
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours = ours.to(memory_format=torch.channels_last)
    x_t, t, context = torch.randn(2, 4, 8, 8), torch.tensor([5, 600]), torch.randn(2, 7, 24)
    ours(x_t.to(memory_format=torch.channels_last), t, context).square().mean().backward()
    theirs(x_t, t, context).sample.square().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name].grad, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(("config", "num_parameters"), [(SD15_UNET, 859_520_964), (SD21_UNET, 865_910_724)])
def test_published_models_have_their_names_shapes_norms_and_size(anatomy, config, num_parameters):
    with torch.device("meta"):
        ours, theirs = UNet.from_config(config), UNet2DConditionModel.from_config(config)
    assert anatomy(ours) == anatomy(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert sum(parameter.numel() for parameter in ours.parameters()) == num_parameters


def test_what_diffusers_saves_can_be_read(tmp_path):
    theirs = UNet2DConditionModel.from_config(VARIANTS["sd21"])
    theirs.save_config(tmp_path)
    ours = UNet.from_config(json.loads((tmp_path / "config.json").read_text()))
    assert ours.config == {name: theirs.config[name] for name in ours.config}


def test_config_builds_the_same_network_again_and_is_plain():
    unet = UNet.from_config(VARIANTS["sd21"])
    config = json.loads(json.dumps(unet.config))
    assert UNet(**config).config == unet.config == config
    assert UNet2DConditionModel.from_config(config).state_dict().keys() == unet.state_dict().keys()


def test_sdxl_is_refused_by_name():
    message = r"UNet: option addition_embed_type='text_time' in config.json is not supported \(only None\)"
    with pytest.raises(ValueError, match=message):
        UNet.from_config(SDXL_UNET)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep' in config.json is not supported"),
        ({"num_attention_heads": 4}, "num_attention_heads=4 in config.json is not supported"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim=256 in config.json is not supported"),
        ({"atention_head_dim": 4}, "atention_head_dim=4 in config.json is not known"),
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, "down_block_types='AttnDownBlock2D' is not supported"),
        ({"up_block_types": ["UpBlock2D"] * 3}, "up_block_types=.* has 3 entries, but block_out_channels has 4"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type='UNetMidBlock2D' is not supported"),
        ({"act_fn": "tanh"}, "act_fn='tanh' is not supported"),
        ({"layers_per_block": [2, 2, 2, 2]}, "layers_per_block=.*only one whole number"),
        ({"cross_attention_dim": [24] * 4}, "cross_attention_dim=.*only one whole number"),
        ({"norm_num_groups": None}, "norm_num_groups=None.*only one whole number"),
        ({"attention_head_dim": [2, 4]}, "attention_head_dim=.* has 2 entries"),
        ({"attention_head_dim": 7}, "7 heads do not divide the width 32"),
        ({"downsample_padding": 2}, "downsample_padding=2 is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        UNet.from_config({**VARIANTS["sd15"], **changes})


@pytest.fixture(scope="module")
def small_unet(scramble) -> UNet:
    options = levels([PLAIN, CROSS, PLAIN], block_out_channels=[8, 8, 8], attention_head_dim=2, layers_per_block=1)
    return scramble(UNet(**options))


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 13), width=st.integers(1, 13))
def test_sizes_either_fit_or_are_refused(small_unet, height, width):
    x_t, t, context = torch.randn(1, 4, height, width), torch.tensor(3), torch.randn(1, 2, 24)
    if height % 4 or width % 4:
        with pytest.raises(ValueError, match=f"size {height}x{width} .* divisible by 4"):
            small_unet(x_t, t, context)
    else:
        assert small_unet(x_t, t, context).shape == x_t.shape


@pytest.mark.parametrize(
    ("x_t", "t", "context", "message"),
    [
        ((2, 3, 4, 4), (2,), (2, 5, 24), r"x_t must be \(B, 4, h, w\), got \(2, 3, 4, 4\)"),
        ((2, 4, 4, 4), (1,), (2, 5, 24), r"t must be \(2,\) or 0-d, got \(1,\)"),
        ((2, 4, 4, 4), (2,), (2, 24), r"context must be \(2, L, 24\), got \(2, 24\)"),
        ((2, 4, 4, 4), (2,), (1, 5, 24), r"context must be \(2, L, 24\), got \(1, 5, 24\)"),
        ((2, 4, 4, 4), (2,), (2, 5, 16), r"context must be \(2, L, 24\), got \(2, 5, 16\)"),
    ],
)
def test_wrong_shapes_are_named(small_unet, x_t, t, context, message):
    with pytest.raises(ValueError, match=message):
        small_unet(torch.zeros(x_t), torch.zeros(t), torch.zeros(context))


def test_timestep_may_be_a_number_for_all_or_one_each_int_or_float(small_unet):
    x_t, context = torch.randn(3, 4, 4, 4), torch.randn(3, 2, 24)
    expected = small_unet(x_t, torch.tensor([7, 7, 7]), context)
    for t in (torch.tensor(7), torch.tensor(7.0), torch.full((3,), 7.0)):
        assert torch.equal(small_unet(x_t, t, context), expected)
    assert not torch.equal(small_unet(x_t, torch.tensor(7.5), context), expected)


def test_samples_of_a_batch_do_not_mix(small_unet):
    x_t, t, context = torch.randn(3, 4, 8, 8), torch.tensor([1, 50, 999]), torch.randn(3, 2, 24)
    alone = [small_unet(x_t[i : i + 1], t[i], context[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(small_unet(x_t, t, context), torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_a_fresh_network_predicts_zero_and_its_blocks_are_the_identity():
    unet = UNet(**levels([CROSS], block_out_channels=[16]))
    assert not unet(torch.randn(1, 4, 4, 4), torch.tensor(1), torch.randn(1, 2, 24)).any()
    x = torch.randn(1, 16, 4, 4)
    for module in unet.modules():
        if isinstance(module, SpatialTransformer):
            assert torch.equal(module(x, torch.randn(1, 2, 24)), x)
        elif isinstance(module, ResBlock) and module.conv_shortcut is None:
            assert torch.equal(module(x, torch.randn(1, 64)), x)


def test_a_fresh_network_learns_in_every_parameter():
    torch.manual_seed(0)
    unet = UNet(**levels([PLAIN, CROSS], block_out_channels=[8, 16], attention_head_dim=2))
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    x_t, t, context = torch.randn(2, 4, 4, 4), torch.tensor([1, 800]), torch.randn(2, 3, 24)
    for _ in range(4):  # zeros at the end let gradients through to the layers before them one step after another
        optimizer.zero_grad()
        (unet(x_t, t, context) - x_t).square().mean().backward()
        optimizer.step()
    # A key's or query's gradient vanishes where all scores are alike; it must exist all the same.
    assert [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_channels_last_is_kept_and_changes_nothing(small_unet):
    x_t, t, context = torch.randn(2, 4, 8, 4), torch.tensor(3), torch.randn(2, 2, 24)
    expected = small_unet(x_t, t, context)
    unet = UNet(**small_unet.config)
    unet.load_state_dict(small_unet.state_dict())
    unet = unet.eval().to(memory_format=torch.channels_last)
    y = unet(x_t.to(memory_format=torch.channels_last), t, context)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


def test_half_precision_runs(small_unet):
    unet = UNet(**small_unet.config).bfloat16()
    x_t, context = torch.randn(1, 4, 4, 4).bfloat16(), torch.randn(1, 2, 24).bfloat16()
    assert unet(x_t, torch.tensor([999]), context).dtype == torch.bfloat16


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_nothing_but_what_is_kept(dropout, scramble):
    """Loss and gradients are the same to the bit, drop-out included; less lies in memory for the backward pass."""
    unet = scramble(UNet(**levels([CROSS, PLAIN], block_out_channels=[8, 16], layers_per_block=2, dropout=dropout)))
    unet.train()
    x_t, t, context = torch.randn(2, 4, 8, 8), torch.tensor([1, 500]), torch.randn(2, 5, 24)
    losses, gradients, kept = [], [], []
    for unet.gradient_checkpointing in (False, True):
        numbers = []

        def pack(tensor, numbers=numbers):
            numbers.append(tensor.numel())
            return tensor

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = unet(x_t, t, context).square().mean()
        kept.append(sum(numbers))
        loss.backward()
        losses.append(loss.detach())
        gradients.append([parameter.grad.clone() for parameter in unet.parameters()])
        unet.zero_grad()
    assert torch.equal(*losses)
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])
    assert kept[1] < kept[0] / 3
    assert "gradient_checkpointing" not in unet.config
