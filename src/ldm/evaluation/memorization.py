"""Does the model draw pictures of its training set again? Each drawn picture beside its nearest training pictures.

N pictures, M training pictures, D width of a feature or number of values in a picture.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.images import Pixels, scale_and_crop
from ldm.evaluation.subject import CHUNK, Setting, Subject
from ldm.gallery import grid, save_png

QUANTILE = 0.01  # of the held-out pictures' distances: what is nearer counts as a copy
SIDE = 64  # pixels; larger pictures are shrunk before they are compared
SHOWN = 16


def nearest(queries: Tensor, chunks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Find the nearest of many vectors by Euclidean distance, the many coming in parts.

    Args:
        queries: (N, D).
        chunks: parts (m, D) of the M vectors, in order.

    Returns:
        (N,) distances in float64, and (N,) int64 numbers of the nearest.
    """
    best = torch.full((len(queries),), float("inf"), dtype=torch.float64)
    numbers = torch.zeros(len(queries), dtype=torch.int64)
    begin = 0
    for chunk in chunks:
        squares = queries.square().sum(1, keepdim=True) + chunk.square().sum(1) - 2 * queries @ chunk.T
        found = squares.argmin(1)
        # The square of a difference by three products is off by some 1e-3 where vectors are equal: measure anew.
        distance = (queries.double() - chunk[found].double()).norm(dim=1)
        nearer = distance < best
        best, numbers = torch.where(nearer, distance, best), torch.where(nearer, found + begin, numbers)
        begin += len(chunk)
    return best, numbers


def copies(drawn: Tensor, held_out: Tensor, quantile: float = QUANTILE) -> tuple[Tensor, float]:
    """Tell which pictures are nearer to the training set than almost all that are no part of it.

    Held-out pictures say how near the training set one comes without having seen it (after the calibrated nearest-
    neighbour tests of Carlini et al., arXiv:2301.13188, section 4, and Somepalli et al., arXiv:2212.03860, section 4).

    Args:
        drawn, held_out: (N,) and (K,) distances to the nearest training picture.
        quantile: share of held-out pictures that may be as near by chance.

    Returns:
        (N,) bool, and the distance up to which a picture counts as a copy.
    """
    threshold = float(torch.quantile(held_out.double(), quantile, interpolation="lower"))
    return drawn <= threshold + 1e-6, threshold


def memorization(subject: Subject) -> dict[str, Any]:
    """Measure for each setting which share of drawn pictures are copies, by CLIP's features and by pixels.

    Feature distance is √(2 - 2 cos) of CLIP's embeddings, pixel distance the root mean square in units of the range.
    The rate to expect of a model that copies nothing is `expected`. A sheet shows the nearest of all.
    """
    chosen = subject.some("train", subject.config.num_train)
    train, num = subject.real("train"), len(subject.real("val"))
    features = F.normalize(subject.real_features("clip", "train", len(chosen)), dim=1)
    held_features = F.normalize(subject.real_features("clip", "val"), dim=1)
    drawn_features = [F.normalize(subject.drawn_features("clip", setting), dim=1) for setting in subject.settings]
    drawn_pixels = [_flat(subject.drawn_rgb(setting)) for setting in subject.settings]
    held_out = np.array_split(np.arange(num), _parts(num))
    held_pixels = torch.cat([_flat(subject.real("val").rgb(part)) for part in held_out])

    def train_pixels() -> Iterable[Tensor]:
        with subject.progress("looking through the training pictures", len(chosen), "pictures") as advance:
            for part in np.array_split(chosen, _parts(len(chosen))):
                yield _flat(train.rgb(part))
                advance(len(part))

    # One way through each, for the held-out pictures and all settings at once.
    by_feature = nearest(torch.cat([held_features, *drawn_features]), features.split(CHUNK))
    by_pixel = nearest(torch.cat([held_pixels, *drawn_pixels]), train_pixels())
    sizes = [num, *(len(each) for each in drawn_features)]
    distances = {"feature": by_feature[0].split(sizes), "pixel": by_pixel[0].split(sizes)}
    numbers = {"feature": by_feature[1].split(sizes), "pixel": by_pixel[1].split(sizes)}

    values, thresholds = [], {}
    for i, setting in enumerate(subject.settings, start=1):
        row: dict[str, Any] = setting._asdict()
        for by in ("feature", "pixel"):
            is_copy, thresholds[by] = copies(distances[by][i], distances[by][0])
            row[f"{by}_rate"] = float(is_copy.float().mean())
            row[f"{by}_median"] = float(distances[by][i].median())
        here = {by: (distances[by][i], torch.from_numpy(chosen)[numbers[by][i]]) for by in distances}
        row["value"] = row["feature_rate"]
        row["nearest"], row["sheet"] = _sheet(subject, setting, here)
        values.append(row)
    return {
        "values": values,
        "expected": QUANTILE,
        "thresholds": thresholds,
        "held_out_median": {by: float(distances[by][0].median()) for by in distances},
        "num_train": len(chosen),
        "num_held_out": num,
        "clip": subject.clip.source,
    }


def _sheet(
    subject: Subject, setting: Setting, found: dict[str, tuple[Tensor, Tensor]]
) -> tuple[list[dict[str, Any]], str]:
    """Show the drawn pictures that are nearest by feature, each with its neighbours by feature and by pixel."""
    train, prompts = subject.real("train"), subject.prompts()
    pictures: list[Pixels] = []
    captions, told = [], []
    for i in found["feature"][0].argsort()[:SHOWN].tolist():
        drawn = subject.drawn_rgb(setting, slice(i, i + 1))
        line: dict[str, Any] = {"picture": i, "seed": subject.config.seed + i, "prompt": prompts[i]}
        pictures += list(drawn)
        captions.append(f"drawn: {prompts[i]}")
        for by, (distance, number) in found.items():
            index = int(number[i])
            line[by] = {"train": train.name(index), "distance": float(distance[i])}
            pictures.append(scale_and_crop(train.rgb([index])[0], drawn.shape[2], drawn.shape[1]))
            captions.append(f"by {by}: {distance[i]:.3f}, {train.name(index)}")
        told.append(line)
    path = subject.file("memorization", setting)
    save_png(path, grid(pictures, columns=6, captions=captions, scale=max(1, 128 // pictures[0].shape[0])))
    subject.say(f"drawn pictures beside the training pictures nearest to them: {path}")
    return told, path.name


def _parts(num: int) -> int:
    return -(-num // CHUNK)


def _flat(pictures: Pixels) -> Tensor:
    """Turn (N, H, W, 3) pictures into (N, D) vectors whose Euclidean distance is the RMS difference, range 1."""
    image = torch.from_numpy(pictures).movedim(-1, 1).float() / 255
    if image.shape[-1] > SIDE:
        image = F.interpolate(image, (SIDE, SIDE), mode="area")
    return image.flatten(1) / image[0].numel() ** 0.5
