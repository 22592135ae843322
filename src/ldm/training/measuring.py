"""Metrics in the course of training: pictures of held-out prompts are drawn, and measured as `evaluate.py` does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from ldm.config import EvaluateConfig, TrainConfig
from ldm.errors import UserError, full_disk
from ldm.evaluation.asking import name
from ldm.evaluation.evaluate import METRICS, check_subject
from ldm.evaluation.plots import best
from ldm.evaluation.subject import Setting, Subject
from ldm.ranks import busy, main_process, meet
from ldm.training.diffusion import DiffusionModule
from ldm.training.module import in_eval_mode
from ldm.training.stages import result_folder

FOLDER = "evaluation"  # of the run directory: pictures of each measurement


class Measure(pl.Callback):
    """Log metrics of drawn pictures every so many optimizer steps, and at the end.

    `diffusion/<metric>` is the figure of the best setting; where several are compared each has a row of its own too,
    `diffusion/<metric>/guidance 3`. The weights in training have `_raw` after the metric's name, unseen pairs of
    prompt_accuracy `_unseen`. Prompts and noise are the same every time. The first rank draws, the others wait. What
    goes wrong in drawing is told and leaves the training alone; a full disk ends it, and the run that goes on measures
    that step again.

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
            value = getattr(config.sampling, swept) if values[swept] is None else values[swept]
            values[swept] = value if isinstance(value, list) else [value]
        if not asked.clip and not config.text_encoder.pretrained:
            values["clip"] = str(result_folder(config, "clip"))
        # The other ranks look at nothing, they find out with the first what cannot be had.
        device = "auto" if main_process() and config.trainer.accelerator != "cpu" else "cpu"
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
        networks = {each: pl_module.evaluated if each == "ema" else pl_module.network for each in self.weights}
        wholes = {weights: pl_module.whole(network) for weights, network in networks.items()}
        if trainer.is_global_zero:
            self._log(trainer, pl_module, wholes, step)
        meet()  # what comes next may be an exchange with a limit to its time

    def _log(self, trainer: pl.Trainer, module: DiffusionModule, wholes: Mapping[Any, Any], step: int) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            figures: dict[str, float] = {}
            with busy("measuring"):
                for weights, unet in wholes.items():
                    figures |= self._measured(module, unet, weights, step)
        except (UserError, OSError) as error:  # such as latents that are not finite: training may be well
            if full_disk(error):  # figures that belong to this step would be missing for good
                raise
            print(f"  not measured after step {step}: {error}", flush=True)
            return
        for logger in trainer.loggers:
            logger.log_metrics(figures, step - 1)  # as Lightning counts

    def _measured(self, module: DiffusionModule, unet: Any, weights: str, step: int) -> dict[str, float]:
        suffix = "" if weights == "ema" else "_raw"
        self.subject.draw_with(module.pipeline(unet), self.folder / f"step-{step:06d}{suffix}.json")
        figures: dict[str, float] = {}
        with in_eval_mode(unet):
            for metric in self.subject.config.metrics:
                for kind, rows in by_setting(metric, METRICS[metric](self.subject)).items():
                    key = f"{module.stage}/{kind}{suffix}"
                    figures[key] = best(metric, rows.values())
                    if len(rows) > 1:
                        figures |= {f"{key}/{setting}": value for setting, value in rows.items()}
        return figures


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
