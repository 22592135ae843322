"""Which of a run's processes this is, known before any of them knows the others; and how they end together."""

import functools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

LAUNCHER = "LDM_LAUNCHER"  # in the environment: the id of the process that started further ranks of its node
LATE = 5.0  # seconds
peers: Any = None  # where there are others, what knows them: an `ldm.training.peers.Peers`
started: list[subprocess.Popen[bytes]] = []  # further ranks that this process has started


def main_process() -> bool:
    """Tell whether this is the first process of a run, by what Lightning, torchrun and Slurm tell the others."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def say(line: str) -> None:
    """Print a line, once for all processes of a run."""
    if main_process():
        print(line, flush=True)


@functools.cache
def say_once(line: str) -> None:
    """Print a line the first time that there is reason to."""
    say(line)


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Do what may take long while the other ranks wait: no rank is taken to hang meanwhile.

    Args:
        what: is done, for people.
    """
    if peers is None:
        yield
        return
    before, peers.busy = peers.busy, what
    try:
        yield
    finally:
        peers.busy = before


def meet() -> None:
    """Wait until every rank has come here, for as long as that takes."""
    if peers is not None:
        peers.meet()


def part() -> None:
    """Say that what comes now is done without the others: they may end before this process does."""
    if peers is not None:
        peers.met = False


@contextmanager
def ending_together() -> Iterator[None]:
    """End all processes of a run where one fails, with the error of the first that did; a rank with who started it.

    What fails before the ranks know of each other mostly fails on all: the first tells it, and the others only where
    they are still there some seconds later.
    """
    follow_launcher()
    try:
        yield
    except Exception as error:
        if peers is not None:
            peers.fail(error)
        if not main_process():
            time.sleep(LATE)
        raise


def end(code: int) -> NoReturn:
    """End this process at once, and the ranks that it has started."""
    sys.stdout.flush()
    sys.stderr.flush()
    for process in started:
        process.kill()
    os._exit(code)


def follow_launcher() -> None:
    """End with the process that has started this one, however that ends; return where a person or a cluster has."""
    launcher = os.environ.get(LAUNCHER, "")
    if launcher in ("", str(os.getpid())):
        return

    def follow() -> None:
        while str(os.getppid()) == launcher:
            time.sleep(0.5)
        if os.environ.get("LOCAL_RANK") == "1":  # once a node
            print(f"error: the first rank of this node (process {launcher}) is gone, the others end", file=sys.stderr)
        end(1)

    threading.Thread(target=follow, daemon=True, name="follow-launcher").start()
