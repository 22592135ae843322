"""The page as a whole: the figures that matter, the stages, the evaluation, and how the run was made."""

import re
import shlex
import time
from functools import partial
from pathlib import Path
from string import Template
from typing import Any

from ldm.errors import UserError
from ldm.files import load_json, load_yaml
from ldm.report.curves import MOST_POINTS
from ldm.report.evaluation import best_guidance, evaluation
from ldm.report.html import attempt, esc, facts, folded, missing
from ldm.report.metrics import Metrics, read_metrics
from ldm.report.stages import TITLES, Config, stage_section, tiles, value

MOST_LINES = 200  # of quarantine.txt

# Nothing may be fetched or run, whatever a name or a caption holds.
PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
$style
</style>
</head>
<body>
<header>
<h1>$name</h1>
$summary
</header>
<main>
$main
</main>
<footer>$footer</footer>
</body>
</html>
""")


def make_page(run_dir: Path) -> str:
    """Return the report of a run directory as HTML."""
    notes: list[str] = []
    config = _or_nothing(lambda: load_yaml(run_dir / "config.yaml"), notes, {})
    metrics = _or_nothing(lambda: read_metrics(run_dir / "metrics.csv"), notes, Metrics([], {}))
    if metrics.num_bad:
        notes.append(f"{metrics.num_bad} rows of metrics.csv cannot be read and are left out")
    name = str(config.get("name") or run_dir.resolve().name)
    asked = config.get("stages")
    sections = {
        title: attempt(f"stage {stage}", partial(stage_section, run_dir, config, metrics, stage))
        for stage, title in TITLES.items()
        if metrics.of(stage) or (isinstance(asked, list) and stage in asked)
    }
    sections["Evaluation"] = attempt("the evaluation", lambda: evaluation(run_dir))
    sections["The run"] = attempt("the run", lambda: how_it_was_made(run_dir, config))
    top = [attempt("the figures", lambda: _tiles(run_dir, config, metrics)), *map(missing, notes)]
    main = "\n".join(f"<section><h2>{esc(title)}</h2>\n{content}</section>" for title, content in sections.items())
    return PAGE.substitute(
        title=esc(f"{name} — report of a run"),
        style=Path(__file__).with_name("style.css").read_text(encoding="utf-8"),
        name=esc(name),
        summary=attempt("what was trained", lambda: summary(run_dir, config, metrics)),
        main="\n".join(top) + main,
        footer=esc(
            f"Made of {run_dir} on {_moment(time.time())}. Curves of more than {MOST_POINTS} points are means of "
            "neighbors. Validation is on held-out pictures, with averaged weights where a stage has them."
        ),
    )


def _or_nothing(read: Any, notes: list[str], nothing: Any) -> Any:
    try:
        return read()
    except UserError as error:
        notes.append(str(error))
        return nothing


def summary(run_dir: Path, config: Config, metrics: Metrics) -> str:
    """Say what was trained, when and where."""
    data = " ".join(str(x) for x in (value(config, "data.kind"), value(config, "data.path")) if x)
    side = value(config, "data.resolution")
    network = value(config, "unet.block_out_channels") or value(config, "unet.pretrained")
    device, num, nodes = (value(config, f"trainer.{name}") for name in ("accelerator", "devices", "num_nodes"))
    hardware = f"{device} × {num}" + (f" × {nodes} machines" if nodes not in (None, 1) else "")
    machine = ", ".join(filter(None, [hardware, value(config, "trainer.precision")]))
    moments = [moment for marks in metrics.times.values() for _, moment in marks]
    pairs = [
        ("data", f"{data}, {side} px" if side else data),
        ("U-Net", f"{network}, {value(config, 'diffusion.prediction_type')}" if network else ""),
        ("trained", f"{_moment(min(moments))} to {_moment(max(moments))}" if moments else ""),
        ("on", machine if device else ""),
        ("where", _platform(run_dir)),
        ("folder", str(run_dir)),
    ]
    return facts((name, told) for name, told in pairs if told)


def _platform(run_dir: Path) -> str:
    try:
        return str(load_json(run_dir / "env.json").get("platform", ""))
    except UserError:
        return ""  # said below, where all of the file is shown


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _tiles(run_dir: Path, config: Config, metrics: Metrics) -> str:
    found = tiles(config, metrics)
    try:
        setting, share, ceiling = best_guidance(load_json(run_dir / "evaluation.json")["prompt_accuracy"])
        found.insert(0, ("Prompt accuracy", f"{share:.1%}", f"{setting}; ceiling {ceiling:.1%}"))
    except (UserError, LookupError, TypeError, ValueError, AttributeError):
        pass  # its own section says what is wrong
    cells = (
        f'<li><span class="name">{esc(name)}</span><span class="number">{esc(shown)}</span>'
        f'<span class="note">{esc(note)}</span></li>'
        for name, shown, note in found
    )
    return f'<ul class="tiles">{"".join(cells)}</ul>' if found else missing("Nothing has been logged yet.")


def how_it_was_made(run_dir: Path, config: Config) -> str:
    """Show how to draw with the model, what was typed, the environment, the config, and pictures left out."""
    if (run_dir / "model" / "model_index.json").is_file():
        drawing = _code(f'python sample.py {shlex.quote(f"ckpt={run_dir}")} prompt="…"')
    else:
        drawing = missing("The model is not finished yet.")
    typed = _text(run_dir / "overrides.txt")
    parts = [
        "<h3>Draw with the model</h3>", drawing,
        "<h3>What was typed</h3>", missing(typed[1]) if typed[1] else _code(_typed(typed[0])),
        "<h3>Environment</h3>", attempt("env.json", lambda: facts(load_json(run_dir / "env.json").items())),
    ]  # fmt: skip
    left_out = run_dir / "quarantine.txt"
    if left_out.exists():
        text, fault = _text(left_out)
        lines = text.splitlines()
        more = f"\n… and {len(lines) - MOST_LINES} more" if len(lines) > MOST_LINES else ""
        shown = missing(fault) if fault else _code("\n".join(lines[:MOST_LINES]) + more)
        parts.append(folded(f"Pictures left out: {len(lines)} (quarantine.txt)", shown))
    text, fault = _text(run_dir / "config.yaml")
    parts.append(folded("Config (config.yaml)", missing(fault) if fault else _code(text)))
    return "".join(parts)


def _typed(overrides: str) -> str:
    """Write overrides as a command: without the quotes that free text was given for Hydra, with those of a shell."""
    words = (re.sub(r"^([^=]+=)'([\w ./:@-]*)'$", r"\1\2", line) for line in overrides.splitlines())
    return " ".join(["python train.py", *map(shlex.quote, words)])


def _text(path: Path) -> tuple[str, str]:
    """Return a file's text, and what is wrong with it."""
    try:
        return path.read_text(encoding="utf-8", errors="replace"), ""
    except OSError as error:
        return "", f"{path.name} cannot be read: {error.strerror}"


def _code(text: str) -> str:
    return f'<pre tabindex="0"><code>{esc(text)}</code></pre>'
