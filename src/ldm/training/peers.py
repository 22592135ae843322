"""Ranks that end together: where one fails, is killed or hangs, all end, and its error is the one that is shown.

Each process writes a beat into the store that the process group met at, once a second: a number, and how far its
training is. The first rank looks at all beats, the others at that of the first. Whoever fails, or sees that another is
gone or hangs, writes why: the first to do so is believed and tells it, and all end with its exit code.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from ldm import ranks
from ldm.errors import UserError
from ldm.redact import redacted

BEAT = 1.0  # seconds between beats
GRACE = 2.0  # that the others get to read why a run ends
GONE = 5.0  # without a beat, of a rank whose connections have broken
SILENT = 60.0  # without a beat at the least, of one whose connections hold
FAILURE = "ldm/failure"
ENGINES = ("torch/nn/parallel/distributed.py", "torch/autograd/graph.py")  # in which ranks exchange gradients
WITHOUT_END = timedelta(days=30)
AGAIN = "The same command goes on from the last checkpoint"


class Clock:
    """Tells from beats, looked at again and again, which rank hangs.

    Args:
        timeout: seconds without any rank going on, before those that are behind are taken to hang.
        now: in seconds, of a clock that only goes forward.
        sees_all: whether it is told of all ranks; else it only tells of silence, for who waits for whom is not known.
    """

    def __init__(self, timeout: float, now: float, sees_all: bool = True) -> None:
        self.timeout, self.sees_all = timeout, sees_all
        self._last_look = self._since = now
        self._places: list[Any] = []
        self._heard: dict[int, tuple[int, float]] = {}  # of each rank its last beat, and when it came

    def fault(self, beats: Mapping[int, Mapping[str, Any]], now: float) -> tuple[int, str] | None:
        """Return the rank that hangs and what to say of it; None where none does.

        Args:
            beats: of the ranks that are looked at.
            now: see above.
        """
        paused = now - self._last_look > 10 * BEAT  # this process was stopped, the others most likely too
        self._last_look = now
        for rank, beat in beats.items():
            if paused or self._heard.get(rank, (-1, now))[0] != beat["number"]:
                self._heard[rank] = beat["number"], now
            elif now - self._heard[rank][1] > max(self.timeout, SILENT):
                return rank, f"{_name(rank, beat)} has given no sign for {now - self._heard[rank][1]:.0f} s; it was "
        places = [beat["place"] for beat in beats.values()]
        if paused or places != self._places or any(beat["busy"] for beat in beats.values()):
            self._places, self._since = places, now
        elif self.sees_all and now - self._since > self.timeout:
            # The others wait for it: at a later place, or at the same one in a collective call.
            rank = min(beats, key=lambda each: (beats[each]["place"], beats[each]["waits"]))
            return rank, f"{_name(rank, beats[rank])} hangs: for {now - self._since:.0f} s no rank has gone on; it is "
        return None


def _name(rank: int, beat: Mapping[str, Any]) -> str:
    return f"rank {rank} (process {beat['pid']} on {beat['host']})"


class Peers:
    """What a rank knows of the others; there is one of each process, from the first stage on.

    Args:
        rank, world_size: of this process.
        timeout: seconds that a step may take on any rank before that rank is taken to hang.

    Attributes:
        busy: what this rank does that may take any time; None where the clock runs.
        place, where: how far its training is, as numbers that only grow, and in words.
        met: whether the ranks need each other now.
    """

    def __init__(self, rank: int, world_size: int, timeout: float) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.busy: str | None = "starting"
        self.place, self.where, self.met = (-1, 0), "starting", True
        self._group: Any = dist.new_group(backend="gloo", timeout=WITHOUT_END)  # the host waits in it, not a GPU
        self._store = dist.distributed_c10d._get_default_store().clone()
        self._number, self._host = 0, socket.gethostname()
        self._beat()
        self.meet()  # now there is a beat of every rank
        threading.Thread(target=self._watch, daemon=True, name="peers").start()

    def meet(self) -> None:
        """Wait for all ranks, for as long as it takes."""
        dist.barrier(self._group)

    def largest(self, number: int) -> int:
        """Return the largest of all ranks' numbers."""
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
        return int(largest)

    # ------------------------------------------------------------------------------------------------------- the end

    def fail(self, error: BaseException) -> NoReturn:
        """End the run because of an error of this rank's own, or one that another's end has brought about."""
        if _is_broken_connection(error) and (silent := self._silent()):
            self.tell_gone(silent[0], "is gone")
        if isinstance(error, UserError):
            self._tell(self.rank, f"error: rank {self.rank}: {error}", code=2)
        trace, where = "".join(traceback.format_exception(error)), f"it was {self.where}. {AGAIN}"
        self._tell(self.rank, f"{trace}error: rank {self.rank} of {self.world_size} failed; {where}")

    def tell_gone(self, rank: int, how: str) -> NoReturn:
        """End the run because a rank is no more."""
        try:
            beat = self._read([rank])[rank]
            text = f"error: {_name(rank, beat)} {how}; it was {beat['where']}. {AGAIN}"
        except RuntimeError:  # the store was the first rank's
            text = f"error: rank {rank} {how}. {AGAIN}"
        self._tell(rank, text)

    def _tell(self, rank: int, text: str, code: int = 1, hangs: bool = False) -> NoReturn:
        """End with this as the reason, where no other has been told before; whoever was first shows it."""
        text = redacted(text)
        mine = {"rank": rank, "by": self.rank, "host": self._host, "text": text, "code": code, "hangs": hangs}
        try:
            told = json.loads(self._store.compare_set(FAILURE, "", json.dumps(mine)))
        except RuntimeError:
            told = mine
        if told == mine:
            print(text, file=sys.stderr, flush=True)
            self._show_where(told)
        self._leave(told)

    def _show_where(self, told: Mapping[str, Any]) -> None:
        if told["hangs"] and told["rank"] == self.rank:
            stack = "".join(traceback.format_stack(_main_frame()))
            print(f"rank {self.rank} hangs here:\n{stack}", file=sys.stderr, flush=True)

    def _leave(self, told: Mapping[str, Any]) -> NoReturn:
        if self.rank == 0 and told["host"] != self._host:  # the first rank's log is the one that is looked at
            print(told["text"], file=sys.stderr, flush=True)
        if self.rank == 0 or ranks.started:
            time.sleep(GRACE)  # the store may be this process's: let the others read
        ranks.end(told["code"])

    # ------------------------------------------------------------------------------------------------------ watching

    def _beat(self) -> None:
        self._number += 1
        beat = {
            "number": self._number, "place": self.place, "where": self.where, "busy": self.busy,
            "waits": _is_in_collective(_main_frame()), "host": self._host, "pid": os.getpid(),
        }  # fmt: skip
        self._store.set(f"ldm/beat/{self.rank}", json.dumps(beat))

    def _read(self, of: Sequence[int]) -> dict[int, dict[str, Any]]:
        beats = self._store.multi_get([f"ldm/beat/{rank}" for rank in of])
        return {rank: json.loads(beat) for rank, beat in zip(of, beats, strict=True)}

    def _silent(self) -> list[int]:
        """Return the ranks that give no beat for a while, in which whoever knows better may tell."""
        everyone = range(self.world_size)
        try:
            before = self._read(everyone)
            time.sleep(GONE)
            after = self._read(everyone)
        except RuntimeError:  # the store went with the first rank
            time.sleep(GONE)
            return [0]
        return [rank for rank in everyone if before[rank]["number"] == after[rank]["number"]]

    def _watch(self) -> None:
        clock = Clock(self.timeout, time.monotonic(), sees_all=self.rank == 0)
        whom = range(self.world_size) if self.rank == 0 else [0]
        while True:
            time.sleep(BEAT)
            try:
                self._beat()
                told = json.loads(self._store.get(FAILURE)) if self._store.check([FAILURE]) else None
                beats = self._read(whom)
            except RuntimeError:
                time.sleep(GRACE)
                if self.met:
                    self._follow_first()
                return
            if told is not None:
                self._show_where(told)
                time.sleep(GRACE)  # the main thread may end by the same cause, and tidy up before
                self._leave(told)
            fault = clock.fault(beats, time.monotonic())
            if fault and self.met:
                rank, text = fault
                more = f"{beats[rank]['where']}. {AGAIN}; a step that takes long by rights needs a longer "
                self._tell(rank, f"error: {text}{more}trainer.timeout_minutes", hangs=True)

    def _follow_first(self) -> NoReturn:
        """End after the first rank, with which the store went."""
        if self.rank == 1 and ranks.LAUNCHER not in os.environ:  # else `ldm.ranks` tells it
            print(f"error: rank 0 is gone. {AGAIN}", file=sys.stderr, flush=True)
        ranks.end(1)


def _main_frame() -> FrameType | None:
    return sys._current_frames().get(threading.main_thread().ident or 0)


def _is_in_collective(frame: FrameType | None) -> bool:
    """Tell whether a thread waits for other ranks, by the functions that it is in."""
    if frame is not None and frame.f_code.co_filename.endswith(ENGINES):
        return True
    while frame is not None:
        if "/torch/distributed/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def _is_broken_connection(error: BaseException) -> bool:
    """Tell whether an error may be no more than the end of another rank."""
    named = any(word in str(error) for word in ("gloo", "NCCL", "Connection ", "ProcessGroup"))
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and named)


class Watch(pl.Callback):
    """Let ranks end together from now on, and note how far this one is; the first of all callbacks.

    Args:
        timeout: seconds, see `Peers`.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not dist.is_initialized():
            return
        if ranks.peers is None:
            ranks.peers = Peers(trainer.global_rank, trainer.world_size, self.timeout)
        ranks.peers.met = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._at(trainer, pl_module, 0, "before the first step", None)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._at(trainer, pl_module, 1, "in the forward pass")

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Any) -> None:
        self._at(trainer, pl_module, 2, "in the backward pass")

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self._at(trainer, pl_module, 3, "in the optimizer's step")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._at(trainer, pl_module, 4, "between two batches")

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._at(trainer, pl_module, 5 + batch_idx, f"in validation, batch {batch_idx}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._at(trainer, pl_module, 10**9, "after the last step", "finishing")

    def _at(self, trainer: pl.Trainer, module: Any, phase: int, what: str, busy: str | None = None) -> None:
        if (peers := ranks.peers) is not None:
            batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            peers.place, peers.busy = (batches, phase), busy
            peers.where = f"at step {trainer.global_step} of {module.stage}, {what}"
