"""What `evaluate.py` does: metrics of a trained model, as JSON, as a table, as pictures."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.config import EvaluateConfig, ShapesData, check, load_run_config
from ldm.errors import UserError


def evaluate(values: Mapping[str, Any]) -> dict[str, Any]:
    """Compute the metrics that the config asks for; write `evaluation.json` and print a table.

    Returns:
        What was written.

    Raises:
        UserError: bad settings; `ckpt` is no finished model; a metric does not apply to this model.
    """
    config = check(EvaluateConfig, values)
    from ldm.files import check_writable, save_json
    from ldm.weights.hub import find_model

    folder = find_model(config.ckpt)
    run_dir = folder.parent if (folder.parent / "config.yaml").is_file() else folder
    out = Path(config.out).expanduser() if config.out else run_dir / "evaluation.json"
    if not out.parent.is_dir():
        raise UserError(f"out={config.out}: there is no folder {out.parent}")
    if out.is_dir() or out.suffix != ".json":
        raise UserError(f"out={config.out} must name a file that ends in .json")
    check_writable(out.parent, f"out={out}")
    started = time.monotonic()
    results: dict[str, Any] = {"ckpt": config.ckpt}
    for metric in config.metrics:
        results[metric] = METRICS[metric](config, run_dir, out)
    results["seconds"] = round(time.monotonic() - started, 1)
    save_json(out, results)
    print(f"written: {out}")
    return results


def prompt_accuracy(config: EvaluateConfig, run_dir: Path, out: Path) -> dict[str, Any]:
    """Ask for held-out scenes of the built-in world and read from the pictures what was drawn.

    For (shape, colour) pairs seen in training and for unseen ones, without guidance and with the model's own. The
    ceiling is the reader's figure on true pictures that went through the VAE and back: no U-Net can do better.
    """
    run = load_run_config(run_dir)
    if run is None or not isinstance(run.data, ShapesData):
        kind = "has no config.yaml beside it" if run is None else f"was trained on data={run.data.kind}"
        raise UserError(f"prompt_accuracy reads pictures of the built-in shapes; {config.ckpt} {kind}")
    import numpy as np
    import torch

    from ldm.data.images import to_pixels, to_tensor
    from ldm.data.shapes import draw, prompts
    from ldm.evaluation.prompt_accuracy import score
    from ldm.evaluation.table import print_table
    from ldm.gallery import grid, save_png
    from ldm.pipeline import LatentDiffusionPipeline

    pipeline = LatentDiffusionPipeline.from_pretrained(config.ckpt, dtype=config.dtype, device=config.device)
    default = pipeline.settings["guidance_scale"] if config.guidance_scale is None else config.guidance_scale
    objects, size = run.data.objects, pipeline.default_size
    results: dict[str, Any] = {
        "num_prompts": config.num_prompts,
        "resolution": size,
        "steps": config.steps or pipeline.settings["steps"],
        "sampler": config.sampler or pipeline.settings["sampler"],
        "seed": config.seed,
        "pairs": {},
    }
    sheet: list[tuple[Any, str]] = []
    truths = []
    for pairs, split in (("seen", "val"), ("unseen", "unseen")):
        asked = prompts(split, config.num_prompts, objects=objects, seed=run.data.seed)
        texts, scenes = [text for text, _ in asked], [scene for _, scene in asked]
        truths += scenes
        results["pairs"][pairs] = {}
        for scale in dict.fromkeys((1.0, float(default))):
            images = list(
                pipeline.generate(
                    texts,
                    range(config.seed, config.seed + len(texts)),
                    steps=config.steps,
                    sampler=config.sampler,
                    guidance_scale=scale,
                    batch_size=config.batch_size,
                )
            )
            results["pairs"][pairs][f"guidance {scale:g}"] = score(images, scenes)
            if scale == default:
                sheet += [(to_pixels(image), text) for image, text in zip(images[:16], texts, strict=False)]

    rendered = to_tensor(np.stack([draw(scene, size) for scene in truths]))
    with torch.inference_mode():
        vae, device = pipeline.vae, next(pipeline.vae.parameters()).device
        decoded = [vae.image(vae.latents(vae.encode(chunk.to(device)))) for chunk in rendered.split(config.batch_size)]
    results["ceiling"] = score(torch.cat(decoded).clamp(-1, 1), truths)

    pictures, captions = zip(*sheet, strict=True)
    sheet_path = out.with_name(out.stem + ".png")
    save_png(sheet_path, grid(pictures, columns=8, captions=captions, scale=max(1, 128 // size)))
    print(f"pictures of held-out prompts (upper half pairs seen in training, lower half unseen): {sheet_path}")
    print_table(results)
    return results


METRICS = {"prompt_accuracy": prompt_accuracy}
