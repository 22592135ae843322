"""What a sweep found: its jobs ranked by their metric, seeds taken together, as a table, a plot and JSON.

python -m ldm.sweep outputs/recipes
python -m ldm.sweep outputs/recipes diffusion/val_loss "diffusion/prompt_accuracy/guidance 3"
"""

import csv
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from math import inf, isfinite, nan
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from ldm.config import STAGES
from ldm.errors import UserError
from ldm.files import file_written_atomically, load_json, load_yaml, save_json
from ldm.report.metrics import higher_is_better

FAILED = "failed.json"  # in the directory of a sweep's job that failed: its error, and the command to run it alone


class Row(NamedTuple):
    """Jobs that differ in their seed alone."""

    told: str  # what sets them apart from the others
    runs: list[str]
    seeds: list[int]
    values: dict[str, list[float]]  # of each metric the last value of each job that has one, in the order of the seeds


def last_values(run_dir: Path) -> dict[str, float]:
    """Return the last value of each metric in a run's metrics.csv; rows cut short by a crash are passed over."""
    return {name: value for name, _, value in _rows(run_dir)}


def last_step(run_dir: Path, stage: str) -> int:
    """Return the last optimizer step that a stage has logged in a run's metrics.csv; 0 where there is none."""
    return next((step for name, step, _ in reversed([*_rows(run_dir)]) if name.startswith(f"{stage}/")), 0)


def _rows(run_dir: Path) -> Iterator[tuple[str, int, float]]:
    """Give metric, step and value of each row of a run's metrics.csv that is whole."""
    path = run_dir / "metrics.csv"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.split("\n")[1:]:
        with suppress(ValueError, csv.Error, StopIteration):
            name, step, value, _ = next(csv.reader([line]))
            yield name, int(step), float(value)


def failures(folder: Path) -> list[dict[str, Any]]:
    """Return what is known of the jobs of a sweep that failed and have not been run again."""
    return [load_json(path) for path in sorted(folder.glob(f"*/{FAILED}"))]


def say_failures(failed: Sequence[Mapping[str, Any]]) -> None:
    """Name the jobs that failed, why, and how to run each by itself."""
    print(f"error: {len(failed)} of the jobs failed:", file=sys.stderr)
    for failure in failed:
        told = failure["error"].replace("\n", "\n    ")
        print(f"  {failure['job']}\n    {told}\n    by itself: {failure['command']}", file=sys.stderr, flush=True)


def ranked_by(config: Mapping[str, Any]) -> str:
    """Return the metric that a run is ranked by: `optimized_metric`, or the validation loss of its last stage."""
    return config.get("optimized_metric") or f"{max(config['stages'], key=STAGES.index)}/val_loss"


def summarize(folder: Path, metrics: Sequence[str] = ()) -> dict[str, Any]:
    """Gather the jobs of a sweep, the best first; write `sweep.json`, `sweep.md` and `sweep.png` into its folder.

    Args:
        folder: `<output_dir>/<name>` of the sweep.
        metrics: names of metrics.csv, each a column; the first one ranks. None of them: the jobs' `optimized_metric`.

    Returns:
        What is in sweep.json: `metric`, `jobs` (ranked rows of `told`, `runs`, `seeds`, `values`).

    Raises:
        UserError: there are no jobs, or none has such a metric.
    """
    jobs = {path.parent: _load_job(path) for path in sorted(folder.glob("*/config.yaml"))}
    if not jobs:
        raise UserError(f"{folder} holds no jobs of a sweep: python train.py -m … makes them")
    found = {run: last_values(run) for run in jobs}
    columns = list(metrics) or [ranked_by(next(iter(jobs.values())))]
    known = sorted({name for values in found.values() for name in values})
    if unknown := [name for name in columns if name not in known]:
        raise UserError(f"no job of {folder} has the metric {unknown[0]}; there are: {', '.join(known) or 'none yet'}")
    overrides = {run: _overrides(run) for run in jobs}
    common = set.intersection(*map(set, overrides.values())) if len(jobs) > 1 else set()
    grouped: dict[str, list[Path]] = {}
    for run, items in overrides.items():
        apart = [item for item in items if item not in common and not item.startswith(("seed=", "run_dir="))]
        grouped.setdefault(" ".join(apart) or "as it is", []).append(run)
    rows = []
    for told, runs in grouped.items():
        runs.sort(key=lambda run: jobs[run]["seed"])
        measured = {name: [found[run][name] for run in runs if isfinite(found[run].get(name, nan))] for name in known}
        seeds = [jobs[run]["seed"] for run in runs]
        rows.append(Row(told, [run.name for run in runs], seeds, {k: v for k, v in measured.items() if v}))
    rank, sign = columns[0], -1 if higher_is_better(columns[0]) else 1
    rows.sort(key=lambda row: sign * mean(row.values[rank]) if rank in row.values else inf)
    failed = failures(folder)
    result = {"metric": rank, "jobs": [row._asdict() for row in rows], "failed": failed}
    with file_written_atomically(folder / "sweep.md") as file:
        file.write((table(rows, columns) + _failures_told(failed)).encode())
    _plot(rows, rank, folder / "sweep.png")
    save_json(folder / "sweep.json", result)
    return result


def _load_job(path: Path) -> dict[str, Any]:
    """Read what is to be known of a job from its config.

    Raises:
        UserError: it is none.
    """
    config = load_yaml(path)
    stages, metric = config.get("stages"), config.get("optimized_metric")
    named = isinstance(stages, list) and stages and all(stage in STAGES for stage in stages)
    if not named or not isinstance(metric, str | None) or not isinstance(config.get("seed"), int):
        raise UserError(f"{path} is no config of a run (seed, stages, optimized_metric): move its folder away")
    return config


def _overrides(run_dir: Path) -> list[str]:
    path = run_dir / "overrides.txt"
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Return a Markdown table: mean ± standard deviation over the seeds; how many have a value of the first column."""
    lines = [["", "seeds", *columns], ["---", "--:", *("--:" for _ in columns)]]
    for row in rows:
        lines.append(
            [
                f"`{row.told}`",
                str(len(row.values.get(columns[0], []))),
                *(_figure(row.values.get(name, [])) for name in columns),
            ]
        )
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _failures_told(failed: Sequence[Mapping[str, Any]]) -> str:
    if not failed:
        return ""
    lines = [f"- `{each['job']}`: {each['error'].splitlines()[0]}; `{each['command']}`\n" for each in failed]
    return "\nFailed:\n\n" + "".join(lines)


def _figure(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{mean(values):.4g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


def _plot(rows: Sequence[Row], metric: str, path: Path) -> None:
    """Plot each job's metric, seeds as points; where guidance was compared, its mean over guidance beside it."""
    from matplotlib.figure import Figure

    def scales(values: Mapping[str, Sequence[float]]) -> list[tuple[float, float]]:
        named = re.compile(re.escape(metric.partition("/guidance ")[0]) + r"/guidance ([\d.]+)")
        return sorted((float(m[1]), mean(v)) for name, v in values.items() if (m := named.fullmatch(name)))

    swept = any(scales(row.values) for row in rows)
    figure = Figure(figsize=(11 if swept else 6, 1.2 + 0.4 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 2 if swept else 1, squeeze=False)[0]
    for place, row in enumerate(rows):
        values = row.values.get(metric, [])
        dots = panels[0].plot(values, [place] * len(values), "o", alpha=0.6)[0]
        if values:
            panels[0].plot([mean(values)], [place], "|", color=dots.get_color(), markersize=16)
        if swept and (points := scales(row.values)):
            panels[1].plot(*zip(*points, strict=True), marker="o", color=dots.get_color(), label=row.told)
    panels[0].set_yticks(range(len(rows)), [row.told for row in rows], fontsize=8)
    panels[0].invert_yaxis()
    panels[0].set_xlabel(f"{metric} ({'higher' if higher_is_better(metric) else 'lower'} is better)")
    for panel in panels:
        panel.grid(alpha=0.3)
    if swept:
        panels[1].set_xlabel("guidance scale")
        panels[1].set_title(f"{metric.partition('/guidance ')[0]}, mean over seeds", fontsize=9)
        panels[1].legend(fontsize=7)
    with file_written_atomically(path) as file:
        figure.savefig(file, format="png", dpi=120)


def say_summary(folder: Path, metrics: Sequence[str] = ()) -> None:
    """Summarize a sweep, print the table, and how to draw with the best."""
    result = summarize(folder, metrics)
    print((folder / "sweep.md").read_text(encoding="utf-8"), end="")
    best = folder / result["jobs"][0]["runs"][0]
    print(f"ranked by {result['metric']}: {folder / 'sweep.md'}, {folder / 'sweep.png'}")
    if (best / "model" / "model_index.json").exists():
        print(f'draw with the best: python sample.py ckpt={best} prompt="…"')


if __name__ == "__main__":
    try:
        say_summary(Path(sys.argv[1]), sys.argv[2:])
    except (UserError, IndexError) as error:
        print(f"error: {error if isinstance(error, UserError) else 'name the folder of a sweep'}", file=sys.stderr)
        sys.exit(2)
