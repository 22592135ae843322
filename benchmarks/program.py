"""Time the training program: `train.py`'s U-Net stage beside a plain loop over diffusers' parts.

    python benchmarks/program.py [--steps 200] [--pictures 4096] [--out benchmarks/results/program.json]

Each runs twice, in turns, in a process of its own (see training_runs.py). `ratio` is of images/s once training goes;
`wall_seconds` is from typing the command to its end, everything included: start, ours first without its latent cache
and then with it, checkpoints, and what each does at its end.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from common import RESULTS, write
from training_runs import Run, prepare, run_ours, run_theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pictures", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=RESULTS / "program.json")
    arguments = parser.parse_args()
    warmup = min(10, arguments.steps // 3)
    short = (
        f"data.num_train={arguments.pictures}", f"trainer.max_steps={arguments.steps}", "autoencoder.max_steps=2",
        "clip.max_steps=2",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = prepare(folder, *short)
        runs: dict[str, list[Run]] = {"ldm": [], "diffusers": []}
        for i in range(2):
            ours = run_ours(folder, f"run{i}", "stages=[diffusion]", *short, watch=folder / f"ours{i}")
            assert ours
            runs["ldm"].append(ours)
            runs["diffusers"].append(run_theirs(folder, config, folder / f"theirs{i}"))
            print({name: round(each[-1].end, 1) for name, each in runs.items()}, flush=True)
    size = config.data.batch_size
    rates = {name: [run.rate(size, warmup) for run in each] for name, each in runs.items()}
    median = {name: statistics.median(each) for name, each in rates.items()}
    row = {
        "experiment": "shapes",
        "steps": arguments.steps,
        "batch": size,
        "pictures": arguments.pictures,
        "precision": config.trainer.precision,
        "ratio": round(median["ldm"] / median["diffusers"], 3),
        "images_per_second": {name: [round(rate, 1) for rate in each] for name, each in rates.items()},
        "wall_seconds": {
            "ldm, no cache yet": round(runs["ldm"][0].end, 1),
            "ldm": round(runs["ldm"][1].end, 1),
            "diffusers": round(statistics.median(run.end for run in runs["diffusers"]), 1),
        },
        "first_step_after_seconds": {
            "ldm, no cache yet": round(runs["ldm"][0].steps[0], 1),
            "ldm": round(runs["ldm"][1].steps[0], 1),
            "diffusers": round(statistics.median(run.steps[0] for run in runs["diffusers"]), 1),
        },
    }
    print(row)
    write(arguments.out, [row])


if __name__ == "__main__":
    main()
