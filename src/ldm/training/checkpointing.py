"""Checkpoints that are whole or absent, and that are data, not code."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from ldm.errors import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its target, flush it to the disk, then rename; read it with `weights_only=True`.

    Lightning writes in the temporary directory and moves, which across file systems copies onto the target and can
    leave neither the old nor the new checkpoint whole.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
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


class Header(NamedTuple):
    """What a checkpoint says of itself."""

    identity: dict[str, Any]  # the config that decides its weights
    step: int


def read_header(path: Path) -> Header:
    """Read what a checkpoint says of itself, without its weights.

    Raises:
        UserError: it is damaged, of another kind, or holds more than data.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return Header(dict(content["identity"]), int(content["global_step"]))
    except Exception as error:  # a zip, a pickle or its content: torch raises something else for each
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} cannot be read: {reason}. To start anew over it: resume=never") from error
