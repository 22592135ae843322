"""Stop when a person or a cluster asks to: after this step, with a checkpoint that the same command goes on from."""

import os
import signal
from types import FrameType
from typing import Any

import pytorch_lightning as pl

from ldm import ranks
from ldm.ranks import main_process
from ldm.training.checkpointing import save_checkpoint
from ldm.training.signals import CODES, queue_again


class Stopped(Exception):
    """Training has ended after a signal, its checkpoint is written.

    Attributes:
        code: that the process should exit with.
    """

    def __init__(self, code: int) -> None:
        super().__init__(f"stopped by a signal, exit code {code}")
        self.code = code


class StopOnSignal(pl.Callback):
    """Finish the step in hand when SIGTERM, SIGUSR1 or Ctrl-C comes, write a checkpoint and raise `Stopped`.

    A validation or a drawing that is going on is finished too. A second signal ends the process at once; checkpoints
    are whole at any moment. Ranks agree on the step: whichever gets the signal, all stop after the same one. On SLURM
    SIGUSR1, which announces the end of a job's time, puts the job into the queue again.

    Args:
        path: of the checkpoint.
    """

    def __init__(self, path: Any) -> None:
        self.path = path
        self._got = 0  # the signal
        self._before: dict[int, Any] = {}
        self._last_step, self._between_steps = -1, False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._before = {signum: signal.getsignal(signum) for signum in CODES}

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self._restore()
        if self._got:  # it came after the last look
            os.kill(os.getpid(), self._got)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._restore()  # Lightning leaves teardown out then

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._got:
            os._exit(CODES[signal.Signals(signum)])
        self._got = signum
        if main_process():
            name = signal.Signals(signum).name
            os.write(2, f"\n{name}: stopping after this step; once more stops at once\n".encode())

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._last_step = trainer.global_step
        for signum in CODES:  # in place of Lightning's, which are there by now
            signal.signal(signum, self._note)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != self._last_step:  # of several batches that make a step only the last ends it
            self._last_step, self._between_steps = trainer.global_step, True

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._between_steps and trainer.global_step < trainer.max_steps:
            self._heed(trainer)
        else:
            ranks.meet()  # the first rank may have drawn and measured after the last step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._between_steps:
            self._between_steps = False
            self._heed(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        ranks.meet()  # where the first rank draws and measures at last, however long that takes
        self._heed(trainer)

    def _heed(self, trainer: pl.Trainer) -> None:
        """Stop where a signal has come: figures of the step are logged by now, and not in `on_train_batch_end`."""
        if not (got := self._agreed()):
            return
        save_checkpoint(trainer, self.path)
        if trainer.is_global_zero:
            print(f"stopped after step {trainer.global_step}; the same command goes on from there ({self.path})")
            if got == signal.SIGUSR1:
                queue_again()
        raise Stopped(CODES[signal.Signals(got)])

    def _agreed(self) -> int:
        """Return the signal that any rank has got; 0 for none."""
        return self._got if ranks.peers is None else ranks.peers.largest(self._got)
