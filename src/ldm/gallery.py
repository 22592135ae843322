"""Pictures on disk: file names, PNGs that carry their settings and give them back, and grids."""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from ldm.data.images import Pixels, to_channels, to_pil
from ldm.errors import UserError
from ldm.files import file_written_atomically
from ldm.redact import redacted


def slug(text: str, most: int = 40) -> str:
    """Turn free text into a part of a file name: letters, digits and hyphens.

    >>> slug("A large, red círcle / ..")
    'a-large-red-círcle'
    """
    words = re.findall(r"\w+", unicodedata.normalize("NFC", text).lower().replace("_", " "))
    kept = "-".join(words).encode()[:most].decode(errors="ignore")
    return kept.strip("-") or "picture"


def save_png(path: Path, pixels: Pixels, settings: Mapping[str, Any] | None = None) -> None:
    """Write (H, W, C) pixels, grey, RGB or RGBA, as a PNG whose text chunks carry `settings`.

    `parameters` is the line that other tools read, `ldm` is everything as JSON, for `read_settings`. The file appears
    whole or not at all. Secrets of the environment stay out of it.
    """
    info = PngImagePlugin.PngInfo()
    if settings := redacted(settings):
        info.add_text("parameters", parameters(settings))  # as UTF-8 where Latin-1 does not have its letters
        info.add_itxt("ldm", json.dumps(settings, ensure_ascii=False))
    with file_written_atomically(path) as file:
        to_pil(pixels).save(file, format="PNG", pnginfo=info)


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings that `save_png` wrote into a PNG. They are data: nothing of them has been checked.

    Raises:
        UserError: the file is not there, is no picture, or carries none.
    """
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get("ldm")
        settings = None if text is None else json.loads(text)
    except Exception as error:  # Pillow and its codecs raise a dozen kinds for one cause
        raise UserError(f"{path} cannot be read as a picture: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} carries no settings of ours; the text of a PNG is lost when a program saves it anew")
    return settings


# What other tools call the samplers.
SAMPLER_NAMES = {
    "ddim": "DDIM", "ddpm": "DDPM", "euler": "Euler", "euler_a": "Euler a", "heun": "Heun", "lms": "LMS",
    "dpmpp_2m": "DPM++ 2M", "dpmpp_2m_sde": "DPM++ 2M SDE", "dpmpp_sde": "DPM++ SDE", "unipc": "UniPC",
}  # fmt: skip


def parameters(settings: Mapping[str, Any]) -> str:
    """Write settings as the text that the Stable Diffusion web UI began and most tools read.

    >>> print(parameters({"prompt": "a star", "steps": 20, "sampler": "euler_a", "seed": 3, "size": [64, 32]}))
    a star
    Steps: 20, Sampler: Euler a, Seed: 3, Size: 64x32
    """
    named = {
        "Steps": settings.get("steps"),
        "Sampler": SAMPLER_NAMES.get(str(settings.get("sampler"))),
        "Schedule type": {"karras": "Karras", "exponential": "Exponential"}.get(str(settings.get("spacing"))),
        "CFG scale": settings.get("guidance_scale"),
        "Seed": settings.get("seed"),
        "Size": "x".join(map(str, settings["size"])) if settings.get("size") else None,
        "Model hash": (settings.get("model_hash") or "")[:10] or None,
        "Model": settings.get("model"),
        "Denoising strength": settings.get("strength"),
        "Mask blur": settings.get("mask_blur") or None,
        "Clip skip": settings["clip_skip"] + 1 if settings.get("clip_skip") else None,  # there, 1 is none left out
        "Eta": settings.get("eta") or None,
        "Version": f"ldm {settings['ldm_version']}" if settings.get("ldm_version") else None,
    }
    items = [
        f"{name}: {_quoted(f'{v:g}' if isinstance(v, float) else str(v))}" for name, v in named.items() if v is not None
    ]
    lines = [str(settings.get("prompt", ""))]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    return "\n".join([*lines, ", ".join(items)])


def _quoted(value: str) -> str:
    """Quote a value in which a reader would see the end of it."""
    return json.dumps(value, ensure_ascii=False) if any(letter in value for letter in ",\n:") else value


def grid(images: Sequence[Pixels], columns: int | None = None, captions: Sequence[str] = (), scale: int = 1) -> Pixels:
    """Lay pictures of one size out in rows, with captions below them where given.

    Args:
        images: (H, W, C) uint8 each, C 1, 3 or 4; transparency shows white.
        columns: of the grid; None for about a square.
        captions: one for each picture, or none; wrapped to the picture's width.
        scale: whole-number enlargement of small pictures.

    Returns:
        (H', W', 3) uint8.
    """
    columns = min(len(images), columns or int(np.ceil(np.sqrt(len(images)))))
    height, width = images[0].shape[0] * scale, images[0].shape[1] * scale
    font, gap = ImageFont.load_default(12), 4
    line_height = 14
    lines = [_wrap(caption, width, font) for caption in captions] or [[]] * len(images)
    text_height = max(len(each) for each in lines) * line_height
    rows = int(np.ceil(len(images) / columns))
    canvas = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + text_height + gap) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for i, image in enumerate(images):
        left, top = gap + i % columns * (width + gap), gap + i // columns * (height + text_height + gap)
        canvas.paste(to_pil(to_channels(image, 3)).resize((width, height), Image.Resampling.NEAREST), (left, top))
        for j, line in enumerate(lines[i]):
            draw.text((left, top + height + j * line_height), line, fill="black", font=font)
    return np.asarray(canvas)


def _wrap(text: str, width: int, font: Any) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:  # a word wider than the picture is broken; some scripts write whole sentences so
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
