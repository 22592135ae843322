"""What `metrics.csv` holds, as lines to plot: read row by row, since the last may be cut short."""

import csv
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ldm.errors import UserError

# Found by evaluating the model as it was trained (ldm.training.measuring), and so of neither training nor validation.
MEASURED = (
    "prompt_accuracy", "fid", "kid", "clip_score", "clip_frechet", "cmmd", "memorization", "retrieval",
    "reconstruction",
)  # fmt: skip
# How fast training went (ldm.training.throughput).
SPEED = ("images_per_second", "gflops_per_image", "utilization", "data_wait")
HIGHER_IS_BETTER = ("psnr", "ssim", "recall", "accuracy", "clip_score", "image_to_text", "text_to_image", *SPEED[:3])


@dataclass
class Line:
    """One metric over steps.

    `diffusion/val_loss_raw/t000-250` is the metric `loss` of the stage `diffusion`, its part `t000-250`, seen in
    validation with the raw weights.
    """

    stage: str
    metric: str
    part: str = ""
    split: str = ""  # training, validation; of what is measured neither
    raw: bool = False
    values: dict[int, float] = field(default_factory=dict)  # by step, in order; finite
    not_finite: list[int] = field(default_factory=list)  # steps

    @property
    def last(self) -> tuple[int, float]:
        return list(self.values.items())[-1]

    @property
    def best(self) -> tuple[int, float]:
        choose = max if higher_is_better(self.metric) else min
        return choose(self.values.items(), key=lambda item: item[1])

    @property
    def label(self) -> str:
        """What tells it from the other lines of a panel."""
        weights = "raw weights" if self.raw else "" if self.part or self.split else "averaged weights"
        return ", ".join(filter(None, [self.part or self.split, weights]))


def higher_is_better(metric: str) -> bool:
    """Tell whether of a metric, by its name alone or as metrics.csv has it, more is better.

    >>> higher_is_better("diffusion/prompt_accuracy_raw/guidance 3"), higher_is_better("diffusion/val_loss")
    (True, False)
    """
    return any(name in metric for name in HIGHER_IS_BETTER)


@dataclass
class Metrics:
    """The lines of a run, and for each stage when its training losses were written: (step, Unix time)."""

    lines: list[Line]
    times: dict[str, list[tuple[int, float]]]
    num_bad: int = 0  # rows that are none

    def of(self, stage: str) -> list[Line]:
        return [line for line in self.lines if line.stage == stage]

    def find(self, stage: str, metric: str, split: str = "validation") -> Line | None:
        """Return a line of the whole, of the averaged weights where there are two."""
        wanted = Line(stage, metric, "", split)
        return next((line for line in self.lines if _identity(line) == _identity(wanted)), None)


def read_metrics(path: Path) -> Metrics:
    """Read what can be read; of steps that were logged twice the later row counts.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    lines: dict[str, Line] = {}
    found = Metrics([], {})
    for row in text.splitlines()[1:]:
        try:
            name, step, value, moment = next(csv.reader([row]))
            at, number, when = int(step), float(value), float(moment)
            line = lines.setdefault(name, _line(name))
        except (ValueError, StopIteration, csv.Error):
            found.num_bad += 1
            continue
        if not math.isfinite(number):
            line.not_finite.append(at)
            continue
        line.values.pop(at, None)
        line.values[at] = number
        marks = found.times.setdefault(line.stage, [])
        is_loss = line.split == "training" and line.metric not in SPEED
        if is_loss and math.isfinite(when) and (not marks or marks[-1][0] != at):
            marks.append((at, when))
    found.lines = [line for line in lines.values() if line.values or line.not_finite]
    for line in found.lines:
        line.values = dict(sorted(line.values.items()))
    return found


def _line(name: str) -> Line:
    stage, metric, *parts = name.split("/")
    part = "/".join(parts)
    split = "validation" if metric.startswith("val_") else "training"
    base = metric.removeprefix("val_").removesuffix("_raw")
    if base.removesuffix("_unseen") in MEASURED or part.startswith("guidance"):
        split = ""
    return Line(stage, base, part, split, raw=metric.endswith("_raw"))


def _identity(line: Line) -> tuple[str, str, str, str, bool]:
    return line.stage, line.metric, line.part, line.split, line.raw


def panels(lines: Sequence[Line]) -> dict[tuple[str, bool], list[Line]]:
    """Put together what belongs into one plot: by metric, and whether it is of timesteps; the loss first.

    What was measured with several settings is shown by setting, without the best of them once more.
    """
    found: dict[tuple[str, bool], list[Line]] = {}
    for line in lines:
        found.setdefault((line.metric, bool(line.part and line.split)), []).append(line)
    for key, together in found.items():
        if not together[0].split and any(line.part for line in together):
            found[key] = [line for line in together if line.part]
    return dict(sorted(found.items(), key=lambda item: item[0][0] != "loss"))


def rates(marks: Sequence[tuple[int, float]], images_a_step: float) -> dict[int, float]:
    """Return images per second between marks, by the step at the end of each interval.

    Intervals that take more than three times the usual time a step are left out: there the run stood still.

    >>> rates([(0, 0.0), (10, 1.0), (20, 2.0), (30, 99.0), (40, 100.0)], 8)
    {10: 80.0, 20: 80.0, 40: 80.0}
    """
    pairs = itertools.pairwise(marks)
    seconds = {b[0]: (b[1] - a[1]) / (b[0] - a[0]) for a, b in pairs if b[0] > a[0] and b[1] > a[1]}
    if not seconds:
        return {}
    usual = statistics.median_low(seconds.values())
    return {step: images_a_step / each for step, each in seconds.items() if each <= 3 * usual}


def images_a_step(config: Mapping[str, object], stage: str) -> tuple[float, bool]:
    """Return the pictures of an optimizer step, and whether that is of one device only.

    How many devices `auto` meant is not written down.

    Raises:
        UserError: the config does not say.
    """
    trainer, data = _mapping(config, "trainer"), _mapping(config, "data")
    batch = data.get("batch_size") if stage == "diffusion" else _mapping(config, stage).get("batch_size")
    accumulate = trainer.get("accumulate_grad_batches", 1) if stage == "diffusion" else 1
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    if isinstance(devices, list):
        devices = len(devices)
    if devices in ("auto", "-1", -1) and trainer.get("accelerator") == "cpu":
        devices = 1
    if not isinstance(batch, int) or not isinstance(accumulate, int) or not (isinstance(nodes, int) or nodes == "auto"):
        raise UserError(f"the config does not say how large a batch of stage {stage} is")
    if not isinstance(devices, int) or devices < 1 or not isinstance(nodes, int):
        return batch * accumulate, True
    return batch * accumulate * devices * nodes, False


def _mapping(config: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = config.get(key)
    return value if isinstance(value, Mapping) else {}
