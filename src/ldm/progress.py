"""Progress of long work: a bar with rate and time left on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(label: str, total: int, unit: str, every: float = 15.0) -> Iterator[Callable[[], None]]:
    """Give a function to call when one of `total` is done.

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

        note = TextColumn("{task.fields[note]}")
        columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), note)
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=total, note="")

            def advance() -> None:
                nonlocal done
                done += 1
                bar.update(task, completed=done, note=rate())

            yield advance
        return

    def say() -> None:
        nonlocal done, last
        done += 1
        if time.monotonic() - last >= every:
            last = time.monotonic()
            left = (total - done) * (last - begun) / done
            print(f"  {label} {done}/{total}  {rate()}  {left:.0f} s left", file=sys.stderr, flush=True)

    yield say
