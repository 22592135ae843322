"""Callbacks that tests plug into runs by `_target_`, in this process and in others (with tests/ on PYTHONPATH)."""

import gc
import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch

from ldm.errors import UserError


class Stopped(Exception):
    """A crash that the test asked for."""


class StopAt(pl.Callback):
    """Crash in a stage after an optimizer step, before anything else of that step is done."""

    def __init__(self, stage: str, step: int) -> None:
        self.stage, self.step = stage, step

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        if pl_module.stage == self.stage and trainer.global_step == self.step:
            raise Stopped


class StopInValidation(StopAt):
    """Crash in the validation after an optimizer step."""

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        pass

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if pl_module.stage == self.stage and trainer.global_step == self.step:
            raise Stopped


class KillAt(pl.Callback):
    """Die without a word in a stage at an optimizer step; once, which the marker file remembers."""

    def __init__(self, stage: str, step: int, marker: str, signum: int = signal.SIGKILL) -> None:
        self.stage, self.step, self.marker, self.signum = stage, step, Path(marker), signum

    def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if pl_module.stage == self.stage and trainer.global_step == self.step and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), self.signum)
            time.sleep(0.1)


class Record(pl.Callback):
    """Note what each micro-batch and optimizer step does, for tests in the same process."""

    rows: ClassVar[list[dict[str, Any]]] = []
    weights: ClassVar[dict[str, list[dict[str, Any]]]] = {}  # of each stage's network, after each micro-batch

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        row = {
            "stage": pl_module.stage,
            "step": trainer.global_step,
            "loss": float(outputs["loss"]),
            "rate": trainer.optimizers[0].param_groups[0]["lr"],
            "updates": None if pl_module.ema is None else int(pl_module.ema.num_updates),
            "accumulate": trainer.accumulate_grad_batches,
        }
        self.rows.append(row)
        state = {name: tensor.detach().clone() for name, tensor in pl_module.network.state_dict().items()}
        self.weights.setdefault(pl_module.stage, []).append(state)


class Usage(pl.Callback):
    """Append what this process holds to a file of JSON lines, every so many optimizer steps.

    `rss` in KiB, `files` open, `threads`, and `children` (processes); `objects` that Python's collector knows.
    """

    def __init__(self, path: str, every: int = 10) -> None:
        self.path, self.every = Path(path), every

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every:
            return
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        row = {
            "stage": pl_module.stage,
            "step": trainer.global_step,
            "rss": int(status["VmRSS"].split()[0]),
            "threads": int(status["Threads"]),
            "files": len(os.listdir("/proc/self/fd")),
            "children": len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()),
            "objects": len(gc.get_objects()),
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class RankEvent(pl.Callback):
    """Let something happen to one rank of several, in a stage after so many steps; once, which the marker remembers.

    Args:
        stage, step, rank: where.
        event: "raise", "user_error", "kill" or "hang".
        marker: file.
        hook: of the callback that it happens in.
    """

    def __init__(
        self, stage: str, step: int, rank: int, event: str, marker: str, hook: str = "on_train_batch_start"
    ) -> None:
        self.stage, self.step, self.rank, self.event, self.marker = stage, step, rank, event, Path(marker)
        setattr(self, hook, self._happen)

    def _happen(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        here = (pl_module.stage, trainer.global_step, trainer.global_rank) == (self.stage, self.step, self.rank)
        if not here or self.marker.exists():
            return
        self.marker.touch()
        if self.event == "raise":
            raise Stopped("broken on purpose")
        if self.event == "user_error":
            raise UserError("bad on purpose")
        if self.event == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)


class Told(pl.Callback):
    """Write the SHA-256 of what it was told: proof that it got a secret, without the secret."""

    def __init__(self, path: str, **secrets: str) -> None:
        self.path, self.secrets = Path(path), secrets

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        digests = {name: hashlib.sha256(value.encode()).hexdigest() for name, value in self.secrets.items()}
        self.path.write_text(json.dumps(digests), encoding="utf-8")


def listening() -> dict[int, str]:
    """Return the addresses at which any process of this machine listens by TCP, by port, as /proc/net has them."""
    found = {}
    for path in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            _, local, _, state, *_ = line.split()
            if state == "0A":
                address, _, port = local.partition(":")
                found[int(port, 16)] = address
    return found


class Listens(pl.Callback):
    """Append the addresses at which this process and its children listen, at each step; lines of JSON."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        rows = [line.split() for each in ("tcp", "tcp6") for line in self._table(each)]
        addresses = {f"socket:[{row[9]}]": row[1].partition(":")[0] for row in rows if row[3] == "0A"}
        mine = {link for process in self._processes(os.getpid()) for link in self._links(process)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([address for link, address in addresses.items() if link in mine]) + "\n")

    @staticmethod
    def _table(name: str) -> list[str]:
        path = Path("/proc/net") / name
        return path.read_text().splitlines()[1:] if path.exists() else []

    def _processes(self, process: int) -> list[int]:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        return [process, *(each for child in children for each in self._processes(int(child)))]

    @staticmethod
    def _links(process: int) -> list[str]:
        found = []
        for name in os.listdir(f"/proc/{process}/fd"):
            try:
                found.append(os.readlink(f"/proc/{process}/fd/{name}"))
            except OSError:  # closed by now
                continue
        return found


class Curve(pl.Callback):
    """Append the loss of each optimizer step, the mean over ranks, to a file; keep the gradient of the first.

    Args:
        folder: of `loss.txt` and `gradient.pt`.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._losses: list[float] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == 0:
            grads = {name: p.grad for name, p in pl_module.network.named_parameters() if p.grad is not None}
            whole = {name: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for name, g in grads.items()}
            if trainer.is_global_zero:
                self.folder.mkdir(parents=True, exist_ok=True)
                torch.save(whole, self.folder / "gradient.pt")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean"))
        self._losses.append(loss * trainer.accumulate_grad_batches)
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            mean = sum(self._losses) / len(self._losses)
            with (self.folder / "loss.txt").open("a") as file:
                file.write(f"{trainer.global_step} {mean!r}\n")
            self._losses.clear()


class WaitAt(pl.Callback):
    """Make a file at an optimizer step, and wait until somebody ends the process."""

    def __init__(self, step: int, marker: str) -> None:
        self.step, self.marker = step, Path(marker)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            self.marker.touch()
            time.sleep(600)
