"""Time one training step of our U-Net beside diffusers': same weights, batch, precision, optimizer, in one process.

    python benchmarks/train_step.py [--presets tiny small] [--rounds 30] [--out benchmarks/results/train_step.json]

Both run alternately, so that whatever else the machine does hits both. The figure is the ratio of median times,
diffusers' over ours: above 1 we are faster. diffusers is measured in both memory formats and its better one counts.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.nn.unet import UNet

ROOT = Path(__file__).parents[1]
# preset -> (batch, latent side, context width)
SETTINGS = {"tiny": (64, 8, 128), "small": (16, 16, 256)}


def load_preset(name: str, sample_size: int, context_dim: int) -> dict[str, Any]:
    import yaml

    options = yaml.safe_load((ROOT / "conf" / "unet" / f"{name}.yaml").read_text(encoding="utf-8"))
    return {"sample_size": sample_size, "cross_attention_dim": context_dim, **options}


def make_step(network: nn.Module, call: Callable[..., Tensor], inputs: dict[str, Tensor]) -> Callable[[], None]:
    """Return forward, backward, clipping and a fused AdamW step on fixed inputs."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        loss = (call(inputs["x_t"], inputs["t"], inputs["context"]) - inputs["target"]).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def compare(preset: str, rounds: int) -> dict[str, Any]:
    from diffusers import UNet2DConditionModel

    batch, side, context_dim = SETTINGS[preset]
    config = load_preset(preset, side, context_dim)
    torch.manual_seed(0)
    ours = UNet(**config)
    state = ours.state_dict()

    def theirs(channels_last: bool) -> tuple[nn.Module, Callable[..., Tensor]]:
        network = UNet2DConditionModel(**config)
        network.load_state_dict(state, strict=True)
        if channels_last:
            network.to(memory_format=torch.channels_last)
        return network, lambda x_t, t, context: network(x_t, t, context).sample

    inputs = {
        "x_t": torch.randn(batch, 4, side, side),
        "t": torch.randint(0, 1000, (batch,)),
        "context": torch.randn(batch, 24, context_dim),
        "target": torch.randn(batch, 4, side, side),
    }
    last = {k: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in inputs.items()}
    ours.to(memory_format=torch.channels_last)
    steps = {
        "ldm": make_step(ours, ours, last),
        "diffusers": make_step(*theirs(False), inputs),
        "diffusers channels_last": make_step(*theirs(True), last),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 3):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if i >= 3:
                times[name].append(time.perf_counter() - started)
    median = {name: statistics.median(values) for name, values in times.items()}
    best_peer = min(value for name, value in median.items() if name != "ldm")
    return {
        "preset": preset,
        "parameters": sum(p.numel() for p in ours.parameters()),
        "batch": batch,
        "latents": side,
        "precision": "fp32",
        "ratio": round(best_peer / median["ldm"], 3),
        "milliseconds": {name: round(value * 1e3, 1) for name, value in median.items()},
        "quartiles": {
            name: [round(q * 1e3, 1) for q in statistics.quantiles(values, n=4)] for name, values in times.items()
        },
    }


def machine() -> dict[str, Any]:
    import diffusers

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()

    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine()
    )
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "commit": git("rev-parse", "--short", "HEAD"),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "train_step.json")
    arguments = parser.parse_args()
    results = {"machine": machine(), "results": [compare(preset, arguments.rounds) for preset in arguments.presets]}
    for row in results["results"]:
        print(f"{row['preset']:8} {row['parameters'] / 1e6:6.1f} M  ratio {row['ratio']:.2f}  {row['milliseconds']} ms")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
