"""Who may write where: a run directory belongs to one run, a shared result is made by one of those that want it."""

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from ldm.errors import UserError
from ldm.ranks import main_process, say

LOOK = 0.5  # seconds between looks at a lock that another process holds
TRIES = 100  # to open a lock file whose folder other processes remove
Waiting = Callable[[str], AbstractContextManager[Callable[[str], None]]]


@contextmanager
def held(run_dir: Path, wait: bool = False) -> Iterator[None]:
    """Hold a run directory against other runs for as long as this process lives.

    A directory that was not there before and that a user error leaves without anything trained is removed again.

    Args:
        run_dir: made where it is not there.
        wait: for another run that holds it, in place of an error.

    Raises:
        UserError: another run holds it (says who), or it cannot be written, or its disk knows no locks.
    """
    if not main_process():  # launched by the process that holds it
        yield
        return
    path = run_dir / ".lock"
    if (lock := _opened_and_taken(path)) is None:
        holder = said_by_holder(path).strip() or "another process"
        if not wait:
            raise UserError(f"{run_dir} is in use by {holder}; wait for it, stop it, or give this run its own name=…")
        say(f"{run_dir} is in use by {holder}; waiting for it")
        while (lock := _opened_and_taken(path)) is None:
            time.sleep(LOOK)
    with lock.file:
        _sign(lock.file, _this_process())
        try:
            yield
        except UserError:
            worth_keeping = (run_dir / name for name in ("checkpoints", "quarantine.txt"))
            if run_dir in lock.made and _lies_at(lock.file, path) and not any(each.exists() for each in worth_keeping):
                _remove(path, lock.made)
            raise


def in_use(run_dir: Path) -> bool:
    """Tell whether a run holds this directory."""
    try:
        with (run_dir / ".lock").open("r+") as file:
            return not _taken(file)
    except (OSError, UserError):
        return False


@contextmanager
def turn(path: Path, mine: str, waiting: Waiting) -> Iterator[None]:
    """Wait until no other process is inside with the same lock file, however it left; the file is gone afterwards.

    Args:
        path: of the lock file; its folder is made.
        mine: what the others read of this process in the meantime.
        waiting: called with what the holder says of itself where there is one; gives what to call again and again.

    Raises:
        UserError: the file cannot be made, or its disk knows no locks.
    """
    if (lock := _opened_and_taken(path)) is None:
        with waiting(said_by_holder(path)) as look:
            while (lock := _opened_and_taken(path)) is None:
                look(said_by_holder(path))
                time.sleep(LOOK)
    with lock.file:
        _sign(lock.file, f"{mine}\n{_this_process()}")
        try:
            yield
        finally:
            if _lies_at(lock.file, path):  # and not one that took the place of a removed one
                path.unlink()
            with suppress(OSError):  # there is something in it
                path.parent.rmdir()


def said_by_holder(path: Path) -> str:
    """Return what the process that holds a lock file says of itself; an empty string where none does."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


class _Lock(NamedTuple):
    file: IO[str]
    made: list[Path]  # folders that were not there before it, the innermost first


def _opened_and_taken(path: Path) -> _Lock | None:
    """Take a lock file, made where it is not there; None where another process holds it."""
    while True:
        lock = _opened(path)
        if not _taken(lock.file):
            lock.file.close()
            return None
        if _lies_at(lock.file, path):
            return lock
        lock.file.close()  # the one before has removed it in the meantime


def _opened(path: Path) -> _Lock:
    for left in reversed(range(TRIES)):
        try:
            made = [folder for folder in path.parents if not folder.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            return _Lock(path.open("a+", encoding="utf-8"), made)
        except OSError as error:
            # Whoever was inside may remove the folder at any moment: before it is there, between mkdir's two looks at
            # it, and before the file is.
            if not left or not isinstance(error, FileNotFoundError | FileExistsError):
                raise UserError(f"{path.parent} cannot be written: {error.strerror}") from error
    raise AssertionError


def _taken(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however it ends
    except BlockingIOError:
        return False
    except OSError as error:
        file.close()
        raise UserError(
            f"{Path(file.name).parent} is on a disk without file locks: {error.strerror}. Choose another place "
            "(output_dir=…)"
        ) from error
    return True


def _lies_at(file: IO[str], path: Path) -> bool:
    """Tell whether an open file is the one that a path names: it may have been removed, and made anew."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _remove(path: Path, made: Sequence[Path]) -> None:
    """Remove the folder of a lock file that this process holds; the file last, since who finds none goes in."""
    for each in path.parent.iterdir():
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each)
        elif each != path:
            each.unlink()
    path.unlink()
    for folder in made:
        with suppress(OSError):  # something else lies in it by now
            folder.rmdir()


def _sign(file: IO[str], text: str) -> None:
    file.truncate(0)
    file.write(text)
    file.flush()


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
