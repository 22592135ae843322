"""Damage files of every kind and use them: it works or says why not, and never crashes, hangs or reaches elsewhere.

python tests/fuzz.py                            # every kind, 200 inputs each
python tests/fuzz.py inputs=5000 minutes=30 targets=tar,model seed=3 keep=found
python tests/fuzz.py targets=tar seed=3 first=1234 inputs=1     # one input again

Input n of a target is a function of (seed, target, n). A target is used in a child of its own, of limited memory; a
child that dies or stands still is a finding like any other, and the next goes on after it. The files of an input with
a finding are kept under `keep`.
"""

import json
import mmap
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

if __name__ == "__main__":  # before what reads them is imported
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", ARROW_DEFAULT_MEMORY_POOL="system")

from PIL import Image

from damage import TRAP, damaged_set
from ldm.errors import UserError

SECONDS = 20  # that an input may take
STANDSTILL = 3 * SECONDS  # after which a child that no alarm reaches is ended
MEMORY = 3 << 30  # that inputs may take beyond what the program itself has


class Target(NamedTuple):
    """A kind of files.

    Args:
        make: writes good ones into a folder.
        use: uses those in a folder; a UserError is a good answer.
        damaged: tells by their names which of them are damaged.
        may_read: let files beside them be read: a picture names those that it was drawn upon, and their digests.
    """

    make: Callable[[Path], Any]
    use: Callable[[Path], Any]
    damaged: Callable[[str], bool] = lambda name: True
    may_read: bool = False


class Stuck(BaseException):
    """No code under test catches this one."""


class Guard:
    """Notes what Python is asked for that no data may ask for.

    Writing outside the folder of an input, reading what lies beside it, starting programs, reaching for the network,
    importing what a file names.
    """

    def __init__(self, may_read: bool = False) -> None:
        self.folder, self.may_read = "", may_read
        self.breaches: list[str] = []
        sys.addaudithook(self._hook)  # for as long as the process lives

    @contextmanager
    def watching(self, folder: Path) -> Iterator[None]:
        self.breaches.clear()
        self.folder = str(folder)
        try:
            yield
        finally:
            self.folder = ""

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.folder:
            return
        if event in RUNNING or (event == "import" and args[0].startswith(TRAP)):
            self.breaches.append(f"{event} {args[:2]!r}")
        elif event == "open":
            path, _, flags = args
            if isinstance(path, int) or path == os.devnull:
                return
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            read = not self.may_read and re.search("canary|passwd", os.fsdecode(path))
            if read or (writes and not self._is_inside(path)):
                self.breaches.append(f"opened to {'write' if writes else 'read'}: {path!r}")
        elif event in CHANGING:
            paths = args[: CHANGING[event]]
            # Relative to an open folder: its removal began from outside if at all, and was seen then.
            if not all(isinstance(p, int) or not os.path.isabs(p) or self._is_inside(p) for p in paths):
                self.breaches.append(f"{event} {paths!r}")

    def _is_inside(self, path: Any) -> bool:
        return os.path.abspath(os.fsdecode(path)).startswith(self.folder)


RUNNING = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.kill",
           "subprocess.Popen", "pty.spawn", "urllib.Request", "webbrowser.open", "socket.connect", "socket.bind",
           "socket.getaddrinfo", "socket.sendto"}  # fmt: skip
# Events that change what is on the disk, and how many of their arguments are paths.
CHANGING = {"os.rename": 2, "os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2, "os.chmod": 1,
            "os.truncate": 1, "os.utime": 1, "shutil.rmtree": 1, "shutil.move": 2}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- one input


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def attempt(use: Callable[[Path], Any], folder: Path, guard: Guard) -> tuple[str, str]:
    """Use the files in a folder.

    Returns:
        "worked", "refused", or what was found; and more about that.
    """
    outcome, more = "worked", ""
    before = sorted(os.listdir(folder.parent))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    with guard.watching(folder):
        try:
            use(folder)
        except UserError as error:
            outcome, more = ("refused" if str(error).strip() else "a UserError that says nothing"), str(error)
        except Stuck:
            outcome, more = f"still at it after {SECONDS} s", traceback.format_exc()
        except BaseException as error:
            outcome, more = f"{type(error).__name__}: {str(error)[:150]}", traceback.format_exc()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    if guard.breaches:
        outcome, more = f"breach: {guard.breaches[0]}", "\n".join(guard.breaches)
    elif (after := sorted(os.listdir(folder.parent))) != before:
        outcome = f"breach: left {set(after) - set(before)} beside its folder"
    return outcome, more


# ------------------------------------------------------------------------------------------------------ many inputs


class Report(NamedTuple):
    """What became of the inputs of a target; a finding is {number, what, more}."""

    worked: int
    refused: int
    findings: list[dict[str, Any]]
    seconds: float

    @property
    def inputs(self) -> int:
        return self.worked + self.refused + len(self.findings)


def run(name: str, target: Target, inputs: int, minutes: float, keep: Path, seed: int = 0, first: int = 0) -> Report:
    """Use damaged files of a target, until so many inputs or minutes are over."""
    started = time.monotonic()
    until = started + 60 * minutes
    root = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    state = State()
    state.number = first
    try:
        while state.number < first + inputs and time.monotonic() < until:
            child = os.fork()
            if not child:
                _work(name, target, seed, range(state.number, first + inputs), until, root, keep, state)
            if (status := _wait(child, state)) == 0:
                break
            if status == BAD_TARGET:
                raise RuntimeError(f"the good files of {name} cannot be made or used; see above")
            what = "no alarm reached it" if status == -signal.SIGKILL else "the process died"
            _note(root, keep, f"{name}-{seed}-{state.number}", what, f"it ended with {status}")
            state.number += 1
        log = root / LOG
        findings = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return Report(state.worked, state.refused, findings, time.monotonic() - started)
    finally:
        shutil.rmtree(root, ignore_errors=True)


LOG, BAD_TARGET = "log.jsonl", 70


class State:
    """Counters that parent and child share: the input in hand, and how many worked or were refused."""

    def __init__(self) -> None:
        self._numbers = memoryview(mmap.mmap(-1, 24)).cast("q")

    number = property(lambda self: self._numbers[0], lambda self, value: self._numbers.__setitem__(0, value))
    worked = property(lambda self: self._numbers[1], lambda self, value: self._numbers.__setitem__(1, value))
    refused = property(lambda self: self._numbers[2], lambda self, value: self._numbers.__setitem__(2, value))


def _work(
    name: str, target: Target, seed: int, numbers: range, until: float, root: Path, keep: Path, state: State
) -> None:
    """Go through inputs in a child, which ends here."""
    try:
        signal.signal(signal.SIGALRM, _stuck)
        silence, spoken = os.open(os.devnull, os.O_WRONLY), os.dup(2)
        os.dup2(silence, 1), os.dup2(silence, 2)
        guard, work = Guard(target.may_read), root / "work"
        shutil.rmtree(work, ignore_errors=True)
        (root / "canary.txt").write_text("not for you")
        work.mkdir()
        (work / "canary.txt").write_text("not for you")
        Image.new("RGB", (8, 8)).save(work / "canary.png")
        os.chdir(work)
        target.make(root / "good")
        good = read_files(root / "good")
        for _ in range(2):  # all that is imported when first needed is there then
            outcome, more = attempt(target.use, _fresh(work / "good", good), guard)
        if outcome != "worked":
            os.write(spoken, f"{name}: good files: {outcome}\n{more}\n".encode())
            os._exit(BAD_TARGET)
        used = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        names = [path for path in good if target.damaged(path)]
        for number in numbers:
            if time.monotonic() > until:
                break
            state.number = number
            folder = _fresh(work / str(number), damaged_set(Random(f"{name} {seed} {number}"), good, names))
            outcome, more = attempt(target.use, folder, guard)
            if outcome in ("worked", "refused"):
                setattr(state, outcome, getattr(state, outcome) + 1)
            else:
                _note(root, keep, f"{name}-{seed}-{number}", outcome, more)
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)
    except BaseException:
        os.write(spoken, traceback.format_exc().encode())
        os._exit(BAD_TARGET)


def _fresh(folder: Path, files: dict[str, bytes]) -> Path:
    """Write files into a folder of their own, where temporary ones go too."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "tmp").mkdir()
    tempfile.tempdir = str(folder / "tmp")
    return write_files(folder, files)


def _stuck(*_: Any) -> None:
    raise Stuck


def _note(root: Path, keep: Path, label: str, what: str, more: str) -> None:
    """Write a finding down, and keep the files it was found with."""
    with (root / LOG).open("a") as file:
        file.write(json.dumps({"input": label, "what": what, "more": more[-4000:]}) + "\n")
    folder = root / "work" / label.rpartition("-")[2]
    shutil.copytree(folder, keep / label, dirs_exist_ok=True, ignore=shutil.ignore_patterns("tmp"))
    (keep / label / "finding.txt").write_text(f"{what}\n{more}\n")


def _wait(child: int, state: State) -> int:
    """Wait for a child; end one that has been at one input for too long. Return its exit code."""
    number, since = -1, time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if state.number != number:
            number, since = state.number, time.monotonic()
        elif time.monotonic() > since + STANDSTILL:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)


def main(arguments: list[str]) -> int:
    """Read KEY=VALUE, run, print a table; 1 where something was found."""
    from fuzz_targets import TARGETS

    options = {
        "inputs": "200",
        "minutes": "1e9",
        "targets": ",".join(TARGETS),
        "seed": "0",
        "first": "0",
        "keep": "fuzz-found",
    }
    given = dict(argument.split("=", 1) for argument in arguments)
    if unknown := given.keys() - options.keys():
        raise SystemExit(f"unknown: {', '.join(unknown)}; there are: {', '.join(options)}")
    options |= {key.lower(): value for key, value in given.items()}
    names = options["targets"].split(",")
    numbers = {"seed": int(options["seed"]), "first": int(options["first"])}
    reports = {}
    print(f"{'target':16} {'inputs':>8} {'worked':>8} {'refused':>8} {'found':>6} {'seconds':>8}", flush=True)
    for i, name in enumerate(names):
        left = float(options["minutes"]) - sum(report.seconds for report in reports.values()) / 60
        found = run(
            name, TARGETS[name], int(options["inputs"]), left / (len(names) - i), Path(options["keep"]), **numbers
        )
        reports[name] = found
        print(
            f"{name:16} {found.inputs:8} {found.worked:8} {found.refused:8} {len(found.findings):6} "
            f"{found.seconds:8.1f}"
        )
        for each in found.findings[:10]:
            print(f"  {each['input']}: {each['what']}", flush=True)
    print(f"{sum(report.inputs for report in reports.values())} inputs, kept: {options['keep']}/")
    return int(any(report.findings for report in reports.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
