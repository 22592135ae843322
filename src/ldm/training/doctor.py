"""`doctor=true`: look at a run before it is trained. Nothing is trained; what would ruin the run is said.

B batch, C latent channels, h w latents, L tokens, D width, N pictures, W H pixels.
"""

import math
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ProgressBar

from ldm.conditioner import Conditioner
from ldm.config import STAGES, TrainConfig
from ldm.data.datamodule import DataModule
from ldm.data.images import Pixels, to_pixels
from ldm.data.order import Pick, Shuffle
from ldm.data.pictures import Pictures
from ldm.data.sources import known
from ldm.data.stream import Stream
from ldm.data.survey import Finding, Level, survey_captions, survey_duplicates, survey_sizes
from ldm.errors import UserError
from ldm.gallery import grid, save_png
from ldm.nn.autoencoder import AutoencoderKL, DiagonalGaussian
from ldm.training import feed, fit
from ldm.training.autoencoder import latent_statistics
from ldm.training.checkpointing import COPIES
from ldm.training.module import StageModule
from ldm.training.networks import build_unet
from ldm.training.stages import check_stages, is_done, stage_steps
from ldm.training.trial import any_conditioner, any_vae, build_module, encoded, exists, trial_trainer

STEPS = 4  # of each measurement; the first warms up
MEASURED = 256  # pictures that latents are measured on
MARKS: dict[Level, str] = {"note": " ", "warning": "!", "ruin": "✗"}


class Cost(NamedTuple):
    """What a training step takes."""

    seconds: float
    memory: int  # bytes at its peak
    loss: float


class Kept(NamedTuple):
    """What of a network will lie on the disk, in bytes."""

    checkpoint: int
    stays: int  # the result and the averages that are kept
    snapshots: int  # how many averages


def examine(config: TrainConfig) -> bool:
    """Print what there is to say about a run, and leave a sheet of samples, `doctor.png`, in its directory.

    Returns:
        Whether something would ruin the run.

    Raises:
        UserError: a network or an encoder cannot be opened at all.
    """
    report = Report()
    _try_the_door(config, report)
    # Everything is to be shown, so that nothing may end the look.
    lenient = config.model_copy(update={"data": config.data.model_copy(update={"max_bad": 1.0})})
    vae = any_vae(config)
    try:
        squares, held_out = feed.open_pictures(lenient, vae.config["in_channels"])
    except UserError as error:
        report.add(Finding("pictures", str(error), "ruin"), *_broken(config, 0))
        return report.conclude()
    conditioner = any_conditioner(config, squares)
    unet = build_unet(config, vae, conditioner.text_tower.config["hidden_size"])
    buckets = feed.find_buckets(config, vae, unet)
    train = feed.training_views(config, squares.source, buckets)
    val = feed.validation_views(config, held_out.source, buckets)
    _survey(config, train, val, conditioner, report)
    report.add(Finding("samples", str(_sheet(config, train))))
    device = torch.device("cuda" if config.trainer.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    vae.to(device).eval(), conditioner.to(device).eval()
    if exists(config, "autoencoder"):
        _measure_latents(vae, squares, report)
    else:
        report.add(Finding("latents", "not yet: the VAE is trained first"))
    networks = _measure_steps(config, squares, train, vae, conditioner, report)
    _weigh(config, train, vae, conditioner, networks, report)
    return report.conclude()


def _try_the_door(config: TrainConfig, report: "Report") -> None:
    """Tell what would stop this run before it begins: a missing result, a network that cannot be."""
    missing = [stage for stage in STAGES if stage in config.stages and not is_done(config, stage)]
    try:
        if "diffusion" in missing:
            check_stages(config)
        fit.check_at_the_door(config, missing)
    except UserError as error:
        report.add(Finding("config", str(error), "ruin"))


class Report:
    """Print findings as they come, and count them."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def add(self, *findings: Finding) -> None:
        self.findings += findings
        for finding in findings:
            print(f"{MARKS[finding.level]} {finding.topic:13} {finding.text}", flush=True)

    def conclude(self) -> bool:
        """Say the last word; return whether anything would ruin the run."""
        ruins = [finding.topic for finding in self.findings if finding.level == "ruin"]
        warnings = sum(finding.level == "warning" for finding in self.findings)
        if ruins:
            print(f"✗ this run would be ruined by: {', '.join(dict.fromkeys(ruins))}")
        else:
            print("✓ nothing would ruin this run" + (f"; {warnings} things to look at (!)" if warnings else ""))
        return bool(ruins)


# --------------------------------------------------------------------------------------------------------- pictures


def _survey(config: TrainConfig, train: Pictures, val: Pictures, conditioner: Conditioner, report: Report) -> None:
    report.add(Finding("pictures", f"{len(train):,} to train on, {len(val):,} held out"))
    report.add(*_broken(config, _met(train) + len(val)))
    mine, held_out = known(train.source), known(val.source)
    names: list[str] = []
    if mine is not None and held_out is not None:
        names = mine.names + held_out.names
        sizes = np.concatenate([mine.sizes, held_out.sizes])
        views = np.concatenate([train.view_sizes, val.view_sizes])
        report.add(*survey_sizes(sizes, views, names, config.data.buckets))
        if train.buckets is not None:
            lines = train.buckets.table(mine.sizes, config.data.batch_size).splitlines()
            report.add(*(Finding("", line) for line in lines))
        likenesses = np.concatenate([mine.likenesses, held_out.likenesses])
        report.add(*survey_duplicates(mine.digests + held_out.digests, likenesses, names))
        trained_on = set(mine.digests)
        if shared := sum(digest in trained_on for digest in held_out.digests):
            text = f"{shared} held-out pictures are in the training set too: validation flatters"
            report.add(Finding("duplicates", text, "warning"))
    captions = [*train.captions, *val.captions]
    names = names or [f"picture {i}" for i in range(len(captions))]
    data = config.data
    report.add(*survey_captions(captions, names, conditioner.num_tokens, conditioner.max_length, data.max_bad))
    if data.batch_size > len(train):
        text = f"data.batch_size={data.batch_size} is more than there are pictures: each comes several times a batch"
        report.add(Finding("batches", text, "warning"))


def _met(pictures: Pictures) -> int:
    """Return how many pictures were looked at: of a stream the first, which are looked at here."""
    if not isinstance(pictures.source, Stream):
        return len(pictures)
    num = min(len(pictures), MEASURED)
    for i in range(num):
        with suppress(UserError):  # none of its shard can be used: each of them is in the quarantine by now
            pictures.source[i]
    return num


def _broken(config: TrainConfig, good: int) -> list[Finding]:
    """Tell of the pictures in the quarantine, beside so many that are good."""
    quarantine = Path(config.run_dir) / "quarantine.txt"
    bad = quarantine.read_text(encoding="utf-8").splitlines() if quarantine.exists() else []
    if not bad:
        return []
    share = len(bad) / (good + len(bad))
    level: Level = "ruin" if share > config.data.max_bad else "warning"
    examples = "".join(f"\n{'':16}{line.replace(chr(9), ': ')}" for line in bad[:5])
    return [Finding("broken", f"{len(bad)} pictures ({share:.1%}) cannot be used, see {quarantine}:{examples}", level)]


def _sheet(config: TrainConfig, train: Pictures, num: int = 16) -> Path:
    """Save samples, spread evenly over the set, as the model will see them in the first epoch, with their captions."""
    num = min(num, len(train))
    apart = 1 if isinstance(train.source, Stream) else len(train) // num  # each shard of a stream may be far away
    items = [train.__getitems__([(i * apart, 0)]) for i in range(num)]
    pixels = [to_pixels(item["image"])[0] for item in items]
    height, width = (max(image.shape[axis] for image in pixels) for axis in (0, 1))
    path = Path(config.run_dir) / "doctor.png"
    captions = [item["caption"][0] for item in items]
    save_png(path, grid([_framed(image, height, width) for image in pixels], captions=captions,
                        scale=max(1, 192 // width)))  # fmt: skip
    return path


def _framed(image: Pixels, height: int, width: int) -> Pixels:
    """Put a picture in the middle of a larger white one."""
    canvas = np.full((height, width, image.shape[2]), 255, np.uint8)
    top, left = (height - image.shape[0]) // 2, (width - image.shape[1]) // 2
    canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas


# --------------------------------------------------------------------------------------------------------- networks


@torch.inference_mode()
def _measure_latents(vae: AutoencoderKL, pictures: Pictures, report: Report) -> None:
    mean, std = latent_statistics(vae, pictures, feed.ENCODE_BATCH, most=MEASURED)
    text = ", ".join(f"{m:+.2f} ± {s:.2f}" for m, s in zip(mean.tolist(), std.tolist(), strict=True))
    off = max(mean.abs().max().item(), std.log2().abs().max().item())  # in deviations, and in factors of two
    level: Level = "note" if off < 0.5 else "warning" if off < 2 else "ruin"
    advice = "" if level == "note" else "; noise schedules are made for 0 ± 1: is this VAE the right one?"
    report.add(Finding("latents", f"mean ± deviation of each channel: {text}{advice}", level))
    indices = np.linspace(0, len(pictures) - 1, min(64, len(pictures))).astype(int).tolist()
    image = pictures.images(indices).to(next(vae.parameters()).device, memory_format=torch.channels_last)
    batches = image.split(8)
    restored = torch.cat([vae.decode(DiagonalGaussian(vae.encode(batch)).mode()) for batch in batches])
    psnr = 10 * math.log10(4 / (restored - image).square().mean().item())
    level = "note" if psnr >= 18 else "warning" if psnr >= 12 else "ruin"
    report.add(Finding("VAE", f"{psnr:.1f} dB between {len(image)} pictures and their reconstructions", level))


def _measure_steps(
    config: TrainConfig, squares: Pictures, train: Pictures, vae: Any, conditioner: Conditioner, report: Report
) -> list[Kept]:
    """Time real steps of what this run will train, and say how long it will take.

    Returns:
        What there will be of each network that is trained.
    """
    seconds, networks = 0.0, list[Kept]()
    for stage in config.stages:
        if is_done(config, stage):
            report.add(Finding("steps", f"{stage}: up to date"))
            continue
        module = build_module(config, stage, vae, conditioner, STEPS)
        networks.append(_kept(config, module))
        if stage != "diffusion":
            batch_size = getattr(config, stage).batch_size
            cost = _step(config, module, squares, batch_size, squares.view_sizes[0], report)
            seconds += cost.seconds * stage_steps(config, stage) if cost else 0
            continue
        shapes, counts = np.unique(train.view_sizes, axis=0, return_counts=True)
        total, num_batches, batch_size = 0.0, 0, config.data.batch_size
        for shape, count in zip(shapes, counts, strict=True):
            members = np.flatnonzero((train.view_sizes == shape).all(1))
            dataset: Any = _Only(train, members)
            if config.data.cache:
                dataset, encoding = encoded(train, members, vae, conditioner, batch_size)
                seconds += encoding * count * train.num_variants
            if len(shapes) > 1 and count < batch_size:
                text = f"{shape[0]}×{shape[1]} has {count} pictures, which fill a batch of {batch_size} again and again"
                report.add(Finding("batches", text, "warning"))
            cost = _step(config, module, dataset, batch_size, shape, report)
            batches = -(-count // batch_size)
            total, num_batches = total + (cost.seconds * batches if cost else 0), num_batches + batches
        seconds += total / num_batches * config.trainer.accumulate_grad_batches * config.trainer.max_steps
    report.add(Finding("length", f"about {_duration(seconds)} in all, without validation and sample grids"))
    return networks


def _kept(config: TrainConfig, module: StageModule) -> Kept:
    lengths, snapshots = len(module.posthoc), 0
    if lengths and config.diffusion.posthoc_ema:  # the last step has its own, whether it is due or not
        snapshots = lengths * -(-config.trainer.max_steps // config.diffusion.posthoc_ema.every)
    size = 4 * sum(p.numel() for p in module.network.parameters())
    return Kept(module.checkpoint_size, size * (1 + snapshots), snapshots)


def _step(
    config: TrainConfig, module: StageModule, dataset: Any, batch_size: int, size: Any, report: Report
) -> Cost | None:
    """Train a few steps that nobody keeps, and report what they cost."""
    clock = _Clock()
    trainer = trial_trainer(config, module, STEPS, clock)
    what = f"{module.stage}: {size[0]}×{size[1]}, batch {batch_size}"
    order = Shuffle(len(dataset), config.seed)
    try:
        trainer.fit(module, DataModule(dataset, dataset, order, batch_size, config.data.num_workers))
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        mend = "a smaller batch with trainer.accumulate_grad_batches, bf16 (trainer=gpu), a smaller resolution or unet="
        report.add(Finding("steps", f"{what}: does not fit into memory; try {mend}", "ruin"))
        return None
    cost = clock.cost(trainer.strategy.root_device)
    text = (
        f"{what}: {cost.seconds:.3g} s a step, {batch_size / cost.seconds:.3g} images/s, {_bytes(cost.memory)} at most"
    )
    if math.isfinite(cost.loss):
        report.add(Finding("steps", text))
    else:
        report.add(Finding("steps", f"{text}; the loss is {cost.loss}", "ruin"))
    return cost


class _Clock(ProgressBar):
    """Time batches from end to end, so that waiting for data counts; and show no bar."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []
        self.loss = math.nan

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.loss = float(outputs["loss"])  # waits for the device
        self.times.append(time.perf_counter())

    def cost(self, device: torch.device) -> Cost:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(device)
        return Cost(float(np.median(np.diff(self.times))), memory, self.loss)


class _Only:
    """Some of the pictures of a training set."""

    bucket_of = None

    def __init__(self, pictures: Pictures, members: Any) -> None:
        self.pictures, self.members = pictures, members

    def __len__(self) -> int:
        return len(self.members)

    def __getitems__(self, picks: Sequence[Pick]) -> dict[str, Any]:
        return self.pictures.__getitems__([(int(self.members[i]), epoch) for i, epoch in picks])


# ------------------------------------------------------------------------------------------------------------- disk


def _weigh(
    config: TrainConfig,
    train: Pictures,
    vae: Any,
    conditioner: Conditioner,
    networks: Sequence[Kept],
    report: Report,
) -> None:
    """Compare the disk that the cache, the checkpoints and the averages need with what is free."""
    cache = 0
    if config.data.cache:
        latents = train.view_sizes.astype(np.int64).prod(1).sum() // vae.downscale_factor**2
        moments = int(latents) * 2 * vae.config["latent_channels"] * train.num_variants
        tokens = len({text for texts in train.captions for text in texts}) * conditioner.max_length
        context = tokens * conditioner.text_tower.config["hidden_size"]
        cache = (moments + context) * (4 if config.data.cache_dtype == "fp32" else 2)
    checkpoints = COPIES * max((each.checkpoint for each in networks), default=0) + sum(each.stays for each in networks)
    place = next(
        path for path in (Path(config.output_dir), *Path(config.output_dir).absolute().parents) if path.exists()
    )
    free = shutil.disk_usage(place).free
    snapshots = sum(each.snapshots for each in networks)
    kept = f"checkpoints, model and {snapshots} averages" if snapshots else "checkpoints and model"
    text = f"cache about {_bytes(cache)}, {kept} {_bytes(checkpoints)}; {_bytes(free)} free in {place}"
    report.add(Finding("disk", text, "ruin" if cache + checkpoints > free else "note"))


def _bytes(num: float) -> str:
    """Write a number of bytes.

    >>> _bytes(3 * 2**30)
    '3.0 GiB'
    """
    return f"{num / 2**30:.1f} GiB" if num >= 2**30 else f"{num / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    """Write a duration.

    >>> _duration(5400), _duration(90)
    ('1.5 hours', '1.5 minutes')
    """
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
