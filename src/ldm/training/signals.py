"""What the signals of a cluster and of a person mean to a run. Nothing here imports torch."""

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ldm.ranks import main_process

# Exit codes: a cluster's signals, and Ctrl-C.
CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """End on SIGTERM and SIGUSR1 as a run should where no step is in hand: tidied up, queued again, with exit code 143.

    While a stage trains, `ldm.training.stopping` takes their place. Ctrl-C is Python's own.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone may listen
        yield
        return
    before = {signum: signal.signal(signum, _end) for signum in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _end(signum: int, frame: FrameType | None) -> None:
    if main_process():
        os.write(2, f"\n{signal.Signals(signum).name}: stopped; the same command goes on from what is there\n".encode())
        if signum == signal.SIGUSR1:
            queue_again()
    raise SystemExit(CODES[signal.Signals(signum)])


def queue_again() -> None:
    """Put this SLURM job into the queue again, where it is one."""
    job, scontrol = os.environ.get("SLURM_JOB_ID"), shutil.which("scontrol")
    if job is None or scontrol is None:
        return
    done = subprocess.run([scontrol, "requeue", job], capture_output=True, text=True)
    print(
        f"job {job} is in the queue again" if done.returncode == 0 else f"scontrol requeue {job}: {done.stderr.strip()}"
    )
