"""Time the way from files to batches, and from a cache to batches.

    python benchmarks/data.py [--parts decode …] [--rounds 20] [--out benchmarks/results/data.json]

decode: JPEGs to a batch of tensors, beside torchvision's `ImageFolder` with the same transforms. Both run alternately
in one process on one core, and processor time is counted, for the files lie in memory. The figure is the ratio of
median times, torchvision's over ours: above 1 we are faster.

cache: training samples a second from a cache of the shape that Stable Diffusion has, beside the same loader without
it. Loaders run alternately; each is timed once its processes are in full swing. What uncached training has to do
besides, encoding each batch, is counted apart, with the smallest encoders there are.

wait: share of its time that the U-Net stage of `experiment=shapes` spends inside the loader of its cache.

memory: what the main process and the loader's hold at the end of each of ten epochs, and, where epochs take no time,
of every tenth of a hundred.

index: seconds until a folder of 100,000 small pictures is open, the first time and again.

Each part is a function (folder to write into, rounds) -> rows of results, with a row in `PARTS`.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import RESULTS, Clocks, load_config, memory_held, run_alternately, summary, write
from PIL import Image
from torch import Tensor

from ldm.conditioner import Conditioner, train_tokenizer
from ldm.config import Target, TrainConfig
from ldm.data.datamodule import DataModule
from ldm.data.images import decode, scale_and_crop, to_tensor
from ldm.data.latents import cached_latents
from ldm.data.pictures import Pictures
from ldm.data.sources import open_sources, training_order
from ldm.nn.autoencoder import AutoencoderKL
from ldm.training.networks import build_clip, build_vae
from ldm.training.stages import run

BATCH = 16
SIZE = (512, 680)  # width and height of the files
RESOLUTIONS = (512, 256)
NUM = 241  # files of a set, one of them held out
EPOCHS = 10
STEPS, WARM_UP = 70, 10
QUIET = "pytorch_lightning.callbacks.ProgressBar"  # which shows none
MANY = 100_000

# Encoders of almost no work, whose output has the shape of Stable Diffusion's: moments 8x64x64, context 77x768.
SD_SHAPES = (
    "data.resolution=512", f"data.batch_size={BATCH}", "data.num_workers=2", "data.num_val=1",
    "vae.block_out_channels=[4,4,4,4]", "+vae.mid_block_add_attention=false", "text_encoder.max_length=77",
    "text_encoder.text.hidden_size=768", "text_encoder.text.num_hidden_layers=1",
)  # fmt: skip


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

    paths = write_pictures(folder / "decode" / "pictures", BATCH, SIZE)
    kilobytes = statistics.mean(path.stat().st_size for path in paths) / 1e3
    rows = []
    for resolution in RESOLUTIONS:
        steps = [
            transforms.Resize(resolution, transforms.InterpolationMode.LANCZOS),
            transforms.CenterCrop(resolution),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
        peer = ImageFolder(str(folder / "decode"), transforms.Compose(steps))

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


# ------------------------------------------------------------------------------------------------------------ cache


def write_captions(folder: Path, paths: Sequence[Path]) -> None:
    lines = (
        {"file_name": path.name, "text": f"picture {i} of many: soft shapes in random colours under fine grain"}
        for i, path in enumerate(paths)
    )
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def open_set(folder: Path) -> tuple[TrainConfig, Pictures, str]:
    """Return a set of captioned 512 px JPEGs, written where it is not there yet: config, views, what the files are."""
    root = folder / "set"
    if not root.exists():
        write_captions(root, write_pictures(root, NUM, SIZE))
    kilobytes = statistics.mean(path.stat().st_size for path in root.glob("*.jpg")) / 1e3
    config = load_config("data=folder", f"data.path={root}", f"output_dir={folder}/outputs", *SD_SHAPES)
    source: Any = open_sources(config.data, cache=folder / "indexes")[0]
    pictures = Pictures(source, config.data.resolution, config.seed)
    return config, pictures, f"{len(pictures)} JPEGs of {SIZE[0]}x{SIZE[1]}, {kilobytes:.0f} kB"


def build_encoders(config: TrainConfig, pictures: Pictures) -> tuple[AutoencoderKL, Conditioner]:
    """Build the encoders of a config with fresh weights: they cost what trained ones do."""
    part = config.text_encoder
    captions = (text for texts in pictures.captions for text in texts)
    tokenizer = train_tokenizer(captions, part.vocab_size or 49408, part.max_length or 77)
    conditioner = Conditioner(tokenizer, build_clip(config, tokenizer).text_model)
    vae = build_vae(config).to(memory_format=torch.channels_last)
    return vae.eval().requires_grad_(False), conditioner.eval().requires_grad_(False)


def open_cache(config: TrainConfig, pictures: Pictures, memory: Any = "auto") -> Any:
    """Return the cache that the U-Net stage has of these pictures."""
    root = Path(config.output_dir) / "cache"
    return cached_latents(root, pictures, *build_encoders(config, pictures), dtype=torch.float16, memory=memory)


def training_batches(
    config: TrainConfig, dataset: Any, pictures: Pictures, batch_size: int = BATCH, num_workers: int | None = None
) -> Iterator[Any]:
    """Give the batches of a run that begins, without end."""
    order = training_order(pictures.source, config.seed)
    num_workers = config.data.num_workers if num_workers is None else num_workers
    datamodule = DataModule(dataset, dataset, order, batch_size, num_workers)
    here = {"global_rank": 0, "world_size": 1, "global_step": 0, "accumulate_grad_batches": 1}
    trainer: Any = SimpleNamespace(**here, strategy=SimpleNamespace(root_device=torch.device("cpu")))
    datamodule.trainer = trainer
    return iter(datamodule.train_dataloader())


def compare_cache(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Draw training batches from the cache and without it."""
    config, pictures, files = open_set(folder)
    in_ram, on_disk = open_cache(config, pictures), open_cache(config, pictures, "disk")
    assert in_ram.in_memory
    tiny = load_config("experiment=shapes", "data.resolution=512")
    vae, conditioner = build_encoders(tiny, pictures)

    @torch.inference_mode()
    def encode(batch: dict[str, Any]) -> None:
        vae.encode(batch["image"].contiguous(memory_format=torch.channels_last))
        conditioner(batch["caption"])

    def time_loader(
        dataset: Any, num: int, num_workers: int | None = None, batch_size: int = BATCH, work: Callable[[Any], Any] = id
    ) -> tuple[float, float]:
        """Return seconds a sample, on the wall and of processors."""
        batches = training_batches(config, dataset, pictures, batch_size, num_workers)
        for _ in range(4 * config.data.num_workers):  # twice as many as lie ready when nobody asks
            next(batches)
        clocks = Clocks()
        for batch in islice(batches, num):
            work(batch)
        wall, processor = clocks.read()
        return wall / num / batch_size, processor / num / batch_size

    loaders: dict[str, tuple[Any, ...]] = {
        "uncached": (pictures, 16),
        "from RAM": (in_ram, 200),
        "from disk": (on_disk, 100),
        "from disk, no workers": (on_disk, 200, 0),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
    for _ in range(max(2, rounds // 2)):
        for name, arguments in loaders.items():
            times[name].append(time_loader(*arguments))
    times["uncached, encoded"] = [time_loader(pictures, 1, batch_size=2, work=encode) for _ in range(3)]

    wall, processor = ({name: statistics.median(t[i] for t in each) for name, each in times.items()} for i in (0, 1))
    cached = [name for name in loaders if name.startswith("from")]
    shapes = ", ".join(
        f"{name} {'x'.join(map(str, tensor.shape[1:]))}" for name, tensor in in_ram.__getitems__([(0, 0)]).items()
    )
    return [
        {
            "part": "cache",
            "files": files,
            "resolution": config.data.resolution,
            "cache": f"{shapes}, fp16, {in_ram.nbytes / 1e6:.0f} MB",
            "batch": BATCH,
            "num_workers": config.data.num_workers,  # none where a cache is held in RAM
            "samples_per_second": {name: round(1 / seconds, 2) for name, seconds in wall.items()},
            "samples_per_processor_second": {name: round(1 / seconds, 2) for name, seconds in processor.items()},
            "ratio": {name: round(wall["uncached"] / wall[name], 1) for name in cached},
            "ratio_in_processor_time": {name: round(processor["uncached"] / processor[name], 1) for name in cached},
            "ratio_to_encoded": {name: round(wall["uncached, encoded"] / wall[name]) for name in cached},
            "milliseconds_a_sample": {name: round(seconds * 1e3, 3) for name, seconds in wall.items()},
            "quartiles": {
                name: [round(q * 1e3, 3) for q in statistics.quantiles([seconds for seconds, _ in each], n=4)]
                for name, each in times.items()
            },
        }
    ]


# ------------------------------------------------------------------------------------------------------------- wait


class Watched:
    """Batches without end, with the time of each call for one."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self.asked: list[float] = []
        self.given: list[float] = []

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.batches)
        while True:
            self.asked.append(time.perf_counter())
            batch = next(batches)
            self.given.append(time.perf_counter())
            yield batch


def measure_waiting(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Run `experiment=shapes` as `train.py` does, with few steps a stage, and watch the loader of the U-Net."""
    few = ("autoencoder.max_steps=2", "clip.max_steps=2", f"trainer.max_steps={STEPS}")
    config = load_config("experiment=shapes", *few, f"output_dir={folder}/outputs")
    config = config.model_copy(update={"logger": {}, "callbacks": {"quiet": Target(_target_=QUIET)}})
    loaders: list[Watched] = []
    open_loader = DataModule.train_dataloader

    def open_watched(datamodule: DataModule) -> Watched:
        loaders.append(Watched(open_loader(datamodule)))
        return loaders[-1]

    with mock.patch.object(DataModule, "train_dataloader", open_watched):
        run(config)
    watched = loaders[-1]
    asked, given = np.array(watched.asked[WARM_UP:STEPS]), np.array(watched.given[WARM_UP:STEPS])
    waits, steps = given - asked, np.diff(given)  # from one batch to the next: a step, and the wait for the next
    return [
        {
            "part": "wait",
            "preset": "tiny",
            "pictures": config.data.model_dump()["num_train"],
            "batch": config.data.batch_size,
            "num_workers": config.data.num_workers,
            "steps": len(steps),
            "waits_percent": round(100 * float(waits[1:].sum() / steps.sum()), 3),
            "milliseconds": {
                "wait": round(1e3 * float(np.median(waits)), 3),
                "step": round(1e3 * float(np.median(steps)), 1),
            },
        }
    ]


# ----------------------------------------------------------------------------------------------------------- memory


def measure_memory(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Draw epochs, uncached and cached, and weigh all processes after each."""
    config, pictures, files = open_set(folder)
    rows = []
    for name, memory in (("uncached", None), ("from disk", "disk"), ("from RAM", "auto")):
        dataset = pictures if memory is None else open_cache(config, pictures, memory)
        batches = training_batches(config, dataset, pictures)
        weighed = [*range(1, EPOCHS + 1), *(range(2 * EPOCHS, 10 * EPOCHS + 1, EPOCHS) if memory else ())]
        held = []
        for epoch in range(1, weighed[-1] + 1):
            for _ in range(len(pictures) // BATCH):
                next(batches)
            if epoch in weighed:
                time.sleep(0.5)  # the loader's processes fill their queue and come to rest
                held.append(memory_held())
        megabytes = {kind: [round(each[i] / 1e6, 1) for each in held] for i, kind in enumerate(("resident", "taken"))}
        growth = {
            f"epoch {weighed[begin]} to {weighed[end]}": {
                kind: round(100 * (values[end] / values[begin] - 1), 2) for kind, values in megabytes.items()
            }
            for begin, end in ((1, EPOCHS - 1), *([(EPOCHS - 1, -1)] if memory else []))
        }
        rows.append(
            {
                "part": "memory",
                "loader": name,
                "files": files,
                "batches_an_epoch": len(pictures) // BATCH,
                "batch": BATCH,
                "num_workers": 0 if getattr(dataset, "in_memory", False) else config.data.num_workers,
                "growth_percent": growth,
                "epochs": weighed,
                "megabytes": megabytes,
            }
        )
        del batches, dataset
    return rows


# ------------------------------------------------------------------------------------------------------------ index


def write_small_pictures(folder: Path, num: int) -> None:
    """Write different 64 px JPEGs and their captions."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    grain = generator.normal(0, 8, (256, 256, 3))
    paths = [folder / f"{i:06d}.jpg" for i in range(num)]
    for path in paths:
        y, x = generator.integers(0, 192, 2)
        tints = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        pixels = np.asarray(tints.resize((64, 64), Image.Resampling.BICUBIC)) + grain[y : y + 64, x : x + 64]
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    write_captions(folder, paths)


def measure_indexing(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Open a large folder of small pictures the first time, and twice again."""
    write_small_pictures(folder / "many", MANY)
    config = load_config("data=folder", f"data.path={folder}/many")
    times: list[tuple[float, float]] = []
    for _ in range(3):
        clocks = Clocks()
        train, val = open_sources(config.data, cache=folder / "index of many")
        times.append(clocks.read())
        assert len(train) + len(val) == MANY
    kept = sum(file.stat().st_size for file in (folder / "index of many").iterdir())
    kilobytes = (folder / "many" / "000000.jpg").stat().st_size / 1e3
    return [
        {
            "part": "index",
            "opened": "first" if i == 0 else "again",
            "files": f"{MANY} JPEGs of 64x64, {kilobytes:.1f} kB, in the page cache",
            "seconds": round(wall, 2),
            "processor_seconds": round(processor, 2),
            "pictures_per_second": round(MANY / wall),
            "index_megabytes": round(kept / 1e6, 1),
        }
        for i, (wall, processor) in enumerate(times)
    ]


PARTS: dict[str, Callable[[Path, int], list[dict[str, Any]]]] = {
    "decode": compare_decoding,
    "cache": compare_cache,
    "memory": measure_memory,
    "wait": measure_waiting,
    "index": measure_indexing,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS / "data.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for part in arguments.parts:
            rows = PARTS[part](Path(folder), arguments.rounds)
            for row in rows:
                print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            results += rows
    write(arguments.out, results, load_before=round(load, 2))


if __name__ == "__main__":
    main()
