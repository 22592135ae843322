"""Checkpoints that are whole or absent, and that are data, not code."""

import os
import shutil
import zipfile
from collections.abc import Sequence
from errno import EACCES, EMFILE, ENFILE, ENOMEM, EPERM, ESTALE
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.loops import evaluation_loop, training_epoch_loop
from pytorch_lightning.plugins.io import TorchCheckpointIO

from ldm import ranks
from ldm.errors import UserError
from ldm.training.loggers import drop_rows

VERSION = 1  # of what a checkpoint holds, the keys of its config among it; those without one are older
PREVIOUS = "previous.ckpt"
COPIES = 3  # that lie on the disk for a moment: the last, the one before, and the one that is being written


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its target, flush it to the disk, then rename; read it with `weights_only=True`.

    The one that was there stays as `previous.ckpt`: what a disk does to a file later, no care in writing prevents.
    Lightning writes in the temporary directory and moves, which across file systems copies onto the target and can
    leave neither the old nor the new checkpoint whole.

    Attributes:
        anew: whether what is there now is another run's, which the first checkpoint of this one takes the place of.
        damaged: whether the last that is there now is, so that the one before it is kept in its stead.
    """

    anew = False
    damaged = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            previous = target.with_name(PREVIOUS)
            if self.anew:
                previous.unlink(missing_ok=True)
            elif target.exists() and not self.damaged:  # killed here, the run goes on from it under its new name
                os.replace(target, previous)
            os.replace(temporary, target)
            self.anew = self.damaged = False
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself must reach the disk
        finally:
            os.close(folder)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        # Said explicitly: an environment variable can turn an unsaid default into running what a pickle wants to run.
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except RuntimeError as error:  # whole to its checksums, and still not what was written
            raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


class SaveCheckpoint(pl.callbacks.Checkpoint):
    """Write a checkpoint every so many optimizer steps, when all else that a step brings with it is done.

    Of several batches that make a step only the last ends it: a checkpoint from in between would hold the step before
    and a place in the data that is not. Lightning's own `ModelCheckpoint` writes there once a run has gone on from a
    step that is due, since it does not know that this one is there already; and it writes before the step's figures are
    logged, which a run that goes on from there would lack.

    A step's validation comes after its checkpoint, so that nothing is lost where validating fails; a run that goes on
    from there begins with it. The last step's checkpoint is written when all else is done.

    Args:
        path: of the checkpoint.
        every: optimizer steps.
    """

    def __init__(self, path: Path, every: int) -> None:
        super().__init__()
        self.path, self.every = path, every
        self._last_step, self._due = -1, False

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._last_step = trainer.global_step
        if trainer.global_step and go_on_after_step(trainer, pl_module.validated):
            drop_rows(trainer, f"{pl_module.stage}/val_", trainer.global_step - 1)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self._due = trainer.global_step % self.every == 0 and trainer.global_step < trainer.max_steps

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._save(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        save_checkpoint(trainer, self.path)

    def _save(self, trainer: pl.Trainer) -> None:
        if self._due:
            self._due = False
            save_checkpoint(trainer, self.path)


def save_checkpoint(trainer: pl.Trainer, path: Path) -> None:
    """Write a checkpoint; other ranks wait for the first one, for as long as that takes."""
    with ranks.busy("writing a checkpoint"):
        trainer.save_checkpoint(path)


def go_on_after_step(trainer: pl.Trainer, validated: bool) -> bool:
    """Set Lightning's counters to what they are when the step that a run goes on from is done.

    They come from a checkpoint that was written somewhere in the course of that step, or by a run with other batches to
    a step, and Lightning's own corrections know neither of these. Called when training starts.

    Args:
        trainer: whose checkpoint has been read.
        validated: whether the validation of that step, where there is one, was done.

    Returns:
        Whether it is done now, before the next step.
    """
    loop, step = trainer.fit_loop.epoch_loop, trainer.global_step
    num_batches = step * trainer.accumulate_grad_batches
    counts: list[Any] = [loop.batch_progress.current, loop.batch_progress.total]
    for progress in counts:
        progress.ready = progress.started = progress.processed = progress.completed = num_batches
    is_due = num_batches % int(trainer.val_check_interval or 1) == 0
    loop._restart_stage = training_epoch_loop.RestartStage.RESTARTED_ON_LAST
    stage = evaluation_loop.RestartStage
    now = is_due and not validated and loop.restarting
    loop.val_loop._restart_stage = stage.RESTARTED_MID_EVALUATION if now else stage.NONE
    loop.val_loop.restarting = False
    # A loop that restarts where a validation is due passes through the end of that step once more, and counts it.
    loop._batches_that_stepped = step - (is_due and loop.restarting)
    return now


def check_room(folder: Path, size: int) -> None:
    """Know before training that its checkpoints will fit on the disk; those of an earlier start make room.

    Args:
        folder: that they go to; it need not exist yet.
        size: of one, in bytes.

    Raises:
        UserError: they will not fit.
    """
    place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    there = sum(path.stat().st_size for path in folder.glob("*.ckpt"))
    free = shutil.disk_usage(place).free
    if COPIES * size > free + there:
        raise UserError(
            f"{place} has {free / 2**30:.1f} GiB free, and checkpoints need {COPIES * size / 2**30:.1f} GiB: the last, "
            "the one before and the one being written. Make room, or let output_dir= be elsewhere"
        )


class Header(NamedTuple):
    """What a checkpoint says of itself."""

    identity: dict[str, Any]  # the config that decides its weights
    step: int
    version: int  # of what it holds
    batch: int | None = None  # samples of an optimizer step, of all ranks; None where it is not written down


class LaterRelease(UserError):
    """A checkpoint that only a later release of ldm knows how to read."""


class NotNow(UserError):
    """A checkpoint that may be whole and cannot be read now, for want of memory, open files or permission."""


# What says nothing about a file's content.
PASSING = (EACCES, EMFILE, ENFILE, ENOMEM, EPERM, ESTALE)


def newest_whole(folder: Path) -> tuple[Path, Header, Sequence[str]] | None:
    """Find the checkpoint to go on from: `last.ckpt`, or where that is damaged the one before it.

    Returns:
        Its path, what it says of itself, and what is wrong with newer ones; None where there is no checkpoint.

    Raises:
        UserError: there are checkpoints, and none is whole; or the newest is of a later release, or cannot be read now.
    """
    faults: list[str] = []
    for path in (folder / "last.ckpt", folder / PREVIOUS):
        try:
            return path, read_header(path), faults
        except FileNotFoundError:
            continue
        except (LaterRelease, NotNow):  # farther than the one before, and the next to be written would take its place
            raise
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("; ".join([*faults, "to start anew over it: resume=never"]))
    return None


def read_header(path: Path) -> Header:
    """Read what a checkpoint says of itself; all of it is compared with its checksums.

    Raises:
        UserError: it is damaged, of another kind, of a later version, holds more than data, or cannot be read now.
        FileNotFoundError: it is not there.
    """
    try:
        stat = path.stat()
        _compare_checksums(path, stat.st_size, stat.st_mtime_ns)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if "identity" not in content:
            raise ValueError("it does not say which config it was trained with, as all of ldm's do")
        of_step = content.get("batch")
        header = Header(
            dict(content["identity"]), int(content["global_step"]), int(content.get("version", 0)),
            None if of_step is None else int(of_step),
        )  # fmt: skip
    except FileNotFoundError:
        raise
    except Exception as error:  # a zip, a pickle or its content: torch raises something else for each
        if passing := _passing(error):
            raise NotNow(
                f"{path} cannot be read now: {passing}. It may well be whole, and no older one takes its place: mend "
                "that, and give the same command again"
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} cannot be read: {reason}") from error
    if header.version > VERSION:
        raise LaterRelease(
            f"{path} was written by a later release of ldm (version {header.version} of its content, this one knows "
            f"{VERSION}): go on with that release"
        )
    return header


def _passing(error: Exception) -> str | None:
    """Say what keeps a file from being read that is not the file's fault; None where it may be."""
    if isinstance(error, MemoryError):
        return os.strerror(ENOMEM)
    if isinstance(error, OSError):
        return error.strerror if error.errno in PASSING else None
    told = str(error) if isinstance(error, RuntimeError) else ""  # torch opens and maps the file itself
    return next((reason for reason in map(os.strerror, PASSING) if reason in told), None)


@lru_cache
def _compare_checksums(path: Path, size: int, mtime_ns: int) -> None:
    """Raise where a file's content is not what was written; once for each state of the file."""
    with zipfile.ZipFile(path) as archive:
        if (name := archive.testzip()) is not None:
            raise ValueError(f"{name} is not what was written")
