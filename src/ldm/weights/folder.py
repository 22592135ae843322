"""Model folders in diffusers' format, and the folders of single networks: reading, writing, finding.

A model folder is `model_index.json` beside `unet/ vae/ text_encoder/ tokenizer/ scheduler/`, each network a
`config.json` and safetensors. Component names are looked up in a table: nothing a folder says is imported or run.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm import __version__
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.nn.autoencoder import AutoencoderKL
from ldm.nn.clip import CLIP, TextTower
from ldm.nn.unet import UNet

M = TypeVar("M", AutoencoderKL, CLIP, TextTower, UNet)

SETTINGS = "ldm.json"  # beside model_index.json: what `sample.py` does unless told otherwise

# network -> (its folder, the library and class that other tools open it with, the weights' file name)
FORMATS: dict[type[nn.Module], tuple[str, str, str, str]] = {
    UNet: ("unet", "diffusers", "UNet2DConditionModel", "diffusion_pytorch_model"),
    AutoencoderKL: ("vae", "diffusers", "AutoencoderKL", "diffusion_pytorch_model"),
    TextTower: ("text_encoder", "transformers", "CLIPTextModel", "model"),
    CLIP: ("clip", "transformers", "CLIPModel", "model"),
}

# Names that older releases of diffusers gave to the VAE's attention.
OLD_VAE_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


# --------------------------------------------------------------------------------------------------------- finding


def find_model(ckpt: str) -> Path:
    """Return the model folder that `ckpt=` names: the folder itself, or `model/` in a run directory.

    Raises:
        UserError: it is not there, or is of another kind.
    """
    path = Path(ckpt).expanduser()
    if not path.exists():
        raise UserError(f"ckpt={ckpt}: there is no such folder (seen from {Path.cwd()})")
    for folder in (path, path / "model"):
        if (folder / "model_index.json").is_file():
            return folder
    if path.is_file():
        raise UserError(f"ckpt={ckpt} is a file; name a run directory or a model folder (with model_index.json)")
    if (path / "checkpoints").is_dir() or (path / "config.yaml").is_file():
        raise UserError(f"ckpt={ckpt}: this run has no finished model yet; `python train.py` with its config goes on")
    if (path / "config.json").is_file():
        raise UserError(f"ckpt={ckpt} is a single network, not a whole model (no model_index.json)")
    raise UserError(f"ckpt={ckpt} is neither a run directory nor a model folder (no model_index.json)")


def find_part(source: str, part: str) -> Path:
    """Return the folder of one network: a local folder, a part of a local model folder, or downloaded from the hub.

    Args:
        source: `./vae`, `outputs/run`, or a hub id such as `stabilityai/sd-vae-ft-mse`.
        part: `vae`, `text_encoder`, `unet` or `tokenizer`, for sources that hold a whole model.

    Raises:
        UserError: it cannot be had; says how to use a mirror or a local folder.
    """
    root = Path(source).expanduser()
    if not root.exists():
        if source.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            raise UserError(f"{part}: there is no folder {source} (seen from {Path.cwd()})")
        root = _download(source, part)
    for folder in (root / part, root / "model" / part, root):
        if folder.is_dir() and any(folder.glob("*.json")):
            return folder
    raise UserError(f"{part}: {source} holds no {part} in diffusers' or transformers' format (no config.json)")


def _download(repo_id: str, part: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [f"{prefix}*.{ending}" for prefix in ("", f"{part}/") for ending in ("json", "txt")]
    weights = ["model*.safetensors", "diffusion_pytorch_model*.safetensors"]
    patterns += [f"{prefix}{name}" for prefix in ("", f"{part}/") for name in weights] if part != "tokenizer" else []
    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns, ignore_patterns=["*fp16*", "*non_ema*"]))
    except Exception as error:  # no network, no such repository, no permission: for the user one and the same
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{part}: '{repo_id}' cannot be had from the hub: {reason}; name a mirror ({part}.pretrained=<other/id>) "
            f"or a local folder ({part}.pretrained=./folder)"
        ) from error


# --------------------------------------------------------------------------------------------------------- reading


def load_network(network: type[M], folder: Path, dtype: torch.dtype = torch.float32) -> M:
    """Load a network from its folder, strictly, holding about one copy of the weights in memory.

    Args:
        network: its class.
        folder: with `config.json` and safetensors.
        dtype: of the parameters, whatever the file holds.

    Raises:
        UserError: a file is missing or damaged, an option is not supported, keys are missing or surplus, or a tensor
            has another shape.
    """
    config = load_json(folder / "config.json")
    if network is TextTower and "text_config" in config:  # a whole CLIP serves as text encoder
        config = {**(config["text_config"] or {}), **(config.get("text_config_dict") or {})}
    try:
        with torch.device("meta"):
            model = network.from_config(config)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:  # the file may hold values of any kind
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    state = load_weights(folder)
    if network is AutoencoderKL:
        state = {_renamed(name, OLD_VAE_NAMES): tensor for name, tensor in state.items()}
    if network is TextTower and any(name.startswith("text_model.") for name in state):
        state = {name.removeprefix("text_model."): t for name, t in state.items() if name.startswith("text_model.")}
    state = {name: tensor for name, tensor in state.items() if not name.endswith("embeddings.position_ids")}
    check_state(model.state_dict(), state, str(folder))
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    return model.eval()


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Read a folder's safetensors: one file, or the shards that an index names."""
    for stem in ("diffusion_pytorch_model", "model"):
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if single.is_file():
            return _read_safetensors(single)
        if index.is_file():
            shards = load_json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise UserError(f"{index} names no files (weight_map)")
            names = sorted({Path(str(name)).name for name in shards.values()})
            return {key: tensor for name in names for key, tensor in _read_safetensors(folder / name).items()}
    raise UserError(f"{folder} holds no weights (diffusion_pytorch_model.safetensors or model.safetensors)")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read, it may be cut short: {error}") from error


def check_state(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
    """Compare names and shapes of weights.

    Raises:
        UserError: they differ; the first few differences are named, all are counted.
    """
    faults = []
    for what, names in (("missing", expected.keys() - found.keys()), ("surplus", found.keys() - expected.keys())):
        if names:
            faults.append(f"{len(names)} {what} ({', '.join(sorted(names)[:3])}{', …' if len(names) > 3 else ''})")
    shapes = [n for n in expected.keys() & found.keys() if expected[n].shape != found[n].shape]
    for name in sorted(shapes)[:3]:
        faults.append(f"{name} is {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}")
    if len(shapes) > 3:
        faults.append(f"{len(shapes) - 3} more of another shape")
    if faults:
        raise UserError(f"{where}: the weights do not fit the config: {'; '.join(faults)}")


def load_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def load_tokenizer(folder: Path) -> Any:
    """Load a `transformers.CLIPTokenizer` from `tokenizer.json`, or from `vocab.json` and `merges.txt`.

    Raises:
        UserError: neither is there, or they are damaged.
    """
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        # Left to itself, transformers would make one up that knows two words.
        raise UserError(f"{folder} holds no tokenizer (tokenizer.json, or vocab.json and merges.txt)")
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise UserError(f"{folder} holds no CLIP tokenizer: {error}") from error


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        name = name.replace(old, new)
    return name


# --------------------------------------------------------------------------------------------------------- writing


def save_network(model: UNet | AutoencoderKL | TextTower | CLIP, folder: Path) -> None:
    """Write `config.json` and safetensors that diffusers or transformers open; the folder is whole or absent."""
    _, library, class_name, stem = FORMATS[type(model)]
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    config: dict[str, Any] = {"_class_name": class_name, **model.config}
    if library == "transformers":
        config = {"architectures": [class_name], "model_type": "clip", **model.config}
        begin = {"bos_token_id": None}  # transformers' default lies outside of a small vocabulary, and it would say so
        if isinstance(model, CLIP):
            config["text_config"] = {**config["text_config"], **begin}
        else:  # with the names that every release of transformers reads
            config |= {"model_type": "clip_text_model", **begin}
            state = {f"text_model.{name}": tensor for name, tensor in state.items()}
    with written_atomically(folder) as temporary:
        save_json(temporary / "config.json", config)
        weights = temporary / f"{stem}.safetensors"
        save_file(state, weights, {"format": "pt", "ldm_version": __version__})
        weights.chmod(0o644)  # safetensors' own choice is for the owner alone


def save_pipeline_index(
    folder: Path, schedule: NoiseSchedule, prediction_type: str, settings: Mapping[str, Any]
) -> None:
    """Complete a folder whose networks and tokenizer are written: scheduler, settings, `model_index.json` last."""
    scheduler = {
        "_class_name": "DDIMScheduler",
        **schedule.config,
        "prediction_type": prediction_type,
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "steps_offset": 1,  # without effect under trailing spacing; diffusers warns of any other value
        "clip_sample": False,
    }
    with written_atomically(folder / "scheduler") as temporary:
        save_json(temporary / "scheduler_config.json", scheduler)
    save_json(folder / SETTINGS, dict(settings))
    parts = {name: [library, class_name] for name, library, class_name, _ in FORMATS.values() if name != "clip"}
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.35.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        **parts,
    }
    save_json(folder / "model_index.json", index)


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


@contextmanager
def written_atomically(folder: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; on success it takes the place of `folder`, on failure nothing has changed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
