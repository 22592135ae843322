"""What a file is, and what its networks look like, told from the names and shapes of its tensors alone."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ldm.errors import UserError
from ldm.weights.names import indices

# Files of other kinds: what they are, and a pattern of which one name is enough. The first that fits counts.
FOREIGN: dict[str, str] = {
    "a checkpoint of training with this project, made to resume from (the finished network is in the run's model/)": (
        r"^network\.|^ema\.average\."
    ),
    "the state of an optimizer": r"(^|\.)exp_avg(_sq)?$|^optimizer_states?\.|^param_groups\b",
    "a LoRA or one of its kin, a change to a model's weights": (
        r"^lora_(unet|te\d?|transformer)_|[._]lora[._](A|B|up|down|mid|linear_layer|magnitude|embedding)(?![a-z])"
        r"|\.(hada_w\d|lokr_w\d|oft_blocks|dora_scale)"
    ),
    "a textual inversion, an embedding of new words": r"^emb_params$|^string_to_param|^<[^>]+>$|^clip_[lg]$",
    "a hypernetwork": r"^\d+\.(\d+\.)?linear",
    "a ControlNet": (
        r"^control_model\.|controlnet_cond_embedding|^controlnet_(down|mid)|^lllite_|(^|\.)(input_hint_block|zero_convs)\."
    ),
    "an IP-Adapter": r"^(image_proj|ip_adapter)\.",
    "a T2I-Adapter": r"(^|\.)body\.\d+\.(block\d|in_conv|resnets)\b",
    "an AnimateDiff motion module": r"\bmotion_modules\.",
    "Stable Video Diffusion": r"\btime_stack\.|\btemporal_transformer_blocks\.",
    "a Stable Diffusion 2.1 unCLIP checkpoint": r"^noise_augmentor\.",
    "a Stable Diffusion upscaler": r"^low_scale_model\.|^model\.diffusion_model\.label_emb\.weight$",
    "a Stable Diffusion 2 depth checkpoint": r"^depth_model\.",
    "Stable Cascade": r"\b(clip_txt_mapper|effnet_mapper|channelwise)\.",
    "Stable Diffusion 3": r"\bjoint_blocks\.",
    "Flux": r"\b(double_blocks|single_blocks|single_transformer_blocks)\.",
    "a diffusion transformer, not a U-Net": (
        r"^(model\.diffusion_model\.|transformer\.)?(transformer_blocks|blocks|double_layers|joint_transformer_blocks"
        r"|adaln_single|patchify_proj|x_embedder|t_embedder|cap_embedder|patch_embedding)\."
    ),
    "an SDXL checkpoint": r"^conditioner\.embedders\.(0\.transformer|1)\.",
    "an SDXL U-Net": r"\badd_embedding\.|^model\.diffusion_model\.label_emb\.",
    "a latent diffusion model of before Stable Diffusion": (
        r"^cond_stage_model\.(transformer\.(token_emb|attn_layers)|embedding)\.|^model\.diffusion_model\..*\.qkv\."
    ),
    "a VQ autoencoder": r"^(first_stage_model\.)?quantize\.",
    "a tiny autoencoder (TAESD)": r"^(encoder|decoder)\.layers\.\d+\.(weight|conv\.)",
    "a CLIP in OpenCLIP's own names": r"^(visual|transformer\.resblocks)\.",
    "a T5 text encoder": r"\bblock\.\d+\.layer\.\d+\.SelfAttention\.",
    "an image upscaler (ESRGAN)": r"\b(RDB|rdb)\d\.conv|^RRDB_trunk\.",
}

SD2_TEXT_WIDTH = 1024

# Parts of checkpoints in the original names. A text encoder comes in no file of its own.
ORIGINAL = {
    "original_unet": r"^(model\.diffusion_model\.|model_ema\.diffusion_model)",
    "original_vae": r"^first_stage_model\.|^(encoder\.(down\.\d|mid\.block_1)|decoder\.(up\.\d|mid\.block_1))\.",
    "single_file": r"^(cond_stage_model|conditioner\.embedders\.0\.model)\.",
}

# Networks in our names; all patterns of a kind must be met.
OURS: dict[str, tuple[str, ...]] = {
    "clip": (r"^text_model\.", r"^vision_model\."),
    "text_encoder": (r"^(text_model\.)?embeddings\.(token|position)_embedding\.",),
    "unet": (r"^(down|up)_blocks\.", r"^(time_embedding|conv_in)\."),
    "vae": (r"^(encoder\.(down_blocks|mid_block)|decoder\.(up_blocks|mid_block))\.",),
}

Shapes = Mapping[str, Sequence[int]]


def recognise(shapes: Shapes) -> str:
    """Name the kind of a flat state dict.

    Args:
        shapes: the names and shapes of its tensors.

    Returns:
        In the original names: "single_file", a checkpoint of several parts; "original_vae" and "original_unet", one
        part alone. In the names of diffusers and transformers: "unet", "vae", "text_encoder", or "clip", both towers.

    Raises:
        UserError: it is something else; says what, where that is known.
    """
    foreign = _foreign(shapes)
    if foreign:
        raise UserError(
            f"this is {foreign}; a Stable Diffusion 1.x or 2.x checkpoint, U-Net, VAE or text encoder is wanted"
        )
    parts = {kind for kind, pattern in ORIGINAL.items() if _any(pattern, shapes)}
    if parts:
        return parts.pop() if len(parts) == 1 else "single_file"
    for kind, patterns in OURS.items():
        if all(_any(pattern, shapes) for pattern in patterns):
            return kind
    if not shapes:
        raise UserError("there are no tensors in it")
    first = ", ".join(sorted(shapes)[:3])
    raise UserError(f"not recognised: {len(shapes)} tensors, the first ones are {first}")


def _foreign(shapes: Shapes) -> str | None:
    # Stability's generative-models gives the text encoders of the SDXL refiner and of SD-Turbo, a 2.x, the same names.
    text = "conditioner.embedders.0.model."
    if _any(rf"^{re.escape(text)}", shapes) and tuple(shapes.get(f"{text}ln_final.weight", ())) != (SD2_TEXT_WIDTH,):
        return "an SDXL refiner"
    return next((what for what, pattern in FOREIGN.items() if _any(pattern, shapes)), None)


def _any(pattern: str, names: Iterable[str]) -> bool:
    return any(map(re.compile(pattern).search, names))


# ------------------------------------------------------------------------------------------------------ architecture

# What shapes do not show is as in Stable Diffusion; numbers that are the default of a network's class are left to it.
NUM_HEADS = 8  # Stable Diffusion 1.x: at each level
HEAD_DIM = 64  # Stable Diffusion 2.x, and CLIP's text towers: width of a head
SAMPLE_SIZE = 64  # height and width of the latents
END_OF_TEXT = 49407  # in CLIP's vocabulary, whose last word it is


def infer_config(part: str, shapes: Shapes) -> dict[str, Any]:
    """Read a network's architecture off the shapes of its parameters.

    What they do not show is taken from Stable Diffusion: heads (8 at each level of a U-Net whose transformers have
    convolutions at their ends, as in 1.x; of width 64 where these are linear layers, as in 2.x, and in text encoders),
    latents of 64 × 64, an end of text that is the vocabulary's last word, and the defaults of our classes.

    Args:
        part: "unet", "vae" or "text_encoder".
        shapes: of the parameters, by their names in our classes.

    Returns:
        What the class's `from_config` takes.

    Raises:
        UserError: a parameter that tells the architecture is missing or has too few dimensions.
    """
    return INFER[part](shapes)


def _size(shapes: Shapes, name: str, axis: int) -> int:
    if name not in shapes:
        raise UserError(f"{name} is missing, without which the architecture cannot be told")
    if len(shapes[name]) <= axis:
        raise UserError(f"{name} has shape {tuple(shapes[name])}, expected more than {axis} dimensions")
    return int(shapes[name][axis])


def _num_heads(width: int) -> int:
    return max(1, width // HEAD_DIM)


def _infer_unet(shapes: Shapes) -> dict[str, Any]:
    num_levels = len(indices(shapes, r"down_blocks\."))
    widths = [_size(shapes, f"down_blocks.{level}.resnets.0.conv1.weight", 0) for level in range(num_levels)]
    mid = "mid_block.attentions.0"
    context_dim = _size(shapes, f"{mid}.transformer_blocks.0.attn2.to_k.weight", 1)
    is_linear = len(shapes.get(f"{mid}.proj_in.weight", ())) == 2

    def has_attention(block: str) -> bool:
        return any(name.startswith(f"{block}.attentions.0.") for name in shapes)

    depths = []
    for level in range(num_levels):
        blocks = [f"down_blocks.{level}", f"up_blocks.{num_levels - 1 - level}"]
        blocks += ["mid_block"] if level == num_levels - 1 else []
        depths.append(max(len(indices(shapes, rf"{b}\.attentions\.0\.transformer_blocks\.")) for b in blocks))
    distinct = set(depths) - {0}  # 0: a level without attention

    return {
        "sample_size": SAMPLE_SIZE,
        "in_channels": _size(shapes, "conv_in.weight", 1),
        "out_channels": _size(shapes, "conv_out.weight", 0),
        "block_out_channels": widths,
        "layers_per_block": len(indices(shapes, r"down_blocks\.0\.resnets\.")),
        "down_block_types": [
            "CrossAttnDownBlock2D" if has_attention(f"down_blocks.{level}") else "DownBlock2D"
            for level in range(num_levels)
        ],
        "up_block_types": [
            "CrossAttnUpBlock2D" if has_attention(f"up_blocks.{level}") else "UpBlock2D" for level in range(num_levels)
        ],
        "cross_attention_dim": context_dim,
        "attention_head_dim": [_num_heads(width) for width in widths] if is_linear else NUM_HEADS,
        "transformer_layers_per_block": distinct.pop() if len(distinct) == 1 else [max(1, depth) for depth in depths],
        "use_linear_projection": is_linear,
    }


def _infer_vae(shapes: Shapes) -> dict[str, Any]:
    num_levels = len(indices(shapes, r"encoder\.down_blocks\."))
    return {
        "in_channels": _size(shapes, "encoder.conv_in.weight", 1),
        "out_channels": _size(shapes, "decoder.conv_out.weight", 0),
        "down_block_types": ["DownEncoderBlock2D"] * num_levels,
        "up_block_types": ["UpDecoderBlock2D"] * num_levels,
        "block_out_channels": [
            _size(shapes, f"encoder.down_blocks.{level}.resnets.0.conv1.weight", 0) for level in range(num_levels)
        ],
        "layers_per_block": len(indices(shapes, r"encoder\.down_blocks\.0\.resnets\.")),
        "latent_channels": _size(shapes, "decoder.conv_in.weight", 1),
        "sample_size": SAMPLE_SIZE * 2 ** (num_levels - 1),
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": any(name.startswith("encoder.mid_block.attentions.") for name in shapes),
    }


def _infer_text_encoder(shapes: Shapes) -> dict[str, Any]:
    vocab_size, width = (_size(shapes, "embeddings.token_embedding.weight", axis) for axis in (0, 1))
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": _size(shapes, "encoder.layers.0.mlp.fc1.weight", 0),
        "num_hidden_layers": len(indices(shapes, r"encoder\.layers\.")),
        "num_attention_heads": _num_heads(width),
        "max_position_embeddings": _size(shapes, "embeddings.position_embedding.weight", 0),
        "eos_token_id": min(END_OF_TEXT, vocab_size - 1),
    }


INFER: dict[str, Callable[[Shapes], dict[str, Any]]] = {
    "unet": _infer_unet,
    "vae": _infer_vae,
    "text_encoder": _infer_text_encoder,
}
