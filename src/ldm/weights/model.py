"""Whole models, and single parts of them, from wherever they lie; and out again in either format."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm.diffusion.parameterization import check_prediction_type
from ldm.errors import UserError
from ldm.files import load_json, written_atomically
from ldm.nn.autoencoder import AutoencoderKL
from ldm.nn.clip import TextTower
from ldm.nn.unet import UNet
from ldm.weights.archive import SD_SCHEDULER, Archive, read_archive, take_network, write_archive
from ldm.weights.folder import FORMATS, NETWORKS, M, load_network, save_index, save_network
from ldm.weights.hub import INDEX, SETTINGS, fetch, find_part, model_folder, weight_files
from ldm.weights.tokenizer import find_tokenizer, is_open_clip, tokenizer_files

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
# What a folder may list beside them; we draw without.
PASSED_OVER = ("safety_checker", "feature_extractor", "image_encoder")


@dataclass
class Model:
    """A text-to-image model as data: networks in eval mode, tokenizer, and how it was trained and is sampled.

    Args:
        unet, vae, text_tower, tokenizer: the parts.
        scheduler: contents of diffusers' `scheduler_config.json`.
        settings: sampling defaults, contents of `ldm.json`; empty where there are none.
        unet_file: that the U-Net came from, the first where there are several.
    """

    unet: UNet
    vae: AutoencoderKL
    text_tower: TextTower
    tokenizer: Any
    scheduler: dict[str, Any]
    settings: dict[str, Any]
    unet_file: Path


# --------------------------------------------------------------------------------------------------------- loading


def load_model(
    source: str,
    dtype: torch.dtype | None = torch.float32,
    *,
    vae: str | None = None,
    text_encoder: str | None = None,
    unet: str | None = None,
    tokenizer: str | None = None,
    prediction_type: str | None = None,
    variant: str | None = None,
    option: str = "ckpt",
) -> Model:
    """Load a model: from a run directory, a model folder, a hub id or a single file.

    Args:
        source: which; a local path goes before a hub id.
        dtype: that the networks are held in; None keeps what the files hold.
        vae, text_encoder, unet, tokenizer: sources of parts that take the place of the model's own. A text encoder
            brings its tokenizer where it has one.
        prediction_type: what the U-Net predicts, where the source does not say or says something wrong.
        variant: of the files, such as `fp16`.
        option: how the user gives `source`, for messages.

    Raises:
        UserError: something is not there, damaged, of another kind, or does not fit the rest.
    """
    if prediction_type is not None:
        try:
            check_prediction_type(prediction_type)
        except ValueError as error:
            raise UserError(str(error)) from None
    others = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    own = [part for part, other in others.items() if not other]
    path = fetch(source, (*own, "tokenizer", "scheduler"), option, variant)
    archive = read_archive(path) if path.is_file() else None
    if archive is None:
        path = model_folder(path, f"{option}={source}")
        _check_index(path)
    found = {}
    for part, other in others.items():
        place = _open(other, part, variant, part) if other else archive or path / part
        found[part] = _take(part, place, dtype, variant)
    (net, unet_file), (autoencoder, _), (text_tower, _) = found.values()
    check_fit(net, autoencoder, text_tower, source)
    if archive is None:
        scheduler = load_json(path / "scheduler" / "scheduler_config.json")
        settings = load_json(path / SETTINGS) if (path / SETTINGS).exists() else {}
    else:
        scheduler = archive.told.get("scheduler") or _sd_scheduler(archive, prediction_type, net, text_tower)
        settings = archive.told.get("settings", {})
    if prediction_type is not None:
        scheduler = {**scheduler, "prediction_type": prediction_type}
    tokens = find_tokenizer(archive or path, text_tower, tokenizer, text_encoder)
    return Model(net, autoencoder, text_tower, tokens, scheduler, settings, unet_file)


def load_part(
    network: type[M],
    source: str,
    dtype: torch.dtype | None = torch.float32,
    variant: str | None = None,
    option: str | None = None,
) -> M:
    """Load one network: from its folder, a model folder, a run directory, a hub id or a single file.

    Args:
        network: its class.
        source: which; a local path goes before a hub id.
        dtype: that it is held in; None keeps what the file holds.
        variant: of the files, such as `fp16`.
        option: how the user gives `source`, for messages; None for the part's name.

    Raises:
        UserError: it is not there, damaged, or of another kind.
    """
    part = FORMATS[network][0]
    loaded: M = _take(part, _open(source, part, variant, option), dtype, variant)[0]
    return loaded


def _open(source: str, part: str, variant: str | None, option: str | None) -> Archive | Path:
    path = find_part(source, part, variant, option)
    return read_archive(path) if path.is_file() else path


def _take(part: str, place: Archive | Path, dtype: torch.dtype | None, variant: str | None) -> tuple[Any, Path]:
    """Load a network from a file or from its own folder; also say which file it was in, the first of several."""
    if isinstance(place, Archive):
        return take_network(place, part, dtype), place.path
    return load_network(NETWORKS[part], place, dtype, variant), weight_files(place, variant)[0][0]


def _check_index(folder: Path) -> None:
    """Refuse a pipeline that works otherwise than by a U-Net, a VAE and one text encoder."""
    index = load_json(folder / INDEX)
    listed = [name for name, value in index.items() if isinstance(value, list) and any(value)]
    if more := [name for name in listed if name not in (*PARTS, *PASSED_OVER)]:
        raise UserError(
            f"{folder} is a {index.get('_class_name', 'pipeline')} and works with {', '.join(more)} too: it is no text-"
            "to-image model of Stable Diffusion 1.x or 2.x"
        )


def check_fit(unet: UNet, vae: AutoencoderKL, text_tower: TextTower, where: str) -> None:
    """See that the parts of a model are made for one another.

    Raises:
        UserError: they are not; or the U-Net wants to see more than we show it.
    """
    width, channels = text_tower.config["hidden_size"], vae.config["latent_channels"]
    if unet.config["cross_attention_dim"] != width:
        raise UserError(
            f"{where}: the U-Net listens to context of width {unet.config['cross_attention_dim']}, "
            f"the text encoder gives {width}"
        )
    if unet.config["out_channels"] != channels:
        predicted = unet.config["out_channels"]
        raise UserError(f"{where}: the U-Net predicts {predicted} channels, the VAE has {channels} latent channels")
    seen = unet.config["in_channels"]
    if seen not in (channels, 2 * channels + 1):  # the latter with a mask and the latents of the masked picture
        what = {
            channels + 1: "a depth-to-image model, which also sees a depth map",
            2 * channels: "an InstructPix2Pix model, which also sees the picture to edit",
            channels + 3: "an upscaler, which also sees a small picture",
        }.get(seen, "no U-Net for this VAE")
        raise UserError(
            f"{where}: the U-Net has in_channels={seen}, the VAE {channels} latent channels: it is {what}; models for "
            f"text alone ({channels}) and for inpainting ({2 * channels + 1}) are supported"
        )


def _sd_scheduler(archive: Archive, prediction_type: str | None, unet: UNet, text_tower: TextTower) -> dict[str, Any]:
    """Return what a Stable Diffusion file of another tool was trained with, as well as can be told."""
    prediction_type = prediction_type or archive.prediction_type
    if prediction_type is None:
        prediction_type = "v_prediction" if is_open_clip(text_tower) else "epsilon"
        if is_open_clip(text_tower):
            print(
                f"note: {archive.path} does not say what its U-Net predicts; it is taken for v_prediction, that of "
                "Stable Diffusion 2.x for 768 px; those for 512 px (base) need prediction_type=epsilon"
            )
    if is_open_clip(text_tower) and prediction_type == "v_prediction":
        unet.config["sample_size"] = 96  # 768 px
    return {**SD_SCHEDULER, "prediction_type": prediction_type}


# --------------------------------------------------------------------------------------------------------- writing


def save_model(model: Model, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write a model folder that diffusers and tools built on it open; it is whole or as it was.

    Args:
        model: what to write.
        folder: what lies there is replaced.
        dtype: of the files; None keeps the networks' own.

    Raises:
        UserError: it cannot be written.
    """
    pipeline = "StableDiffusionInpaintPipeline" if model.unet.sees_mask else "StableDiffusionPipeline"
    with failing_for_people(folder), written_atomically(folder) as temporary:
        save_network(model.unet, temporary / "unet", dtype)
        save_network(model.vae, temporary / "vae", dtype)
        save_network(model.text_tower, temporary / "text_encoder", dtype)
        model.tokenizer.save_pretrained(temporary / "tokenizer")
        save_index(temporary, model.scheduler, model.settings, pipeline)


def save_single_file(model: Model, path: Path, dtype: torch.dtype | None = None) -> None:
    """Write a model as one safetensors file in the original names; it is whole or as it was.

    What the format has no place for is in the metadata, so that it loads here as it was. Other tools tell the
    architecture from the tensors, and take the rest to be as in Stable Diffusion.

    Args:
        model: what to write.
        path: of the file.
        dtype: of the file; None keeps the networks' own.

    Raises:
        UserError: it cannot be written, or the format has no name for a parameter.
    """
    networks = {"unet": model.unet, "vae": model.vae, "text_encoder": model.text_tower}
    with failing_for_people(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_archive(path, networks, dtype, model.scheduler, model.settings, tokenizer_files(model.tokenizer))


@contextmanager
def failing_for_people(place: Path) -> Iterator[None]:
    """Turn what can go wrong in writing into a UserError that names the place."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # tokenizers raises nothing more special
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{place} cannot be written: {reason}") from error
