"""A model of Stable Diffusion 1.5's full size through every door, within the memory of a laptop."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runs import ROOT

GIB = 2**30
WRITE = """
import sys, torch
from pathlib import Path
import yaml
import tiny
from ldm.nn.autoencoder import AutoencoderKL
from ldm.nn.clip import TextTower
from ldm.nn.unet import UNet
from ldm.weights.model import SD_SCHEDULER, Model, save_model

def fresh(network, **options):
    with torch.device("meta"):
        network = network(**options)
    network = network.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.data.fill_(float(parameter.shape[0] > 4))
    return network.eval()

options = yaml.safe_load((Path(sys.argv[1]) / "conf" / "unet" / "sd15.yaml").read_text())
unet = fresh(UNet, **{"sample_size": 64, "cross_attention_dim": 768, **options})
assert sum(p.numel() for p in unet.parameters()) == 859_520_964
vae = fresh(AutoencoderKL, block_out_channels=[128, 256, 512, 512], layers_per_block=2, sample_size=512)
text = fresh(TextTower, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
             eos_token_id=tiny.tokenizer().eos_token_id)
model = Model(unet, vae, text, tiny.tokenizer(), {**SD_SCHEDULER, "prediction_type": "epsilon"}, {}, Path())
save_model(model, Path(sys.argv[2]))
"""


def run(*command: str, cwd: Path) -> int:
    """Run a process to its end; return its peak resident memory in bytes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    environment.pop("OMP_NUM_THREADS", None)
    process = subprocess.Popen([sys.executable, *command], cwd=cwd, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * 1024


@pytest.mark.slow
def test_a_full_size_model_loads_converts_and_draws_within_12_gib(tmp_path):
    run("-c", WRITE, str(ROOT), "folder", cwd=tmp_path)
    convert, sample = str(ROOT / "convert.py"), str(ROOT / "sample.py")
    started, peaks = time.monotonic(), {}
    peaks["to a file"] = run(convert, "src=folder", "dst=single.safetensors", "dtype=bf16", cwd=tmp_path)
    peaks["to a folder"] = run(convert, "src=single.safetensors", "dst=again", "dtype=bf16", cwd=tmp_path)
    for part in ("unet", "vae"):
        file = Path(part) / "diffusion_pytorch_model.safetensors"
        assert (tmp_path / "folder" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    words = ["prompt=a large red circle", "steps=2", "sampler=dpmpp_2m", "dtype=bf16", "device=cpu"]
    for source in ("single.safetensors", "again"):
        peaks[f"drawn from {source}"] = run(sample, f"ckpt={source}", *words, f"out=out-{source}", cwd=tmp_path)
    for name, peak in peaks.items():
        print(f"{name}: peak {peak / GIB:.1f} GiB")
    print(f"{time.monotonic() - started:.0f} s")
    drawn = [np.asarray(Image.open(next((tmp_path / f"out-{x}").iterdir()))) for x in ("single.safetensors", "again")]
    assert drawn[0].shape == (512, 512, 3) and drawn[0].std() > 1
    assert np.array_equal(*drawn)
    assert max(peaks.values()) < 12 * GIB
