"""What `sample.py` does: prompts from the command line, a file or a picture; pictures into a folder."""

import hashlib
import os
import time
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ldm import __version__
from ldm.config import SampleConfig, check
from ldm.errors import UserError
from ldm.redact import printable, redacted

PARTS = ("vae", "text_encoder", "unet", "tokenizer", "prediction_type", "variant")
DRAWN_UPON = ("init_image", "mask")  # files, which must be as they were when a picture is drawn again
OPTIONS = (
    "sampler", "steps", "spacing", "eta", "guidance_scale", "guidance_rescale", "guidance_interval", "clip_skip",
    "strength",
)  # fmt: skip
CANVAS = ("height", "width", "init_image", "mask", "mask_blur", "outpaint", "vae_tile")
# What a picture is drawn with, and brings when it is drawn again.
RECORDED = ("ckpt", *PARTS, "prompt", "negative_prompt", "seed", *OPTIONS, *CANVAS, "dtype", "device")
MOST_COPIES = 1024  # of a picture that is drawn again, whatever its file says


def sample(values: Mapping[str, Any], stated: Collection[str] = ()) -> list[Path]:
    """Draw `num_images` pictures of each prompt; picture i of the call is drawn from `seed + i`.

    Each becomes `NNNN-SEED-slug.png` in `out` as soon as its batch is done, with its settings in its text chunks; the
    numbers go on from those that are there. Several are laid out in `grid.png` too.

    Args:
        values: of `SampleConfig`.
        stated: the keys that a person has said: with `from_image` they stand, the others come from the picture.

    Returns:
        The files written, the grid last.

    Raises:
        UserError: bad settings; a file that is not there or cannot be read; `out` cannot be written.
    """
    place, copies, model_hash = 0, 1, None
    if values.get("from_image"):
        values, place, copies, model_hash = _again(values, stated)
    config = check(SampleConfig, values)
    prompts, seeds = _asked(config)
    from ldm.files import check_writable
    from ldm.weights.hub import check_source

    check_source(config.ckpt)  # before anything is made, and before torch has done its work
    out = Path(config.out).expanduser()
    check_writable(out, f"out={config.out}")
    from ldm.data.images import to_pixels
    from ldm.gallery import grid, save_png, slug
    from ldm.options import Options, default_strength
    from ldm.pipeline import LatentDiffusionPipeline
    from ldm.progress import progress

    parts = {name: getattr(config, name) for name in PARTS}
    pipeline = LatentDiffusionPipeline.from_pretrained(config.ckpt, config.dtype, config.device, **parts)
    options = asdict(pipeline.resolve(Options(**{name: getattr(config, name) for name in OPTIONS})))
    canvas = {name: getattr(config, name) for name in CANVAS}
    if config.init_image is None:
        canvas |= {"height": config.height or pipeline.default_size, "width": config.width or pipeline.default_size}
    else:
        options["strength"] = options["strength"] or default_strength(bool(config.mask or config.outpaint))
    hashing = ThreadPoolExecutor(1).submit(_digest, pipeline.unet_file)  # of gigabytes, while pictures are drawn
    if model_hash is not None and model_hash != hashing.result():
        print(f"warning: {config.ckpt} has changed since {values['from_image']} was drawn: the picture will be another")
    cut = {p for p in prompts if pipeline.conditioner.num_tokens(p) > pipeline.conditioner.max_length}
    for prompt in sorted(cut):
        shown = printable(redacted(prompt))
        print(f"warning: only the first {pipeline.conditioner.max_length} tokens are read of: {shown}")

    # A picture drawn again takes the place in a batch of the size that it had: so it is the same to the last bit.
    num, size = len(prompts), copies if copies > 1 else config.batch_size
    num_steps = int(options["steps"] * (options["strength"] or 1)) * -(-num * copies // size)
    fixed = {"ckpt": config.ckpt, **parts, **options, **canvas, "dtype": config.dtype, "device": config.device}
    for name in DRAWN_UPON:
        if canvas[name]:
            fixed[f"{name}_sha256"] = _digest(os.path.expanduser(canvas[name]))
    files: list[Path] = []
    first = _next_number(out)  # nothing is written over
    drawn, started = [], time.monotonic()
    with progress("drawing", num_steps, "steps") as advance:
        images = pipeline.generate(
            prompts * copies,
            seeds * copies,
            config.negative_prompt,
            batch_size=size,
            callback=lambda *_: advance(),
            **canvas,
            **options,
        )
        for i, image in enumerate(images):
            if copies > 1 and i != place:
                continue
            j = i % num
            settings = {"prompt": prompts[j], "negative_prompt": config.negative_prompt, "seed": seeds[j], **fixed}
            settings |= {"batch": [i % size, min(size, num * copies - i // size * size)]}
            settings |= {"size": [image.shape[2], image.shape[1]], "model": Path(config.ckpt).name}
            settings |= {"model_hash": hashing.result(), "ldm_version": __version__}
            files.append(out / f"{first + len(files):04d}-{seeds[j]}-{slug(prompts[j])}.png")
            drawn.append(to_pixels(image))
            try:
                out.mkdir(parents=True, exist_ok=True)  # not before there is something to put into it
                save_png(files[-1], drawn[-1], settings)
            except OSError as error:
                raise UserError(f"out={config.out} cannot be written: {error}") from error
    print(f"{len(files)} pictures in {time.monotonic() - started:.1f} s: {out}/")
    if len(files) > 1:
        files.append(out / "grid.png")
        captions = prompts if len(set(prompts)) > 1 else ()
        save_png(files[-1], grid(drawn, captions=captions, scale=max(1, 128 // drawn[0].shape[1])))
        print(f"grid: {files[-1]}")
    return files


def _asked(config: SampleConfig) -> tuple[list[str], list[int]]:
    """Return a prompt and a seed for each picture."""
    prompts = _prompts(config)
    if isinstance(config.seed, list):
        return [prompt for prompt in prompts for _ in config.seed], config.seed * len(prompts)
    prompts = [prompt for prompt in prompts for _ in range(config.num_images)]
    return prompts, [config.seed + i for i in range(len(prompts))]


def _prompts(config: SampleConfig) -> list[str]:
    if config.prompt is not None:
        return [config.prompt]
    try:
        lines = Path(config.prompt_file or "").expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt_file={config.prompt_file} cannot be read: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompt_file={config.prompt_file} holds no prompt")
    return prompts


def _again(values: Mapping[str, Any], stated: Collection[str]) -> tuple[dict[str, Any], int, int, Any]:
    """Return the config that a picture of ours was drawn with, its place in a batch of which size, the model's hash.

    The picture's text is data like a config's: it is checked by the schema.

    Raises:
        UserError: the file holds no settings, or a picture that it was drawn upon has changed since.
    """
    from ldm.gallery import read_settings

    path = Path(values["from_image"]).expanduser()
    found = read_settings(path)
    kept = {name: found[name] for name in RECORDED if name in found and name not in stated}
    if not isinstance(kept.get("seed", 0), int):
        raise UserError(f"{path}: its seed is {kept['seed']!r}, a picture has one")
    if "prompt_file" in stated:
        kept.pop("prompt", None)
    if "init_image" in stated:  # another picture has another size, and none has no mask
        kept |= {name: None for name in ("height", "width") if name in kept}
        if not values["init_image"]:
            none = {"mask": None, "outpaint": None, "mask_blur": 0, "strength": None}
            kept |= {name: value for name, value in none.items() if name not in stated}
    if {"mask", "outpaint"} & set(stated):
        kept.pop("strength", None)
    for name in DRAWN_UPON:
        before = found.get(f"{name}_sha256")
        if isinstance(kept.get(name), str) and before != _digest(os.path.expanduser(kept[name])):
            raise UserError(
                f"{name}={kept[name]} is not there as {path} was drawn with it: put it back, or name one with {name}=…"
            )
    if "ckpt" in kept:
        print(f"{path}: ckpt={printable(str(kept['ckpt']))}")
    place, size = 0, 1
    if not {"prompt", "prompt_file", "num_images", "seed", "batch_size"} & set(stated):
        match found.get("batch"):
            case [int(at), int(of)] if 0 <= at < of <= MOST_COPIES:
                place, size = at, of
    model_hash = None if {"ckpt", *PARTS} & set(stated) else found.get("model_hash")
    return {**values, **kept}, place, size, model_hash


def _digest(path: str | Path | None) -> str | None:
    """Return a file's SHA-256, or None where there is none to read, whatever its name."""
    if path is None or not os.path.isfile(path):
        return None
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _next_number(folder: Path) -> int:
    """Return the first number that no picture in a folder has, nor any after it."""
    taken = [int(path.name.partition("-")[0]) for path in folder.glob("[0-9]*-*.png") if path.name[:4].isdecimal()]
    return max(taken, default=-1) + 1
