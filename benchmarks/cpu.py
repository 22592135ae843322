"""Time our U-Net's training step on a processor by threads, memory format and precision.

    python benchmarks/cpu.py [--presets tiny small] [--rounds 6] [--out benchmarks/results/cpu.json]

All combinations run in turns in one process, those of one preset after those of another.
"""

import argparse
import os
import statistics
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, run_alternately, write
from train_step import SETTINGS, build, make_inputs, make_step


def make(preset: str, threads: int, channels_last: bool, precision: str) -> Callable[[], None]:
    network, call = build("ldm", preset)
    if not channels_last:
        network.to(memory_format=torch.contiguous_format)
    step = make_step(network, call, make_inputs(preset, channels_last))

    def run() -> None:
        torch.set_num_threads(threads)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            step()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["tiny", "small"], choices=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.json")
    arguments = parser.parse_args()
    cores = os.cpu_count() or 1
    counts = sorted({1, cores})
    rows: list[dict[str, Any]] = []
    for preset in arguments.presets:
        cases = list(product(counts, (False, True), ("fp32", "bf16")))
        work = {str(case): make(preset, *case) for case in cases}
        times = run_alternately(work, arguments.rounds, warmup=1)
        for case in cases:
            threads, channels_last, precision = case
            rows.append(
                {
                    "preset": preset,
                    "batch": SETTINGS[preset]["batch"],
                    "threads": threads,
                    "memory_format": "channels_last" if channels_last else "contiguous",
                    "precision": precision,
                    "milliseconds": round(1e3 * statistics.median(times[str(case)]), 1),
                }
            )
            print(rows[-1], flush=True)
    write(arguments.out, rows)


if __name__ == "__main__":
    main()
