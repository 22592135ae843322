"""Pictures that stand in a page as data: grids of samples, how they came about, and sheets of an evaluation."""

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.report.html import esc, missing

GAP = 4  # pixels around each picture of a grid, see ldm.gallery.grid
SHOWN = 6  # grids that a strip is made of
LARGE = 300_000  # bytes of a PNG that has a JPEG in its place


def load(path: Path) -> Image.Image | None:
    """Return a picture in RGB, or None where the file is none."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception:  # Pillow and its codecs raise a dozen kinds for one cause
        return None


def embedded(image: Image.Image, alt: str, most_width: int) -> str:
    """Return an `<img>` that carries its picture, no wider than so many pixels."""
    if image.width > most_width:
        image = image.resize((most_width, max(1, round(image.height * most_width / image.width))), Image.Resampling.BOX)
    file, kind = io.BytesIO(), "png"
    image.save(file, format="PNG", optimize=True)
    if file.tell() > LARGE:
        file, kind = io.BytesIO(), "jpeg"
        image.save(file, format="JPEG", quality=88)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/{kind};base64,{data}" alt="{esc(alt)}" width="{image.width}" height="{image.height}">'


def figure(path: Path, caption: str, alt: str, most_width: int = 1100) -> str:
    """Show a picture file with a caption; where it cannot be read, say so."""
    image = load(path)
    if image is None:
        return missing(f"{path.name} is there and cannot be read as a picture")
    return f"<figure>{embedded(image, alt, most_width)}<figcaption>{esc(caption)}</figcaption></figure>"


def first_row(image: Image.Image, side: int) -> Image.Image:
    """Cut the pictures of a grid's first row out of it, without their captions.

    Args:
        image: a grid of square pictures.
        side: pixels of a picture before the grid enlarged it.

    Returns:
        The row, or the whole where the grid is of other pictures.
    """
    width = max(1, 128 // side) * side  # as ldm.training.callbacks enlarges them
    fits = image.width >= width + 2 * GAP and (image.width - GAP) % (width + GAP) == 0
    if not fits or image.height < width + GAP:
        return image
    return image.crop((0, 0, image.width, GAP + width))


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """Choose some of many, the first and the last among them.

    >>> evenly(range(11), 3)
    [0, 5, 10]
    """
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def samples(folder: Path, side: int | None, told: str) -> str:
    """Show how the pictures of a stage came about, and the last grid whole.

    Args:
        folder: of `step-000500.png` and so on.
        side: pixels of a picture, where it is known.
        told: what the pictures are.
    """
    steps = [(int(found[1]), path) for path in folder.glob("step-*.png") if (found := re.search(r"(\d+)$", path.stem))]
    loaded = [(step, path, load(path)) for step, path in evenly(sorted(steps), SHOWN)]
    notes = "".join(missing(f"{path.name} cannot be read as a picture") for _, path, image in loaded if image is None)
    whole = [(step, image) for step, _, image in loaded if image is not None]
    if not whole:
        return notes or missing("no pictures were saved")
    strips = []
    for step, image in whole if len(whole) > 1 else []:
        strip = embedded(first_row(image, side) if side else image, f"{told} after {step} steps", 540)
        strips.append(f"<figure>{strip}<figcaption>step {step:,}</figcaption></figure>")
    step, image = whole[-1]
    last = embedded(image, f"grid of {told} after {step} steps", 1100)
    column = f'<div class="strips">{"".join(strips)}</div>' if strips else ""
    return (
        f'{notes}<div class="samples">{column}<figure class="last">{last}'
        f"<figcaption>{esc(told)}, step {step:,}</figcaption></figure></div>"
    )
