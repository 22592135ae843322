"""What the crash harness plugs into a real `train.py`: a trace of all that training does, events, and sabotage.

`crashes.py` composes them into runs by `_target_` and reads the trace.
"""

import ctypes
import errno
import hashlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytorch_lightning as pl
import torch

from ldm.data import datamodule
from ldm.training.checkpointing import AtomicCheckpointIO


def leaves(value: Any) -> Iterator[bytes]:
    """Give the bytes of all that a nest of containers holds, in order."""
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        yield f"{plain.dtype}{tuple(plain.shape)}".encode()
        yield plain.view(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    elif isinstance(value, dict):
        for key in value:
            yield str(key).encode()
            yield from leaves(value[key])
    elif isinstance(value, list | tuple):
        for each in value:
            yield from leaves(each)
    else:
        yield repr(value).encode()


def digest(value: Any) -> str:
    sha = hashlib.sha256()
    for part in leaves(value):
        sha.update(len(part).to_bytes(8, "little") + part)
    return sha.hexdigest()[:16]


class Trace(pl.Callback):
    """Append JSON lines to a file: what each batch held, its loss, and a digest of all states after each step.

    A line is one `write`, so that what was done before a SIGKILL is there after it.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._last_step = -1

    def _write(self, row: str, trainer: pl.Trainer, pl_module: Any, **values: Any) -> None:
        place = {"row": row, "stage": pl_module.stage, "step": trainer.global_step, "rank": trainer.global_rank}
        file = os.open(f"{self.path}.{trainer.global_rank}", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(file, (json.dumps({**place, **values}) + "\n").encode())
        os.close(file)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._last_step = trainer.global_step
        trainer.log_every_n_steps = 2  # type: ignore[attr-defined]
        self._write("begin", trainer, pl_module)
        save = trainer.strategy.save_checkpoint

        def saved(checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            self._write("saving", trainer, pl_module)
            save(checkpoint, *args, **kwargs)
            self._write("saved", trainer, pl_module)

        trainer.strategy.save_checkpoint = saved  # type: ignore[method-assign]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        micro_batch = batch_idx % trainer.accumulate_grad_batches
        self._write("batch", trainer, pl_module, micro_batch=micro_batch, digest=digest(batch))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        micro_batch = batch_idx % trainer.accumulate_grad_batches
        self._write("loss", trainer, pl_module, micro_batch=micro_batch, loss=float(outputs["loss"]).hex())
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        state = {
            "weights": pl_module.state_dict(),  # the averages among them
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        }
        self._write("state", trainer, pl_module, digest=digest(state))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        values = {key: float(value) for key, value in trainer.callback_metrics.items() if "/val_" in key}
        self._write("validation", trainer, pl_module, values={key: value.hex() for key, value in values.items()})


class Act(pl.Callback):
    """Let something happen at a moment of a run, once, which a marker file remembers.

    Args:
        phase: one of `PHASES`.
        stage: in which stage.
        step: the optimizer step from which on the moment counts; of phases outside of training, how often to let it
            pass before.
        event: one of `EVENTS`.
        marker: file that is made when it happens.
        ballast: file that fills the disk, where that is what happens.
        rank: of the process that it happens to.
    """

    def __init__(self, phase: str, stage: str, step: int, event: str, marker: str, ballast: str, rank: int = 0) -> None:
        assert phase in PHASES and event in EVENTS, (phase, event)
        self.phase, self.stage, self.step, self.event = phase, stage, step, event
        self.marker, self.ballast = Path(marker), Path(ballast)
        self.armed = not self.marker.exists() and int(os.environ.get("LOCAL_RANK", 0)) == rank
        if self.armed and phase in OUTSIDE:
            self._left = step
            sys.addaudithook(self._audit)

    def act(self) -> None:
        if self.armed:
            self.armed = False
            self.marker.write_text(f"{os.getpid()}")
            EVENTS[self.event](self)

    def _due(self, trainer: pl.Trainer, pl_module: Any, phase: str) -> bool:
        return self.armed and (self.phase, self.stage) == (phase, pl_module.stage) and trainer.global_step >= self.step

    def _audit(self, name: str, args: tuple[Any, ...]) -> None:
        """See renames, which make files whole, before they happen; `step` of them pass."""
        if self.armed and name == "os.rename" and OUTSIDE[self.phase](str(args[1]), self.stage):
            self._left -= 1
            if self._left < 0:
                self.act()

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._due(trainer, pl_module, "start"):
            self.act()
        if self.phase in WRITING and self.stage == pl_module.stage and self.armed:
            self._watch_writing(trainer, pl_module)
        if self.phase == "sampling" and self.stage == pl_module.stage:
            preview = pl_module.preview

            def watched(*args: Any) -> Any:
                if self._due(trainer, pl_module, "sampling"):
                    self.act()
                return preview(*args)

            pl_module.preview = watched

    def _watch_writing(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Act on the way of a checkpoint to the disk."""
        save, fsync, replace, replaced = torch.save, os.fsync, os.replace, [0]

        def due(phase: str) -> bool:
            return self._due(trainer, pl_module, phase)

        def torch_save(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            if not due("half written"):
                return save(content, file, *args, **kwargs)
            whole = io.BytesIO()
            save(content, whole, *args, **kwargs)
            data = whole.getvalue()
            if isinstance(file, str | os.PathLike):
                file = open(file, "wb")  # noqa: SIM115 the process may die here
            file.write(data[: len(data) // 2])
            file.flush()
            self.act()
            file.write(data[len(data) // 2 :])
            file.flush()

        def os_fsync(number: int) -> None:
            if due("not synced"):
                self.act()
            fsync(number)

        def os_replace(old: Any, new: Any, *args: Any, **kwargs: Any) -> None:
            if str(new).endswith("previous.ckpt"):
                if due("not renamed"):
                    self.act()
                replaced[0] += 1
            elif str(new).endswith("last.ckpt") and replaced[0] and due("between renames"):
                self.act()
            replace(old, new, *args, **kwargs)
            if str(new).endswith("last.ckpt") and due("renamed"):
                self.act()

        torch.save, os.fsync, os.replace = torch_save, os_fsync, os_replace  # type: ignore[assignment]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        first = batch_idx % trainer.accumulate_grad_batches == 0
        if self._due(trainer, pl_module, "batch" if first else "accumulating"):
            self.act()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._due(trainer, pl_module, "gradient"):
            self.act()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._due(trainer, pl_module, "stepped"):
            self.act()

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if self._due(trainer, pl_module, "validation"):
            self.act()

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._due(trainer, pl_module, "end"):
            self.act()


# Moments outside of a training loop: what is renamed to what.
OUTSIDE: dict[str, Callable[[str, str], bool]] = {
    "caching": lambda path, stage: "/cache/" in path,
    "exporting": lambda path, stage: f"/stages/{stage}-" in path or (stage == "diffusion" and "/model/" in path),
}
WRITING = ("half written", "not synced", "not renamed", "between renames", "renamed")
TRAINING = ("start", "batch", "accumulating", "gradient", "stepped", "validation", "sampling", "end")
PHASES = (*TRAINING, *WRITING, *OUTSIDE)


def _send(signum: int) -> Callable[[Act], None]:
    def send(act: Act) -> None:
        # Clusters and terminals send to all processes of a run: here to its group, which the harness has made.
        if signum != signal.SIGKILL and os.getpid() == os.getpgrp():
            os.killpg(0, signum)
        else:
            os.kill(os.getpid(), signum)
        time.sleep(0.2)

    return send


def _fill_disk(act: Act) -> None:
    """Leave no byte on the disk."""
    with act.ballast.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC


def _kill_worker(act: Act) -> None:
    """Do to a loader process what the kernel does when memory runs out."""
    children = psutil.Process().children()
    for child in children:
        if "resource_tracker" not in " ".join(child.cmdline()):
            child.kill()
            return
    raise AssertionError("there is no loader process")


def _raise(act: Act) -> None:
    raise RuntimeError("the crash that was asked for")


def _abort(act: Act) -> None:
    ctypes.string_at(0)  # reads where nothing is: a crash in native code


EVENTS: dict[str, Callable[[Act], None]] = {
    "SIGKILL": _send(signal.SIGKILL),
    "SIGTERM": _send(signal.SIGTERM),
    "SIGUSR1": _send(signal.SIGUSR1),
    "SIGINT": _send(signal.SIGINT),
    "segfault": _abort,
    "exception": _raise,
    "full disk": _fill_disk,
    "worker killed": _kill_worker,
}


class Sabotage(pl.Callback):
    """Break a promise, for the harness to notice.

    Args:
        what: one of `SABOTAGES`.
    """

    def __init__(self, what: str) -> None:
        assert what in SABOTAGES, what
        self.what = what
        if what == "writing in place":
            AtomicCheckpointIO.save_checkpoint = _write_in_place  # type: ignore[method-assign]
        elif what == "position":  # the data begin again, as they do where no position is saved
            datamodule.EndlessBatches = _from_the_start(datamodule.EndlessBatches)  # type: ignore[misc]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.what == "optimizer":  # Adam's moments are forgotten
            for optimizer in trainer.optimizers:
                optimizer.state.clear()
        elif self.what == "average" and pl_module.ema is not None:
            for average, weight in zip(pl_module.ema.average.parameters(), pl_module.network.parameters(), strict=True):
                average.data.copy_(weight.data)
        elif self.what == "draws":  # come from a state that no checkpoint holds
            source = torch.Generator().manual_seed(int.from_bytes(os.urandom(4)))
            pl_module.generator = lambda batch_idx: source


SABOTAGES = ("writing in place", "position", "optimizer", "average", "draws")


def _write_in_place(self: Any, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("wb") as file:
        torch.save(checkpoint, file)


def _from_the_start(batches: Any) -> Any:
    def begun(*args: Any) -> Any:
        return batches(*args[:-1], 0)

    return begun
