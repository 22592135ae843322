"""Stop when a person or a cluster asks to: after this step, with a checkpoint that the same command goes on from."""

import os
import shutil
import signal
import subprocess
from types import FrameType
from typing import Any

import pytorch_lightning as pl

from ldm import ranks
from ldm.ranks import main_process

# Exit codes: a cluster's signals, and Ctrl-C.
CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}


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
        self._last_step = -1

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._before = {signum: signal.getsignal(signum) for signum in CODES}

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")  # which Lightning leaves out then

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

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        ranks.meet()  # where the first rank draws and measures at last, however long that takes
        self._heed(trainer)  # what came in the last validation, or while the last grid was drawn

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._last_step:  # of several batches that make a step only the last ends it
            return
        self._last_step = trainer.global_step
        self._heed(trainer)

    def _heed(self, trainer: pl.Trainer) -> None:
        if not (got := self._agreed()):
            return
        trainer.save_checkpoint(self.path)
        if trainer.is_global_zero:
            print(f"stopped after step {trainer.global_step}; the same command goes on from there ({self.path})")
            if got == signal.SIGUSR1:
                _queue_again()
        raise Stopped(CODES[signal.Signals(got)])

    def _agreed(self) -> int:
        """Return the signal that any rank has got; 0 for none."""
        return self._got if ranks.peers is None else ranks.peers.largest(self._got)


def _queue_again() -> None:
    """Put this SLURM job into the queue again, where it is one."""
    job, scontrol = os.environ.get("SLURM_JOB_ID"), shutil.which("scontrol")
    if job is None or scontrol is None:
        return
    done = subprocess.run([scontrol, "requeue", job], capture_output=True, text=True)
    print(
        f"job {job} is in the queue again" if done.returncode == 0 else f"scontrol requeue {job}: {done.stderr.strip()}"
    )
