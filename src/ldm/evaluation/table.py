"""The table of prompt accuracy, from the figures in `evaluation.json`: `python -m ldm.evaluation.table FILE`."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_table(results: Mapping[str, Any]) -> None:
    """Print what `prompt_accuracy` measured: a row for each kind of pair and guidance, and the ceiling."""
    attributes = list(results["ceiling"])
    table = Table(title=f"prompt accuracy, {results['num_prompts']} held-out prompts a row, {results['steps']} steps")
    table.add_column("(shape, colour) pairs")
    table.add_column("guidance", justify="right")
    for attribute in attributes:
        table.add_column(attribute, justify="right")
    rows = [(pairs, name, row) for pairs, by_scale in results["pairs"].items() for name, row in by_scale.items()]
    for pairs, name, row in [*rows, ("VAE reconstruction (ceiling)", "", results["ceiling"])]:
        table.add_row(pairs, name.removeprefix("guidance "), *(f"{row[attribute]:.1%}" for attribute in attributes))
    Console(width=110).print(table)


if __name__ == "__main__":
    print_table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["prompt_accuracy"])
