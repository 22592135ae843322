"""Pictures on disk: file names, PNGs that carry their settings, and grids."""

import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from ldm.data.images import Pixels


def slug(text: str, most: int = 40) -> str:
    """Turn free text into a part of a file name: letters, digits and hyphens.

    >>> slug("A large, red círcle / ..")
    'a-large-red-círcle'
    """
    words = re.findall(r"\w+", unicodedata.normalize("NFC", text).lower().replace("_", " "))
    kept = "-".join(words).encode()[:most].decode(errors="ignore")
    return kept.strip("-") or "picture"


def save_png(path: Path, pixels: Pixels, settings: Mapping[str, Any] | None = None) -> None:
    """Write a PNG whose text chunks carry `settings`: `prompt` as plain text, everything as JSON under `ldm`.

    The file appears whole or not at all.
    """
    info = PngImagePlugin.PngInfo()
    if settings:
        info.add_itxt("prompt", str(settings.get("prompt", "")))
        info.add_itxt("ldm", json.dumps(settings, ensure_ascii=False))
    temporary = path.with_name(f".{path.name}.tmp")
    Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=info)
    os.replace(temporary, path)


def grid(images: Sequence[Pixels], columns: int | None = None, captions: Sequence[str] = (), scale: int = 1) -> Pixels:
    """Lay pictures of one size out in rows, with captions below them where given.

    Args:
        images: (H, W, 3) uint8 each.
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
        canvas.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (left, top))
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
