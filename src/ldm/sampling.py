"""What `sample.py` does: prompts from the command line or a file, pictures into a folder."""

import os
import time
from pathlib import Path
from typing import Any

from ldm.config import SampleConfig, check
from ldm.errors import UserError


def sample(values: dict[str, Any]) -> list[Path]:
    """Draw `num_images` pictures of each prompt; picture i of the call is drawn from `seed + i`.

    Each becomes `NNNN-SEED-slug.png` in `out` as soon as its batch is done, with its settings in its text chunks;
    several are laid out in `grid.png` too.

    Returns:
        The files written, the grid last.

    Raises:
        UserError: bad settings; `ckpt` or `prompt_file` is not there; `out` cannot be written.
    """
    config = check(SampleConfig, values)
    prompts = [prompt for prompt in _prompts(config) for _ in range(config.num_images)]
    from ldm.weights.folder import find_model

    find_model(config.ckpt)  # before anything is made, and before torch has done its work
    out = Path(config.out).expanduser()
    _check_writable(out)
    from ldm.data.images import to_pixels
    from ldm.gallery import grid, save_png, slug
    from ldm.pipeline import LatentDiffusionPipeline

    pipeline = LatentDiffusionPipeline.from_pretrained(config.ckpt, dtype=config.dtype, device=config.device)
    options: dict[str, Any] = {
        "steps": config.steps,
        "sampler": config.sampler,
        "guidance_scale": config.guidance_scale,
        "height": config.height or pipeline.default_size,
        "width": config.width or pipeline.default_size,
    }
    options = {key: pipeline.settings.get(key) if value is None else value for key, value in options.items()}
    seeds = [config.seed + i for i in range(len(prompts))]
    images = pipeline.generate(prompts, seeds, config.negative_prompt, batch_size=config.batch_size, **options)
    cut = {p for p in prompts if pipeline.conditioner.num_tokens(p) > pipeline.conditioner.max_length}
    for prompt in sorted(cut):
        print(f"warning: only the first {pipeline.conditioner.max_length} tokens are read of: {prompt}")

    files, drawn, started = [], [], time.monotonic()
    for i, (prompt, seed, image) in enumerate(zip(prompts, seeds, images, strict=True)):
        settings = {"prompt": prompt, "negative_prompt": config.negative_prompt, "seed": seed, **options}
        files.append(out / f"{i:04d}-{seed}-{slug(prompt)}.png")
        drawn.append(to_pixels(image))
        try:
            out.mkdir(parents=True, exist_ok=True)  # not before there is something to put into it
            save_png(files[-1], drawn[-1], {**settings, "dtype": config.dtype, "model": Path(config.ckpt).name})
        except OSError as error:
            raise UserError(f"out={config.out} cannot be written: {error}") from error
    print(f"{len(files)} pictures in {time.monotonic() - started:.1f} s: {out}/")
    if len(files) > 1:
        files.append(out / "grid.png")
        captions = prompts if len(set(prompts)) > 1 else ()
        save_png(files[-1], grid(drawn, captions=captions, scale=max(1, 128 // drawn[0].shape[1])))
        print(f"grid: {files[-1]}")
    return files


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


def _check_writable(folder: Path) -> None:
    """Know before any work is done, and without leaving a trace, that files can be written into a folder.

    Raises:
        UserError: they cannot.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"out={folder} cannot be written: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"out={folder} cannot be written: no permission to write into {there}")
