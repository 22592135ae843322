"""Whole training programs beside each other: `train.py`, and a plain loop over diffusers' parts (plain_loop.py).

Both train the U-Net of `experiment=shapes` from the same fresh weights over the same VAE and text encoder, each in a
process of its own, and note when each step ended. What both read is written beforehand and takes no time of either.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from common import ROOT, load_config
from safetensors.torch import save_file

from ldm.config import TrainConfig

STAGES = "stages=[autoencoder,clip]"


class Watch(pl.Callback):
    """Note when each step of `train.py` ended; keep the averaged weights now and then.

    Args:
        folder: gets `times.json`, and `step-….safetensors`.
        every: steps between two copies of the weights; 0 for none.
    """

    def __init__(self, folder: str, every: int = 0) -> None:
        self.folder, self.every = Path(folder), every
        self.times: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.times.append(time.time())
        if self.every and trainer.is_global_zero and len(self.times) % self.every == 0:
            save_file(
                {name: tensor.contiguous() for name, tensor in pl_module.evaluated.state_dict().items()},
                self.folder / f"step-{len(self.times):06d}.safetensors",
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            (self.folder / "times.json").write_text(json.dumps(self.times), encoding="utf-8")


@dataclass
class Run:
    """Seconds from the start of a program to the end of each of its steps, and to its own end."""

    steps: list[float]
    end: float

    def rate(self, batch_size: int, warmup: int = 10) -> float:
        """Return images/s of the steps after the first few."""
        return batch_size * (len(self.steps) - 1 - warmup) / (self.steps[-1] - self.steps[warmup])


def prepare(folder: Path, *overrides: str, stages_from: Path | None = None) -> TrainConfig:
    """Write what both programs begin with; return the config of ours.

    Args:
        folder: gets the run directory of ours; `parts/` with vae, text_encoder, tokenizer, unet as diffusers keeps
            them; `pictures/` with PNGs and `metadata.jsonl`.
        overrides: of `train.py experiment=shapes`.
        stages_from: an output directory whose VAE and CLIP are taken, and trained in it where they are not there yet;
            None trains them here.
    """
    from PIL import Image

    from ldm.data.sources import open_sources
    from ldm.training.networks import build_unet, load_frozen
    from ldm.weights.folder import save_network

    run_ours(stages_from or folder, "parts", STAGES, *overrides)
    if stages_from:
        shutil.copytree(stages_from / "stages", folder / "stages")
    config = load_config("experiment=shapes", f"output_dir={folder}", "name=run", *overrides)
    vae, conditioner = load_frozen(config)
    parts = folder / "parts"
    save_network(vae, parts / "vae")
    save_network(conditioner.text_tower, parts / "text_encoder")
    conditioner.tokenizer.save_pretrained(parts / "tokenizer")
    save_network(build_unet(config, vae, conditioner.text_tower.config["hidden_size"]), parts / "unet")

    pictures: Any = open_sources(config.data)[0]
    (folder / "pictures").mkdir()
    with (folder / "pictures" / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for i in range(len(pictures)):
            Image.fromarray(pictures[i]["image"]).save(folder / "pictures" / f"{i:06d}.png")
            file.write(json.dumps({"file_name": f"{i:06d}.png", "text": pictures[i]["captions"][0]}) + "\n")
    return config


def run_ours(output_dir: Path, name: str, *overrides: str, watch: Path | None = None, every: int = 0) -> Run | None:
    """Run `train.py experiment=shapes`; of a run that is watched return when each step ended."""
    arguments = [f"output_dir={output_dir}", f"name={name}", "evaluation.metrics=[]", *overrides]
    if watch:
        watch.mkdir(parents=True)
        arguments += [
            "+callbacks.watch._target_=training_runs.Watch", f"+callbacks.watch.folder={watch}",
            f"+callbacks.watch.every={every}",
        ]  # fmt: skip
    return _run(["train.py", "experiment=shapes", *arguments], watch)


def run_theirs(folder: Path, config: TrainConfig, watch: Path, every: int = 0) -> Run:
    """Run the plain loop with the settings of a config."""
    watch.mkdir(parents=True)
    settings = {
        "pictures": str(folder / "pictures"),
        "parts": str(folder / "parts"),
        "out": str(watch),
        "every": every,
        "batch_size": config.data.batch_size,
        "num_workers": 2,
        "max_steps": config.trainer.max_steps,
        "seed": config.seed,
        "optim": config.optim.model_dump(),
        "diffusion": config.diffusion.model_dump(),
    }
    (watch / "settings.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    run = _run(["benchmarks/plain_loop.py", str(watch / "settings.json")], watch)
    assert run
    return run


def _run(arguments: list[str], watch: Path | None) -> Run | None:
    path = os.pathsep.join(filter(None, [str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")]))
    started = time.time()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    ended = time.time()
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    if watch is None:
        return None
    times = json.loads((watch / "times.json").read_text(encoding="utf-8"))
    return Run([each - started for each in times], ended - started)
