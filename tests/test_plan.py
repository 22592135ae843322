"""The formulae of `python -m ldm.plan`, held against runs, files and counts of this machine."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm import plan
from ldm.nn.unet import UNet
from ldm.training import stages
from ldm.training.flops import count_flops
from runs import compose_values, tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose U-Net is large enough for files to be weights and not headers."""
    config = tiny_config(
        tmp_path_factory.mktemp("plan"), "unet.block_out_channels=[32,64]", "trainer.max_steps=1", "data.num_val=2",
        "data.num_train=512",
    )  # fmt: skip
    stages.run(config)
    return config


def test_the_size_of_a_cache_is_that_of_its_files(run):
    sizes = {"moments": 0, "context": 0}
    for path in (Path(run.output_dir) / "cache").rglob("*.safetensors"):
        for name in sizes:
            sizes[name] += path.stat().st_size * path.name.startswith(name)
    captions = len({text for split in ("train", "val") for text in captions_of(run, split)})
    num = run.data.num_train + run.data.num_val
    moments = plan.cache_bytes((4, 8, 8), (0, 0), itemsize=4) * num
    context = plan.cache_bytes((0, 0, 0), (20, 16), itemsize=4) * captions
    assert sizes["moments"] == pytest.approx(moments, rel=0.01)
    assert sizes["context"] == pytest.approx(context, rel=0.02)  # the null caption's beside
    assert plan.cache_bytes((4, 8, 8), (20, 16), 4, variants=3) == 3 * moments // num + context // captions


def captions_of(config, split: str) -> list[str]:
    from ldm.data.sources import open_sources

    source = open_sources(config.data)[("train", "val").index(split)]
    return [text for texts in source.captions() for text in texts]


def test_the_size_of_a_checkpoint_is_that_of_its_file(run):
    unet = UNet(**torch_config(run))
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    [path] = (Path(run.run_dir) / "checkpoints" / "diffusion").glob("last.ckpt")
    assert path.stat().st_size == pytest.approx(plan.checkpoint_bytes(parameters), rel=0.05)


def torch_config(config) -> dict:
    import json

    found = json.loads((Path(config.run_dir) / "model" / "unet" / "config.json").read_text())
    return {key: value for key, value in found.items() if not key.startswith("_")}


def test_the_state_of_a_step_is_what_its_tensors_hold():
    network = torch.nn.Linear(300, 300)
    average = torch.nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    held = [*network.parameters(), *(p.grad for p in network.parameters()), *moments, *average.parameters()]
    assert plan.state_bytes(300 * 301) == sum(tensor.nbytes for tensor in held)
    assert plan.state_bytes(300 * 301, sharded_over=2) == plan.state_bytes(300 * 301) // 2


def test_presets_have_the_published_size_and_the_work_of_a_real_step():
    tiny = plan.count("tiny", 64)
    network = UNet(**{**compose_values("train")["unet"], "cross_attention_dim": 768})
    inputs = torch.randn(1, 4, 8, 8), torch.zeros(1, dtype=torch.int64), torch.randn(1, 77, 768)
    with sdpa_kernel(SDPBackend.MATH):
        assert tiny.step_flops == count_flops(partial(network, *inputs))
        kept = plan.activation_bytes(network, *inputs)
    assert tiny.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert tiny.activation_bytes == pytest.approx(kept, rel=0.1)  # a processor's kernels keep a little else
    assert plan.count("sd15", 64).parameters == 859_520_964


def test_activations_grow_with_the_batch_and_weights_are_none_of_them():
    network = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
    one, four = (plan.activation_bytes(network, torch.ones(batch, 64)) for batch in (1, 4))
    assert one == 4 * 64 * 3 and four == 4 * one  # the input of each layer


def test_checkpoints_are_as_far_apart_as_loses_least():
    seconds, mean_time, restart = 20.0, 5_000.0, 60.0
    interval = plan.checkpoint_interval(seconds, mean_time)
    least = plan.lost_share(interval, seconds, mean_time, restart)
    assert all(plan.lost_share(interval * factor, seconds, mean_time, restart) > least for factor in (0.8, 1.25))
    assert simulated(interval, seconds, mean_time, restart) == pytest.approx(least, rel=0.15)
    assert all(simulated(interval * factor, seconds, mean_time, restart) > 1.2 * least for factor in (0.25, 4.0))


def simulated(interval: float, seconds: float, mean_time: float, restart: float, failures: int = 4000) -> float:
    """Let a job fail so many times; return the share of time that was no use, over that of use."""
    lives = np.random.default_rng(0).exponential(mean_time, failures)
    useful = np.floor(lives / (interval + seconds)).sum() * interval
    return float((lives.sum() + failures * restart - useful) / useful)


def test_what_is_asked_is_reckoned():
    asked = plan.parse(["--pictures", "1e6", "--gpus", "10", "--images-per-second", "50", "--scaling", "0.8"])
    load = plan.Load(parameters=10**9, step_flops=10**12, encode_flops=10**12, activation_bytes=10**9)
    rows = {name: told for name, told, _ in plan.plan(asked, load)}
    assert rows["images/s in all"] == "400"
    assert rows["images/s of a GPU"] == "50 from the cache, 42 without"  # 1/50 s, and 1/280 s to encode
    assert rows["cache"] == "183.8 GB, 184 kB a picture"
    assert rows["tar shards"] == "100" and rows["steps"] == "3,125"
    assert rows["a checkpoint"] == "16.0 GB, 8 s"
    assert rows["training"].endswith("7 GPU-hours") and rows["mean time to failure"] == "5,000 hours of the job"


def test_it_is_called_as_typed_and_refuses_what_cannot_be():
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "ldm.plan", *arguments], capture_output=True, text=True)

    done = call("--unet", "tiny", "--resolution", "64", "--pictures", "1000", "--gpus", "1")
    assert done.returncode == 0 and done.stdout.startswith("U-Net  ") and "training costs" in done.stdout
    for wrong in (["--resolution", "100"], ["--gpus", "1.5"], ["--pictures", "-1"], ["--utilization", "40"]):
        assert call(*wrong).returncode == 2


def test_the_page_shows_what_is_reckoned(monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
    command, _, shown = page.partition("$ python -m ldm.plan ")[2].partition("```")[0].partition("\n")
    monkeypatch.setattr(sys, "argv", ["ldm.plan", *command.split()])
    plan.main()
    assert capsys.readouterr().out == shown
