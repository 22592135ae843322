"""From Hydra's config to a run, and to the jobs of a sweep.

A job of a sweep is `python train.py …` in a process of its own, whatever launches it: memory, signals and the ranks of
distributed training are its own too, and what ends it ends nothing else. Nothing here imports torch.
"""

import hashlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from ldm.cli import FREE_TEXT_KEYS
from ldm.config import TrainConfig, check
from ldm.errors import UserError
from ldm.files import save_json
from ldm.redact import redacted
from ldm.report.metrics import higher_is_better
from ldm.sweep import FAILED, failures, ranked_by, say_failures, say_summary
from ldm.training.locks import in_use
from ldm.training.stages import STOP_FILE, missing_stages, optimized, run

SCRIPT = "LDM_SWEEP_SCRIPT"  # in the environment of what runs a sweep's jobs: the script to run them by
WRITTEN_BY_HYDRA = "multirun.yaml"  # in a sweep's folder: the config with all that it holds
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LOOK = 0.2  # seconds between looks at a job
ERROR_LINES = 8  # of what a failed job says, that the summary repeats


def run_from_hydra(composed: Any) -> float | None:
    """Check a composed config and run it; jobs of a sweep each get a directory named by their overrides.

    Returns:
        The last value of `optimized_metric`, for Hydra's sweepers; None where there was no validation yet, and of
        a job that failed.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    overrides = list(hydra.overrides.task)
    if hydra.mode == RunMode.MULTIRUN:
        Path(hydra.sweep.dir, WRITTEN_BY_HYDRA).unlink(missing_ok=True)
        composed.run_dir = str(Path(composed.run_dir) / sweep_name(redacted(overrides)))
    values = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(values, dict)
    if hydra.mode == RunMode.MULTIRUN:
        return _run_job(values, overrides, _search_arguments(hydra))  # type: ignore[arg-type]
    return run(check(TrainConfig, values), redacted(overrides))  # type: ignore[arg-type]


def sweep_name(overrides: Sequence[str]) -> str:
    """Name a job's directory by what sets it apart: free of `=`, which `ckpt=` could not take; long ones by a hash.

    >>> sweep_name(["experiment=shapes", "optim.lr=1e-3", "stages=[diffusion]"])
    'optim.lr-1e-3'
    """
    told = [
        item
        for item in overrides
        if item.partition("=")[0] not in ("experiment", "name", "output_dir", "stages", "sweep")
    ]
    name = re.sub(r"[^\w.,+-]+", "-", "_".join(told)).strip("-") or "job"
    return name if len(name.encode()) <= 200 else f"{name[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _search_arguments(hydra: Any) -> list[str]:
    """Return what the command line said about where configs are found."""
    folders = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    searched = [item for item in hydra.overrides.hydra if item.startswith("hydra.searchpath=")]
    return [*(f"--config-dir={folder}" for folder in folders), *searched]


# ------------------------------------------------------------------------------------------------------ the whole sweep


class Sweep(Callback):
    """Hydra's callback around a sweep: how it is stopped, what it found, and the exit code.

    Signals come to the launching process. Those that run jobs, which may be elsewhere, read of it in a file that the
    environment names, and hand it on; so a launcher needs to know nothing of it.

    Raises:
        SystemExit: at the end, with code 1, where a job has failed.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        global _stop
        folder = Path(config.run_dir).absolute()
        _stop = folder / f".stop-{socket.gethostname()}-{os.getpid()}"
        _stop.unlink(missing_ok=True)
        os.environ[STOP_FILE], os.environ[SCRIPT] = str(_stop), str(Path(sys.argv[0]).absolute())
        self._before = {signum: signal.signal(signum, _on_signal) for signum in SIGNALS}
        _settle_search(config)
        _write_nothing(Path(config.hydra.sweep.dir, WRITTEN_BY_HYDRA))

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        launch = os.environ.pop(STOP_FILE)
        folder = Path(config.run_dir)
        try:
            say_summary(folder)
        except UserError as error:  # jobs that measure nothing
            print(f"no summary: {error}", flush=True)
        failed = [failure for failure in failures(folder) if failure["launch"] == launch]
        if failed:
            say_failures(failed)
            raise SystemExit(1)


def _write_nothing(path: Path) -> None:
    """Let what a sweeper writes there go nowhere: there may be secrets in it. The first job takes the file away."""
    with suppress(OSError):  # a file system without links: the file is there until then
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(os.devnull)


def _settle_search(config: DictConfig) -> None:
    """Tell a sweeper that searches which way is better, and a seed: it asks for the same jobs when it is resumed."""
    sweeper = config.hydra.sweeper
    metric = ranked_by({"optimized_metric": config.optimized_metric, "stages": config.stages})
    with read_write(config), open_dict(config):
        if "direction" in sweeper and higher_is_better(metric):
            sweeper.direction = "maximize"
        if "max_failure_rate" in sweeper:
            sweeper.max_failure_rate = 1.0  # a job that fails, fails alone
        if "seed" in (sweeper.get("sampler") or {}) and sweeper.sampler.seed is None:
            sweeper.sampler.seed = config.seed


_stop: Path | None = None  # in the launching process: the file that tells jobs to stop
_watching = False  # whether this process has a job in hand
_ran_here = False  # whether this process has had one


def _on_signal(signum: int, frame: FrameType | None) -> None:
    """Hand a signal on to the jobs; a second one ends this process at once."""
    assert _stop is not None
    if _stop.exists():
        os._exit(_code(signum))
    told = "stopping after the step in hand; once more stops at once"
    os.write(2, f"\n{signal.Signals(signum).name}: {told}\n".encode())
    if _stop.parent.is_dir():
        _stop.write_text(str(int(signum)))
    if _watching:
        return
    while not _ran_here and any(in_use(run_dir) for run_dir in _stop.parent.glob("*/")):
        time.sleep(LOOK)  # a launcher that is interrupted kills what it has launched
    _end(signum)


def _code(signum: int) -> int:
    return 130 if signum == signal.SIGINT else 143


def _end(signum: int) -> NoReturn:
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(_code(signum))


def _asked_to_stop() -> int:
    """Return the signal that the launching process has got; 0 for none."""
    try:
        return int(Path(os.environ[STOP_FILE]).read_text())
    except (KeyError, FileNotFoundError, ValueError):
        return 0


# --------------------------------------------------------------------------------------------------------------- a job


def _run_job(values: dict[str, Any], overrides: Sequence[str], search: Sequence[str]) -> float | None:
    """Run a job of a sweep, in a process of its own unless there is nothing to do; whatever happens to it, return."""
    global _ran_here
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a sweep starts the processes of its jobs itself: python train.py -m …, without torchrun")
    if _asked_to_stop():
        return None
    _ran_here = True
    run_dir = Path(values["run_dir"])
    arguments = [*overrides, f"run_dir={values['run_dir']}"]
    (run_dir / FAILED).unlink(missing_ok=True)
    code, said = 2, ""
    try:
        config = check(TrainConfig, values)
        if not missing_stages(config) and not config.doctor and config.data.cache != "build":
            return run(config, redacted(list(overrides)))
        code, said = _run_in_own_process(run_dir, [*search, *arguments, "hydra.mode=RUN"])
        if stopped := _asked_to_stop():
            if _stop is not None:
                _end(stopped)
            return None
        if code == 0:
            return optimized(config, run_dir)
    except UserError as error:
        said = f"error: {error}"
        print(said, file=sys.stderr, flush=True)
    typed = [_as_typed(argument) for argument in [*search, *arguments]]
    command = shlex.join(redacted(["python", "train.py", *typed]))
    record = {
        "job": run_dir.name, "exit_code": code, "error": redacted(first_lines_of_error(said, code)),
        "command": command, "launch": os.environ.get(STOP_FILE, ""),
    }  # fmt: skip
    run_dir.mkdir(parents=True, exist_ok=True)
    save_json(run_dir / FAILED, record)
    print(f"{run_dir.name} failed; the others go on. By itself: {command}", file=sys.stderr, flush=True)
    return None


def _as_typed(argument: str) -> str:
    """Take off the quotes that the command line puts around free text, where it would put them again."""
    key, _, text = argument.partition("=")
    return f"{key}={text[1:-1]}" if key in FREE_TEXT_KEYS and re.fullmatch(r"'[\w./:-]*'", text) else argument


def _run_in_own_process(run_dir: Path, arguments: Sequence[str]) -> tuple[int, str]:
    """Run the script and say what it says, which is kept in `job.log` too; hand on the sweep's signal.

    Returns:
        its exit code, and its output
    """
    global _watching
    if _stop is None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C comes to every process of a terminal
    run_dir.mkdir(parents=True, exist_ok=True)
    launcher, handed_on = os.getppid(), False

    def orphaned() -> bool:
        """Tell whether the launcher of this worker is gone; the launching process itself may outlive its shell."""
        return _stop is None and os.getppid() != launcher

    with (run_dir / "job.log").open("ab") as log, (run_dir / "job.log").open("rb") as said:
        begin = said.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            [sys.executable, os.environ[SCRIPT], *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # signals come from here, once
            preexec_fn=_at_birth(),
        )
        _watching = True
        try:
            ended = None
            while ended is None:
                ended = process.poll()
                _show(said.read(), run_dir.name)
                asked = _asked_to_stop() or (signal.SIGTERM if orphaned() else 0)
                if asked and not handed_on and ended is None:
                    process.send_signal(asked)
                    handed_on = True
                if ended is None:
                    time.sleep(LOOK)
        finally:
            _watching = False
            if process.poll() is None:
                process.terminate()
                process.wait()
        if orphaned():  # nobody would want another job
            os._exit(143)
        said.seek(begin)
        return ended, said.read().decode(errors="replace")


def _show(output: bytes, name: str) -> None:
    """Print what a job has said; with its name where several speak."""
    if not output:
        return
    text = output.decode(errors="replace")
    if _stop is None:
        text = "".join(f"[{name}] {line}\n" for line in text.splitlines())
    sys.stdout.write(text)
    sys.stdout.flush()


def _at_birth() -> Callable[[], None]:
    """Return what a job's process does first: heed Ctrl-C, which is ignored here, and end with this one.

    The second is for this process being killed, and known to Linux alone (PR_SET_PDEATHSIG).
    """
    import ctypes

    prctl = ctypes.CDLL(None).prctl if sys.platform.startswith("linux") else None

    def begin() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if prctl is not None:
            prctl(1, int(signal.SIGTERM))

    return begin


def first_lines_of_error(said: str, code: int) -> str:
    """Find what a process that failed says of it: our own message, or the end of a traceback.

    >>> first_lines_of_error("epoch 1\\nerror: no such folder\\nsay data.path=…\\n", 2)
    'error: no such folder\\nsay data.path=…'
    >>> first_lines_of_error("a\\nTraceback (most recent call last):\\n  File x\\nValueError: b\\n", 1)
    'ValueError: b'
    >>> first_lines_of_error("a\\nb\\n", -9)
    'ended by SIGKILL (want of memory ends a process so); its last lines:\\na\\nb'
    """
    if code < 0:
        name = signal.Signals(-code).name
        why = " (want of memory ends a process so)" if -code == signal.SIGKILL else ""
        return f"ended by {name}{why}; its last lines:\n" + "\n".join(said.splitlines()[-3:])
    lines = said.splitlines()
    own = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    raised = [
        number
        for number, line in enumerate(lines)
        if number and lines[number - 1].startswith("  ") and re.match(r"[A-Za-z_][\w.]*(:|$)", line)
    ]
    begin = own[0] if own else raised[-1] if raised else max(len(lines) - ERROR_LINES, 0)
    return "\n".join(lines[begin : begin + ERROR_LINES]) or f"exit code {code}, without a word"
