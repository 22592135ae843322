"""What loading and converting cost in memory: one copy of the weights, whatever the form and the dtype."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny
from ldm.nn.unet import UNet
from ldm.weights.archive import write_archive
from ldm.weights.folder import save_network

SRC = Path(__file__).parents[2] / "src"
# Watched by a thread: memory of the process itself, without the pages of files, which the system may take back.
WATCH = """
import json, sys, threading, time
from pathlib import Path
import torch
from ldm.nn.unet import UNet
from ldm.weights.model import load_part
from ldm.weights.convert import convert

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)

tiny, source, dtype, dst = sys.argv[1:]
load_part(UNet, tiny, torch.float32)  # what the first time costs
peak = before = anonymous()
threading.Thread(target=watch, daemon=True).start()
if dst:
    keys = ("vae", "text_encoder", "unet", "tokenizer", "prediction_type", "variant", "format")
    convert({"src": source, "dst": dst, "dtype": dtype, "overwrite": False, "ema": None, **dict.fromkeys(keys)})
else:
    unet = load_part(UNet, source, getattr(torch, dtype))
    sum(float(p.detach().sum()) for p in unet.parameters())  # touch them all
time.sleep(0.01)
print(json.dumps({"peak": peak - before}))
"""
NUM_PARAMETERS = 80_511_108
NUM_BYTES = 4 * NUM_PARAMETERS


@pytest.fixture(scope="module")
def unets(tmp_path_factory) -> Path:
    """A U-Net of 80 million parameters in each form, and a tiny one."""
    place = tmp_path_factory.mktemp("memory")
    unet = UNet(block_out_channels=(128, 192, 384, 384), cross_attention_dim=256)
    assert sum(p.numel() for p in unet.parameters()) == NUM_PARAMETERS
    save_network(unet, place / "folder")
    save_network(unet, place / "half", torch.float16)
    write_archive(place / "file.safetensors", {"unet": unet})
    torch.save({"state_dict": unet.state_dict()}, place / "folder" / "file.ckpt")
    save_network(tiny.unet(), place / "tiny")
    return place


def peak(unets: Path, source: str, dtype: str, dst: str = "") -> int:
    env = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WATCH, str(unets / "tiny"), str(unets / source), dtype, dst]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["peak"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "dtype", "copies"),
    [
        ("folder", "float32", 1.0),
        ("folder", "float16", 0.5),
        ("half", "float32", 1.0),
        ("half", "bfloat16", 0.5),
        ("file.safetensors", "float32", 1.0),
        ("file.safetensors", "bfloat16", 0.5),
        ("folder/file.ckpt", "float32", 1.0),
        ("folder/file.ckpt", "float16", 0.5),
    ],
)
def test_loading_takes_one_copy_of_the_weights(unets, source, dtype, copies):
    assert peak(unets, source, dtype) < 1.15 * copies * NUM_BYTES + 30e6


@pytest.mark.slow
@pytest.mark.parametrize(("source", "dst"), [("folder", "out.safetensors"), ("file.safetensors", "out")])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_converting_takes_no_copy_at_all(unets, tmp_path, source, dst, dtype):
    assert peak(unets, source, dtype, str(tmp_path / dst)) < 0.25 * NUM_BYTES
