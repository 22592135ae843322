"""What `evaluation.json` holds, as tables, and the pictures beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.files import load_json
from ldm.report.html import attempt, esc, facts, missing, number, table
from ldm.report.pictures import figure

REFERENCES = {"floor": "other real pictures", "real": "held-out pictures", "expected": "held-out pictures, by chance"}


def evaluation(run_dir: Path) -> str:
    """Lay out the results of the last `evaluate.py` on a run.

    Raises:
        UserError: the file cannot be read.
    """
    path = run_dir / "evaluation.json"
    if not path.is_file():
        return missing("Not evaluated yet: python evaluate.py measures a finished run.")
    results = load_json(path)
    parts = []
    if _is_older(path, run_dir / "model" / "stage.json"):
        parts.append(missing("The model was trained again since it was measured: these figures are of an older one."))
    if "prompt_accuracy" in results:
        parts.append(attempt("prompt_accuracy", lambda: prompt_accuracy(results["prompt_accuracy"])))
    swept = {name: found for name, found in results.items() if isinstance(found, Mapping) and "values" in found}
    if swept:
        drawn = results.get("drawn")
        parts.append(attempt(", ".join(swept), lambda: sweep(swept, drawn if isinstance(drawn, Mapping) else {})))
    for name, found in results.items():
        if isinstance(found, Mapping) and name not in (*swept, "prompt_accuracy", "drawn"):
            parts.append(f"<h3>{esc(heading(name))}</h3>{facts(_flat(found))}")
    for picture in sorted(run_dir.glob("evaluation*.png")):
        told = _told(picture.stem.removeprefix("evaluation").strip("-"))
        parts.append(figure(picture, f"{told} ({picture.name})", told))
    return "".join(parts) or missing(f"{path.name} holds no figures")


def prompt_accuracy(found: Mapping[str, Any]) -> str:
    """Lay out which share of held-out prompts was obeyed, a row for each kind of pair and guidance, and the ceiling."""
    ceiling = found["ceiling"]
    rows = [
        [pairs, name.removeprefix("guidance "), *(f"{row[attribute]:.1%}" for attribute in ceiling)]
        for pairs, by_scale in found["pairs"].items()
        for name, row in by_scale.items()
    ]
    rows.append(["VAE reconstruction (ceiling)", "", *(f"{value:.1%}" for value in ceiling.values())])
    steps = found["steps"]
    told = ", ".join(map(str, steps)) if isinstance(steps, list) else steps
    caption = f"Prompt accuracy: {found['num_prompts']} held-out prompts a row, {told} steps of {found['sampler']}"
    return table(["(shape, color) pairs", "guidance", *ceiling], rows, caption)


def best_guidance(found: Mapping[str, Any]) -> tuple[str, float, float]:
    """Return the setting under which most prompts of seen pairs were obeyed, that share, and the ceiling."""
    name, row = max(found["pairs"]["seen"].items(), key=lambda item: item[1]["all"])
    return name, float(row["all"]), float(found["ceiling"]["all"])


def sweep(swept: Mapping[str, Mapping[str, Any]], drawn: Mapping[str, Any]) -> str:
    """Lay out the metrics of drawn pictures, a row for each setting, and what real pictures have."""
    first = next(iter(swept.values()))["values"]
    rows = []
    for i, row in enumerate(first):
        figures = (number(found["values"][i]["value"]) for found in swept.values())
        rows.append([f"{row['steps']}", f"{row['guidance_scale']:g}", *figures])
    for reference, told in REFERENCES.items():
        if any(reference in found for found in swept.values()):
            figures = (number(found[reference]) if reference in found else "" for found in swept.values())
            rows.append([told, "", *figures])
    told = "; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in drawn.items())
    caption = "Drawn pictures of held-out prompts" + (f" ({told})" if told else "")
    return table(["steps", "guidance", *map(heading, swept)], rows, caption)


# Where letters alone would mislead.
NAMES = {
    "l1": "L1", "l2": "L2", "kl": "KL", "psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS", "rfid": "rFID",
    "fid": "FID", "kid": "KID", "cmmd": "CMMD", "clip_score": "CLIP score", "clip_frechet": "CLIP Fréchet distance",
}  # fmt: skip


def heading(metric: str) -> str:
    """Name a metric for people.

    >>> heading("fid"), heading("prompt_accuracy")
    ('FID', 'prompt accuracy')
    """
    return NAMES.get(metric, metric.replace("_", " "))


def _told(stem: str) -> str:
    """Say what a picture of an evaluation shows, from its name."""
    if not stem:
        return "drawn from held-out prompts: upper half pairs seen in training, lower half unseen"
    if stem in ("guidance", "steps"):
        return f"metrics over {stem}"
    if stem.startswith("memorization"):
        return "drawn pictures, each beside the training pictures nearest to it"
    if stem.startswith("reconstruction"):
        return "held-out pictures and their reconstructions"
    return heading(stem.replace("-", " "))


def _flat(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (key.replace("_", " "), number(value) if isinstance(value, int | float) else str(value))
        for key, value in found.items()
        if isinstance(value, int | float | str)
    ]


def _is_older(path: Path, other: Path) -> bool:
    """Tell whether a file was written before another; a minute is nothing, as when folders are copied."""
    return other.is_file() and path.stat().st_mtime < other.stat().st_mtime - 60
