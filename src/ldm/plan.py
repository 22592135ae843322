"""Reckon what a training takes before it is begun: shards, cache, memory, time, checkpoints, money.

    python -m ldm.plan --pictures 2e9 --gpus 256 --unet sd15 --resolution 512

Every assumption is an option, and shown with what follows from it. Networks are built on the meta device, their
floating-point operations counted, not guessed.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ldm.cli import CONF_DIR

CONTEXT = (77, 768)  # tokens and width of CLIP ViT-L/14
VAE_CHANNELS, VAE_FACTOR = 4, 8  # of Stable Diffusion's VAE
TERA = 1e12


@dataclass(frozen=True)
class Load:
    """What one picture asks of the hardware, counted.

    Attributes:
        parameters: of the U-Net.
        step_flops: of its forward and backward pass.
        encode_flops: of the VAE's encoder and the text encoder, forward.
        activation_bytes: kept from forward for backward, in float32.
    """

    parameters: int
    step_flops: int
    encode_flops: int
    activation_bytes: int


def count(unet: str, resolution: int) -> Load:
    """Build a preset of `conf/unet` and the encoders of Stable Diffusion on the meta device, and count.

    Raises:
        ValueError: pictures of this resolution cannot be halved as often as the networks do.
    """
    import torch
    import yaml

    from ldm.nn.autoencoder import AutoencoderKL
    from ldm.nn.clip import TextTower
    from ldm.nn.unet import UNet
    from ldm.training.flops import count_flops
    from ldm.weights.folder import WithoutInit

    options = yaml.safe_load((CONF_DIR / "unet" / f"{unet}.yaml").read_text(encoding="utf-8"))
    length, width = CONTEXT
    with torch.device("meta"), WithoutInit():
        network = UNet(**{"cross_attention_dim": width, **options})
        width = network.config["cross_attention_dim"]
        vae = AutoencoderKL(block_out_channels=[128, 256, 512, 512], layers_per_block=2)
        tower = TextTower(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        side = resolution // VAE_FACTOR
        x_t = torch.empty(1, VAE_CHANNELS, side, side)
        t, context = torch.zeros(1, dtype=torch.int64), torch.empty(1, length, width)
        image, ids = torch.empty(1, 3, resolution, resolution), torch.zeros(1, length, dtype=torch.int64)
        step = count_flops(lambda: network(x_t, t, context))
        with torch.no_grad():
            encoding = count_flops(lambda: vae.encode(image)) + count_flops(lambda: tower(ids)[0])
        kept = activation_bytes(network, x_t, t, context)
    return Load(sum(p.numel() for p in network.parameters()), step, encoding, kept)


def activation_bytes(network: Any, *inputs: Any) -> int:
    """Return the bytes that autograd keeps from a forward pass for the backward one, weights aside."""
    import torch

    owned = {id(parameter) for parameter in network.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        base = tensor if tensor._base is None else tensor._base  # views share their memory
        if id(base) not in owned:
            kept[id(base)] = base
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network(*inputs)
    found = sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
    del output
    return found


# ------------------------------------------------------------------------------------------------------- formulae


def cache_bytes(latents: tuple[int, int, int], context: tuple[int, int], itemsize: int, variants: int = 1) -> int:
    """Return what a cache keeps of a picture with one caption: moments (2C, h, w) of each view, and context (L, D).

    Args:
        latents: C, h and w.
        context: L and D.
        itemsize: bytes of a number.
        variants: views of a picture.
    """
    channels, height, width = latents
    return itemsize * (2 * channels * height * width * variants + context[0] * context[1])


def checkpoint_bytes(parameters: int, num_averages: int = 1) -> int:
    """Return the size of a checkpoint: weights, Adam's two moments, averages, in float32."""
    return 4 * parameters * (3 + num_averages)


def state_bytes(parameters: int, num_averages: int = 1, sharded_over: int = 1) -> int:
    """Return what weights, gradients, moments and averages take on a GPU; cut up over so many by FSDP."""
    return 4 * parameters * (4 + num_averages) // sharded_over


def checkpoint_interval(seconds: float, mean_time_to_failure: float) -> float:
    """Return the seconds of work between checkpoints that lose the least: √(2 δ M).

    Young (1974), the first order of Daly (2006): δ is what writing one takes, M the whole job's mean time to failure.

    >>> checkpoint_interval(50, 10_000)
    1000.0
    """
    return math.sqrt(2 * seconds * mean_time_to_failure)


def lost_share(interval: float, seconds: float, mean_time_to_failure: float, restart: float = 0.0) -> float:
    """Return the share of time that goes to writing checkpoints, to work done again and to restarts.

    δ/τ + (τ/2 + R)/M, for failures that are rare beside τ.

    >>> lost_share(1000, 50, 10_000)
    0.1
    """
    return seconds / interval + (interval / 2 + restart) / mean_time_to_failure


# ------------------------------------------------------------------------------------------------------------- plan


def plan(asked: argparse.Namespace, load: Load) -> list[tuple[str, str, str]]:
    """Return each figure with its name and where it comes from."""
    side, itemsize = asked.resolution // VAE_FACTOR, 2
    picture_cache = cache_bytes((VAE_CHANNELS, side, side), CONTEXT, itemsize)
    cache = asked.pictures * picture_cache
    raw = asked.pictures * asked.picture_kb * 1e3
    useful = asked.tflops * TERA * asked.utilization
    rate = asked.images_per_second or useful / load.step_flops
    uncached = 1 / (1 / rate + load.encode_flops / useful)
    scaling = asked.scaling if asked.gpus > 1 else 1.0
    total = asked.gpus * rate * scaling
    written = checkpoint_bytes(load.parameters)
    mean_time = 3600 * asked.mttf_hours / asked.gpus
    write = written / (asked.write_gb * 1e9)
    interval = checkpoint_interval(write, mean_time)
    lost = lost_share(interval, write, mean_time, 60 * asked.restart_minutes)
    seconds = asked.pictures * asked.epochs / total / (1 - lost)
    hours = asked.gpus * seconds / 3600
    encoding = asked.pictures * load.encode_flops / useful / 3600
    held = state_bytes(load.parameters)
    months = asked.months or max(1.0, seconds / 86400 / 30)
    bandwidth = total * picture_cache
    kept = (raw + cache) / TERA
    steps = asked.pictures * asked.epochs / asked.gpus / asked.batch
    return [
        ("U-Net", f"{load.parameters / 1e6:.0f} M parameters", f"{asked.unet} over a context of width {CONTEXT[1]}"),
        ("a training step", f"{load.step_flops / 1e9:,.0f} GFLOP a picture", "forward and backward, counted"),
        ("encoding", f"{load.encode_flops / 1e9:,.0f} GFLOP a picture", "VAE and text encoder forward, counted"),
        ("pictures", f"{_bytes(raw)}", f"{asked.picture_kb:g} kB each"),
        ("tar shards", f"{raw / 1e9 / asked.shard_gb:,.0f}", f"{asked.shard_gb:g} GB each"),
        ("cache", f"{_bytes(cache)}, {picture_cache / 1e3:.0f} kB a picture", "moments and context in fp16"),
        ("building it", f"{encoding:,.0f} GPU-hours, {_money(encoding * asked.gpu_hour)}", "once, at this utilization"),
        (
            "storage",
            f"{_money(kept * 1e3 * asked.gb_month)} a month, {_money(kept * 1e3 * asked.gb_month * months)} in all",
            f"pictures and cache, {months:.1f} months",
        ),
        (
            "images/s of a GPU",
            f"{rate:,.0f} from the cache, {uncached:,.0f} without",
            "as measured" if asked.images_per_second else f"{asked.utilization:.0%} of {asked.tflops:g} TFLOP/s",
        ),
        ("images/s in all", f"{total:,.0f}", f"{asked.gpus} GPUs, {scaling:.0%} of so many times one"),
        ("read from the cache", f"{bandwidth / 1e9:,.1f} GB/s", f"{bandwidth / asked.gpus / 1e6:,.0f} MB/s a GPU"),
        ("steps", f"{steps:,.0f}", f"{asked.batch} pictures on each GPU, {asked.batch * asked.gpus:,} a step"),
        (
            "memory of a GPU",
            f"{_bytes(held)} of state, {_bytes(load.activation_bytes * asked.batch / 2)} of activations",
            f"float32 state with one average, bf16 activations; FSDP leaves {_bytes(held / asked.gpus)} of state",
        ),
        ("a checkpoint", f"{_bytes(written)}, {write:.0f} s", f"written at {asked.write_gb:g} GB/s while all wait"),
        (
            "mean time to failure",
            f"{mean_time / 3600:,.0f} hours of the job",
            f"{asked.mttf_hours:,.0f} GPU-hours to a failure",
        ),
        (
            "checkpoints",
            f"every {interval / 60:.0f} minutes, {interval * rate * scaling / asked.batch:,.0f} steps",
            "Young and Daly: √(2 · write · mean time)",
        ),
        ("lost to failures", f"{lost:.1%}", f"writing, work done again, {asked.restart_minutes:g} minutes to restart"),
        ("training", f"{seconds / 86400:.1f} days, {hours:,.0f} GPU-hours", f"{asked.epochs:g} times through the set"),
        ("training costs", _money(hours * asked.gpu_hour), f"{_money(asked.gpu_hour)} a GPU-hour"),
    ]  # fmt: skip


def _bytes(num: float) -> str:
    """Write a number of bytes, in powers of ten.

    >>> _bytes(2.5e12), _bytes(4e6)
    ('2.5 TB', '4.0 MB')
    """
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9)):
        if num >= size:
            return f"{num / size:.1f} {unit}"
    return f"{num / 1e6:.1f} MB"


def _money(amount: float) -> str:
    return f"${amount:,.2f}" if amount < 100 else f"${amount:,.0f}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    presets = sorted(path.stem for path in (CONF_DIR / "unet").glob("*.yaml"))
    parser = argparse.ArgumentParser(
        "python -m ldm.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default, told in (
        ("pictures", 2e9, "in the set"),
        ("epochs", 1.0, "times that each is seen"),
        ("resolution", 512, "pixels a side, a multiple of 64"),
        ("gpus", 256, ""),
        ("batch", 32, "pictures of a step on one GPU"),
        ("tflops", 700.0, "TFLOP/s of a large bf16 matrix product, measured"),
        ("utilization", 0.4, "share of that which training reaches (figure `utilization` of metrics.csv)"),
        ("scaling", 0.9, "images/s of all GPUs over so many times those of one"),
        ("picture-kb", 100.0, "kB of a picture and its caption"),
        ("shard-gb", 1.0, "GB of a tar shard"),
        ("write-gb", 2.0, "GB/s that a checkpoint is written at"),
        ("mttf-hours", 50_000.0, "GPU-hours to a failure; 50,700 in arXiv:2407.21783, section 3.3.4"),
        ("restart-minutes", 10.0, "from a failure to the next step"),
        ("gpu-hour", 2.5, "dollars"),
        ("gb-month", 0.02, "dollars"),
    ):
        kind = int if isinstance(default, int) else float
        parser.add_argument(f"--{name}", type=partial(_positive, kind=kind), default=default, help=told)
    parser.add_argument("--unet", choices=presets, default="sd15")
    parser.add_argument("--images-per-second", type=_positive, help="of one GPU from the cache, measured; in place of "
                        "--tflops and --utilization, which still tell what encoding takes")  # fmt: skip
    parser.add_argument(
        "--months", type=_positive, help="that pictures and cache are stored; default: while training, a month at least"
    )
    asked = parser.parse_args(arguments)
    if asked.resolution % 64:
        parser.error(
            f"--resolution {asked.resolution} must be a multiple of 64: the VAE and the U-Net halve it 6 times"
        )
    for name in ("utilization", "scaling"):
        if getattr(asked, name) > 1:
            parser.error(f"--{name} {getattr(asked, name):g} is a share of one, such as 0.4")
    return asked


def _positive(text: str, kind: type = float) -> float:
    number = float(text)
    if not 0 < number < math.inf or kind(number) != number:
        raise argparse.ArgumentTypeError(f"{text} is not a positive {'whole ' if kind is int else ''}number")
    return kind(number)


def main() -> None:
    asked = parse()
    rows = plan(asked, count(asked.unet, asked.resolution))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    print("\n".join(f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}" for row in rows))


if __name__ == "__main__":
    main()
