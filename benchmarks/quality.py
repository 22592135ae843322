"""Time until prompts are obeyed: wall clock of `train.py experiment=shapes` and of a plain loop over diffusers' parts.

    python benchmarks/quality.py [--steps 1500] [--every 100] [--out benchmarks/results/quality.json]

Both train the whole recipe of the built-in experiment from the same fresh U-Net over the same VAE and CLIP, which are
those of outputs/ (trained there first where they are missing) and part of neither clock; ours begins without its latent
cache. Each keeps its averaged weights every so often. Afterwards these are measured, all in the same way: prompts of
seen and of unseen pairs, obeyed in every attribute. The figure is the seconds, from typing the command, to the first
that obey 90 % of them.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, write
from training_runs import Run, prepare, run_ours, run_theirs

from ldm.config import TrainConfig
from ldm.data import shapes
from ldm.evaluation.prompt_accuracy import score
from ldm.nn.unet import UNet
from ldm.pipeline import LatentDiffusionPipeline
from ldm.training.networks import build_schedule, load_frozen
from ldm.weights.folder import load_network
from ldm.weights.tensors import read_weights

GOAL = 0.9


def obeyed(config: TrainConfig, parts: Path, weights: Path, num_prompts: int) -> float:
    """Return the share of prompts that a U-Net's weights obey, half of them of pairs never seen in training."""
    unet = load_network(UNet, parts / "unet")
    unet.load_state_dict(read_weights(weights))
    pipeline = LatentDiffusionPipeline(
        unet.eval().to(memory_format=torch.channels_last), *load_frozen(config), build_schedule(config),
        config.diffusion.prediction_type, settings=config.sampling.model_dump(),
    )  # fmt: skip
    asked = [each for split in ("val", "unseen") for each in shapes.prompts(split, num_prompts // 2)]
    images = list(pipeline.generate([text for text, _ in asked], range(len(asked)), batch_size=64))
    return score(images, [scene for _, scene in asked])["all"]


def first_at_goal(curve: list[dict[str, Any]]) -> dict[str, Any] | None:
    return next((point for point in curve if point["obeyed"] >= GOAL), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.json")
    parser.add_argument("--parts", type=Path, default=ROOT / "outputs", help="output directory with VAE and CLIP")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the experiment, for a short try")
    arguments = parser.parse_args()
    overrides = [f"trainer.max_steps={arguments.steps}", *arguments.set]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = prepare(folder, *overrides, stages_from=arguments.parts)
        watch = {"ldm": folder / "ours", "diffusers": folder / "theirs"}
        ours = run_ours(folder, "run", "stages=[diffusion]", *overrides, watch=watch["ldm"], every=arguments.every)
        assert ours
        print(f"ldm trained in {ours.end:.0f} s", flush=True)
        theirs = run_theirs(folder, config, watch["diffusers"], arguments.every)
        print(f"diffusers trained in {theirs.end:.0f} s", flush=True)
        runs: dict[str, Run] = {"ldm": ours, "diffusers": theirs}
        curves: dict[str, list[dict[str, Any]]] = {}
        for name, run in runs.items():
            curves[name] = []
            for weights in sorted(watch[name].glob("step-*.safetensors")):
                step = int(weights.stem.removeprefix("step-"))
                share = obeyed(config, folder / "parts", weights, arguments.prompts)
                curves[name].append({"step": step, "seconds": round(run.steps[step - 1], 1), "obeyed": round(share, 4)})
                print(name, curves[name][-1], flush=True)
    reached = {name: first_at_goal(curve) for name, curve in curves.items()}
    seconds = {name: point and point["seconds"] for name, point in reached.items()}
    row = {
        "experiment": "shapes",
        "goal": GOAL,
        "prompts": arguments.prompts,
        "batch": config.data.batch_size,
        "precision": config.trainer.precision,
        "seconds": seconds,
        "steps": {name: point and point["step"] for name, point in reached.items()},
        "ratio": round(seconds["diffusers"] / seconds["ldm"], 3) if all(seconds.values()) else None,
        "trained_seconds": {name: round(run.end, 1) for name, run in runs.items()},
        "curves": curves,
    }
    print({key: row[key] for key in ("seconds", "steps", "ratio")})
    write(arguments.out, [row])


if __name__ == "__main__":
    main()
