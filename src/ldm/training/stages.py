"""An experiment is a list of stages: run what is missing, say what is there.

A stage's result is named by a hash of all that decides it. The VAE and CLIP are kept under `<output_dir>/stages/`, so
that runs and sweeps share them; the run directory's `model/` holds copies, the U-Net, and is what `ckpt=` takes.

Nothing here imports torch: finding that everything is up to date takes no time.
"""

import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ldm.cli import nearest
from ldm.config import STAGES, ShapesData, Stage, TrainConfig
from ldm.data.shapes import VERSION as SHAPES_VERSION
from ldm.errors import UserError
from ldm.files import file_written_atomically, load_json, remove_unfinished, save_json, written_atomically
from ldm.progress import progress
from ldm.ranks import busy, main_process, say
from ldm.redact import redacted
from ldm.sweep import last_step, last_values, ranked_by
from ldm.training.locks import held, said_by_holder, turn
from ldm.training.signals import ending_on_signals

RESULT = "stage.json"  # beside a stage's result: the config that it was trained with
STOP_FILE = "LDM_SWEEP"  # in the environment of a sweep's jobs: the file that tells them to stop


def run(config: TrainConfig, overrides: Sequence[str] = ()) -> float | None:
    """Run the stages of an experiment whose results do not exist yet.

    Raises:
        UserError: bad data or weights; another run holds the directory; a stage that is left out has no result.
    """
    run_dir = Path(config.run_dir)
    if config.doctor:
        from ldm.training.doctor import examine

        with held(run_dir):
            ruinous = examine(config)
        raise SystemExit(1 if ruinous else 0)
    if config.data.cache == "build":
        from ldm.training.feed import build_cache

        with held(run_dir), ending_on_signals():
            build_cache(config)
        return None
    if "diffusion" in missing_stages(config):
        check_stages(config)
    with held(run_dir, wait=STOP_FILE in os.environ), ending_on_signals():
        if missing := missing_stages(config):
            from ldm.training.fit import check_at_the_door

            check_at_the_door(config, missing)
        for stage in STAGES:
            _run_stage(stage, config, run_dir, overrides)
        _report(run_dir, trained=bool(missing))
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish()
    return optimized(config, run_dir)


def optimized(config: TrainConfig, run_dir: Path) -> float | None:
    """Return the last value of `optimized_metric`: the validation loss of the last stage unless another was named.

    Raises:
        UserError: the run has no such figure.
    """
    metric, values = ranked_by(config.model_dump(include={"optimized_metric", "stages"})), last_values(run_dir)
    if config.optimized_metric and metric not in values:
        raise UserError(
            f"optimized_metric={metric} is not in {run_dir}/metrics.csv{nearest(metric, values)}; it has: "
            + (", ".join(sorted(values)) or "nothing")
        )
    return values.get(metric)


def missing_stages(config: TrainConfig) -> list[Stage]:
    return [stage for stage in STAGES if stage in config.stages and not is_done(config, stage)]


def _run_stage(stage: Stage, config: TrainConfig, run_dir: Path, overrides: Sequence[str]) -> None:
    place = result_folder(config, stage)
    if stage in config.stages and is_done(config, stage):
        say(f"{stage:12} up to date: {place}")
    elif stage in config.stages:
        with _in_turn(config, stage):
            if is_done(config, stage):
                say(f"{stage:12} done by another run: {place}")
            else:
                _fit_stage(stage, config, run_dir, overrides)
    if stage != "diffusion" and is_done(config, stage) and main_process():
        _link_result(place, run_dir / "model", PARTS[stage])


def _fit_stage(stage: Stage, config: TrainConfig, run_dir: Path, overrides: Sequence[str]) -> None:
    from ldm.training import fit

    def begin() -> None:
        _write_run_files(run_dir, config, overrides)
        say(f"{stage:12} training, {stage_steps(config, stage)} steps")

    place, started = result_folder(config, stage), time.monotonic()
    if main_process():  # which alone writes there, and holds both places
        mine = [path for name in ("checkpoints", "model", "samples") for path in (run_dir / name).rglob(".*")]
        remove_unfinished([*mine, *place.parent.glob(f".{place.name}.*")])
    fit.FIT[stage](config, place, begin)
    say(f"{stage:12} done in {time.monotonic() - started:.0f} s: {place}")


@contextmanager
def _in_turn(config: TrainConfig, stage: Stage) -> Iterator[None]:
    """Let one run at a time work on a result that runs share: the others wait, and take over where it is given up."""
    if stage == "diffusion":  # the run's own
        yield
        return
    place, mine = result_folder(config, stage), str(Path(config.run_dir).absolute())
    lock = place.with_name(f".{place.name}.lock")

    @contextmanager
    def waiting(holder: str) -> Iterator[Callable[[str], None]]:
        seen = 0
        say(f"{stage:12} waiting for {', '.join(holder.splitlines()) or 'another run'}, which trains it")

        def look(holder: str) -> None:
            nonlocal seen
            if (step := last_step(Path(holder.partition("\n")[0]), stage)) > seen:
                advance(step - seen)
                seen = step

        with progress(f"{stage} of another run", stage_steps(config, stage), "steps") as advance, busy("waiting"):
            yield look

    if main_process():
        with turn(lock, mine, waiting):
            yield
        return
    with busy("waiting"):  # for the first rank to have its turn
        while not is_done(config, stage) and said_by_holder(lock).partition("\n")[0] != mine:
            time.sleep(0.1)
    yield


def _report(run_dir: Path, trained: bool) -> None:
    """Write the report where something was trained, or where a run has none yet."""
    is_run = (run_dir / "config.yaml").exists()
    if main_process() and is_run and (trained or not (run_dir / "report" / "index.html").exists()):
        from ldm.report import report

        report(run_dir)


# Where the model folder keeps what a stage trains.
PARTS: dict[Stage, str] = {"autoencoder": "vae", "clip": "text_encoder", "diffusion": "unet"}


def stage_steps(config: TrainConfig, stage: Stage) -> int:
    return {
        "autoencoder": config.autoencoder.max_steps,
        "clip": config.clip.max_steps,
        "diffusion": config.trainer.max_steps,
    }[stage]


def stage_inputs(config: TrainConfig, stage: Stage) -> dict[str, Any]:
    """Return all that decides a stage's result: data, networks, training, and the results it builds on.

    How data are fed (workers, cache) and where it runs (devices, logging) are left out: they decide nothing. So is
    `trainer.precision` for the VAE and CLIP, which runs on different machines are to share, and what only the U-Net
    sees (buckets, cached views). They may hold secrets of the environment, and are written down without.
    """
    values = config.model_dump(mode="json")
    feeding = {"batch_size", "num_workers", "cache", "cache_on_device", "max_bad"}
    if stage != "diffusion":
        feeding |= {"buckets", "variants", "cache_dtype"}
    data = {key: value for key, value in values["data"].items() if key not in feeding}
    if stage == "diffusion" and (data["crop"] == "random" or data["flip"] or data["cache_dtype"] != "fp32"):
        data["cached"] = bool(config.data.cache)  # then a cache decides which views there are, and how exact they are
    if isinstance(config.data, ShapesData):
        data["version"] = SHAPES_VERSION  # of the drawing code, which decides the pictures as well
    trainer = values["trainer"]
    common = {"data": data, "seed": config.seed, "overfit_batches": trainer["overfit_batches"]}
    if stage == "autoencoder":
        own = {key: value for key, value in values["autoencoder"].items() if key != "rfid"}  # looks on
        if own["perceptual"]:  # where its weights lie decides nothing
            own = {**own, "perceptual": {k: v for k, v in own["perceptual"].items() if k != "weights"}}
        return {**common, "vae": values["vae"], "autoencoder": own}
    if stage == "clip":
        return {**common, "text_encoder": values["text_encoder"], "clip": values["clip"]}
    return {
        **common,
        "batch_size": config.data.batch_size,
        "accumulate_grad_batches": trainer["accumulate_grad_batches"],
        "precision": trainer["precision"],
        "max_steps": trainer["max_steps"],
        "vae": config.frozen_vae or stage_key(config, "autoencoder"),
        "text_encoder": values["text_encoder"]["pretrained"] or stage_key(config, "clip"),
        "unet": {key: value for key, value in values["unet"].items() if key != "gradient_checkpointing"},
        "diffusion": values["diffusion"],
        "optim": values["optim"],
    }


def stage_key(config: TrainConfig, stage: Stage) -> str:
    """Return 12 hex digits that name a stage's result."""
    inputs = json.dumps(stage_inputs(config, stage), sort_keys=True)
    return hashlib.sha256(inputs.encode()).hexdigest()[:12]


def result_folder(config: TrainConfig, stage: Stage) -> Path:
    """Return where a stage's result lies, or will."""
    if stage == "diffusion":
        return Path(config.run_dir) / "model"
    return Path(config.output_dir) / "stages" / f"{stage}-{stage_key(config, stage)}"


def is_done(config: TrainConfig, stage: Stage) -> bool:
    """Tell whether a stage's result exists for these inputs."""
    try:
        found = load_json(result_folder(config, stage) / RESULT)
    except UserError:  # not there, or cut short
        return False
    return found.get("key") == stage_key(config, stage)


def check_stages(config: TrainConfig) -> None:
    """Refuse to train a U-Net whose VAE or text encoder is not there and will not be.

    Raises:
        UserError: a stage that is left out has no result.
    """
    needed: dict[Stage, Any] = {"autoencoder": config.vae, "clip": config.text_encoder}
    for stage, part in needed.items():
        if stage not in config.stages and not part.pretrained:
            require_result(config, stage)


def require_result(config: TrainConfig, stage: Stage) -> Path:
    """Return the folder of a stage's result.

    Raises:
        UserError: it was never trained for these inputs.
    """
    if not is_done(config, stage):
        group = "vae" if stage == "autoencoder" else "text_encoder"
        raise UserError(
            f"latents and the U-Net need the result of stage '{stage}' for this config, and {config.output_dir}/stages "
            f"has none: train with {stage} in stages=[…] first, or load one with +{group}.pretrained=<folder or hub id>"
        )
    return result_folder(config, stage)


def recorded_pictures(folder: Path) -> str | None:
    """Return the hash of the set that a result was trained on; None where it is not known."""
    return load_json(folder / RESULT).get("pictures")


def record_result(config: TrainConfig, stage: Stage, folder: Path, pictures: str) -> None:
    """Write down what a finished result was made from; the result exists from now on."""
    inputs = redacted(stage_inputs(config, stage))
    content = {"key": stage_key(config, stage), "pictures": pictures, "inputs": inputs}
    save_json(folder / RESULT, content)


def _link_result(result: Path, model: Path, part: str) -> None:
    """Copy a shared result into the run's model folder where it is not yet."""
    names = ["text_encoder", "tokenizer"] if part == "text_encoder" else [part]
    marker = model / f".{part}"
    linked = marker.read_text(encoding="utf-8") if marker.exists() else None
    if linked == result.name and all((model / name).is_dir() for name in names):
        return
    if linked != result.name:  # with another part than its U-Net was trained over it is a model no longer
        for old in ("model_index.json", RESULT):
            (model / old).unlink(missing_ok=True)
    remove_unfinished(model.glob(".*"))  # where this was killed
    for name in names:
        with written_atomically(model / name) as temporary:
            shutil.copytree(result / name, temporary, dirs_exist_ok=True)
    with file_written_atomically(marker) as file:
        file.write(result.name.encode())


def _write_run_files(run_dir: Path, config: TrainConfig, overrides: Sequence[str]) -> None:
    """Write the run's config, the overrides that a person typed, and what it ran on."""
    if not main_process():
        return
    import yaml

    def node(value: Any) -> Any:
        return value.model_dump(by_alias=True, mode="json") if hasattr(value, "model_dump") else value

    environment = {
        "ldm": version("ldm"), "torch": version("torch"), "pytorch-lightning": version("pytorch-lightning"),
        "python": platform.python_version(), "platform": platform.platform(), "command": sys.argv[0],
    }  # fmt: skip
    for name, text in (
        ("config.yaml", yaml.safe_dump(redacted(node(config)), sort_keys=False, allow_unicode=True)),
        ("overrides.txt", "".join(f"{item}\n" for item in overrides)),
        ("env.json", json.dumps(redacted(environment), indent=2) + "\n"),
    ):
        with file_written_atomically(run_dir / name) as file:
            file.write(text.encode())
