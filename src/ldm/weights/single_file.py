"""Single files: whole Stable Diffusion 1.x and 2.x checkpoints as one flat state dict in the original names.

Here they are taken apart and put together; the names are in `names.py`, architectures are read off in `kinds.py`.
Tensors pass as they are, in views where their shape changes; only what OpenCLIP stores fused is copied on the way out.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.weights.kinds import infer_config
from ldm.weights.names import (
    BARE_VAE,
    PARTS,
    PASSED_OVER,
    PREFIXES,
    Table,
    indices,
    inverse,
    open_clip_names,
    rename,
    unet_names,
    vae_names,
    with_dots,
)

State = dict[str, Tensor]


@dataclass(frozen=True)
class Network:
    """A network as data: what `from_config` of its class takes, and its parameters in the names of that class."""

    config: dict[str, Any]
    state: State


VAE_ATTENTION_WEIGHT = re.compile(r"(encoder|decoder)\.mid_block\.attentions\.0\.to_(q|k|v|out\.0)\.weight")
FUSED = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")
UNFUSED = re.compile(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")
NUM_OPEN_CLIP_LAYERS = 24  # of ViT-H/14's text tower, that of Stable Diffusion 2.x


# --------------------------------------------------------------------------------------------------------- reading


def split(state: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Network]:
    """Take a file in the original names apart into its networks; where it holds an EMA of the U-Net, that is taken.

    Parameters that are unknown within a part stay in its state under the file's name for them, less the part's prefix:
    a strict load will name them.

    Args:
        state: the file's tensors, of any dtype and on any device, the meta device too. A VAE may stand without prefix.
        configs: by part, options that go before what `infer_config` says; some or all of them.

    Returns:
        "unet", "vae" and "text_encoder", those of them that the file holds.

    Raises:
        UserError: tensors belong to no part, two are one parameter, or a parameter that tells the architecture is
            missing.
    """
    files = _take_apart(state)
    unet, ema = files.pop("unet", {}), files.pop("ema", {})
    if unet or ema:
        files["unet"] = {**unet, **ema}
    if "clip" in files and "open_clip" in files:
        raise UserError("the file holds two text encoders, one in CLIP's names and one in OpenCLIP's")
    networks = {}
    for names, tensors in files.items():
        part = PARTS[names]
        given = (configs or {}).get(part, {})
        ours = READERS[names](tensors, given)
        config = infer_config(part, {name: tensor.shape for name, tensor in ours.items()})
        if names == "open_clip":
            config["hidden_act"] = "gelu"
        scale = state.get("scale_factor")  # measured when training began
        if part == "vae" and scale is not None and scale.numel() == 1 and not scale.is_meta:
            config["scaling_factor"] = float(f"{scale.item():.6g}")
        networks[part] = Network({**config, **given}, ours)
    return networks


def _take_apart(state: Mapping[str, Tensor]) -> dict[str, State]:
    """Sort tensors by the names they are in, the values of `PREFIXES`, and take the prefixes off."""
    files: dict[str, State] = {}
    strays = []
    for name, tensor in state.items():
        if PASSED_OVER.fullmatch(name):
            continue
        full = f"first_stage_model.{name}" if BARE_VAE.match(name) else name
        prefix = next((prefix for prefix in PREFIXES if full.startswith(prefix)), "")
        names = PREFIXES.get(prefix)
        inner = full.removeprefix(prefix)
        short = with_dots(inner) if names == "ema" else inner
        if names is None or short is None:
            strays.append(name)
        else:
            _put(files.setdefault(names, {}), short, tensor)
    if strays:
        named = ", ".join(sorted(strays)[:3]) + (", …" if len(strays) > 3 else "")
        raise UserError(f"tensors of no part of a Stable Diffusion checkpoint: {named} ({len(strays)} in all)")
    return files


def _put(state: State, name: str, tensor: Tensor) -> None:
    if name in state:
        raise UserError(f"two tensors of the file are both {name}")
    state[name] = tensor


def _renamed(state: State, table: Table) -> State:
    ours: State = {}
    for name, tensor in state.items():
        _put(ours, rename(name, table) or name, tensor)
    return ours


def _read_unet(state: State, config: Mapping[str, Any]) -> State:
    # The first block is conv_in; each level but the last ends with a block that halves the size.
    blocks = indices(state, r"input_blocks\.")
    ends = [i for i in sorted(blocks) if any(f"input_blocks.{i}.0.op.{kind}" in state for kind in ("weight", "bias"))]
    stride = len([i for i in blocks if not ends or i < ends[0]])
    num_levels = len(ends) + 1
    up_attention = [f"output_blocks.{level * stride}.1.proj_in.weight" in state for level in range(num_levels)]
    return _renamed(state, unet_names(num_levels, stride - 1, up_attention))


def _read_vae(state: State, config: Mapping[str, Any]) -> State:
    num_levels, num_layers = len(indices(state, r"encoder\.down\.")), len(indices(state, r"encoder\.down\.0\.block\."))
    ours = _renamed(state, vae_names(num_levels, num_layers))
    # Original files store the attention's linear layers as 1×1 convolutions, some later tools do not.
    return {
        name: tensor.flatten(1) if VAE_ATTENTION_WEIGHT.fullmatch(name) and tensor.ndim > 2 else tensor
        for name, tensor in ours.items()
    }


def _read_open_clip(state: State, config: Mapping[str, Any]) -> State:
    # Stable Diffusion 2.x listens to the last layer but one. An original file holds the whole tower; one that a tool
    # wrote from a diffusers folder can be without the last layer, as it is without the projection that comes after.
    num_blocks = len(indices(state, r"transformer\.resblocks\."))
    is_whole = "text_projection" in state or num_blocks == NUM_OPEN_CLIP_LAYERS
    num_layers = config.get("num_hidden_layers", num_blocks - is_whole)
    has_unread = num_layers == num_blocks - 1
    table = open_clip_names(num_blocks)
    ours: State = {}
    for name, tensor in state.items():
        if name == "text_projection" or (has_unread and name.startswith(f"transformer.resblocks.{num_layers}.")):
            continue
        fused = FUSED.fullmatch(name)
        if fused and tensor.ndim and len(tensor) % 3 == 0:
            for letter, piece in zip("qkv", tensor.chunk(3), strict=True):
                _put(ours, f"encoder.layers.{fused[1]}.self_attn.{letter}_proj.{fused[2]}", piece)
        else:
            _put(ours, rename(name, table) or name, tensor)
    return ours


READERS: dict[str, Callable[[State, Mapping[str, Any]], State]] = {
    "unet": _read_unet,
    "vae": _read_vae,
    "clip": lambda state, config: state,
    "open_clip": _read_open_clip,
}


# --------------------------------------------------------------------------------------------------------- writing


def join(networks: Mapping[str, Network]) -> State:
    """Put networks together as one flat state dict in the original names, the inverse of `split`.

    A text encoder with `hidden_act` "gelu" is written as OpenCLIP's, as in Stable Diffusion 2.x; others as CLIP's, as
    in 1.x. What shapes do not show (numbers of heads and groups, scaling factors, …) is not in the result: whoever
    reads it goes by Stable Diffusion's, or is given the configs.

    Args:
        networks: any of "unet", "vae" and "text_encoder".

    Returns:
        Contiguous tensors that share no memory with one another, of the dtype that they came in.

    Raises:
        UserError: a parameter has no original name.
    """
    file: State = {}
    for part, network in networks.items():
        names = part
        if part == "text_encoder":
            names = "open_clip" if network.config.get("hidden_act") == "gelu" else "clip"
        prefix = next(prefix for prefix, follows in PREFIXES.items() if follows == names)
        file |= {prefix + name: tensor.contiguous() for name, tensor in WRITERS[names](network.state).items()}
    return file


def _original(name: str, table: Table) -> str:
    original = rename(name, table)
    if original is None:
        raise UserError(f"{name} has no name in Stable Diffusion's original format: it cannot be written as one file")
    return original


def _write_unet(state: State) -> State:
    num_levels, num_layers = len(indices(state, r"down_blocks\.")), len(indices(state, r"down_blocks\.0\.resnets\."))
    up_attention = [f"up_blocks.{level}.attentions.0.proj_in.weight" in state for level in range(num_levels)]
    table = inverse(unet_names(num_levels, num_layers, up_attention))
    return {_original(name, table): tensor for name, tensor in state.items()}


def _write_vae(state: State) -> State:
    num_levels = len(indices(state, r"encoder\.down_blocks\."))
    table = inverse(vae_names(num_levels, len(indices(state, r"encoder\.down_blocks\.0\.resnets\."))))
    return {
        _original(name, table): tensor[:, :, None, None] if VAE_ATTENTION_WEIGHT.fullmatch(name) else tensor
        for name, tensor in state.items()
    }


def _write_open_clip(state: State) -> State:
    num_layers = len(indices(state, r"encoder\.layers\."))
    table = inverse(open_clip_names(num_layers))
    file: State = {}
    for name, tensor in state.items():
        unfused = UNFUSED.fullmatch(name)
        if unfused is None:
            file[_original(name, table)] = tensor
        elif unfused[2] == "q":
            qkv = [state[f"encoder.layers.{unfused[1]}.self_attn.{letter}_proj.{unfused[3]}"] for letter in "qkv"]
            file[f"transformer.resblocks.{unfused[1]}.attn.in_proj_{unfused[3]}"] = torch.cat(qkv)
    # The tower that readers expect goes on with a layer of which they take nothing, and a projection. The layer is all
    # zeros, so that it is the identity for those who read it after all.
    last, unread = (f"transformer.resblocks.{i}." for i in (num_layers - 1, num_layers))
    file |= {name.replace(last, unread): torch.zeros_like(t) for name, t in file.items() if name.startswith(last)}
    norm = file["ln_final.weight"]
    file["text_projection"] = torch.eye(len(norm), dtype=norm.dtype, device=norm.device)
    return file


WRITERS: dict[str, Callable[[State], State]] = {
    "unet": _write_unet,
    "vae": _write_vae,
    "clip": lambda state: state,
    "open_clip": _write_open_clip,
}
