"""Metrics in the course of training: pictures of held-out prompts are drawn, and measured as `evaluate.py` does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from ldm.config import EvaluateConfig, TrainConfig
from ldm.evaluation.asking import name
from ldm.evaluation.evaluate import METRICS, check_subject
from ldm.evaluation.plots import best
from ldm.evaluation.subject import Setting, Subject
from ldm.training.diffusion import DiffusionModule

FOLDER = "evaluation"  # of the run directory: pictures of each measurement


class Measure(pl.Callback):
    """Log metrics of drawn pictures every so many optimizer steps, and at the end.

    `diffusion/<metric>` is the figure of the best setting; where several are compared each has a row of its own too,
    `diffusion/<metric>/guidance 3`. The weights in training have `_raw` after the metric's name, unseen pairs of
    prompt_accuracy `_unseen`. Prompts and noise are the same every time. The first rank draws, the others wait.

    Args:
        config: the run's.
        module: the U-Net's.

    Raises:
        UserError: a metric cannot be had.
    """

    def __init__(self, config: TrainConfig, module: DiffusionModule) -> None:
        asked, run_dir = config.evaluation, Path(config.run_dir)
        values = asked.model_dump(exclude={"every", "weights"})
        for swept in Setting._fields:  # lists are compared as they are, without guidance 1 beside
            value = values[swept] or getattr(config.sampling, swept)
            values[swept] = value if isinstance(value, list) else [value]
        device = "cpu" if config.trainer.accelerator == "cpu" else "auto"
        wanted = EvaluateConfig(ckpt=config.run_dir, **values, out=None, device=device, dtype="fp32")
        self.every, self.weights, self.folder = asked.every, asked.weights, run_dir / FOLDER
        self.subject = Subject(wanted, run_dir / "model", run_dir, run_dir, say=lambda _: None, run=config)
        self.subject.draw_with(module.pipeline(module.evaluated), run_dir)
        check_subject(self.subject)
        self._last_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Before the checkpoint of this step, which Lightning writes last: one that goes on from there misses nothing.
        step = trainer.global_step
        if step == self._last_step or (step % self.every and step < trainer.max_steps):
            return
        self._last_step = step
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        figures: dict[str, float] = {}
        for weights in self.weights:
            suffix = "" if weights == "ema" else "_raw"
            unet = pl_module.evaluated if weights == "ema" else pl_module.network
            self.subject.draw_with(pl_module.pipeline(unet), self.folder / f"step-{step:06d}{suffix}.json")
            was_training = unet.training
            unet.eval()
            for metric in self.subject.config.metrics:
                for kind, rows in by_setting(metric, METRICS[metric](self.subject)).items():
                    key = f"{pl_module.stage}/{kind}{suffix}"
                    figures[key] = best(metric, rows.values())
                    if len(rows) > 1:
                        figures |= {f"{key}/{setting}": value for setting, value in rows.items()}
            unet.train(was_training)
        for logger in trainer.loggers:
            logger.log_metrics(figures, step - 1)  # as Lightning counts


def by_setting(metric: str, found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Take the figures out of what a metric found: of each kind of prompts, by the setting they were drawn with."""
    if metric == "prompt_accuracy":
        return {
            metric + ("" if pairs == "seen" else f"_{pairs}"): {setting: row["all"] for setting, row in rows.items()}
            for pairs, rows in found["pairs"].items()
        }
    several = len({row["steps"] for row in found["values"]}) > 1
    rows = {name(Setting(row["steps"], row["guidance_scale"]), several): row["value"] for row in found["values"]}
    return {metric: rows}
