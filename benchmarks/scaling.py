"""Time `train.py` with 1, 2 and 4 processes on one machine, over gloo.

    python benchmarks/scaling.py [--processes 1 2 4] [--steps 60] [--out benchmarks/results/scaling.json]

Every process has one thread and the same batch of its own, so that n of them do n times the work a step. `speed_up` is
of images/s over one process without torch.distributed; more processes than cores share these, so that the most it can
be is the number of cores. `overhead_milliseconds` is what a step takes longer than that work alone would.
"""

import argparse
import itertools
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, write
from training_runs import STAGES, Run, run_ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling.json")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    warmup = min(10, arguments.steps // 3)
    short = (
        "data.num_train=1024", f"data.batch_size={arguments.batch}", f"trainer.max_steps={arguments.steps}",
        "autoencoder.max_steps=2", "clip.max_steps=2",
    )  # fmt: skip
    cases = {"one process": ["trainer.devices=1"]} | {
        f"ddp, {num}": ["trainer.strategy=ddp", f"trainer.devices={num}"] for num in arguments.processes
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run_ours(folder, "parts", STAGES, *short)
        run_ours(folder, "first", "stages=[diffusion]", *short, "trainer.max_steps=1")
        for i in range(arguments.rounds):
            for number, (name, options) in enumerate(cases.items()):
                place = f"run-{i}-{number}"
                run = run_ours(folder, place, "stages=[diffusion]", *short, *options, watch=folder / f"{place}-watch")
                assert isinstance(run, Run)
                steps = run.steps[warmup:]
                seconds[name].append(statistics.median(after - before for before, after in itertools.pairwise(steps)))
                print(name, [round(1e3 * each) for each in seconds[name]], "ms", flush=True)
    median = {name: statistics.median(each) for name, each in seconds.items()}
    alone, cores = median["one process"], os.cpu_count() or 1
    rows: list[dict[str, Any]] = []
    for name, step in median.items():
        num = int(name.rpartition(" ")[2]) if name.startswith("ddp") else 1
        work = alone * num / min(num, cores)
        rows.append(
            {
                "case": name,
                "processes": num,
                "batch": arguments.batch,
                "images_per_second": round(num * arguments.batch / step, 1),
                "step_milliseconds": [round(1e3 * each, 1) for each in seconds[name]],
                "speed_up": round(num * alone / step, 3),
                "at_most": min(num, cores),
                "overhead_milliseconds": round(1e3 * (step - work), 1),
            }
        )
        print(rows[-1])
    write(arguments.out, rows, threads=1)


if __name__ == "__main__":
    main()
