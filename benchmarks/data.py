"""Time the way from files to batches.

    python benchmarks/data.py [--parts decode] [--rounds 20] [--out benchmarks/results/data.json]

decode: JPEGs to a batch of tensors, beside torchvision's `ImageFolder` with the same transforms. Both run alternately
in one process on one core, and processor time is counted, for the files lie in memory. The figure is the ratio of
median times, torchvision's over ours: above 1 we are faster.

Each part is a function (folder to write into, rounds) -> rows of results, with a row in `PARTS`.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, run_alternately, summary, write
from PIL import Image
from torch import Tensor

from ldm.data.images import decode, scale_and_crop, to_tensor

BATCH = 16
SIZE = (512, 680)  # width and height of the files
RESOLUTIONS = (512, 256)


def write_pictures(folder: Path, num: int, size: tuple[int, int], seed: int = 0) -> list[Path]:
    """Write JPEGs of quality 90 with large shapes, texture and grain, and about as many bytes as photographs take."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    paths = [folder / f"{i:06d}.jpg" for i in range(num)]
    for path in paths:
        pixels = generator.normal(0, 6, (size[1], size[0], 3))  # grain
        for cells, contrast in ((8, 60), (64, 15), (256, 8)):
            shapes = generator.normal(0, contrast, (cells, cells)).astype(np.float32)
            pixels += np.asarray(Image.fromarray(shapes).resize(size, Image.Resampling.BICUBIC))[..., None]
        tint = generator.normal(0, 30, (8, 8, 3)) + 128
        tints = Image.fromarray(tint.clip(0, 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
        Image.fromarray((pixels + np.asarray(tints)).clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


def compare_decoding(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Decode, scale, cut and stack a batch, for each resolution."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    torch.set_num_threads(1)
    paths = write_pictures(folder / "pictures", BATCH, SIZE)
    kilobytes = statistics.mean(path.stat().st_size for path in paths) / 1e3
    rows = []
    for resolution in RESOLUTIONS:
        steps = [
            transforms.Resize(resolution, transforms.InterpolationMode.LANCZOS),
            transforms.CenterCrop(resolution),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
        peer = ImageFolder(str(folder), transforms.Compose(steps))

        def ours(resolution: int = resolution) -> Tensor:
            whole = [decode(path.read_bytes(), at_least=2 * resolution) for path in paths]  # as the sources do
            return to_tensor(np.stack([scale_and_crop(pixels, resolution, resolution) for pixels in whole]))

        def theirs(peer: ImageFolder = peer) -> Tensor:
            return torch.stack([peer[i][0] for i in range(len(peer))])

        times = run_alternately({"ldm": ours, "torchvision": theirs}, rounds, warmup=2, clock=time.process_time)
        rows.append(
            {
                "part": "decode",
                "files": f"{SIZE[0]}x{SIZE[1]} JPEG, {kilobytes:.0f} kB",
                "resolution": resolution,
                "batch": BATCH,
                "levels_apart": round(float((ours() - theirs()).abs().mean() * 127.5), 3),
                "images_per_second": {name: round(BATCH / statistics.median(t), 1) for name, t in times.items()},
                **summary(times),
            }
        )
    return rows


PARTS: dict[str, Callable[[Path, int], list[dict[str, Any]]]] = {"decode": compare_decoding}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS / "data.json")
    arguments = parser.parse_args()
    results = []
    for part in arguments.parts:
        with tempfile.TemporaryDirectory() as folder:
            results += PARTS[part](Path(folder), arguments.rounds)
    for row in results:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    write(arguments.out, results)


if __name__ == "__main__":
    main()
