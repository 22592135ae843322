"""What `evaluate.py` does: metrics of a trained model, as JSON, as tables, as pictures."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ldm.config import DRAWING, EvaluateConfig, check
from ldm.errors import UserError
from ldm.evaluation.asking import check_world, compared, name, prompt_accuracy
from ldm.evaluation.clip_score import clip_scores, retrieval
from ldm.evaluation.comparing import clip_frechet, clip_mmd, fid, kid
from ldm.evaluation.memorization import memorization
from ldm.evaluation.plots import plot_sweep
from ldm.evaluation.reconstruction import reconstruction
from ldm.evaluation.subject import Progress, Subject, silent
from ldm.evaluation.table import print_figures, print_table
from ldm.files import check_writable, save_json
from ldm.redact import redacted
from ldm.report import report
from ldm.weights.hub import find_model


def evaluate(values: Mapping[str, Any], progress: Progress = silent) -> dict[str, Any]:
    """Compute the metrics that the config asks for; write `evaluation.json` and PNGs, and print tables.

    Args:
        values: of the config.
        progress: shows long work, see `ldm.evaluation.subject`.

    Returns:
        What was written.

    Raises:
        UserError: bad settings; `ckpt` is no finished model; a metric does not apply to this model, or what it looks
            with cannot be had. All this shows before anything is drawn.
    """
    config = check(EvaluateConfig, values)
    folder = find_model(config.ckpt)
    run_dir = folder.parent if (folder.parent / "config.yaml").is_file() else folder
    out = Path(config.out).expanduser() if config.out else run_dir / "evaluation.json"
    if not out.parent.is_dir():
        raise UserError(f"out={config.out}: there is no folder {out.parent}")
    if out.is_dir() or out.suffix != ".json":
        raise UserError(f"out={config.out} must name a file that ends in .json")
    check_writable(out.parent, f"out={out}")
    started = time.monotonic()
    subject = Subject(config, folder, run_dir, out, progress)
    check_subject(subject)
    results: dict[str, Any] = {"ckpt": config.ckpt}
    for metric in config.metrics:
        results[metric] = METRICS[metric](subject)
        if metric == "prompt_accuracy":
            print_table(results[metric])
    if any(metric in DRAWING for metric in config.metrics if metric != "prompt_accuracy"):
        results["drawn"] = {
            "num_prompts": config.num_prompts,
            "resolution": subject.pipeline.default_size,
            "sampler": config.sampler or subject.pipeline.settings["sampler"],
            "seed": config.seed,
        }
    if plots := plot(subject, results):
        results["plots"] = plots
    results["seconds"] = round(time.monotonic() - started, 1)
    save_json(out, redacted(results))
    print_figures(results)
    print(f"written: {out}")
    if out.parent == run_dir and (run_dir / "config.yaml").is_file():
        report(run_dir)
    return results


def check_subject(subject: Subject) -> None:
    """Know before anything is drawn whether every metric can be had; raises a UserError that names the first."""
    metrics = set(subject.config.metrics)
    if "prompt_accuracy" in metrics:
        check_world(subject)
    if metrics - {"prompt_accuracy"}:
        subject.real("val")
    if metrics & {"clip_score", "clip_frechet", "cmmd", "memorization", "retrieval"}:
        _ = subject.clip
    if metrics & {"fid", "kid"}:
        _ = subject.inception
    if metrics & set(DRAWING):
        subject.check_settings(compared(subject) if "prompt_accuracy" in metrics else subject.settings)


def plot(subject: Subject, results: Mapping[str, Any]) -> list[str]:
    """Plot what a call compares; return the names of the files."""
    if not set(subject.config.metrics) & set(DRAWING) or len(subject.settings) < 2:
        return []
    values: dict[str, Any] = {
        metric: results[metric]["values"] for metric in DRAWING if "values" in results.get(metric, {})
    }
    if "prompt_accuracy" in results:
        seen, settings = results["prompt_accuracy"]["pairs"]["seen"], compared(subject)
        several = isinstance(results["prompt_accuracy"]["steps"], list)
        values["prompt_accuracy"] = [{**each._asdict(), "value": seen[name(each, several)]["all"]} for each in settings]
    paths = plot_sweep(values, subject.out)
    for path in paths:
        print(f"plotted: {path}")
    return [path.name for path in paths]


METRICS: dict[str, Callable[[Subject], Mapping[str, Any]]] = {
    "prompt_accuracy": prompt_accuracy,
    "fid": fid,
    "kid": kid,
    "clip_score": clip_scores,
    "clip_frechet": clip_frechet,
    "cmmd": clip_mmd,
    "memorization": memorization,
    "retrieval": retrieval,
    "reconstruction": reconstruction,
}
