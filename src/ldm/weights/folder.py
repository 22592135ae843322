"""Model folders in diffusers' format, and the folders of single networks: reading and writing.

A model folder is `model_index.json` beside `unet/ vae/ text_encoder/ tokenizer/ scheduler/`, each network a
`config.json` and safetensors. Component names are looked up in a table: nothing a folder says is imported or run.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.diffusion.schedule import FlowSchedule, NoiseSchedule
from ldm.errors import UserError
from ldm.files import load_json, save_json, written_atomically
from ldm.nn.autoencoder import AutoencoderKL
from ldm.nn.clip import CLIP, TextTower
from ldm.nn.unet import UNet
from ldm.weights.hub import INDEX, SETTINGS, weight_files
from ldm.weights.tensors import read_weights, write_weights

M = TypeVar("M", AutoencoderKL, CLIP, TextTower, UNet)

# network -> (its folder, the library and class that other tools open it with, the weights' file name)
FORMATS: dict[type[nn.Module], tuple[str, str, str, str]] = {
    UNet: ("unet", "diffusers", "UNet2DConditionModel", "diffusion_pytorch_model"),
    AutoencoderKL: ("vae", "diffusers", "AutoencoderKL", "diffusion_pytorch_model"),
    TextTower: ("text_encoder", "transformers", "CLIPTextModel", "model"),
    CLIP: ("clip", "transformers", "CLIPModel", "model"),
}
NETWORKS: dict[str, Any] = {name: network for network, (name, *_) in FORMATS.items()}

# Names that older releases of diffusers gave to the VAE's attention.
OLD_VAE_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


# --------------------------------------------------------------------------------------------------------- reading


def load_network(
    network: type[M], folder: Path, dtype: torch.dtype | None = torch.float32, variant: str | None = None
) -> M:
    """Load a network from its folder, strictly, holding about one copy of the weights in memory.

    Args:
        network: its class.
        folder: with `config.json` and safetensors, or a pickle of tensors where there are none.
        dtype: of the parameters, whatever the file holds; None keeps what it holds.
        variant: of the files, such as `fp16`.

    Raises:
        UserError: a file is missing or damaged, an option is not supported, keys are missing or surplus, or a tensor
            has another shape.
    """
    config = load_json(folder / "config.json")
    check_class(network, config, str(folder))
    return build_network(network, config, load_weights(folder, variant, dtype), dtype, folder, folder / "config.json")


def build_network(
    network: type[M],
    config: Mapping[str, Any],
    state: dict[str, Tensor],
    dtype: torch.dtype | None,
    where: Path,
    config_file: Path,
) -> M:
    """Build a network around its weights: on the meta device, then each tensor converted and put into its place.

    Args:
        network: its class.
        config: as in diffusers' or transformers' `config.json`.
        state: the weights; it is emptied, so that no second copy is held.
        dtype: of the parameters; None keeps what `state` holds.
        where: the weights come from, for messages.
        config_file: where the config comes from.

    Raises:
        UserError: as `load_network`.
    """
    if network is TextTower and "text_config" in config:  # a whole CLIP serves as text encoder
        config = {**(config["text_config"] or {}), **(config.get("text_config_dict") or {})}
    if max(_layer_counts(config), default=0) > len(state):  # before they are made: it would take for ever
        raise UserError(f"{config_file} asks for more layers than {where} has tensors")
    try:
        with torch.device("meta"), WithoutInit():
            model = network.from_config(config)
    except (ValueError, TypeError, ArithmeticError, RuntimeError, KeyError) as error:  # the file may hold anything
        raise UserError(f"{config_file}: {error}") from error
    tensors = _with_our_names(network, state)
    state.clear()
    check_state(model.state_dict(), tensors, str(where))
    for name, tensor in tensors.items():
        tensors[name] = tensor if dtype is None else tensor.to(dtype)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


class WithoutInit(TorchFunctionMode):
    """Leave out the initialisation of weights that are replaced at once.

    On the meta device it would cost next to nothing, but for two seconds of imports that drawing normal numbers there
    brings with it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _layer_counts(config: Mapping[str, Any]) -> Iterator[int]:
    """Give all numbers of layers that a config states, for itself or for the towers of a CLIP."""
    for options in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for name in ("layers_per_block", "num_hidden_layers", "transformer_layers_per_block"):
            value = options.get(name)
            yield from (count for count in (value if isinstance(value, list) else [value]) if isinstance(count, int))


def _with_our_names(network: type[nn.Module], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give weights the names that today's diffusers and transformers give them."""
    found = {name: tensor for name, tensor in state.items() if not name.endswith("embeddings.position_ids")}
    if network is AutoencoderKL:
        for old, new in OLD_VAE_NAMES.items():
            found = {name.replace(old, new): tensor for name, tensor in found.items()}
    if network is TextTower and any(name.startswith("text_model.") for name in found):
        found = {name.removeprefix("text_model."): t for name, t in found.items() if name.startswith("text_model.")}
    return found


def load_weights(folder: Path, variant: str | None = None, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Read a folder's weights: one file, or the shards that an index names; `dtype` is that of `read_weights`.

    Raises:
        UserError: there are none, or they cannot be read.
    """
    files, form = weight_files(folder, variant)
    if form != variant:
        print(
            f"note: {folder} holds {f'no variant {variant}' if variant else f'{form} alone'}: {files[0].name} is taken"
        )
    return {name: tensor for file in files for name, tensor in read_weights(file, dtype).items()}


def check_state(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
    """Compare names and shapes of weights.

    Raises:
        UserError: they differ; the first few differences are named, all are counted.
    """
    faults = []
    for what, names in (("missing", expected.keys() - found.keys()), ("surplus", found.keys() - expected.keys())):
        if names:
            faults.append(f"{len(names)} missing" if what == "missing" else f"{len(names)} surplus")
            faults[-1] += f" ({', '.join(sorted(names)[:3])}{', …' if len(names) > 3 else ''})"
    common = sorted(expected.keys() & found.keys())
    shapes = [name for name in common if expected[name].shape != found[name].shape]
    for name in shapes[:3]:
        faults.append(f"{name} is {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}")
    if len(shapes) > 3:
        faults.append(f"{len(shapes) - 3} more of another shape")
    if numbers := [name for name in common if not found[name].is_floating_point()]:
        faults.append(f"{len(numbers)} of another type ({numbers[0]} is {found[numbers[0]].dtype})")
    if faults:
        raise UserError(f"{where}: the weights do not fit the config: {'; '.join(faults)}")


def check_class(network: type[nn.Module], config: Mapping[str, Any], where: str) -> None:
    """Raise a UserError where a `config.json` says that it is of another class than this network."""
    part, library, class_name, _ = FORMATS[network]
    kinds = {"text_encoder": ("clip_text_model", "clip"), "clip": ("clip",)}.get(part, (class_name,))
    found = config.get("_class_name" if library == "diffusers" else "model_type", kinds[0])
    if found not in kinds:
        raise UserError(f"{where} holds a {found}; a {part} must be a {' or '.join(kinds)}")


# --------------------------------------------------------------------------------------------------------- writing


def save_network(
    model: UNet | AutoencoderKL | TextTower | CLIP, folder: Path, dtype: torch.dtype | None = None
) -> None:
    """Write `config.json` and safetensors that diffusers or transformers open; the folder is whole or absent.

    Args:
        model: a network.
        folder: what lies there is replaced.
        dtype: of the file; None keeps the parameters' own.
    """
    part, library, class_name, stem = FORMATS[type(model)]
    state = dict(model.state_dict())
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
        metadata = {"kind": part, "config_hash": config_hash(model.config)}
        write_weights(temporary / f"{stem}.safetensors", state, metadata, dtype)


def config_hash(config: Mapping[str, Any]) -> str:
    """Return 12 hex digits that name a config.

    >>> config_hash({"b": 1, "a": 2}) == config_hash({"a": 2, "b": 1})
    True
    """
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def save_pipeline_index(
    folder: Path, schedule: NoiseSchedule | FlowSchedule, prediction_type: str, settings: Mapping[str, Any]
) -> None:
    """Complete a folder of a model that was trained here; its networks and tokenizer are written."""
    unet = load_json(folder / "unet" / "config.json")
    sees_mask = unet["in_channels"] == 2 * unet["out_channels"] + 1
    pipeline = "StableDiffusionInpaintPipeline" if sees_mask else "StableDiffusionPipeline"
    if isinstance(schedule, FlowSchedule):  # its class says what is predicted
        save_index(folder, {"_class_name": "FlowMatchEulerDiscreteScheduler", **schedule.config}, settings, pipeline)
        return
    scheduler = {
        "_class_name": "DDIMScheduler",
        **schedule.config,
        "prediction_type": prediction_type,
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "steps_offset": 1,  # without effect under trailing spacing; diffusers warns of any other value
        "clip_sample": False,
    }
    save_index(folder, scheduler, settings, pipeline)


def save_index(
    folder: Path, scheduler: Mapping[str, Any], settings: Mapping[str, Any], pipeline: str = "StableDiffusionPipeline"
) -> None:
    """Write what makes a folder of networks a model: scheduler, settings where there are any, `model_index.json` last.

    Args:
        folder: whose networks and tokenizer are written.
        scheduler: contents of `scheduler_config.json`; its `_class_name` is what other tools sample with.
        settings: sampling defaults.
        pipeline: diffusers' class for it.
    """
    with written_atomically(folder / "scheduler") as temporary:
        save_json(temporary / "scheduler_config.json", scheduler)
    if settings:
        save_json(folder / SETTINGS, settings)
    parts = {name: [library, class_name] for name, library, class_name, _ in FORMATS.values() if name != "clip"}
    index = {
        "_class_name": pipeline,
        "_diffusers_version": "0.35.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler.get("_class_name", "DDIMScheduler")],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        **parts,
    }
    save_json(folder / INDEX, index)
