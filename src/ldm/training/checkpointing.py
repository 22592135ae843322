"""Checkpoints that are whole or absent, and that are data, not code."""

import os
import shutil
import zipfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from ldm.errors import UserError

VERSION = 1  # of what a checkpoint holds; those without one are older
PREVIOUS = "previous.ckpt"
COPIES = 3  # that lie on the disk for a moment: the last, the one before, and the one that is being written


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its target, flush it to the disk, then rename; read it with `weights_only=True`.

    The one that was there stays as `previous.ckpt`: what a disk does to a file later, no care in writing prevents.
    Lightning writes in the temporary directory and moves, which across file systems copies onto the target and can
    leave neither the old nor the new checkpoint whole.

    Attributes:
        anew: whether what is there now is another run's, which the first checkpoint of this one takes the place of.
    """

    anew = False

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
            elif target.exists():  # killed here, the run goes on from it under its new name
                os.replace(target, previous)
            os.replace(temporary, target)
            self.anew = False
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
        return torch.load(path, map_location=map_location, weights_only=True)


def last_checkpoint_callback(folder: Path, every: int) -> ModelCheckpoint:
    """Keep `last.ckpt` in `folder`, written anew every so many optimizer steps."""
    return ModelCheckpoint(
        dirpath=folder,
        filename="last",
        every_n_train_steps=every,
        save_top_k=1,
        enable_version_counter=False,
        save_on_train_epoch_end=False,
    )


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


def newest_whole(folder: Path) -> tuple[Path, Header, Sequence[str]] | None:
    """Find the checkpoint to go on from: `last.ckpt`, or where that is damaged the one before it.

    Returns:
        Its path, what it says of itself, and what is wrong with newer ones; None where there is no checkpoint.

    Raises:
        UserError: there are checkpoints, and none is whole.
    """
    faults: list[str] = []
    for path in (folder / "last.ckpt", folder / PREVIOUS):
        if path.exists():
            try:
                return path, read_header(path), faults
            except UserError as error:
                faults.append(str(error))
    if faults:
        raise UserError("; ".join([*faults, "to start anew over it: resume=never"]))
    return None


def read_header(path: Path) -> Header:
    """Read what a checkpoint says of itself; all of it is compared with its checksums.

    Raises:
        UserError: it is damaged, of another kind, of a later version, or holds more than data.
    """
    try:
        stat = path.stat()
        _compare_checksums(path, stat.st_size, stat.st_mtime_ns)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        header, version = Header(dict(content["identity"]), int(content["global_step"])), int(content.get("version", 0))
    except Exception as error:  # a zip, a pickle or its content: torch raises something else for each
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} cannot be read: {reason}") from error
    if version > VERSION:
        raise UserError(
            f"{path} was written by a later release of ldm (version {version} of its content, this one knows "
            f"{VERSION}): go on with that release"
        )
    return header


@lru_cache
def _compare_checksums(path: Path, size: int, mtime_ns: int) -> None:
    """Raise where a file's content is not what was written; once for each state of the file."""
    with zipfile.ZipFile(path) as archive:
        if (name := archive.testzip()) is not None:
            raise ValueError(f"{name} is not what was written")
