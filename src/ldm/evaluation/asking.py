"""Ask for held-out scenes of the built-in world, and have read from the pictures what was drawn."""

from typing import Any

import numpy as np
import torch

from ldm.config import ShapesData
from ldm.data.images import to_channels, to_pixels, to_tensor
from ldm.data.shapes import draw
from ldm.errors import UserError
from ldm.evaluation import prompt_accuracy as reader
from ldm.evaluation.real import to_rgb
from ldm.evaluation.subject import Setting, Subject
from ldm.gallery import grid, save_png


def prompt_accuracy(subject: Subject) -> dict[str, Any]:
    """Measure how often held-out prompts are obeyed, see `ldm.evaluation.prompt_accuracy`.

    For (shape, colour) pairs seen in training and for unseen ones; one guidance scale is compared with 1, none. The
    ceiling is the reader's figure on true pictures that went through the VAE and back: no U-Net can do better.

    Raises:
        UserError: the model was not trained on the built-in world, or in grey.
    """
    config, pipeline = subject.config, subject.pipeline
    settings = compared(subject)
    results: dict[str, Any] = {
        "num_prompts": config.num_prompts,
        "resolution": pipeline.default_size,
        "steps": told(list(dict.fromkeys(setting.steps for setting in settings))),
        "sampler": config.sampler or pipeline.settings["sampler"],
        "seed": config.seed,
        "pairs": {},
    }
    shown, truths = subject.settings[-1], []
    sheet: list[tuple[Any, str]] = []
    for pairs, split in (("seen", "val"), ("unseen", "unseen")):
        asked = subject.scenes(split)
        scenes = [scene for _, scene in asked]
        truths += scenes
        rows = {}
        for setting in settings:
            pictures = to_rgb(np.asarray(subject.drawn(setting, split)), subject.background)
            several = isinstance(results["steps"], list)
            rows[name(setting, several)] = reader.score(pictures, scenes)
            if setting == shown:
                sheet += [(picture, text) for picture, (text, _) in zip(pictures[:16], asked, strict=False)]
        results["pairs"][pairs] = rows
    if subject.ceiling is None:
        subject.ceiling = reader.score(_through_vae(subject, truths), truths)
    results["ceiling"] = subject.ceiling

    path = subject.out.with_name(subject.out.stem + ".png")
    shown_pictures, captions = zip(*sheet, strict=True)
    save_png(path, grid(shown_pictures, columns=8, captions=captions, scale=max(1, 128 // pipeline.default_size)))
    subject.say(f"pictures of held-out prompts (upper half pairs seen in training, lower half unseen): {path}")
    return results


def check_world(subject: Subject) -> None:
    """Raise a UserError where a model was not trained on the built-in world, or sees or draws no colours."""
    run, ckpt = subject.run, subject.config.ckpt
    if run is None or not isinstance(run.data, ShapesData):
        kind = "has no config.yaml beside it" if run is None else f"was trained on data={run.data.kind}"
        raise UserError(f"prompt_accuracy reads pictures of the built-in shapes; {ckpt} {kind}")
    if 1 in (subject.channels, subject.pipeline.vae.config["out_channels"]):
        raise UserError(
            f"prompt_accuracy reads colours, and the VAE of {ckpt} works in grey (in_channels=1): take it out of "
            "metrics=[…]; clip_score and the others do without"
        )


def compared(subject: Subject) -> list[Setting]:
    """Return the settings that prompt_accuracy draws: those of the call, one guidance scale beside guidance 1."""
    if isinstance(subject.config.guidance_scale, list):
        return subject.settings
    pairs = [(Setting(setting.steps, 1.0), setting) for setting in subject.settings]
    return list(dict.fromkeys(setting for pair in pairs for setting in pair))


def name(setting: Setting, several_steps: bool) -> str:
    return f"guidance {setting.guidance_scale:g}" + (f", {setting.steps} steps" if several_steps else "")


def told(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def _through_vae(subject: Subject, scenes: list[Any]) -> Any:
    pipeline, channels = subject.pipeline, subject.channels
    true = np.stack([to_channels(draw(scene, pipeline.default_size), channels) for scene in scenes])
    with torch.inference_mode():
        decoded = torch.cat(
            [
                pipeline.decode(pipeline.vae.latents(pipeline.codec.encode(chunk)))
                for chunk in to_tensor(true).split(subject.config.batch_size)
            ]
        )
    return decoded if channels == 3 else to_rgb(to_pixels(decoded), subject.background)
