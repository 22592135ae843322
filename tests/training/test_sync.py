"""No step from the cache makes the host wait for the device, but for the one look at what is not finite."""

import warnings
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from ldm.data.datamodule import DataModule
from ldm.data.order import Shuffle
from ldm.training import feed
from ldm.training.trial import any_conditioner, any_vae, build_module, encoded, trial_trainer
from runs import tiny_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose waiting torch can tell of")
WARM_UP, STEPS = 2, 3


class CountWaits(pl.Callback):
    """Count how often a step waits, from when its batch is there until its optimizer has been called."""

    def __init__(self) -> None:
        self.waits: list[list[str]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.caught = warnings.catch_warnings(record=True)
        self.seen = self.caught.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        torch.cuda.set_sync_debug_mode("default")
        assert self.seen is not None
        self.waits.append([str(each.message) for each in self.seen if "synchroniz" in str(each.message)])
        self.caught.__exit__(None, None, None)


@pytest.mark.parametrize(("max_skipped", "waits"), [(None, 0), (0, 1)])
def test_a_step_from_the_cache_does_not_wait_for_the_device(tmp_path, max_skipped, waits):
    config = tiny_config(tmp_path, "stages=[diffusion]", "trainer=gpu", "trainer.max_steps=5")
    vae = any_vae(config)
    pictures, _ = feed.open_pictures(config)
    conditioner = any_conditioner(config, pictures)
    vae.cuda().eval(), conditioner.cuda().eval()
    dataset = encoded(pictures, range(len(pictures)), vae, conditioner, config.data.batch_size)[0]
    module = build_module(config, "diffusion", vae, conditioner, WARM_UP + STEPS)
    counting = CountWaits()
    trainer = trial_trainer(config, module, WARM_UP + STEPS, counting)
    module.max_skipped = max_skipped
    order: Any = Shuffle(len(dataset), config.seed)
    trainer.fit(module, DataModule(dataset, dataset, order, config.data.batch_size, 0))
    assert [len(each) for each in counting.waits[WARM_UP:]] == [waits] * STEPS, counting.waits
