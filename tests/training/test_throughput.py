"""How fast training is: what is counted is what torch counts in a real step, and time is charged to whom it belongs."""

import csv
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import pytorch_lightning as pl
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tiny
from ldm.config import TrainConfig
from ldm.training import flops, stages, throughput
from ldm.training.throughput import Throughput
from runs import tiny_config

FIGURES = ("images_per_second", "gflops_per_image", "utilization", "data_wait")


class CountStep(pl.Callback):
    """Have torch count every operation of each batch, forward and backward."""

    counted: ClassVar[dict[str, int]] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.counter = FlopCounterMode(display=False)
        self.counter.__enter__()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.counter.__exit__(None, None, None)
        self.counted[pl_module.stage] = self.counter.get_total_flops()


def run_counted(output_dir: Any, *overrides: str) -> TrainConfig:
    config = tiny_config(
        output_dir, "callbacks.throughput.every=3",
        f"+callbacks.count._target_={__name__}.{CountStep.__name__}", *overrides,
    )  # fmt: skip
    CountStep.counted = {}
    with sdpa_kernel(SDPBackend.MATH):  # the kernels of attention count what they compute twice
        stages.run(config)
    return config


def rows(config: TrainConfig) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    with (Path(config.run_dir) / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["metric"], []).append((int(row["step"]), float(row["value"])))
    return found


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> TrainConfig:
    return run_counted(tmp_path_factory.mktemp("counted"), "trainer.max_steps=6")


def test_operations_are_those_that_torch_counts_in_a_real_step(counted):
    found = rows(counted)
    for stage, size in (("autoencoder", 8), ("clip", 8), ("diffusion", 8)):
        [value, *others] = [value for _, value in found[f"{stage}/gflops_per_image"]]
        assert set(others) <= {value}
        # In CLIP's loss each picture meets each caption, which is no part of one picture.
        assert value * 1e9 * size == pytest.approx(CountStep.counted[stage], rel=1e-2 if stage == "clip" else 1e-5)


@pytest.mark.parametrize("overrides", [["data.cache=false"], ["+unet.in_channels=9", "data.cache=false"]])
def test_what_frozen_parts_do_each_step_counts(counted, overrides):
    config = run_counted(counted.output_dir, "stages=[diffusion]", "name=uncached", "resume=never", *overrides)
    [(_, value)] = rows(config)["diffusion/gflops_per_image"][-1:]
    assert value * 1e9 * 8 == pytest.approx(CountStep.counted["diffusion"], rel=1e-5)
    assert value > 1.01 * rows(counted)["diffusion/gflops_per_image"][0][1]


def test_weights_that_are_not_trained_have_no_gradient_to_compute():
    whole, part = tiny.unet(), tiny.unet()
    whole.requires_grad_(True)
    part.requires_grad_(False).conv_out.requires_grad_(True)
    inputs = [torch.empty(*shape, device="meta") for shape in ((1, 4, 8, 8), (1,), (1, 5, 16))]
    least, most = (flops.count_flops(partial(flops.twin(unet), *inputs)) for unet in (part, whole))
    with torch.no_grad():
        forward = flops.count_flops(partial(flops.twin(whole), *inputs))
    assert forward < least < 1.2 * forward
    assert 2.8 * forward < most <= 3 * forward


def test_every_figure_is_logged_when_it_is_due(counted):
    found = rows(counted)
    for stage, steps in (("autoencoder", [2]), ("clip", [2]), ("diffusion", [2, 5])):
        for name in FIGURES:
            assert [step for step, _ in found[f"{stage}/{name}"]] == steps
    for name, value in ((name, value) for name, values in found.items() for _, value in values):
        if name.endswith("data_wait"):
            assert 0 <= value < 1
        if name.endswith(("utilization", "images_per_second")):
            assert value > 0


# ------------------------------------------------------------------------------------------------------------- time


@pytest.fixture
def clock(monkeypatch) -> Iterator[SimpleNamespace]:
    """A clock that the test turns, and a device of 1 TFLOP/s."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(throughput, "matmul_rate", lambda device, dtype: 1e12)
    yield clock


@pytest.mark.parametrize("accumulate", [1, 2])
def test_time_is_that_of_steps_and_of_waiting_for_data(clock, accumulate):
    logged: list[tuple[dict[str, float], int]] = []
    logger = SimpleNamespace(log_metrics=lambda figures, step: logged.append((figures, step)))
    loader = SimpleNamespace(waited=0.0)
    trainer: Any = SimpleNamespace(
        global_step=0, world_size=2, is_global_zero=True, loggers=[logger], train_dataloader=loader, precision="32-true"
    )
    module = SimpleNamespace(
        stage="diffusion", device="cpu", dtype=torch.float32, flops_per_image=lambda batch: 5_000_000_000
    )
    callback = Throughput(every=2)
    callback.on_train_start(trainer, module)
    batch = {"image": torch.zeros(10, 3, 1, 1)}
    for i in range(4 * accumulate + 1):  # the first warms up
        loader.waited += 0.25
        clock.now += 0.25
        callback.on_train_batch_start(trainer, module, batch, i)
        clock.now += 0.75 if i else 60.0
        trainer.global_step = i // accumulate
        callback.on_train_batch_end(trainer, module, None, batch, i)
        clock.now += 100.0  # validation, a checkpoint
    assert [step for _, step in logged] == [1, 3]
    for figures, _ in logged:
        assert figures == pytest.approx(
            {
                "diffusion/images_per_second": 20.0,
                "diffusion/gflops_per_image": 5.0,
                "diffusion/utilization": 0.05,
                "diffusion/data_wait": 0.25,
            }
        )


def test_the_loader_knows_how_long_it_was_waited_for(monkeypatch):
    from ldm.data import datamodule

    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(datamodule, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    class Slow:
        def __getitems__(self, picks: Any) -> dict[str, torch.Tensor]:
            clock.now += 2.0
            return {"image": torch.zeros(len(picks))}

    loader = datamodule.Loader(datamodule.Guarded(Slow()), batch_sampler=[[0, 1]] * 3, collate_fn=lambda batch: batch)
    for _ in loader:
        clock.now += 5.0
    assert loader.waited == 6.0


def test_the_rate_of_a_device_is_measured_once():
    device = torch.device("cpu")
    rate = flops.matmul_rate(device, torch.float32, 0.0)
    assert rate > 1e9 and flops.matmul_rate(device, torch.float32, 0.0) == rate
