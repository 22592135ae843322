"""Time drawing with our pipeline beside diffusers': same weights, sampler, steps, batch, dtype, in one process.

    python benchmarks/sampling.py [--presets tiny small sd15] [--rounds 10] [--out benchmarks/results/sampling.json]

Random models in the shape of the presets are written as model folders, which both open. Times are of whole calls, from
prompts to Pillow pictures; the figure is the ratio of medians, diffusers' over ours, above 1 where we are faster.
diffusers is measured in both memory formats and its better one counts. Peak memory is that of a process of its own that
loads the model and draws once, above what its imports take.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, load_preset, run_alternately, summary, write
from torch import nn

PROMPT = "a large red circle on the left of a blue background"
GUIDANCE, SEED = 4.0, 0
# preset -> batch, latent side, context width, layers of the text tower, tokens, widths of the VAE, steps, dtype, rounds
SETTINGS: dict[str, dict[str, Any]] = {
    "tiny": {"batch": 16, "side": 8, "width": 128, "layers": 2, "vae": [16, 32, 64], "steps": 20, "dtype": "fp32"},
    "small": {"batch": 4, "side": 16, "width": 256, "layers": 4, "vae": [32, 64, 128], "steps": 20, "dtype": "fp32"},
    "sd15": {
        "batch": 1, "side": 64, "width": 768, "layers": 12, "vae": [128, 256, 512, 512], "steps": 2, "dtype": "bf16",
        "rounds": 4,
    },
}  # fmt: skip


@torch.no_grad()
def randomize(network: nn.Module) -> nn.Module:
    """Replace zeros, with which residual branches start, by what work is like after training."""
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    return network


def write_model(folder: Path, preset: str) -> None:
    """Write a random model of a preset's shape."""
    from ldm.conditioner import train_tokenizer
    from ldm.diffusion.schedule import NoiseSchedule
    from ldm.nn.autoencoder import AutoencoderKL
    from ldm.nn.clip import TextTower
    from ldm.nn.unet import UNet
    from ldm.weights.folder import save_network, save_pipeline_index

    shape = SETTINGS[preset]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[shape["dtype"]]
    torch.manual_seed(SEED)
    levels = len(shape["vae"])
    vae = AutoencoderKL(
        block_out_channels=shape["vae"], layers_per_block=2 if levels == 4 else 1,
        norm_num_groups=32 if levels == 4 else 8,
    )  # fmt: skip
    tokenizer = train_tokenizer([PROMPT], 600, 77 if preset == "sd15" else 24)
    tower = TextTower(
        hidden_size=shape["width"], intermediate_size=4 * shape["width"], num_hidden_layers=shape["layers"],
        num_attention_heads=shape["width"] // 64, max_position_embeddings=tokenizer.model_max_length,
        vocab_size=49408 if preset == "sd15" else len(tokenizer), eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    unet = UNet(**load_preset(preset, shape["side"], shape["width"]))
    for network, name in ((unet, "unet"), (vae, "vae"), (tower, "text_encoder")):
        save_network(randomize(network).to(dtype), folder / name)  # type: ignore[arg-type]
    tokenizer.save_pretrained(folder / "tokenizer")
    save_pipeline_index(folder, NoiseSchedule(), "epsilon", {"sampler": "ddim", "steps": 20, "guidance_scale": 4.0})


def load_ours(folder: Path, preset: str) -> Callable[[], Any]:
    from ldm import LatentDiffusionPipeline

    shape = SETTINGS[preset]
    pipeline = LatentDiffusionPipeline.from_pretrained(folder, dtype=shape["dtype"], device="cpu")
    return lambda: pipeline(
        PROMPT, num_images=shape["batch"], seed=SEED, steps=shape["steps"], sampler="ddim", guidance_scale=GUIDANCE
    )


def load_theirs(folder: Path, preset: str, channels_last: bool = False) -> Callable[[], Any]:
    from diffusers import StableDiffusionPipeline

    shape = SETTINGS[preset]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[shape["dtype"]]
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    if channels_last:
        for network in (pipeline.unet, pipeline.vae):
            network.to(memory_format=torch.channels_last)

    def draw() -> Any:
        generators = [torch.Generator().manual_seed(SEED + i) for i in range(shape["batch"])]
        return pipeline(
            [PROMPT] * shape["batch"], num_inference_steps=shape["steps"], guidance_scale=GUIDANCE, generator=generators
        ).images

    return draw


def peak_memory(side: str, folder: Path, preset: str) -> int:
    """Return in MiB what a fresh process needs at most to load and draw, above its imports."""
    arguments = [sys.executable, __file__, "--peak-of", side, str(folder), preset]
    return int(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_peak(side: str, folder: Path, preset: str) -> None:
    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(key))

    if side == "ldm":
        from transformers import CLIPTokenizer  # noqa: F401

        import ldm.pipeline  # noqa: F401
    else:
        from diffusers import StableDiffusionPipeline  # noqa: F401
    before = status("VmRSS")
    (load_ours if side == "ldm" else load_theirs)(folder, preset)()
    print(status("VmHWM") - before)


def compare(preset: str, rounds: int) -> dict[str, Any]:
    shape = SETTINGS[preset]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(folder, preset)
        memory = {side: peak_memory(side, folder, preset) for side in ("ldm", "diffusers")}
        work = {
            "ldm": load_ours(folder, preset),
            "diffusers": load_theirs(folder, preset),
            "diffusers channels_last": load_theirs(folder, preset, channels_last=True),
        }
        times = run_alternately(work, shape.get("rounds", rounds), warmup=1)
    told = {key: shape[key] for key in ("batch", "side", "steps", "dtype")}
    return {"preset": preset, "sampler": "ddim", **told, **summary(times), "peak_mebibytes": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS / "sampling.json")
    parser.add_argument("--peak-of", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        side, folder, preset = arguments.peak_of
        print_peak(side, Path(folder), preset)
        return
    results = []
    for preset in arguments.presets:
        results.append(row := compare(preset, arguments.rounds))
        print(json.dumps({key: row[key] for key in ("preset", "ratio", "milliseconds", "peak_mebibytes")}), flush=True)
    write(arguments.out, results)


if __name__ == "__main__":
    main()
