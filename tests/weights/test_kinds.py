"""Recognising files: real key lists of other kinds, where a library at hand can make them, else names as published."""

import diffusers
import pytest
import torch
from torch import nn

import tiny
from ldm.config import PosthocEMA
from ldm.errors import UserError
from ldm.training.module import StageModule
from ldm.weights.kinds import FOREIGN, infer_config, recognise
from ldm.weights.single_file import Network, join
from runs import tiny_config

SD1 = {"unet": tiny.unet, "vae": tiny.vae, "text_encoder": tiny.text_tower}


def shapes_of(state, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + name: tuple(tensor.shape) for name, tensor in state.items()}


def named(*names: str, shape=(8, 8)) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(names, shape)


def original(*parts: str, **options) -> dict[str, tuple[int, ...]]:
    models = {part: SD1[part](**options) for part in parts}
    return shapes_of(join({part: Network(model.config, model.state_dict()) for part, model in models.items()}))


# ---------------------------------------------------------------------------------------------------------- our kinds


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        (("unet", "vae", "text_encoder"), "single_file"),
        (("unet", "text_encoder"), "single_file"),
        (("text_encoder",), "single_file"),
        (("unet",), "original_unet"),
        (("vae",), "original_vae"),
    ],
)
@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_original_names(parts, kind, hidden_act):
    shapes = {}
    for part in parts:
        shapes |= original(part, **({"hidden_act": hidden_act} if part == "text_encoder" else {}))
    assert recognise(shapes) == kind
    assert recognise({**shapes, "betas": (1000,), "model_ema.decay": ()}) == kind


def test_original_names_in_other_forms():
    bare = {name.removeprefix("first_stage_model."): shape for name, shape in original("vae").items()}
    assert recognise({**bare, "loss.logvar": ()}) == "original_vae"
    ema = {f"model_ema.{name.removeprefix('model.').replace('.', '')}": s for name, s in original("unet").items()}
    assert recognise(ema) == "original_unet"
    assert recognise({**ema, **original("vae")}) == "single_file"
    turbo = original("text_encoder", hidden_act="gelu", hidden_size=1024, intermediate_size=64)
    turbo = {name.replace("cond_stage_model.", "conditioner.embedders.0."): shape for name, shape in turbo.items()}
    assert recognise({**turbo, **original("unet")}) == "single_file"


def test_depth_channels_and_inpainting_channels_pass():
    for channels in (5, 7, 8, 9):
        assert recognise(original("unet", in_channels=channels)) == "original_unet"
        assert recognise(shapes_of(tiny.unet(in_channels=channels).state_dict())) == "unet"


def test_diffusers_names():
    assert recognise(shapes_of(tiny.unet().state_dict())) == "unet"
    assert recognise(shapes_of(tiny.vae().state_dict())) == "vae"
    assert recognise(shapes_of(tiny.vae(mid_block_add_attention=False).state_dict())) == "vae"
    assert recognise(shapes_of(tiny.text_tower().state_dict())) == "text_encoder"
    assert recognise(shapes_of(tiny.text_tower().state_dict(), "text_model.")) == "text_encoder"
    assert recognise(shapes_of(tiny.clip().state_dict())) == "clip"


def test_meta_tensors_will_do():
    with torch.device("meta"):
        state = tiny.UNet(**tiny.UNET).state_dict()
    assert recognise({name: tensor.shape for name, tensor in state.items()}) == "unet"


# -------------------------------------------------------------------------------------------------------- other kinds


def sdxl() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        **tiny.UNET,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )


def controlnet() -> nn.Module:
    options = {name: value for name, value in tiny.UNET.items() if name not in ("sample_size", "up_block_types")}
    return diffusers.ControlNetModel(**options, conditioning_embedding_out_channels=(8, 16))


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8, num_layers=1, attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16
    )


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, axes_dims_rope=(2, 2, 4)
    )


def motion() -> nn.Module:
    return diffusers.MotionAdapter(block_out_channels=(32,), motion_num_attention_heads=1, motion_norm_num_groups=4)


OTHER_MODELS = {
    sdxl: "an SDXL U-Net",
    controlnet: "a ControlNet",
    sd3: "a diffusion transformer",
    flux: "Flux",
    motion: "AnimateDiff",
    lambda: diffusers.T2IAdapter(channels=[8, 16, 16, 16], num_res_blocks=1): "a T2I-Adapter",
    lambda: diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4
    ): "TAESD",
    lambda: diffusers.VQModel(norm_num_groups=4, block_out_channels=(8,)): "a VQ autoencoder",
}


@pytest.mark.parametrize(("make", "what"), OTHER_MODELS.items(), ids=OTHER_MODELS.values())
def test_models_of_diffusers(make, what):
    with torch.device("meta"):
        shapes = shapes_of(make().state_dict())
    with pytest.raises(UserError, match=f"this is .*{what}"):
        recognise(shapes)


UNET_BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
SGM_UNET = named("model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.label_emb.0.0.weight")
OTHER_NAMES = [
    (named("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"), "a LoRA"),
    (named("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", shape=()), "a LoRA"),
    (named("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a"), "a LoRA"),
    (named(f"unet.{UNET_BLOCK}.to_q.lora_A.weight"), "a LoRA"),
    (named(f"unet.{UNET_BLOCK}.to_q.lora.down.weight"), "a LoRA"),
    (named(f"{UNET_BLOCK}.processor.to_q_lora.up.weight"), "a LoRA"),
    (named(f"base_model.model.{UNET_BLOCK}.to_q.lora_B.default.weight"), "a LoRA"),
    (named("emb_params", shape=(4, 768)), "a textual inversion"),
    (named("<cat-toy>", shape=(768,)), "a textual inversion"),
    (named("clip_l", "clip_g", shape=(2, 768)), "a textual inversion"),
    (named("768.0.linear.0.weight", "320.1.linear.2.bias"), "a hypernetwork"),
    ({**named("control_model.input_blocks.0.0.weight"), **original("unet")}, "a ControlNet"),
    (named("ip_adapter.1.to_k_ip.weight", "image_proj.proj.weight"), "an IP-Adapter"),
    (named("body.0.block1.weight", "conv_in.weight"), "a T2I-Adapter"),
    (named("adapter.body.0.resnets.0.block1.weight"), "a T2I-Adapter"),
    ({**SGM_UNET, **named("conditioner.embedders.1.model.ln_final.weight")}, "an SDXL checkpoint"),
    (named("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"), "an SDXL checkpoint"),
    ({**SGM_UNET, **named("conditioner.embedders.0.model.ln_final.weight", shape=(1280,))}, "an SDXL refiner"),
    (SGM_UNET, "an SDXL U-Net"),
    (named("model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"), "Stable Diffusion 3"),
    (named("joint_blocks.0.x_block.mlp.fc1.weight"), "Stable Diffusion 3"),
    (named("double_blocks.0.img_attn.qkv.weight"), "Flux"),
    (named("model.diffusion_model.double_blocks.0.img_attn.qkv.weight"), "Flux"),
    (named("blocks.0.attn.qkv.weight", "adaln_single.linear.weight"), "a diffusion transformer"),
    (named("clip_txt_mapper.weight", "down_blocks.0.0.channelwise.0.weight"), "Stable Cascade"),
    ({**original("unet"), **named("model.diffusion_model.input_blocks.1.0.time_stack.x.weight")}, "Stable Video"),
    ({**original("unet"), **named("noise_augmentor.data_mean")}, "unCLIP"),
    ({**original("unet", in_channels=7), **named("model.diffusion_model.label_emb.weight")}, "upscaler"),
    ({**original("unet", in_channels=5), **named("depth_model.model.x.weight")}, "depth"),
    (named("cond_stage_model.transformer.attn_layers.layers.0.0.weight"), "of before Stable Diffusion"),
    (named("model.diffusion_model.input_blocks.4.1.qkv.weight"), "of before Stable Diffusion"),
    ({**original("vae"), **named("first_stage_model.quantize.embedding.weight")}, "a VQ autoencoder"),
    (named("visual.conv1.weight", "transformer.resblocks.0.ln_1.weight", "logit_scale"), "in OpenCLIP's own names"),
    (named("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"), "a T5 text encoder"),
    (named("body.0.rdb1.conv1.weight", "conv_first.weight"), "ESRGAN"),
    (named("state.0.exp_avg", "state.0.exp_avg_sq", "state.0.step"), "the state of an optimizer"),
]


@pytest.mark.parametrize(
    ("shapes", "what"), OTHER_NAMES, ids=[f"{what}-{i}" for i, (_, what) in enumerate(OTHER_NAMES)]
)
def test_other_kinds_are_named(shapes, what):
    with pytest.raises(UserError, match=f"this is .*{what}.*; a Stable Diffusion 1.x or 2.x checkpoint"):
        recognise(shapes)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_our_own_training_checkpoint(ema_decay, tmp_path):
    optim = tiny_config(tmp_path).optim
    module = StageModule(tiny.unet(), optim, 1, 0, ema_decay, PosthocEMA(lengths=[0.1], every=1))
    with pytest.raises(UserError, match="a checkpoint of training with this project"):
        recognise(shapes_of(module.state_dict()))


def test_every_kind_in_the_table_is_met():
    seen = [*OTHER_MODELS.values(), *(what for _, what in OTHER_NAMES), "a checkpoint of training with this project"]
    for kind in FOREIGN:
        assert any(what in kind for what in seen), kind


def test_unknown_files():
    with pytest.raises(UserError, match=r"not recognised: 4 tensors, the first ones are a\.weight, b, c"):
        recognise(named("c", "b", "a.weight", "d"))
    with pytest.raises(UserError, match="no tensors"):
        recognise({})


# ------------------------------------------------------------------------------------------------------- architecture


def test_architecture_of_diffusers_names():
    """What shapes show comes out, whatever the numbers that they do not show."""
    shown = ["in_channels", "out_channels", "block_out_channels", "layers_per_block"]
    for part, model in {"unet": tiny.unet(in_channels=9), "vae": tiny.vae()}.items():
        config = infer_config(part, shapes_of(model.state_dict()))
        assert {name: config[name] for name in shown} == {name: model.config[name] for name in shown}
    tower = tiny.text_tower(hidden_act="quick_gelu")
    config = infer_config("text_encoder", shapes_of(tower.state_dict()))
    assert {**tower.config, **config, "num_attention_heads": 2} == tower.config


def test_a_vocabulary_with_new_words_keeps_its_end_of_text():
    shapes = shapes_of(tiny.text_tower().state_dict())
    shapes["embeddings.token_embedding.weight"] = (49410, 16)
    config = infer_config("text_encoder", shapes)
    assert config["vocab_size"] == 49410 and config["eos_token_id"] == 49407
