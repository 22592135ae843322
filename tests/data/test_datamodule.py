import os
import signal
import threading
import time
from itertools import chain, islice
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch

from ldm.data.buckets import Buckets
from ldm.data.datamodule import DataModule
from ldm.data.order import EndlessBatches, Shuffle
from ldm.data.pictures import Pictures
from ldm.errors import UserError
from tiny import Pixels


def first(num_batches, num_samples, batch_size, seed):
    return list(islice(EndlessBatches(Shuffle(num_samples, seed), batch_size), num_batches))


def flat(lists):
    return list(chain.from_iterable(lists))


# -------------------------------------------------------------------------------------------------------- loaders


def module(
    num=10, rank=0, world_size=1, global_step=0, accumulate=1, batch_size=4, num_val=5, source=Pixels, **options
):
    train, val = Pictures(source(num), 16), Pictures(source(num_val, seed=1), 16, fixed=True)
    datamodule = DataModule(train, val, Shuffle(num, seed=3), batch_size, **options)
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
    assert drawn == [[texts[i] for i, _ in batch] for batch in first(5, 10, 4, 3)]


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


@pytest.mark.parametrize("ranks", [(1, 2), (4, 2), (2, 1)], ids=str)
def test_with_another_number_of_ranks_it_goes_on_after_the_last_sample(ranks):
    """Some steps on so many ranks, then on others: none is left out, and less than a step comes again."""
    steps, order = 3, [index for batch in first(9, 10, 8, 3) for index, _ in batch]
    then, now = ranks
    drawn = []
    for world_size, start in ((then, 0), (now, steps)):
        modules = [module(rank=rank, world_size=world_size, global_step=start) for rank in range(world_size)]
        for each in modules:
            each.before = start * 4 * (then - now)
        batches = [captions(each.train_dataloader(), steps) for each in modules]
        again = len(drawn) % (4 * world_size)
        drawn[len(drawn) - again :] = [text for step in range(steps) for of_rank in batches for text in of_rank[step]]
    assert drawn == [Pixels(10).texts[index] for index in order[: len(drawn)]]


def test_ranks_of_a_network_that_is_cut_up_validate_as_many_batches(monkeypatch):
    modules = [module(num_val=9, rank=rank, world_size=2) for rank in range(2)]
    assert [len(each.val_dataloader()) for each in modules] == [2, 1]
    monkeypatch.setattr("ldm.data.datamodule.ModelParallelStrategy", SimpleNamespace)
    assert [len(each.val_dataloader()) for each in modules] == [1, 1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_is_the_whole_set_once_in_order(world_size):
    loaders = [module(num_val=11, rank=rank, world_size=world_size).val_dataloader() for rank in range(world_size)]
    drawn = [flat(captions(loader)) for loader in loaders]
    assert sorted(flat(drawn)) == sorted(Pixels(11).texts)
    assert drawn[0] == Pixels(11).texts[::world_size]
    assert captions(loaders[0]) == captions(loaders[0])


def test_each_rank_has_something_to_validate():
    drawn = [flat(captions(module(num_val=1, rank=rank, world_size=3).val_dataloader())) for rank in range(3)]
    assert drawn == [Pixels(1).texts] * 3


class Broken(Pixels):
    def __getitem__(self, index):
        raise UserError(f"row {index}: not a picture")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_picture_ends_the_run_with_its_message(num_workers):
    loader = module(source=Broken, num_workers=num_workers).train_dataloader()
    with pytest.raises(UserError, match=r"^row \d+: not a picture$"):
        next(iter(loader))


class Deadly(Pixels):
    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_loader_process_that_is_killed_ends_the_run_with_a_message():
    loader = module(source=Deadly, num_workers=1).train_dataloader()
    started = time.monotonic()
    with pytest.raises(UserError, match=r"a loader process is gone.*killed.*data\.num_workers=1"):
        next(iter(loader))
    assert time.monotonic() - started < 60


class Bug(Pixels):
    def __getitem__(self, index):
        raise KeyError("a bug")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bug_keeps_its_traceback(num_workers):
    with pytest.raises(KeyError, match="a bug"):
        next(iter(module(source=Bug, num_workers=num_workers).train_dataloader()))


class Shaped(Pixels):
    """Pictures of which every third is twice as wide as high."""

    def sizes(self):
        sizes = super().sizes()
        sizes[::3, 0] *= 2
        return sizes


def test_with_buckets_every_batch_has_one_shape_in_validation_too():
    train, val = (Pictures(Shaped(num), 16, buckets=Buckets(16, 4), fixed=num < 20) for num in (40, 11))
    datamodule = module()
    datamodule.train, datamodule.val, datamodule.order = train, val, Shuffle(40, seed=3)
    shapes = {tuple(batch["image"].shape) for batch in islice(datamodule.train_dataloader(), 20)}
    assert shapes == {(4, 3, 16, 16), (4, 3, 12, 20)}
    drawn = captions(datamodule.val_dataloader())
    assert sorted(flat(drawn)) == sorted(Pixels(11).texts)
    assert drawn[0][0] == Pixels(11).texts[0] and drawn[1][0] == Pixels(11).texts[1]


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
    datamodule = DataModule(Pictures(Pixels(10), 16), Pictures(Pixels(2), 16), Shuffle(10, seed=5), batch_size=3)
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


class Mapped(Pixels):
    """Stands for a cache that is read from its files."""

    in_memory, bucket_of = False, None

    def __getitems__(self, picks):
        if any(index == 7 for index, _ in picks) and self.broken:
            raise UserError("a file is gone")
        return {"picks": torch.tensor(picks), "thread": threading.current_thread().name}


@pytest.mark.parametrize("broken", [False, True])
def test_a_mapped_cache_is_read_ahead_by_threads_in_order(broken):
    datamodule = module(num_workers=3)
    datamodule.train = Mapped(10)
    datamodule.train.broken = broken
    loader = datamodule.train_dataloader()
    assert loader.num_workers == 0
    if broken:
        with pytest.raises(UserError, match="a file is gone"):
            list(islice(loader, 9))
        return
    batches = list(islice(loader, 9))
    assert [batch["picks"].tolist() for batch in batches] == [
        [[*pick] for pick in picks] for picks in first(9, 10, 4, 3)
    ]
    assert threading.current_thread().name not in {batch["thread"] for batch in batches}
