"""Tables between the original names of Stable Diffusion's weights (CompVis, OpenCLIP) and ours, which are diffusers'.

A table maps paths of modules, original to ours; what stands below a path keeps its name. Ours are those of `UNet`,
`AutoencoderKL` and `TextTower`; the original ones are without the prefix that a part has in a whole checkpoint.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

Table = dict[str, str]

UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
UNET_RES_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
VAE_ENDS = {
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
    **{f"{half}.conv_in": f"{half}.conv_in" for half in ("encoder", "decoder")},
    **{f"{half}.norm_out": f"{half}.conv_norm_out" for half in ("encoder", "decoder")},
    **{f"{half}.conv_out": f"{half}.conv_out" for half in ("encoder", "decoder")},
}
VAE_RES_BLOCK = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OPEN_CLIP_ENDS = {
    "token_embedding": "embeddings.token_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final": "final_layer_norm",
}
OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}

# Prefix in a file -> the names that follow. The first prefix that fits counts, and is the one to write.
PREFIXES = {
    "model.diffusion_model.": "unet",
    "model_ema.diffusion_model": "ema",
    "first_stage_model.": "vae",
    "cond_stage_model.transformer.text_model.": "clip",
    "cond_stage_model.transformer.": "clip",  # as transformers named it in 2022
    "cond_stage_model.model.": "open_clip",
    "conditioner.embedders.0.model.": "open_clip",  # SD-Turbo, out of Stability's generative-models
}
PARTS = {"unet": "unet", "vae": "vae", "clip": "text_encoder", "open_clip": "text_encoder"}
BARE_VAE = re.compile(r"(encoder|decoder|quant_conv|post_quant_conv)\.")

# What original files hold beside the networks: the schedule's buffers, losses and counters of training, what joins CLIP
# to its other tower, the safety checker.
PASSED_OVER = re.compile(
    r"""
    betas | alphas_cumprod(_prev)? | (sqrt|log)_(alphas|one_minus_alphas|recip_alphas|recipm1_alphas)_cumprod
    | posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2) | lvlb_weights | logvar | scale_factor
    | denoiser\.sigmas | (model_ema\.)?(decay|num_updates) | (first_stage_model\.)?loss\..*
    | embedding_manager\..* | safety_checker\..*
    | (cond_stage_model|conditioner\.embedders\.0)
      \.( (transformer\.|model\.)?(logit_scale|text_projection\.weight) | model\.attn_mask
        | transformer\.(text_model\.|vision_model\.)?embeddings\.position_ids )
    """,
    re.VERBOSE,
)

# The names of a U-Net's original modules and parameters, a longer one before what it begins with. Two numbers run
# together in "input_blocks.10.0": the second is a single digit.
EMA_WORD = re.compile(
    r"""
    (?<=put_blocks)\d+(?=\d) | \d+
    | input_blocks | middle_block | output_blocks | time_embed | out_layers
    | in_layers | emb_layers | skip_connection | op | conv
    | proj_in | proj_out | proj | transformer_blocks | attn[12] | to_[qkv] | to_out | norm[123] | norm | ff | net
    | out | weight | bias
    """,
    re.VERBOSE,
)


def rename(name: str, table: Mapping[str, str]) -> str | None:
    """Translate a parameter's name by the longest path that the table knows; None where it knows none.

    >>> rename("input_blocks.0.0.weight", UNET_ENDS)
    'conv_in.weight'
    """
    path, below = name, ""
    while path not in table:
        path, dot, last = path.rpartition(".")
        if not dot:
            return None
        below = f".{last}{below}"
    return table[path] + below


def with_dots(name: str) -> str | None:
    """Give a U-Net's parameter of an EMA, whose names are stored without dots, its dots back; None where it is unknown.

    >>> with_dots("input_blocks100in_layers0weight")
    'input_blocks.10.0.in_layers.0.weight'
    """
    words = EMA_WORD.findall(name)
    return ".".join(words) if "".join(words) == name else None


def indices(names: Iterable[str], prefix: str) -> set[int]:
    """Collect the numbers that follow `prefix`, a regular expression, at the start of names.

    >>> sorted(indices(["blocks.0.weight", "blocks.0.bias", "blocks.12.weight"], r"blocks\\."))
    [0, 12]
    """
    pattern = re.compile(rf"{prefix}(\d{{1,9}})\.")
    return {int(match[1]) for match in map(pattern.match, names) if match}


def inverse(table: Mapping[str, str]) -> Table:
    """Turn a table around."""
    return {ours: original for original, ours in table.items()}


def unet_names(num_levels: int, layers_per_block: int, up_attention: Sequence[bool]) -> Table:
    """Return the table of a U-Net. The original numbers all blocks of a way through, ours number them by level.

    Args:
        num_levels: how many sizes it works at.
        layers_per_block: residual blocks of a level on the way down.
        up_attention: for each level on the way up, the smallest first, whether it has attention.
    """
    table = UNET_ENDS | {"middle_block.1": "mid_block.attentions.0"}
    for i in range(2):
        table |= _inside(f"middle_block.{2 * i}", f"mid_block.resnets.{i}", UNET_RES_BLOCK)
    stride = layers_per_block + 1
    for level in range(num_levels):
        for way, ours, first, num_layers in (
            ("input_blocks", f"down_blocks.{level}", level * stride + 1, layers_per_block),
            ("output_blocks", f"up_blocks.{level}", level * stride, stride),
        ):
            for layer in range(num_layers):
                original = f"{way}.{first + layer}"
                table |= _inside(f"{original}.0", f"{ours}.resnets.{layer}", UNET_RES_BLOCK)
                table[f"{original}.1"] = f"{ours}.attentions.{layer}"
        end = (level + 1) * stride
        table[f"input_blocks.{end}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        place = 2 if up_attention[level] else 1  # it comes last in its block
        table[f"output_blocks.{end - 1}.{place}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return table


def vae_names(num_levels: int, layers_per_block: int) -> Table:
    """Return the table of an autoencoder. The original numbers the decoder's levels by size, ours by their order."""
    table = dict(VAE_ENDS)
    for half in ("encoder", "decoder"):
        table |= _inside(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", VAE_ATTENTION)
        for i in range(2):
            table |= _inside(f"{half}.mid.block_{i + 1}", f"{half}.mid_block.resnets.{i}", VAE_RES_BLOCK)
    for level in range(num_levels):
        for original, ours, resize, num_layers in (
            (f"encoder.down.{level}", f"encoder.down_blocks.{level}", "downsample", layers_per_block),
            (f"decoder.up.{num_levels - 1 - level}", f"decoder.up_blocks.{level}", "upsample", layers_per_block + 1),
        ):
            for layer in range(num_layers):
                table |= _inside(f"{original}.block.{layer}", f"{ours}.resnets.{layer}", VAE_RES_BLOCK)
            table[f"{original}.{resize}.conv"] = f"{ours}.{resize}rs.0.conv"
    return table


def open_clip_names(num_layers: int) -> Table:
    """Return the table of OpenCLIP's text tower, but for the fused projections of its attention."""
    table = dict(OPEN_CLIP_ENDS)
    for layer in range(num_layers):
        table |= _inside(f"transformer.resblocks.{layer}", f"encoder.layers.{layer}", OPEN_CLIP_LAYER)
    return table


def _inside(original: str, ours: str, table: Mapping[str, str]) -> Table:
    return {f"{original}.{name}": f"{ours}.{our_name}" for name, our_name in table.items()}
