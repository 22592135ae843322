"""Going on from a trained U-Net: does it predict what we train, does it see enough, which of its weights may move."""

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import nn

from ldm.errors import UserError
from ldm.files import load_json, parse_json
from ldm.nn.unet import UNet
from ldm.weights.archive import PREDICTION_TYPES
from ldm.weights.hub import fetch, part_folder
from ldm.weights.tensors import read_metadata

OPTION = "unet.pretrained"
GROUPS = {"epsilon": "ddpm", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}


def check_prediction(source: str, prediction_type: str) -> None:
    """See that a pretrained U-Net predicts what it will be trained to, where its source says.

    Raises:
        UserError: it predicts something else, or cannot be had.
    """
    found = _prediction_type(source)
    if found not in (None, prediction_type):
        raise UserError(
            f"{OPTION}={source} predicts {found}, and diffusion.prediction_type={prediction_type} would first have to "
            f"teach it otherwise: go on with diffusion={GROUPS.get(str(found), found)}. If that is what you want, name "
            "the folder of the U-Net alone (…/unet), which does not say what it predicts"
        )


def _prediction_type(source: str) -> str | None:
    """Return what a model's U-Net predicts; None where its source does not say."""
    root = fetch(source, ("unet", "scheduler"), OPTION)
    if root.is_file():
        metadata = read_metadata(root)
        if "scheduler" not in metadata or "ldm_version" not in metadata:
            return PREDICTION_TYPES.get(metadata.get("modelspec.prediction_type", ""))
        config = parse_json(metadata["scheduler"], f"{root}: its metadata (scheduler)")
    elif (folder := part_folder(root, "scheduler")) is not None:
        config = load_json(folder / "scheduler_config.json")
    else:
        return None
    is_flow = str(config.get("_class_name")).startswith("FlowMatch")
    return str(config.get("prediction_type") or ("flow_prediction" if is_flow else "epsilon"))


@torch.no_grad()
def widen(unet: UNet, in_channels: int) -> None:
    """Let a U-Net see more channels behind those that it knows; their weights are zero, so it predicts as before."""
    old = unet.conv_in
    new = nn.Conv2d(in_channels, old.out_channels, 3, padding=1, dtype=old.weight.dtype, device=old.weight.device)
    new.weight.zero_()[:, : old.in_channels] = old.weight
    assert new.bias is not None and old.bias is not None
    new.bias.copy_(old.bias)
    unet.conv_in = new
    unet.config["in_channels"] = in_channels


def train_only(network: nn.Module, patterns: Sequence[str] | None) -> None:
    """Freeze all parameters but those that a pattern names; None trains all.

    Args:
        network: whose parameters.
        patterns: names of parameters with `*`, `?` and `[…]` as in file names, such as `*attn2*`, or names of whole
            parts, such as `mid_block`.

    Raises:
        UserError: a pattern names nothing; it says what comes near.
    """
    if patterns is None:
        return
    names = [name for name, _ in network.named_parameters()]
    wanted: set[str] = set()
    for pattern in patterns:
        found = [name for name in names if fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")]
        if not found:
            parts = dict.fromkeys(part for name in names for part in name.split(".") if not part.isdigit())
            near = get_close_matches(pattern.strip("*.").rpartition(".")[2], parts, n=1)
            blocks = ", ".join(name for name, _ in network.named_children())
            raise UserError(
                f"unet.train={list(patterns)}: no parameter of the U-Net is named {pattern!r}; "
                f"{f'did you mean {near[0]!r}?' if near else f'its parts are {blocks}.'} Names are such as "
                f"{names[-1]}, and * stands for any letters (*attn2*)"
            )
        wanted.update(found)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in wanted)
