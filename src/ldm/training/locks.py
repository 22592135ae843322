"""Who may write where: a run directory belongs to one run, a shared result is made by one of those that want it."""

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO

from ldm.errors import UserError
from ldm.ranks import main_process, say

LOOK = 0.5  # seconds between looks at a lock that another process holds
Waiting = Callable[[str], AbstractContextManager[Callable[[str], None]]]


@contextmanager
def held(run_dir: Path, wait: bool = False) -> Iterator[None]:
    """Hold a run directory against other runs for as long as this process lives.

    A directory that was not there before and that a user error leaves without anything trained is removed again.

    Args:
        run_dir: made where it is not there.
        wait: for another run that holds it, in place of an error.

    Raises:
        UserError: another run holds it (says who), or it cannot be written.
    """
    if not main_process():  # launched by the process that holds it
        yield
        return
    try:
        made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"the run directory {run_dir} cannot be written: {error.strerror}") from error
    with file:
        if not _taken(file):
            holder = _read(file) or "another process"
            if not wait:
                raise UserError(
                    f"{run_dir} is in use by {holder}; wait for it, stop it, or give this run its own name=…"
                ) from None
            say(f"{run_dir} is in use by {holder}; waiting for it")
            while not _taken(file):
                time.sleep(LOOK)
        _sign(file, _this_process())
        try:
            yield
        except UserError:
            worth_keeping = (run_dir / name for name in ("checkpoints", "quarantine.txt"))
            if run_dir in made and not any(path.exists() for path in worth_keeping):
                shutil.rmtree(run_dir)
                for folder in made[1:]:
                    with suppress(OSError):  # something else lies in it by now
                        folder.rmdir()
            raise


def in_use(run_dir: Path) -> bool:
    """Tell whether a run holds this directory."""
    try:
        with (run_dir / ".lock").open("r+") as file:
            return not _taken(file)
    except OSError:
        return False


@contextmanager
def turn(path: Path, mine: str, waiting: Waiting) -> Iterator[None]:
    """Wait until no other process is inside with the same lock file, however it left; the file is gone afterwards.

    Args:
        path: of the lock file; its folder is made.
        mine: what the others read of this process in the meantime.
        waiting: called with what the holder says of itself where there is one; gives what to call again and again.
    """
    if (file := _opened_and_taken(path)) is None:
        with waiting(said_by_holder(path)) as look:
            while (file := _opened_and_taken(path)) is None:
                look(said_by_holder(path))
                time.sleep(LOOK)
    with file:
        _sign(file, f"{mine}\n{_this_process()}")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # there is something in it
                path.parent.rmdir()


def said_by_holder(path: Path) -> str:
    """Return what the process that holds a lock file says of itself; an empty string where none does."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def _opened_and_taken(path: Path) -> IO[str] | None:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a+", encoding="utf-8")
        except FileNotFoundError:  # whoever was inside has removed the folder in the meantime
            continue
        if not _taken(file):
            file.close()
            return None
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                return file
        file.close()  # the one before has removed it in the meantime


def _taken(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however it ends
    except BlockingIOError:
        return False
    return True


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip()


def _sign(file: IO[str], text: str) -> None:
    file.truncate(0)
    file.write(text)
    file.flush()


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
