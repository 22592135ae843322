from itertools import chain, islice
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data.datamodule import DataModule, EndlessBatches, Pictures
from ldm.data.images import to_pixels
from ldm.errors import UserError
from tiny import Pixels

sizes = {"num_samples": st.integers(1, 50), "batch_size": st.integers(1, 20), "seed": st.integers(0, 2**40)}
SETTINGS = settings(max_examples=60, deadline=None)


def first(num_batches, *args, **kwargs):
    return list(islice(EndlessBatches(*args, **kwargs), num_batches))


def flat(lists):
    return list(chain.from_iterable(lists))


# ---------------------------------------------------------------------------------------------------------- order


@SETTINGS
@given(**sizes)
def test_every_index_comes_exactly_once_in_each_n_draws(num_samples, batch_size, seed):
    num_batches = -(-3 * num_samples // batch_size)
    drawn = flat(first(num_batches, num_samples, batch_size, seed))
    for i in range(3):
        assert sorted(drawn[i * num_samples : (i + 1) * num_samples]) == list(range(num_samples))


@SETTINGS
@given(**sizes)
def test_batches_are_full(num_samples, batch_size, seed):
    assert {len(batch) for batch in first(7, num_samples, batch_size, seed)} == {batch_size}


@SETTINGS
@given(**sizes, world_size=st.integers(1, 5))
def test_ranks_share_out_the_order_of_one_rank_with_the_whole_batch(num_samples, batch_size, seed, world_size):
    together = first(4, num_samples, batch_size * world_size, seed)
    ranks = [first(4, num_samples, batch_size, seed, rank, world_size) for rank in range(world_size)]
    assert [flat(batches) for batches in zip(*ranks, strict=True)] == together


@SETTINGS
@given(**sizes, world_size=st.integers(1, 4), start=st.integers(0, 30), data=st.data())
def test_starting_later_is_skipping(num_samples, batch_size, seed, world_size, start, data):
    rank = data.draw(st.integers(0, world_size - 1))
    whole = first(start + 3, num_samples, batch_size, seed, rank, world_size)
    assert first(3, num_samples, batch_size, seed, rank, world_size, start=start) == whole[start:]


@SETTINGS
@given(**sizes)
def test_order_is_a_function_of_the_seed(num_samples, batch_size, seed):
    sampler = EndlessBatches(num_samples, batch_size, seed)
    assert list(islice(sampler, 5)) == list(islice(sampler, 5)) == first(5, num_samples, batch_size, seed)


def test_seeds_and_epochs_are_shuffled_apart():
    orders = [tuple(first(1, 100, 100, seed)[0]) for seed in range(5)]
    orders += [tuple(batch) for batch in first(5, 100, 100, 0)[1:]]
    orders.append(tuple(range(100)))
    assert len(set(orders)) == len(orders)


def test_order_is_the_same_on_every_machine():
    assert first(2, 6, 4, seed=0) == [[3, 2, 5, 4], [0, 1, 1, 4]]


# ------------------------------------------------------------------------------------------------------- pictures


def test_a_batch_of_pictures():
    source = Pixels(6, side=16)
    pictures = Pictures(source, 16)
    batch = pictures.__getitems__([5, 0, 5])
    assert len(pictures) == 6
    assert batch["image"].shape == (3, 3, 16, 16) and batch["image"].dtype == torch.float32
    assert np.array_equal(to_pixels(batch["image"]), source.pixels[[5, 0, 5]])
    assert batch["caption"] == [source.texts[i] for i in (5, 0, 5)]


def test_pictures_of_any_size_are_cut_to_one():
    class Mixed(Pixels):
        def __getitem__(self, index):
            return {"image": self.pixels[0][: 3 + index], "caption": ""}

    assert Pictures(Mixed(9), 8).__getitems__([0, 4, 8])["image"].shape == (3, 3, 8, 8)


# -------------------------------------------------------------------------------------------------------- loaders


def module(
    num=10, rank=0, world_size=1, global_step=0, accumulate=1, batch_size=4, num_val=5, source=Pixels, **options
):
    train, val = Pictures(source(num), 16), Pictures(source(num_val, seed=1), 16)
    datamodule = DataModule(train, val, batch_size, seed=3, **options)
    datamodule.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        global_step=global_step,
        accumulate_grad_batches=accumulate,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return datamodule


def captions(loader, num_batches=None):
    return [batch["caption"] for batch in islice(loader, num_batches)]


def test_training_batches_are_those_of_the_order():
    drawn = captions(module().train_dataloader(), 5)
    texts = Pixels(10).texts
    assert drawn == [[texts[i] for i in batch] for batch in first(5, 10, 4, 3)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_do_not_change_the_order(num_workers):
    assert captions(module(num_workers=num_workers).train_dataloader(), 6) == captions(module().train_dataloader(), 6)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_resumed_run_goes_on_where_the_trainer_stands(accumulate, rank):
    place = {"rank": rank, "world_size": 2, "accumulate": accumulate}
    whole = captions(module(**place).train_dataloader(), 5 * accumulate)
    resumed = captions(module(**place, global_step=3).train_dataloader(), 2 * accumulate)
    assert resumed == whole[3 * accumulate :]


def test_overfitting_uses_the_first_batches_alone():
    drawn = captions(module(num=100, overfit_batches=2).train_dataloader(), 10)
    assert set(flat(drawn)) == set(Pixels(100).texts[:8])
    few = captions(module(num=5, overfit_batches=2).train_dataloader(), 10)
    assert set(flat(few)) == set(Pixels(5).texts)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_is_the_whole_set_once_in_order(world_size):
    loaders = [module(num_val=11, rank=rank, world_size=world_size).val_dataloader() for rank in range(world_size)]
    drawn = [flat(captions(loader)) for loader in loaders]
    assert sorted(flat(drawn)) == sorted(Pixels(11).texts)
    assert drawn[0] == Pixels(11).texts[::world_size]
    assert captions(loaders[0]) == captions(loaders[0])


class Broken(Pixels):
    def __getitem__(self, index):
        raise UserError(f"row {index}: not a picture")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_picture_ends_the_run_with_its_message(num_workers):
    loader = module(source=Broken, num_workers=num_workers).train_dataloader()
    with pytest.raises(UserError, match=r"row \d+: not a picture"):
        next(iter(loader))


class Recorder(pl.LightningModule):
    """Trains one number, and notes what it is fed."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.fed = []

    def training_step(self, batch, _):
        self.fed.append(batch["caption"])
        return (self.weight - batch["image"].mean()) ** 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(steps, ckpt_path=None, accumulate=1):
    recorder = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, accumulate_grad_batches=accumulate, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    datamodule = DataModule(Pictures(Pixels(10), 16), Pictures(Pixels(2), 16), batch_size=3, seed=5)
    trainer.fit(recorder, datamodule, ckpt_path=ckpt_path)
    return trainer, recorder


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_with_the_next_batch(tmp_path, accumulate):
    _, whole = fit(9, accumulate=accumulate)
    trainer, begun = fit(4, accumulate=accumulate)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    _, resumed = fit(9, ckpt_path=tmp_path / "a.ckpt", accumulate=accumulate)
    assert begun.fed + resumed.fed == whole.fed
    assert len(whole.fed) == 9 * accumulate
    assert torch.equal(resumed.weight, whole.weight)
