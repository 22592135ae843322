"""Files that may be far away, named by path or URL: their state, copies of them at hand, patience with the network."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self, TypeVar

from fsspec.core import url_to_fs

from ldm.errors import UserError
from ldm.files import locked
from ldm.progress import progress

T = TypeVar("T")
Item = TypeVar("Item")

PAUSES = (1.0, 4.0, 16.0)
"""Seconds between attempts."""

ROOM = 8 << 30
"""Bytes of copies that need not be removed."""

_THREADS = 8
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, ValueError)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def patiently(action: Callable[[], T], told: str) -> T:
    """Do what may fail because the network does: several times, with growing pauses.

    Args:
        action: done again from its beginning.
        told: begins the message, such as "s3://set/000.tar cannot be read".

    Raises:
        UserError: it failed every time, or for a reason that does not pass.
    """
    for pause in (*PAUSES, None):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # each file system has kinds of its own
            lasting = isinstance(error, _LASTING) or getattr(error, "errno", None) in _FULL
            if lasting or pause is None:
                reason = "it is not there" if isinstance(error, FileNotFoundError) else str(error) or repr(error)
                raise UserError(f"{told}: {reason}") from error
        time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def each(action: Callable[[Item], T], items: Sequence[Item], label: str, unit: str) -> list[T]:
    """Return an action's results for all items; some are worked on at once, and progress is shown."""
    with ThreadPoolExecutor(_THREADS) as pool, progress(label, len(items), unit) as advance:
        futures = [pool.submit(action, item) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
                advance()
        except BaseException:  # also Ctrl-C
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def recalled(
    action: Callable[[str], T],
    fits: Callable[[Any], bool],
    urls: Sequence[str],
    states: Sequence[str],
    kept: Path | None,
    label: str,
) -> list[T]:
    """Return what an action finds in each file, without asking again what is known from before.

    Args:
        action: takes a URL, returns what JSON can hold.
        fits: tells whether what was kept is such a thing; a damaged line is asked for anew.
        urls, states: the files.
        kept: file of JSON lines, to which each finding is added at once; None keeps nothing.
        label: what is going on.
    """
    known: dict[tuple[str, str], T] = {}
    content = kept.read_bytes() if kept is not None and kept.exists() else b""
    for line in content.splitlines():
        with suppress(ValueError, TypeError, RecursionError):  # cut short when a process was killed
            url, mark, found = json.loads(line)
            if fits(found):
                known[url, mark] = found

    def ask(file: tuple[str, str]) -> None:
        known[file] = action(file[0])
        if kept is not None:
            add_line(kept, json.dumps([*file, known[file]]))

    if kept is not None and content and not content.endswith(b"\n"):
        add_line(kept, "")
    files = list(zip(urls, states, strict=True))
    if unknown := [file for file in files if file not in known]:
        each(ask, unknown, label, "files")
    return [known[file] for file in files]


def add_line(path: Path, line: str) -> None:
    """Add a line that is not there yet to a file, in one piece, so that several processes may do it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        return
    number = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(number, f"{line}\n".encode("utf-8", "backslashreplace"))
    finally:
        os.close(number)


def is_local(url: str) -> bool:
    return "://" not in url


def state(url: str) -> str:
    """Return a file's size, and after a space what else tells whether it has changed.

    Raises:
        UserError: it is not there or cannot be reached.
    """
    return patiently(lambda: local_state(os.stat(url)) if is_local(url) else _remote_state(url), url)


def local_state(status: os.stat_result) -> str:
    # A copy may keep the size and time of what it takes the place of; the time of change is the system's own.
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _remote_state(url: str) -> str:
    files, path = url_to_fs(url)
    info = files.info(path)
    marks = (info.get(key) for key in ("ETag", "etag", "mtime", "LastModified", "last_modified", "created"))
    return f"{info.get('size')} {next((mark for mark in marks if mark), '')}"


def open_file(url: str) -> IO[bytes]:
    """Open a file for reading, near or far."""
    if is_local(url):
        return open(url, "rb")
    files, path = url_to_fs(url)  # anew each time: connections do not survive a fork
    return files.open(path, "rb")


def copy_file(url: str, path: Path) -> None:
    """Copy a far file whole.

    Raises:
        OSError: the copy is not of the size that was announced.
    """
    files, far = url_to_fs(url)
    files.get_file(far, str(path))
    size = files.info(far).get("size")
    if size is not None and path.stat().st_size != size:
        raise OSError(f"{path.stat().st_size} of {size} bytes arrived")


class Copies:
    """A folder of copies, each made once for all processes that ask for it.

    Args:
        folder: made where it is not there.
        keep: how many stay at least, those used last; of small ones stay as many as `ROOM` holds. None keeps all.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        self.folder, self.keep = folder, keep
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be made: {error}") from error

    @classmethod
    def temporary(cls, parent: Path | None, keep: int | None = None) -> Self:
        """Make a folder that goes when this object does, or with the process.

        What processes of this machine that were killed left behind goes too.
        """
        parent = cls(parent or Path(tempfile.gettempdir())).folder
        prefix = f"ldm-copies-{os.getuid()}-{socket.gethostname()}-"
        with locked(parent / f".{prefix}lock"):
            for old in parent.iterdir():
                if old.name.startswith(prefix) and not _is_owned(old):
                    shutil.rmtree(old, ignore_errors=True)
            copies = cls(Path(tempfile.mkdtemp(prefix=prefix, dir=parent)), keep)
            owner = open(copies.folder / "owner.lock", "w")  # noqa: SIM115  # until the folder goes
            fcntl.flock(owner, fcntl.LOCK_EX)
        weakref.finalize(copies, _remove, copies.folder, owner, os.getpid())
        return copies

    def get(self, told: str, state: str, write: Callable[[Path], Any]) -> Path:
        """Return the copy of something in some state, written first where there is none.

        With `keep` another process may remove it at any moment; a file that was opened stays readable.

        Raises:
            UserError: it cannot be written.
        """
        digest = digest_of(told, state)
        path = self.folder / f"{digest}.copy"
        with locked(self.folder / f"{digest[:2]}.lock"):
            try:
                os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))  # used now, and not changed
            except FileNotFoundError:
                patiently(lambda: self._write(path, write), f"{told} cannot be copied to {self.folder}")
                self._make_room()
        return path

    def _make_room(self) -> None:
        if self.keep is None:
            return
        copies = sorted(map(_use, self.folder.glob("*.copy")))
        room = sum(size for _, size, _ in copies) - ROOM
        for _, size, path in copies[: -self.keep]:
            if room > 0:
                path.unlink(missing_ok=True)
                room -= size

    def _write(self, path: Path, write: Callable[[Path], Any]) -> None:
        part = path.with_suffix(".part")
        write(part)
        if self.keep is None:  # those that stay outlive the machine's crash; the others need not wait for the disk
            with part.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(part, path)


def digest_of(*texts: str) -> str:
    """Return a name for texts that may hold anything."""
    return hashlib.sha256(repr(texts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _is_owned(folder: Path) -> bool:
    try:
        with (folder / "owner.lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # locked, or another user's
        return True
    return False


def _remove(folder: Path, owner: IO[str], process: int) -> None:
    owner.close()
    if os.getpid() == process:  # not when a loader worker drops its copy of the object
        shutil.rmtree(folder, ignore_errors=True)


def _use(path: Path) -> tuple[int, int, Path]:
    """Return when a copy was used last, and its size."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0, 0, path
    return status.st_atime_ns, status.st_size, path
