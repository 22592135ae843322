"""The tables of what was measured, from the figures in `evaluation.json`: `python -m ldm.evaluation.table FILE`."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ldm.errors import UserError
from ldm.files import load_json

WIDTH = 110


def print_table(results: Mapping[str, Any]) -> None:
    """Print what `prompt_accuracy` measured: a row for each kind of pair and guidance, and the ceiling."""
    attributes = list(results["ceiling"])
    steps = results["steps"]
    told = ", ".join(map(str, steps)) if isinstance(steps, list) else steps
    table = Table(title=f"prompt accuracy, {results['num_prompts']} held-out prompts a row, {told} steps")
    table.add_column("(shape, colour) pairs")
    table.add_column("guidance", justify="right")
    for attribute in attributes:
        table.add_column(attribute, justify="right")
    rows = [(pairs, name, row) for pairs, by_scale in results["pairs"].items() for name, row in by_scale.items()]
    for pairs, name, row in [*rows, ("VAE reconstruction (ceiling)", "", results["ceiling"])]:
        table.add_row(pairs, name.removeprefix("guidance "), *(f"{row[attribute]:.1%}" for attribute in attributes))
    Console(width=WIDTH).print(table)


def print_figures(results: Mapping[str, Any]) -> None:
    """Print what the other metrics measured: a row for each setting, and of what draws nothing a line."""
    swept = {name: found for name, found in results.items() if isinstance(found, Mapping) and "values" in found}
    if swept:
        first = next(iter(swept.values()))["values"]
        table = Table(title="drawn pictures of held-out prompts")
        for name in ("steps", "guidance", *swept):
            table.add_column(name, justify="right")
        for i, row in enumerate(first):
            figures = (f"{found['values'][i]['value']:.4g}" for found in swept.values())
            table.add_row(f"{row['steps']}", f"{row['guidance_scale']:g}", *figures)
        for reference in ("floor", "real", "expected"):
            if any(reference in found for found in swept.values()):
                figures = (f"{found[reference]:.4g}" if reference in found else "" for found in swept.values())
                table.add_row(REFERENCES[reference], "", *figures)
        Console(width=WIDTH).print(table)
    for name in ("reconstruction", "retrieval"):
        if name in results:
            figures = (f"{key} {value:.4g}" for key, value in results[name].items() if isinstance(value, float))
            print(f"{name}: {', '.join(figures)}")


REFERENCES = {"floor": "other real pictures", "real": "held-out pictures", "expected": "held-out pictures, by chance"}


def show(path: Path) -> None:
    """Print the tables of a file of results.

    Raises:
        UserError: it cannot be read, or does not hold what `evaluate.py` writes.
    """
    found = load_json(path)
    try:
        if "prompt_accuracy" in found:
            print_table(found["prompt_accuracy"])
        print_figures(found)
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # a person may have written into it
        raise UserError(f"{path} holds no results of evaluate.py: {type(error).__name__}: {error}") from error


if __name__ == "__main__":
    try:
        show(Path(sys.argv[1]))
    except (UserError, IndexError) as error:
        print(f"error: {error if isinstance(error, UserError) else 'name an evaluation.json'}", file=sys.stderr)
        sys.exit(2)
