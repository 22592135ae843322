"""Progress of long work: a bar with rate and time left on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Say that so many more are done."""

    def __call__(self, count: int = 1) -> None: ...


@contextmanager
def progress(label: str, total: int, unit: str, every: float = 15.0) -> Iterator[Advance]:
    """Give a function to call when one of `total` is done, or with how many are.

    Args:
        label: what is going on.
        total: how many there are.
        unit: what they are called, plural.
        every: seconds between lines where there is no terminal; work shorter than that says nothing.
    """
    begun = last = time.monotonic()
    done = 0

    def rate() -> str:
        return f"{done / max(time.monotonic() - begun, 1e-9):.3g} {unit}/s"

    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        name = TextColumn("{task.description}", style="bold", markup=False)  # a path in it may hold brackets
        columns = (name, BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=total, note="")

            def advance(count: int = 1) -> None:
                nonlocal done
                done += count
                bar.update(task, completed=done, note=rate())

            yield advance
        return

    def say(count: int = 1) -> None:
        nonlocal done, last
        done += count
        if done and time.monotonic() - last >= every:
            last = time.monotonic()
            left = (total - done) * (last - begun) / done
            print(f"  {label} {done}/{total}  {rate()}  {left:.0f} s left", file=sys.stderr, flush=True)

    yield say
