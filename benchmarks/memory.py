"""Weigh a training step: peak memory with our U-Net and with diffusers', by preset.

    python benchmarks/memory.py [--presets tiny small] [--out benchmarks/results/memory.json]

Forward, backward, clipping and fused AdamW, three times, in float32 on a processor, each in a process of its own: its
highest resident memory, above what it held when everything was imported. The weights, gradients and both moments are
in it. On a GPU it is the highest that torch allocated, in bf16. The figure is ours over diffusers': below 1 we need
less. diffusers is measured in both memory formats and the smaller counts.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write
from train_step import DEVICE, GPU, ON_CPU, SETTINGS, build, make_inputs, make_step

SIDES = ("ldm", "diffusers", "diffusers channels_last")


def peak(side: str, preset: str) -> float:
    """Return in MiB what a step takes at most in a fresh process."""
    arguments = [sys.executable, __file__, "--peak-of", side, preset]
    return float(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_peak(side: str, preset: str) -> None:
    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

    if side != "ldm":
        from diffusers import UNet2DConditionModel  # noqa: F401
    make_step(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), {})  # imports what an optimizer needs
    before = status("VmRSS")
    network, call = build(side, preset)
    step = make_step(network, call, make_inputs(preset, side != "diffusers"))
    for _ in range(3):
        step()
    on_gpu = DEVICE.type == "cuda"
    print(torch.cuda.max_memory_allocated() / 2**20 if on_gpu else (status("VmHWM") - before) / 2**10)


def compare(preset: str, rounds: int) -> dict[str, Any]:
    weighed = {side: sorted(peak(side, preset) for _ in range(rounds))[rounds // 2] for side in SIDES}
    return {
        "preset": preset,
        "batch": SETTINGS[preset]["batch"],
        "latents": SETTINGS[preset]["side"],
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "ratio": round(weighed["ldm"] / min(weighed[side] for side in SIDES[1:]), 3),
        "mebibytes": {side: round(value) for side, value in weighed.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = list(SETTINGS) if DEVICE.type == "cuda" else list(ON_CPU)
    parser.add_argument("--presets", nargs="+", default=presets, choices=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / f"memory{GPU}.json")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        print_peak(*arguments.peak_of)
        return
    results = []
    for preset in arguments.presets:
        results.append(row := compare(preset, arguments.rounds))
        print(json.dumps(row), flush=True)
    write(arguments.out, results)


if __name__ == "__main__":
    main()
