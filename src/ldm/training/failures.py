"""What ends a run: numbers that are none, and too little memory. Said with what was at hand and what to try."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.config import Stage, TrainConfig
from ldm.data.sources import known
from ldm.errors import UserError

SHOWN = 8  # samples of a batch that are named


class SkippedStep(Exception):
    """Ends an optimizer step before it has changed anything."""


def name_samples(trainer: pl.Trainer, micro_batch: int, captions: Sequence[str] | None) -> str:
    """Name the samples of a micro-batch of the step in hand: number, file where there is one, caption.

    Nothing is noted as batches come: their order is a function of their number.

    Args:
        trainer: in `fit`.
        micro_batch: of the step.
        captions: of the batch, where it holds them.
    """
    loader: Any = trainer.train_dataloader
    batches = copy.copy(loader.batch_sampler)
    batches.start = trainer.datamodule.position + micro_batch  # type: ignore[attr-defined]
    indices, epochs = zip(*next(iter(batches)), strict=True)
    dataset = loader.dataset.dataset
    pictures = getattr(dataset, "pictures", dataset)  # those that a cache was made of
    if captions is None:
        chosen = pictures.caption_numbers(indices, epochs).tolist()
        captions = [pictures.captions[index][i] for index, i in zip(indices, chosen, strict=True)]
    index = known(pictures.source)
    names = [f"{i} ({index.names[i]})" if index is not None else str(i) for i in indices[:SHOWN]]
    told = ", ".join(f"{name} {caption!r}" for name, caption in zip(names, captions, strict=False))
    return told + (f" and {len(indices) - SHOWN} more" if len(indices) > SHOWN else "")


def describe(terms: Mapping[str, Tensor]) -> str | None:
    """Say which terms of a loss are no finite numbers; None where all are."""
    bad = {name: float(value) for name, value in terms.items() if not value.isfinite()}
    return ", ".join(f"{name} is {value}" for name, value in bad.items()) or None


def not_finite(stage: Stage, step: int, faults: Sequence[str], num_skipped: int, max_skipped: int) -> str:
    """Say that a step was not taken, and why: `faults` name what was not finite and in which samples."""
    what = "; ".join(faults)
    if num_skipped <= max_skipped:
        return f"  {stage}, step {step}: left out ({num_skipped} of at most {max_skipped}): {what}"
    before = f"{max_skipped} batches were left out before, which is all that may be. " if max_skipped else ""
    more = max(10, 2 * max_skipped)
    optim = "optim" if stage == "diffusion" else f"{stage}.optim"
    return (
        f"{stage}, step {step}: {what}. {before}The step was not taken, and the checkpoint is the one before. Look at "
        f"these pictures; try a lower {optim}.lr with {optim}.clip_norm=1, or trainer.precision=32-true; "
        f"trainer.max_skipped={more} goes on and leaves such batches out, up to {more} of them"
    )


def check_weights(stage: Stage, step: int, state: Mapping[str, Tensor]) -> None:
    """See that weights are finite before they take the place of those that are kept.

    Raises:
        UserError: they are not.
    """
    bad = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        optim = "optim" if stage == "diffusion" else f"{stage}.optim"
        raise UserError(
            f"{stage}, step {step}: {len(bad)} of the weights are no finite numbers any more ({', '.join(bad[:3])}"
            f"{', …' if len(bad) > 3 else ''}), and were not saved: the checkpoint is the one before. Steps are too "
            f"large: a lower {optim}.lr, a longer {optim}.warmup_steps, or {optim}.clip_norm=1"
        )


@contextmanager
def explaining_want_of_memory(config: TrainConfig, stage: Stage, precision: str) -> Iterator[None]:
    """Turn running out of memory in training into a UserError that says what took it and what to try.

    Args:
        config: of the run.
        stage: in training.
        precision: that it trains in.
    """
    part = config.data if stage == "diffusion" else getattr(config, stage)
    what = f"for batches of {part.batch_size} at {config.data.resolution} px in {precision}"
    then = (
        "The same command then goes on from the last checkpoint where the change allows it, and anew with resume=never"
    )
    with _explaining(stage, what, _remedies(config, stage, precision), then):
        yield


@contextmanager
def explaining_want_of_memory_to_encode(config: TrainConfig, batch_size: int, device: torch.device) -> Iterator[None]:
    """Turn running out of memory while the cache is encoded or opened into a UserError, as in training.

    Args:
        config: of the run.
        batch_size: of encoding.
        device: that encodes.
    """
    what = f"to encode batches of {batch_size} at {config.data.resolution} px in float32"
    then = "A cache of the same pictures goes on from what is there"
    with _explaining("cache", what, _remedies_to_encode(config, batch_size, device), then):
        yield


@contextmanager
def _explaining(who: str, what: str, remedies: Iterator[str | None], then: str) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_want_of_memory(error):
            raise
        where = "the GPU" if isinstance(error, torch.OutOfMemoryError) else "this machine"
        steps = ", ".join(f"({i}) {remedy}" for i, remedy in enumerate(islice(filter(None, remedies), 3), start=1))
        raise UserError(
            f"{who}: the memory of {where} is not enough {what}. Try, in this order: {steps}. {then} "
            f"({str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__})"
        ) from error


def _is_want_of_memory(error: BaseException) -> bool:
    text = str(error)
    allocator = "can't allocate memory" in text or "not enough memory" in text or "out of memory" in text
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or allocator


def _remedies(config: TrainConfig, stage: Stage, precision: str) -> Iterator[str | None]:
    """Give what may help, what costs least first; None for what has been done."""
    diffusion = stage == "diffusion"
    if diffusion and config.data.cache_on_device:
        yield "data.cache_on_device=false"
    if precision == "32-true":
        yield "autoencoder.precision=bf16-mixed" if stage == "autoencoder" else "trainer.precision=bf16-mixed"
    if diffusion and not config.unet.gradient_checkpointing:
        yield "+unet.gradient_checkpointing=true"
    batch_size = config.data.batch_size if diffusion else getattr(config, stage).batch_size
    if batch_size > 1 and diffusion:
        accumulate = config.trainer.accumulate_grad_batches * -(-batch_size // (batch_size // 2))
        yield f"data.batch_size={batch_size // 2} trainer.accumulate_grad_batches={accumulate}"
    elif batch_size > (2 if stage == "clip" else 1):
        yield f"{stage}.batch_size={batch_size // 2}"
    yield f"data.resolution={config.data.resolution // 2}"
    yield {"diffusion": "a smaller unet=", "autoencoder": "a smaller vae=", "clip": "a smaller text_encoder="}[stage]
    yield "a machine with more of it"


def _remedies_to_encode(config: TrainConfig, batch_size: int, device: torch.device) -> Iterator[str]:
    """Give what may help, what costs least first."""
    if config.data.cache_on_device:
        yield "data.cache_on_device=false"
    if device.type != "cpu":
        yield "trainer=cpu data.cache=build, which encodes on the processor, and then this command"
    if config.data.cache != "build":
        fewer = max(1, min(config.data.batch_size, batch_size // 2))
        yield f"data.cache=false data.batch_size={fewer}, which encodes the pictures of each step"
    yield f"data.resolution={config.data.resolution // 2}"
    yield "a smaller vae="
    yield "a machine with more of it"
