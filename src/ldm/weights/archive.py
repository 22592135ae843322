"""Single files with all that the original format has no place for, which ours carry in their metadata.

`single_file.py` knows the names of the tensors; here are the files, the configs, the tokenizer and the scheduler.
Metadata are data from anywhere: parsed as JSON and read as a `config.json` is.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm.errors import UserError
from ldm.files import load_json, parse_json
from ldm.weights.folder import NETWORKS, build_network, check_class, config_hash
from ldm.weights.kinds import recognise
from ldm.weights.single_file import Network, join, split
from ldm.weights.tensors import read_metadata, read_weights, write_weights

LONE_KINDS = {"original_unet": "unet", "original_vae": "vae", **{part: part for part in NETWORKS}}
"""The kinds of files that hold one network, and which."""

SD_SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "timestep_spacing": "leading",
}
"""What Stable Diffusion 1.x and 2.x were trained with, and how they are sampled unless told otherwise."""

TOLD = {"configs", "scheduler", "settings", "tokenizer"}
PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction"}  # in the words of ModelSpec, a convention of metadata


@dataclass
class Archive:
    """A single file, taken apart: its kind, its networks by part, and what its metadata say.

    `told` holds what files of our own say, under the names in `TOLD`, and is empty for others.
    """

    path: Path
    kind: str
    networks: dict[str, Network]
    told: dict[str, dict[str, Any]]
    prediction_type: str | None


def read_archive(path: Path) -> Archive:
    """Read a file of weights, in the original names or of one network in diffusers' and transformers'.

    Raises:
        UserError: it is damaged, of another kind, or does not tell the architecture.
    """
    state, metadata = read_weights(path), read_metadata(path)
    told: dict[str, dict[str, Any]] = {}
    if "ldm_version" in metadata:
        for name in TOLD & metadata.keys():
            told[name] = parse_json(metadata[name], f"{path}: its metadata ({name})")
    configs = told.get("configs", {})
    if not all(isinstance(config, dict) for config in configs.values()):
        raise UserError(f"{path}: its metadata (configs) hold no configs")
    try:
        kind = recognise({name: tuple(tensor.shape) for name, tensor in state.items()})
        networks = (
            {kind: Network(_config_beside(path, kind, configs), state)} if kind in NETWORKS else split(state, configs)
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    prediction_type = PREDICTION_TYPES.get(metadata.get("modelspec.prediction_type", ""))
    return Archive(path, kind, networks, told, prediction_type)


def _config_beside(path: Path, kind: str, configs: Mapping[str, Any]) -> dict[str, Any]:
    if kind in configs:
        return configs[kind]
    if not (path.parent / "config.json").is_file():
        raise UserError(f"this is a {kind} without its config: a config.json must lie beside it")
    config = load_json(path.parent / "config.json")
    check_class(NETWORKS[kind], config, str(path.parent))
    return config


def take_network(archive: Archive, part: str, dtype: torch.dtype | None) -> Any:
    """Build a network of a file and let go of the file's weights for it.

    Raises:
        UserError: the file does not hold it, or its weights do not fit its config.
    """
    name = "clip" if part == "text_encoder" and archive.kind == "clip" else part
    if name not in archive.networks:
        raise UserError(f"{archive.path} holds no {part} (only: {', '.join(archive.networks)})")
    found = archive.networks[name]
    return build_network(NETWORKS[part], found.config, found.state, dtype, archive.path, archive.path)


def write_archive(
    path: Path,
    networks: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    scheduler: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, str] | None = None,
) -> None:
    """Write networks into one file in the original names.

    Args:
        path: of the file.
        networks: by part.
        dtype: of the file; None keeps the parameters' own.
        scheduler, settings, tokenizer: of a whole model; the last as the texts of its files.

    Raises:
        UserError: the original names have none for a parameter.
        OSError: the file cannot be written.
    """
    parts = {part: Network(network.config, dict(network.state_dict())) for part, network in networks.items()}
    state = join(parts)
    configs = {part: network.config for part, network in parts.items()}
    metadata = {"config_hash": config_hash(configs), "configs": _dump(configs)}
    if scheduler is None:
        (part,) = parts
        metadata["kind"] = part
        if part == "vae":  # by itself a VAE stands without prefix
            state = {name.removeprefix("first_stage_model."): tensor for name, tensor in state.items()}
    else:
        rest = {"scheduler": scheduler, "settings": settings, "tokenizer": tokenizer}
        metadata |= {"kind": "single_file", **{name: _dump(content or {}) for name, content in rest.items()}}
        metadata |= _model_spec(path.stem, configs, scheduler.get("prediction_type"))
    write_weights(path, state, metadata, dtype)


def _model_spec(title: str, configs: Mapping[str, Any], prediction_type: str | None) -> dict[str, str]:
    """Return what other tools read first, but for a date: the same model makes the same file."""
    is_v2 = configs["text_encoder"]["hidden_act"] == "gelu"
    v2 = "stable-diffusion-v2-768-v" if prediction_type == "v_prediction" else "stable-diffusion-v2-512"
    spec = {
        "sai_model_spec": "1.0.0",
        "architecture": v2 if is_v2 else "stable-diffusion-v1",
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": title,
    }
    for theirs, ours in PREDICTION_TYPES.items():
        if ours == prediction_type:
            spec["prediction_type"] = theirs
    return {f"modelspec.{name}": text for name, text in spec.items()}


def _dump(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))
