"""A stage on the page: how its metrics went, how fast it was, what its pictures looked like."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from ldm.errors import UserError
from ldm.report.curves import COLORS, Curve, draw
from ldm.report.evaluation import heading
from ldm.report.html import attempt, esc, facts, folded, missing, number, table
from ldm.report.metrics import SPEED, Line, Metrics, higher_is_better, images_a_step, panels, rates
from ldm.report.pictures import samples

Config = Mapping[str, Any]

TITLES = {"autoencoder": "VAE", "clip": "CLIP", "diffusion": "U-Net"}
PARTS = {"autoencoder": "vae", "clip": "text_encoder"}  # of the model folder and of the config
PICTURES = {
    "autoencoder": "held-out pictures, each beside its reconstruction",
    "clip": "pictures",
    "diffusion": "fixed prompts drawn from fixed noise",
}


def stage_section(run_dir: Path, config: Config, metrics: Metrics, stage: str) -> str:
    """Tell of a stage that was trained in this run, or where it was taken from."""
    lines = metrics.of(stage)
    if not lines:
        return f"<p>{esc(origin(run_dir, config, stage))}</p>"
    side = value(config, "data.resolution")
    side = side if isinstance(side, int) and side > 0 else None
    folder = run_dir / "samples" / stage
    pictures = samples(folder, side, PICTURES[stage]) if folder.is_dir() or stage != "clip" else ""
    return "".join(
        [
            facts(stage_facts(run_dir, config, metrics, stage)),
            attempt("the curves", lambda: curves(config, metrics, stage)),
            pictures,
            folded("Figures of all curves", attempt("the figures", lambda: figures(lines))),
        ]
    )


def origin(run_dir: Path, config: Config, stage: str) -> str:
    """Say where a stage came from that metrics.csv knows nothing of."""
    part = PARTS.get(stage)
    if part and (pretrained := value(config, f"{part}.pretrained")):
        return f"Not trained: pretrained weights, {pretrained}."
    if part and (result := linked(run_dir, part)):
        return (
            f"Not trained in this run: taken from {Path(str(config.get('output_dir', 'outputs'))) / 'stages' / result}."
        )
    return "Nothing of this stage has been logged in this run."


def linked(run_dir: Path, part: str) -> str | None:
    """Return the name of the shared result that lies in the model folder."""
    try:
        return (run_dir / "model" / f".{part}").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def stage_facts(run_dir: Path, config: Config, metrics: Metrics, stage: str) -> list[tuple[str, str]]:
    block = "trainer" if stage == "diffusion" else stage
    optim = "optim" if stage == "diffusion" else f"{stage}.optim"
    reached = 1 + max((step for line in metrics.of(stage) for step in line.values), default=-1)
    asked = value(config, f"{block}.max_steps")
    is_done = (run_dir / "model" / "stage.json").is_file() if stage == "diffusion" else linked(run_dir, PARTS[stage])
    found = [("steps", f"{reached:,}" + (f" of {asked:,}" if isinstance(asked, int) else ""))]
    found.append(("state", "finished" if is_done else "going on, or stopped before its end"))
    batch = value(config, "data.batch_size") if stage == "diffusion" else value(config, f"{stage}.batch_size")
    accumulate = value(config, "trainer.accumulate_grad_batches") if stage == "diffusion" else 1
    if batch is not None:
        found.append(("batch", f"{batch}" + (f" × {accumulate}" if accumulate not in (None, 1) else "")))
    name = str(value(config, f"{optim}._target_") or "").rpartition(".")[2]
    settings = [name, *(str(value(config, f"{optim}.{key}") or "") for key in ("lr", "schedule"))]
    if any(settings):
        found.append(("optimizer", " ".join(filter(None, settings))))
    if stage != "diffusion" and (result := linked(run_dir, PARTS[stage])):
        found.append(("result", f"{Path(str(config.get('output_dir', 'outputs'))) / 'stages' / result}"))
    return found


def curves(config: Config, metrics: Metrics, stage: str) -> str:
    """Plot what has more than one point: losses first, then throughput, then what was found by looking at the model."""
    lines = metrics.of(stage)
    trained = plots([line for line in lines if line.split and line.metric not in SPEED])
    trained.append(attempt("the throughput", lambda: throughput(config, metrics, stage)))
    measured = plots([line for line in lines if not line.split])
    title = "<h3>Measured as training went</h3>" if measured else ""
    return f"{warnings(lines)}{side_by_side(trained)}{title}{side_by_side(measured)}"


def side_by_side(figures: Iterable[str]) -> str:
    there = "".join(figures)
    return f'<div class="plots">{there}</div>' if there else ""


def warnings(lines: Iterable[Line]) -> str:
    told = (
        f"{line.metric} ({line.label}) was not finite at {len(line.not_finite)} logged steps, first at step "
        f"{min(line.not_finite):,}"
        for line in lines
        if line.not_finite
    )
    return "".join(map(missing, told))


def plots(lines: Sequence[Line]) -> list[str]:
    found = []
    for (metric, by_timestep), together in panels(lines).items():
        drawn = [line for line in together if line.values]
        if any(len(line.values) > 1 for line in drawn):
            title = f"{heading(metric)} by timestep" if by_timestep else heading(metric)
            found.append(attempt(metric, partial(plot, title, drawn)))
    return found


def plot(title: str, lines: Sequence[Line]) -> str:
    """Plot lines of one metric; what the raw weights have is dashed, in the color of the averaged ones."""
    keys = list(dict.fromkeys((line.part, line.split) for line in lines))
    of_split = {"training": COLORS[0], "validation": COLORS[1]}
    colors = {key: COLORS[i % len(COLORS)] if key[0] else of_split.get(key[1], COLORS[2]) for i, key in enumerate(keys)}
    drawn = [Curve(line.values, colors[line.part, line.split], line.raw) for line in lines]
    several = len(keys) > 1 and bool(lines[0].part)  # then a second entry of each color would tell nothing new
    legend = "".join(
        entry(line.label, curve, line.last[1])
        for line, curve in zip(lines, drawn, strict=True)
        if not (several and line.raw)
    )
    if several and any(line.raw for line in lines):
        legend += "<li>dashed: raw weights</li>"
    return panel(title, legend, draw(drawn, log=not higher_is_better(lines[0].metric)), told(title, lines))


def entry(label: str, curve: Curve, last: float) -> str:
    """Write an entry of a legend: line, name, last value."""
    style = f"border-top:2px {'dashed' if curve.dashed else 'solid'} {curve.color}"
    return f'<li><span class="line" style="{style}"></span>{esc(label)} <b>{esc(number(last))}</b></li>'


def panel(title: str, legend: str, svg: str, alt: str) -> str:
    return (
        f'<figure class="plot"><figcaption>{esc(title)}</figcaption><ul>{legend}</ul>'
        f'<div role="img" aria-label="{esc(alt)}">{svg}</div></figure>'
    )


def told(title: str, lines: Iterable[Line]) -> str:
    """Say in words what a plot shows."""
    each = (f"{line.label} from {number(next(iter(line.values.values())))} to {number(line.last[1])}" for line in lines)
    return f"{title} over steps: {'; '.join(each)}"


def throughput(config: Config, metrics: Metrics, stage: str) -> str:
    """Plot pictures a second; nothing where there were too few steps to tell."""
    found, unit = speed(config, metrics, stage)
    if len(found) < 2:
        return ""
    curve, usual = Curve(found, COLORS[2]), median(found.values())
    alt = f"{unit} over steps: {number(usual)} in the median"
    return panel(unit, entry("median", curve, usual), draw([curve], from_zero=True), alt)


def speed(config: Config, metrics: Metrics, stage: str) -> tuple[dict[int, float], str]:
    """Return pictures a second by step, and what they are called: as logged, or from the times of the losses.

    Raises:
        UserError: the config does not say how large a batch is.
    """
    if (line := metrics.find(stage, SPEED[0], "training")) and line.values:
        return line.values, "images/s"
    images, of_one = images_a_step(config, stage)
    return rates(metrics.times.get(stage, []), images), "images/s of one device" if of_one else "images/s"


def figures(lines: Iterable[Line]) -> str:
    """Lay out the last and the best value of each line."""
    rows = []
    for line in lines:
        if not line.values:
            continue
        (last_step, last), (best_step, best) = line.last, line.best
        seen = ", ".join(filter(None, [line.part, line.split, "raw weights" if line.raw else ""]))
        rows.append([heading(line.metric), seen, number(last), f"{last_step:,}", number(best), f"{best_step:,}"])
    return table(["metric", "of", "last", "at step", "best", "at step"], rows, texts=2)


Tile = tuple[str, str, str]
"""The name of a figure, its value, a note."""


def tiles(config: Config, metrics: Metrics) -> list[Tile]:
    """Return what one wants to know of training first."""
    found = [tile for stage, title in TITLES.items() if (tile := _loss_tile(metrics, stage, title))]
    if (line := metrics.find("autoencoder", "psnr")) and line.values:
        found.append(("Reconstruction PSNR", f"{number(line.last[1])} dB", "held-out pictures"))
    if (line := metrics.find("clip", "image_to_text@1")) and line.values:
        found.append(("CLIP recall@1", f"{line.last[1]:.1%}", "captions found for held-out pictures"))
    found += _measured_tiles(metrics)
    return found + [tile for stage, title in TITLES.items() if (tile := _speed_tile(config, metrics, stage, title))]


def _loss_tile(metrics: Metrics, stage: str, title: str) -> Tile | None:
    for split in ("validation", "training"):
        if (line := metrics.find(stage, "loss", split)) and line.values:
            return f"{title} {split} loss", number(line.last[1]), f"step {line.last[0]:,}"
    return None


def _measured_tiles(metrics: Metrics) -> Iterable[Tile]:
    """Tell of each metric what the best of its settings has now."""
    measured = [line for line in metrics.lines if not line.split and not line.raw and line.values]
    for (metric, _), lines in panels(measured).items():
        choose = max if higher_is_better(metric) else min
        line = choose(lines, key=lambda line: line.last[1])
        note = ", ".join(filter(None, [line.part, f"step {line.last[0]:,}"]))
        yield f"{heading(metric)} in training", number(line.last[1]), note


def _speed_tile(config: Config, metrics: Metrics, stage: str, title: str) -> Tile | None:
    try:
        found, unit = speed(config, metrics, stage)
    except UserError:
        return None
    shares = {"utilization": "of the matmul rate", "data_wait": "waiting for data"}
    lines = ((metrics.find(stage, name, "training"), told) for name, told in shares.items())
    notes = [f"{median(line.values.values()):.1%} {told}" for line, told in lines if line and line.values]
    note = ", ".join(["median, in training", *notes])
    return (f"{title} {unit}", number(median(found.values())), note) if found else None


def value(config: Config, dotted: str) -> Any:
    """Look a dotted key up in a config of which nothing has been checked."""
    node: Any = config
    for name in dotted.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node
