"""Time one training step of our U-Net beside diffusers': same weights, batch, precision, optimizer, in one process.

    python benchmarks/train_step.py [--presets tiny small] [--rounds 30] [--out benchmarks/results/train_step.json]

Both run alternately, so that whatever else the machine does hits both. The figure is the ratio of median times,
diffusers' over ours: above 1 we are faster. diffusers is measured in both memory formats and its better one counts.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, load_preset, run_alternately, summary, write
from torch import Tensor, nn

from ldm.nn.unet import UNet

# preset -> (batch, latent side, context width)
SETTINGS = {"tiny": (64, 8, 128), "small": (16, 16, 256)}


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
    times = run_alternately(steps, rounds, warmup=3)
    return {
        "preset": preset,
        "parameters": sum(p.numel() for p in ours.parameters()),
        "batch": batch,
        "latents": side,
        "precision": "fp32",
        **summary(times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULTS / "train_step.json")
    arguments = parser.parse_args()
    results = [compare(preset, arguments.rounds) for preset in arguments.presets]
    for row in results:
        print(f"{row['preset']:8} {row['parameters'] / 1e6:6.1f} M  ratio {row['ratio']:.2f}  {row['milliseconds']} ms")
    write(arguments.out, results)


if __name__ == "__main__":
    main()
