"""Which of a run's processes this is, known before any of them knows the others."""

import functools
import os


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
