"""Time one training step of our U-Net beside diffusers': same weights, batch, precision, optimizer, in one process.

    python benchmarks/train_step.py [--presets tiny small] [--rounds 30] [--out benchmarks/results/train_step.json]

All run alternately, so that whatever else the machine does hits all. The figure is the ratio of median times,
diffusers' over ours: above 1 we are faster. diffusers is measured in both memory formats and its best one counts. On a
GPU steps are in bf16, and both are measured compiled as well, their repeated blocks alone, the best of each counting;
`--compile` does so on a processor.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, load_preset, run_alternately, summary, write
from torch import Tensor, nn

from ldm.nn.unet import UNet

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = "_gpu" if DEVICE.type == "cuda" else ""  # figures of a GPU have files of their own
# preset -> batch, latent side, tokens, context width; and at most so many rounds where a step takes seconds
SETTINGS: dict[str, dict[str, int]] = {
    "tiny": {"batch": 64, "side": 8, "tokens": 24, "width": 128},
    "small": {"batch": 16, "side": 16, "tokens": 24, "width": 256},
    "base": {"batch": 2, "side": 32, "tokens": 77, "width": 768, "rounds": 8},
    "sd15": {"batch": 16, "side": 64, "tokens": 77, "width": 768},
}
ON_CPU = ("tiny", "small", "base")


def build(name: str, preset: str) -> tuple[nn.Module, Callable[..., Tensor]]:
    """Return a U-Net in channels_last memory where its name says so, ours always, and how it is called."""
    shape = SETTINGS[preset]
    config = load_preset(preset, shape["side"], shape["width"])
    network: Any
    if name.startswith("ldm"):
        network = UNet(**config)
    else:
        from diffusers import UNet2DConditionModel

        network = UNet2DConditionModel(**config)
    network.to(DEVICE).train()
    if name.startswith("ldm") or "channels_last" in name:
        network.to(memory_format=torch.channels_last)
    if name.startswith("ldm"):
        return network, network
    return network, lambda x_t, t, context: network(x_t, t, context).sample


def compile_blocks(network: nn.Module) -> None:
    """Compile the blocks that a U-Net repeats, by the names that they have in both."""
    for module in network.modules():
        if type(module).__name__ in ("ResBlock", "ResnetBlock2D", "BasicTransformerBlock"):
            module.compile(dynamic=False)


def make_inputs(preset: str, channels_last: bool = True) -> dict[str, Tensor]:
    shape = SETTINGS[preset]
    batch, side = shape["batch"], shape["side"]
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "x_t": torch.randn(batch, 4, side, side, generator=generator),
        "t": torch.randint(0, 1000, (batch,), generator=generator),
        "context": torch.randn(batch, shape["tokens"], shape["width"], generator=generator),
        "target": torch.randn(batch, 4, side, side, generator=generator),
    }
    if channels_last:
        for name in ("x_t", "target"):
            inputs[name] = inputs[name].contiguous(memory_format=torch.channels_last)
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def make_step(network: nn.Module, call: Callable[..., Tensor], inputs: dict[str, Tensor]) -> Callable[[], None]:
    """Return forward, backward, clipping and a fused AdamW step on fixed inputs."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16) if DEVICE.type == "cuda" else nullcontext():
            out = call(inputs["x_t"], inputs["t"], inputs["context"])
        (out.float() - inputs["target"]).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return step


def compare(preset: str, rounds: int, compiled: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    names = ["ldm", "diffusers", "diffusers channels_last"]
    if compiled:
        names += [f"{name} compiled" for name in ("ldm", "diffusers channels_last")]
    steps, state = {}, None
    for name in names:
        network, call = build(name, preset)
        state = state or {key: tensor.clone() for key, tensor in network.state_dict().items()}
        network.load_state_dict(state, strict=True)
        if "compiled" in name:
            compile_blocks(network)
        steps[name] = make_step(network, call, make_inputs(preset, name != "diffusers"))
    times = run_alternately(steps, min(rounds, SETTINGS[preset].get("rounds", rounds)), warmup=3)
    assert state
    shape = SETTINGS[preset]
    return {
        "preset": preset,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "batch": shape["batch"],
        "latents": shape["side"],
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "precision": "bf16" if DEVICE.type == "cuda" else "fp32",
        **summary(times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = DEVICE.type == "cuda"
    presets = list(SETTINGS) if on_gpu else list(ON_CPU)
    parser.add_argument("--presets", nargs="+", default=presets, choices=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--compile", action="store_true", default=on_gpu)
    parser.add_argument("--out", type=Path, default=RESULTS / f"train_step{GPU}.json")
    arguments = parser.parse_args()
    results = [compare(preset, arguments.rounds, arguments.compile) for preset in arguments.presets]
    for row in results:
        print(f"{row['preset']:8} {row['parameters'] / 1e6:6.1f} M  ratio {row['ratio']:.2f}  {row['milliseconds']} ms")
    write(arguments.out, results)


if __name__ == "__main__":
    main()
