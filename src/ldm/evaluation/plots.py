"""What a sweep shows: each metric over guidance and over steps, and a distance over CLIP score. PNGs for a report."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.files import file_written_atomically
from ldm.report.metrics import higher_is_better

TITLES = {
    "prompt_accuracy": "prompt accuracy, seen pairs",
    "fid": "FID",
    "kid": "KID",
    "clip_score": "CLIP score",
    "clip_frechet": "Fréchet distance over CLIP",
    "cmmd": "CMMD",
    "memorization": "share of copies, by feature",
}
AXES = {"guidance_scale": "guidance scale", "steps": "steps"}

Values = Mapping[str, Sequence[Mapping[str, Any]]]
"""Of each metric its figures: rows of `steps`, `guidance_scale` and `value`."""


def best(metric: str, values: Iterable[float]) -> float:
    """Return the best of a metric's figures."""
    return (max if higher_is_better(metric) else min)(values)


def plot_sweep(values: Values, out: Path) -> list[Path]:
    """Draw what of these the figures have: metrics over guidance, over steps, and a distance over CLIP score.

    Args:
        values: at least one metric.
        out: the JSON file beside which the PNGs go, under its name.

    Returns:
        The files that were written.
    """
    written = []
    for axis in AXES:
        swept = {name: rows for name, rows in values.items() if len({row[axis] for row in rows}) > 1}
        if swept:
            written.append(_over(axis, swept, out.with_name(f"{out.stem}-{axis.partition('_')[0]}.png")))
    distance = next((name for name in ("fid", "clip_frechet", "cmmd", "kid") if name in values), None)
    if written and distance and "clip_score" in values:
        path = out.with_name(f"{out.stem}-{distance}-over-clip_score.png")
        written.append(_trade_off(values["clip_score"], values[distance], distance, path))
    return written


def _over(axis: str, values: Values, path: Path) -> Path:
    """Draw each metric over one axis, a panel each, a line for each value of the other axis."""
    from matplotlib.figure import Figure

    other = next(name for name in AXES if name != axis)
    figure = Figure(figsize=(3.6 * len(values), 3.2), layout="constrained")
    panels = figure.subplots(1, len(values), squeeze=False)[0]
    for panel, (name, rows) in zip(panels, values.items(), strict=True):
        lines = list(dict.fromkeys(row[other] for row in rows))
        for line in lines:
            points = sorted((row[axis], row["value"]) for row in rows if row[other] == line)
            panel.plot(*zip(*points, strict=True), marker="o", label=f"{AXES[other]} {line:g}")
        panel.set_xlabel(AXES[axis])
        panel.set_title(f"{TITLES[name]} ({'higher' if higher_is_better(name) else 'lower'} is better)", fontsize=9)
        panel.grid(alpha=0.3)
        if len(lines) > 1:
            panel.legend(fontsize=8)
    return _save(figure, path)


def _trade_off(scores: Sequence[Any], distances: Sequence[Any], name: str, path: Path) -> Path:
    """Draw a distance over CLIP score, a point for each setting, joined in the order of guidance for each steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    panel = figure.subplots()
    joined = [(x["steps"], x["guidance_scale"], x["value"], y["value"]) for x, y in zip(scores, distances, strict=True)]
    for steps in dict.fromkeys(row[0] for row in joined):
        points = sorted(row[1:] for row in joined if row[0] == steps)
        panel.plot([x for _, x, _ in points], [y for *_, y in points], marker="o", label=f"{steps} steps")
        for scale, x, y in points:
            panel.annotate(f"{scale:g}", (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8)
    panel.set_xlabel("CLIP score (higher is better)")
    panel.set_ylabel(f"{TITLES[name]} (lower is better)")
    panel.set_title("points are guidance scales", fontsize=9)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    with file_written_atomically(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return path
