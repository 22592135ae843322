"""What `convert.py` does: a model, or a VAE or U-Net by itself, from one format into another."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.config import ConvertConfig, check
from ldm.errors import UserError
from ldm.files import check_writable, load_json
from ldm.weights.hub import INDEX, fetch, locate

CLASSES = {"UNet2DConditionModel": "unet", "AutoencoderKL": "vae"}  # what is converted by itself
PARTS = ("unet", "vae", "text_encoder")


def convert(values: Mapping[str, Any]) -> Path:
    """Convert what the config says; print what was read and written.

    Returns:
        What was written.

    Raises:
        UserError: bad settings; `src` is not there, damaged or of another kind; `dst` cannot be written.
    """
    config = check(ConvertConfig, values)
    dst = Path(config.dst).expanduser().absolute()
    _check_destination(dst, config)
    src = locate(config.src, "src")  # before torch has done its work
    if src is not None and dst in (src.absolute(), *src.absolute().parents):
        raise UserError(f"dst={config.dst} holds src={config.src}: write elsewhere")
    import torch

    from ldm.weights.archive import write_archive
    from ldm.weights.folder import NETWORKS, save_network
    from ldm.weights.model import failing_for_people, load_model, load_part, save_model, save_single_file

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, None: None}[config.dtype]
    is_file = dst.suffix == ".safetensors"
    others = {name: getattr(config, name) for name in (*PARTS, "tokenizer", "prediction_type")}
    part = None if any(others.values()) else _lone_part(config)
    if part and config.ema is not None:
        raise UserError(f"src={config.src} is a network by itself: for ema={config.ema:g} name the run directory")
    if dst.is_dir() and any(dst.iterdir()) and (dst / INDEX).is_file() != (part is None):
        raise UserError(
            f"dst={config.dst} holds {'a single network' if part is None else 'a whole model'}: write elsewhere"
        )
    if part:  # tensors are mapped from the file, and converted as they are written
        network = load_part(NETWORKS[part], config.src, None, config.variant, "src")
        networks = {part: network}
        with failing_for_people(dst):
            if is_file:
                dst.parent.mkdir(parents=True, exist_ok=True)
                write_archive(dst, networks, dtype)
            else:
                save_network(network, dst, dtype)
    else:
        model = load_model(config.src, None, **others, variant=config.variant, option="src")
        if config.ema is not None:
            _put_average(model.unet, Path(config.src).expanduser(), config.ema)
        networks = dict(zip(PARTS, (model.unet, model.vae, model.text_tower), strict=True))
        (save_single_file if is_file else save_model)(model, dst, dtype)
    sizes = {name: sum(p.numel() for p in net.parameters()) / 1e6 for name, net in networks.items()}
    told = ", ".join(f"{name} {size:.4g} M" for name, size in sizes.items())
    print(
        f"read     {config.src}: {told} parameters"
        + ("" if part else f"; predicts {model.scheduler.get('prediction_type', 'epsilon')}")
    )
    kinds = {dtype} if dtype else {p.dtype for net in networks.values() for p in net.parameters()}
    num_bytes = sum(file.stat().st_size for file in ([dst] if is_file else dst.rglob("*")) if file.is_file())
    form = "single file" if is_file else "diffusers folder"
    names = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
    print(f"written  {config.dst}: {form}, {names}, {num_bytes / 1e6:,.1f} MB")
    return dst


def _put_average(unet: Any, run_dir: Path, length: float) -> None:
    """Give a U-Net the average of its weights in training that has this relative length.

    Raises:
        UserError: it cannot be put together.
    """
    from ldm.weights.folder import check_state
    from ldm.weights.posthoc import FOLDER, listed, reconstruct

    found = reconstruct(run_dir / FOLDER, length)
    check_state(unet.state_dict(), found.state, str(run_dir / FOLDER))
    unet.load_state_dict(found.state)
    print(f"average  ema={length:g} after {found.steps} steps; its profile is met but for {found.error:.1%}")
    if found.missing:
        print(f"note: without {listed(found.missing)}, which are missing in {run_dir / FOLDER}")


def _check_destination(dst: Path, config: ConvertConfig) -> None:
    check_writable(dst.parent, f"dst={config.dst}")
    if not dst.exists():
        return
    if not config.overwrite:
        raise UserError(f"dst={config.dst} is there already; overwrite=true replaces it")
    if dst.is_dir() and (dst.suffix == ".safetensors" or not _is_replaceable(dst)):
        raise UserError(f"dst={config.dst} is a folder that holds something else than a model: it is left as it is")
    if dst.is_file() and dst.suffix != ".safetensors":
        raise UserError(
            f"dst={config.dst} is a file; to write a folder name one, to write a file end it in .safetensors"
        )


def _is_replaceable(folder: Path) -> bool:
    marks = (INDEX, "config.json")
    return not any(folder.iterdir()) or any((folder / mark).is_file() for mark in marks)


def _lone_part(config: ConvertConfig) -> str | None:
    """Return which part of a model the source is by itself; None for a whole model, or what may be one.

    Raises:
        UserError: it is a part that is not converted by itself.
    """
    from ldm.weights.archive import LONE_KINDS, read_archive

    path = fetch(config.src, (*PARTS, "tokenizer", "scheduler"), "src", config.variant)
    if path.is_file():
        kind = read_archive(path).kind
        part = LONE_KINDS.get(kind)
    elif (path / "config.json").is_file() and not (path / INDEX).is_file():
        found = load_json(path / "config.json")
        kind = str(found.get("_class_name", found.get("model_type", "network of an unknown class")))
        part = CLASSES.get(kind, kind)
    else:
        return None
    if part not in (None, *CLASSES.values()):
        raise UserError(f"src={config.src} is a {kind}; whole models are converted, and VAEs and U-Nets by themselves")
    return part
