"""JSON, and writing that leaves a whole file or none. Nothing here imports torch."""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ldm.errors import UserError

WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
"""Of files of weights, as they are found; what is written is safetensors."""
UNFINISHED = ".tmp"
"""How the hidden name ends that something has while it is being written."""


def load_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        UserError: it is not there, cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return parse_json(text, str(path))


def parse_json(text: str, where: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        UserError: it is none; the message names `where`.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{where} holds no JSON object")
    return content


MOST_VALUES = 100_000
"""Of a YAML file of ours with its aliases written out: ten lines of them can stand for more than a disk holds."""


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a file that holds a YAML mapping, as data: no tag in it makes an object.

    Raises:
        UserError: it is not there, cannot be read, or holds something else.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if _num_values(content, {}) > MOST_VALUES:
            raise UserError(f"{path} stands for more than {MOST_VALUES:,} values, which no config has")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (ValueError, TypeError, LookupError, AttributeError, OSError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings")
    return content


def _num_values(node: Any, known: dict[int, int]) -> int:
    """Count the values in a tree whose branches may be shared; one within itself is no tree (RecursionError)."""
    if not isinstance(node, dict | list):
        return 1
    if id(node) not in known:
        known[id(node)] = 1 + sum(
            _num_values(each, known) for each in (node.values() if isinstance(node, dict) else node)
        )
    return known[id(node)]


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object; the file is whole or as it was."""
    with file_written_atomically(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def check_writable(folder: Path, told: str) -> None:
    """Know before any work is done, and without leaving a trace, that something can be put into a folder.

    Args:
        folder: it need not be there yet.
        told: how the user gave it, such as `out=pictures`.

    Raises:
        UserError: nothing can be put there; the message begins with `told`.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{told} cannot be written: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{told} cannot be written: no permission to write into {there}")


def remove_unfinished(paths: Iterable[Path]) -> None:
    """Remove those of these paths under which a process was writing when it was killed.

    Args:
        paths: of which the caller knows that no other process is writing there.
    """
    for path in list(paths):
        if path.name.startswith(".") and path.name.endswith(UNFINISHED):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, for as long as this process lives at most; others wait.

    Raises:
        OSError: the file cannot be made, or its disk knows no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes, also when the process dies
        yield


@contextmanager
def file_written_atomically(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write; on success it takes the place of `path`, on failure nothing has changed."""
    number, name = tempfile.mkstemp(UNFINISHED, f".{path.name[:40]}.", path.parent)
    try:
        with os.fdopen(number, "wb") as file:
            yield file
            file.flush()
            os.fsync(number)
        os.chmod(name, 0o644)  # a temporary file is for its owner alone
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def written_atomically(folder: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; on success it takes the place of `folder`, on failure nothing has changed.

    All that is in it is on the disk before it takes its name, whoever wrote it; and its name when this returns.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(UNFINISHED, f".{folder.name[:40]}.", folder.parent))
    old = temporary.with_name(f"{temporary.name}.old{UNFINISHED}")
    try:
        temporary.chmod(0o755)
        yield temporary
        for inside, _, names in os.walk(temporary):
            for path in (*(Path(inside, name) for name in names), Path(inside)):
                _flush(path)
        if folder.exists():  # a folder cannot take the place of another in one step
            folder.rename(old)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists():
            old.rename(folder)
        raise
    _flush(folder.parent)  # the rename itself
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
