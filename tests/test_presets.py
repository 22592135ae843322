"""docs/presets.md says of every preset what a computation of today finds: nothing is trained, nothing is allocated."""

import re

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from ldm.nn.autoencoder import AutoencoderKL, DiagonalGaussian
from ldm.nn.unet import UNet
from ldm.weights.folder import WithoutInit
from runs import ROOT

PAGE = ROOT / "docs" / "presets.md"
# preset -> side of the pictures, halvings of the VAE, tokens and width of the context that it is made for
UNETS = {"tiny": (64, 2, 20, 128), "small": (64, 2, 20, 128), "base": (512, 3, 77, 768), "sd15": (512, 3, 77, 768),
         "sd21": (768, 3, 77, 1024)}  # fmt: skip
VAES = {"tiny": 64, "kl_f4": 256, "kl_f8": 256, "kl_f16": 256}
BYTES = 4 * 5  # weights, gradients, Adam's two moments, average: each float32


def options(group: str, preset: str) -> dict[str, object]:
    return yaml.safe_load((ROOT / "conf" / group / f"{preset}.yaml").read_text(encoding="utf-8"))


def number(value: float) -> str:
    """Three digits, as the page writes them."""
    value = float(f"{value:.3g}")
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def memory(count: int) -> str:
    size = count * BYTES
    return f"{number(size / 1e9)} GB" if size >= 1e9 else f"{number(size / 1e6)} MB"


def unet_row(preset: str) -> tuple[str, int]:
    side, halvings, tokens, width = UNETS[preset]
    latents = side // 2**halvings
    with torch.device("meta"), WithoutInit():
        unet = UNet(sample_size=latents, in_channels=4, out_channels=4, cross_attention_dim=width,
                    **options("unet", preset))  # fmt: skip
        with FlopCounterMode(display=False) as flops:
            unet(torch.empty(1, 4, latents, latents), torch.empty(1), torch.empty(1, tokens, width))
    count = sum(p.numel() for p in unet.parameters())
    cells = [f"`unet={preset}`", f"{side} px", f"4 × {latents} × {latents}", f"{tokens} × {width}",
             f"{number(count / 1e6)} M", number(flops.get_total_flops() / 1e9), memory(count)]  # fmt: skip
    return f"| {' | '.join(cells)} |", count


def vae_row(preset: str) -> tuple[str, int]:
    side, chosen = VAES[preset], options("vae", preset)
    levels = len(chosen["block_out_channels"])
    with torch.device("meta"), WithoutInit():
        vae = AutoencoderKL(sample_size=side, down_block_types=["DownEncoderBlock2D"] * levels,
                            up_block_types=["UpDecoderBlock2D"] * levels, **chosen)  # fmt: skip
        figures = []
        with FlopCounterMode(display=False) as flops:
            moments = vae.encode(torch.empty(1, 3, side, side))
        figures.append(flops.get_total_flops())
        latents = DiagonalGaussian(moments).mode()
        with FlopCounterMode(display=False) as flops:
            vae.decode(latents)
        figures.append(flops.get_total_flops())
    count = sum(p.numel() for p in vae.parameters())
    cells = [f"`vae={preset}`", f"{side} px", " × ".join(map(str, latents.shape[1:])), f"{number(count / 1e6)} M",
             *(number(each / 1e9) for each in figures), memory(count)]  # fmt: skip
    return f"| {' | '.join(cells)} |", count


ROWS = {**{("unet", each): unet_row for each in UNETS}, **{("vae", each): vae_row for each in VAES}}


@pytest.mark.parametrize(("group", "preset"), ROWS)
def test_the_page_says_what_is_found(group, preset):
    row, count = ROWS[group, preset](preset)
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith(f"| `{group}={preset}`")] == [row]
    comment = (ROOT / "conf" / group / f"{preset}.yaml").read_text(encoding="utf-8")
    for said in re.findall(r"([\d.]+) M parameters", comment):
        assert float(said) == pytest.approx(count / 1e6, rel=0.02 if count > 1e6 else 0.2)


def test_no_preset_is_left_out():
    found = {(group, path.stem) for group in ("unet", "vae") for path in (ROOT / "conf" / group).glob("*.yaml")}
    networks = {(group, preset) for group, preset in found if "block_out_channels" in options(group, preset)}
    assert networks == ROWS.keys()


def test_a_step_holds_what_the_page_counts():
    """Weights, gradients, moments and average of a real step are the bytes that the formula says."""
    import tiny
    from ldm.training.ema import EMA

    unet = tiny.unet()
    ema = EMA(unet, 0.9)
    optimizer = torch.optim.AdamW(unet.parameters())
    unet(torch.randn(1, 4, 8, 8), torch.zeros(1), torch.randn(1, 5, 16)).square().mean().backward()
    optimizer.step()
    moments = [each for state in optimizer.state.values() for each in state.values() if each.ndim]
    tensors = [*unet.parameters(), *(p.grad for p in unet.parameters()), *ema.average.parameters(), *moments]
    numbers = sum(p.numel() for p in unet.parameters())
    singles = sum(p.ndim == 0 for p in unet.parameters())
    assert sum(each.nbytes for each in tensors) == numbers * BYTES - singles * 8
