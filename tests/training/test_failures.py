"""Numbers that are not finite end a run or are left out; too little memory is told with what to try."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn

from ldm.config import Optim
from ldm.errors import UserError
from ldm.nn.autoencoder import AutoencoderKL
from ldm.training import fit, stages
from ldm.training.autoencoder import AutoencoderModule
from ldm.training.clip import ClipModule
from ldm.training.diffusion import DiffusionModule
from ldm.training.failures import explaining_want_of_memory, explaining_want_of_memory_to_encode
from ldm.training.module import StageModule
from probes import Record
from runs import TINY, run_script, tiny_config
from training_checks import assert_equal

MODULES = {"autoencoder": AutoencoderModule, "clip": ClipModule, "diffusion": DiffusionModule}
RECORD = "+callbacks.record={_target_: probes.Record}"
NAN, INF = float("nan"), float("inf")


def poison(
    monkeypatch, stage: str, at: list[int], what: str = "loss", value: float = NAN, micro_batch: int = 0
) -> None:
    """Spoil the loss or the gradient of some steps of a stage, at one micro-batch of them."""
    real, real_hook = MODULES[stage].training_step, StageModule.on_after_backward

    def hit(self: Any, batch_idx: int) -> bool:
        return self.global_step in at and batch_idx % self.trainer.accumulate_grad_batches == micro_batch

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        if hit(self, batch_idx) and what == "loss":
            factor = torch.tensor(value)
            log = self.log_losses
            self.log_losses = lambda losses, *args: log({key: each * factor for key, each in losses.items()}, *args)
            try:
                return real(self, batch, batch_idx) * factor
            finally:
                del self.log_losses
        return real(self, batch, batch_idx)

    def on_after_backward(self: Any) -> None:
        real_hook(self)
        if self.stage == stage and self.global_step in at and what == "gradient":
            next(self.network.parameters()).grad[0] = value

    monkeypatch.setattr(MODULES[stage], "training_step", training_step)
    monkeypatch.setattr(StageModule, "on_after_backward", on_after_backward, raising=False)


def state(config: Any, stage: Any) -> dict[str, Any]:
    return torch.load(fit.checkpoint_path(config, stage), weights_only=True)


@pytest.mark.parametrize(
    ("stage", "what", "value", "told"),
    [
        ("diffusion", "loss", NAN, "loss is nan, in 1"),
        ("diffusion", "gradient", INF, "the gradient is not finite, in 1"),
        ("autoencoder", "loss", INF, "loss is inf, l1 is inf"),
        ("clip", "loss", NAN, "loss is nan"),
    ],
)
def test_the_run_stops_with_step_term_and_samples(stage, what, value, told, finished, tmp_path, monkeypatch):
    root = finished.output_dir if stage == "diffusion" else tmp_path
    name = f"stopped-{what}"
    options = [f"stages=[{stage}]", f"name={name}", f"{'trainer' if stage == 'diffusion' else stage}.max_steps=6"]
    config = tiny_config(root, *options, "trainer.checkpoint_every=2")
    poison(monkeypatch, stage, [3], what, value)
    with pytest.raises(UserError) as error:
        stages.run(config)
    message = str(error.value)
    assert message.startswith(f"{stage}, step 4: ") and told.removesuffix("1") in message, message
    assert "trainer.max_skipped=10" in message and len(re.findall(r"\d+ '", message)) == 8
    kept = state(config, stage)
    assert kept["global_step"] == 2 and not Path(config.run_dir, "model", "stage.json").exists()
    assert all(tensor.isfinite().all() for tensor in kept["state_dict"].values() if tensor.is_floating_point())


def test_the_samples_named_are_those_of_the_batch(finished, monkeypatch):
    """Cached batches hold no captions, and only the micro-batch at fault is named."""
    seen: list[list[str]] = []
    real = DiffusionModule.training_step

    def watch(self: Any, batch: Any, batch_idx: int) -> Any:
        seen.append(list(batch["caption"]))
        return real(self, batch, batch_idx)

    arguments = ["stages=[diffusion]", "trainer.accumulate_grad_batches=2", "data.batch_size=4", "trainer.max_steps=4"]
    with monkeypatch.context() as patch:
        patch.setattr(DiffusionModule, "training_step", watch)
        stages.run(tiny_config(finished.output_dir, *arguments, "name=watched", "data.cache=false"))
    poison(monkeypatch, "diffusion", [2], micro_batch=1)
    for cache in ("true", "false"):
        with pytest.raises(UserError) as error:
            stages.run(tiny_config(finished.output_dir, *arguments, f"name=named-{cache}", f"data.cache={cache}"))
        told = str(error.value).split(", in ")[1].split(". The step")[0]
        assert all(repr(caption) in told for caption in seen[5]) and len(re.findall(r"\d+ '", told)) == 4


def test_files_are_named(tmp_path, monkeypatch, capsys):
    from runs import TINY_OWN
    from sets import picture_folder

    picture_folder(tmp_path / "pictures", [f"{i}.png" for i in range(9)])
    poison(monkeypatch, "autoencoder", [1])
    arguments = [*TINY_OWN, "data=folder", f"data.path={tmp_path}/pictures", f"output_dir={tmp_path}/out"]
    assert run_script("train", *arguments, "stages=[autoencoder]", "autoencoder.batch_size=2") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: autoencoder, step 2: loss is nan") and ".png) '" in err and "Traceback" not in err


@pytest.mark.parametrize(("what", "value"), [("loss", NAN), ("gradient", INF)])
def test_a_batch_that_is_left_out_changes_nothing(what, value, finished, monkeypatch, capsys):
    """Weights, average, optimizer; and the schedule and the data go on."""
    name = f"left-out-{what}"
    config = tiny_config(
        finished.output_dir, "stages=[diffusion]", f"name={name}", "trainer.max_steps=6", "trainer.max_skipped=2",
        RECORD, "diffusion.posthoc_ema={lengths: [0.1], every: 100}",
    )  # fmt: skip
    Record.rows.clear(), Record.weights.clear()
    before: dict[int, Any] = {}

    def keep(self: Any, *args: Any, real: Any = StageModule.on_train_batch_start) -> None:
        real(self, *args)
        optimizer = self.optimizers().optimizer.state_dict()["state"]
        averages = {**self.ema.state_dict(), **self.posthoc.state_dict()}
        before[self.global_step] = [
            {key: {name: each.clone() for name, each in part.items()} for key, part in optimizer.items()},
            {key: each.clone() for key, each in averages.items()},
            {key: each.clone() for key, each in self.network.state_dict().items()},
        ]

    monkeypatch.setattr(StageModule, "on_train_batch_start", keep)
    poison(monkeypatch, "diffusion", [2, 4], what, value)
    stages.run(config)
    for step in (2, 4):
        assert_equal(before[step], before[step + 1])
    for step in (0, 1, 3):
        assert not torch.equal(*(next(iter(before[i][2].values())) for i in (step, step + 1)))
    out = capsys.readouterr().out
    assert "  diffusion, step 3: left out (1 of at most 2): " in out and "step 5: left out (2 of at most 2)" in out
    assert Record.rows[-1]["step"] == 6 and Record.rows[-1]["updates"] == 4
    assert state(config, "diffusion")["num_skipped"] == 2
    [kept] = (Path(config.run_dir) / "ema").iterdir()
    assert kept.name == "step-0000004-length-0.1.safetensors"  # by the steps that were taken
    rates = state(config, "diffusion")["lr_schedulers"]
    assert rates[0]["last_epoch"] == 6


def test_one_more_than_may_be_ends_the_run_and_is_counted_on(finished, monkeypatch, capsys):
    base = ["stages=[diffusion]", "name=too-many", "trainer.max_steps=6", "trainer.checkpoint_every=3"]
    poison(monkeypatch, "diffusion", [1, 4])
    config = tiny_config(finished.output_dir, *base, "trainer.max_skipped=1")
    for _ in range(2):  # the second goes on from step 3, where one had been left out
        with pytest.raises(UserError, match=r"step 5: .*1 batches were left out before, .*max_skipped=10"):
            stages.run(config)
    stages.run(tiny_config(finished.output_dir, *base, "trainer.max_skipped=2"))
    assert "step 5: left out (2 of at most 2)" in capsys.readouterr().out
    assert state(config, "diffusion")["global_step"] == 6


def test_weights_that_are_not_finite_never_reach_the_checkpoint(finished, monkeypatch):
    """Gradients were finite and the step was not: at the step of a checkpoint nothing had noticed."""
    real = StageModule.optimizer_step

    def overshoot(self: Any, *args: Any) -> None:
        real(self, *args)
        if self.global_step >= 3:
            next(self.network.parameters()).data[0] = INF

    monkeypatch.setattr(StageModule, "optimizer_step", overshoot)
    config = tiny_config(
        finished.output_dir, "stages=[diffusion]", "name=overshoot", "trainer.max_steps=4", "trainer.val_every=100"
    )
    with pytest.raises(UserError, match=r"step 4: .*no finite numbers any more \(network\."):
        stages.run(config)
    assert state(config, "diffusion")["global_step"] == 2


# ------------------------------------------------------------------------------------------------------------ fp16


class Line(StageModule):
    stage = "diffusion"

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = (self.network(batch["x"]) * self.factors[self.global_step]).mean()
        self.log_losses({"loss": loss / self.hidden[self.global_step]}, 1)
        return loss


def line(factors: list[float], scale: float, hidden: dict[int, float] | None = None) -> tuple[Line, Any]:
    """Train a straight line by SGD in fp16 with a scaler of this scale."""
    import pytorch_lightning as pl

    optim = Optim.model_validate(
        {"_target_": "torch.optim.SGD", "lr": 0.1, "weight_decay": 0, "arguments": {}, "schedule": "constant",
         "warmup_steps": 0, "decay_share": 0.2, "clip_norm": 1.0}
    )  # fmt: skip
    module = Line(nn.Linear(1, 1), optim, len(factors), 0, ema_decay=0.5)
    module.factors, module.hidden, module.max_skipped = factors, {**dict.fromkeys(range(99), 1.0), **(hidden or {})}, 1
    module.weights = []
    module.on_train_batch_end = lambda *_: module.weights.append(module.network.weight.item())
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=len(factors), plugins=[MixedPrecision("16-mixed", "cpu", scaler)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader([{"x": torch.ones(1)}] * len(factors), batch_size=1)
    return module, lambda: (trainer.fit(module, loader), scaler)[1]


def test_steps_that_the_scaler_leaves_out_are_no_failures():
    module, train = line([1.0, 1e3, 1e3, 1.0], scale=2.0**10)
    assert train().get_scale() == 2.0**8
    assert module.num_skipped == 0 and int(module.ema.num_updates) == 2
    assert module.weights[0] == module.weights[1] == module.weights[2] != module.weights[3]


def test_what_no_scale_explains_is_a_failure(monkeypatch):
    monkeypatch.setattr("ldm.training.module.name_samples", lambda *_: "0")
    module, train = line([1.0, INF, 1.0], scale=1.0)
    train()
    assert module.num_skipped == 1 and module.weights[0] == module.weights[1] != module.weights[2]


def test_a_loss_is_a_failure_at_any_scale_and_the_scaler_goes_on(monkeypatch):
    """Though its gradient is finite."""
    monkeypatch.setattr("ldm.training.module.name_samples", lambda *_: "0")
    module, train = line([1.0, 1.0, 1.0], scale=2.0**10, hidden={1: 0.0})
    assert train().get_scale() == 2.0**10
    assert module.num_skipped == 1 and module.weights[0] == module.weights[1] != module.weights[2]
    assert int(module.ema.num_updates) == 2


# ------------------------------------------------------------------------------------------------------------- ranks


def on_a_rank(rank: int, port: int, place: str) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    module = StageModule.__new__(StageModule)
    nn.Module.__init__(module)
    module.max_skipped, module.num_skipped, module.stage = 1, 0, "diffusion"
    module._captions, module._fabric, module._trainer = [None], None, None
    module._terms = [(0, {"loss": torch.tensor(NAN if rank else 1.0)})]
    trainer = SimpleNamespace(precision_plugin=None, global_step=6, global_rank=rank, accumulate_grad_batches=1)
    module._trainer = trainer
    import ldm.training.module as used

    used.name_samples = lambda *_: f"picture {10 + rank}"
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    told = []
    for _ in range(2):
        try:
            told.append(str(module.usable([parameter], 1.0)))
        except UserError as error:
            told.append(str(error))
    Path(place, str(rank)).write_text("\n".join(told))
    torch.distributed.destroy_process_group()


def test_all_ranks_take_the_same_decision(tmp_path):
    """The loss of one alone is not finite, and no gradient shows it."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        torch.multiprocessing.get_context("fork").Process(target=on_a_rank, args=(rank, port, str(tmp_path)))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    told = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert told[0] == told[1] and told[0].startswith("False\ndiffusion, step 7: loss is nan, in picture 11. ")


# ----------------------------------------------------------------------------------------------------------- memory

GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to")


@pytest.mark.parametrize(
    ("stage", "error", "overrides", "told"),
    [
        (
            "diffusion", GPU, [],
            ["diffusion: the memory of the GPU", "batches of 8 at 16 px in 32-true", "(1) trainer.precision=bf16-mixed",
             "(2) +unet.gradient_checkpointing=true", "(3) data.batch_size=4 trainer.accumulate_grad_batches=2"],
        ),
        (
            "diffusion", CPU, ["+unet.gradient_checkpointing=true", "data.batch_size=1"],
            ["the memory of this machine", "(1) trainer.precision=", "(2) data.resolution=8", "(3) a smaller unet="],
        ),
        (
            "autoencoder", CPU, [],
            ["(1) autoencoder.precision=bf16-mixed", "(2) autoencoder.batch_size=4", "(3) data.resolution=8"],
        ),
        ("clip", MemoryError(), ["clip.batch_size=2"], ["(1) trainer.precision=", "(2) data.resolution=8"]),
    ],
)  # fmt: skip
def test_want_of_memory_is_told_with_what_to_try(stage, error, overrides, told, finished, tmp_path, monkeypatch):
    root = finished.output_dir if stage == "diffusion" else tmp_path
    config = tiny_config(root, f"stages=[{stage}]", "name=memory", "trainer.precision=32-true", *overrides)

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(MODULES[stage], "training_step", fail)
    with pytest.raises(UserError) as raised:
        stages.run(config)
    for part in told:
        assert part in str(raised.value), str(raised.value)
    assert "(4)" not in str(raised.value) and str(raised.value).count("\n") == 0


@pytest.mark.parametrize(
    ("cache", "ways"),
    [
        (
            "true",
            "(1) data.cache=false data.batch_size=8, which encodes the pictures of each step, (2) data.resolution=8",
        ),
        ("build", "(1) data.resolution=8, (2) a smaller vae=, (3) a machine with more of it. A cache"),
    ],
)
def test_want_of_memory_for_the_cache_is_told_with_what_to_try(cache, ways, finished, monkeypatch, capsys):
    """As the U-Net's stage begins, and where the cache alone is built."""

    def fail(*_: Any) -> None:
        raise GPU

    monkeypatch.setattr(AutoencoderKL, "encode", fail)
    options = [f"output_dir={finished.output_dir}", "stages=[diffusion]", "name=encoding", "data.cache_dtype=bf16"]
    assert run_script("train", *TINY, *options, f"data.cache={cache}") == 2
    err = capsys.readouterr().err
    told = (
        "error: cache: the memory of the GPU is not enough to encode batches of 64 at 16 px in float32. Try, in this "
    )
    assert err.startswith(f"{told}order: {ways}") and "(CUDA out of memory" in err and "Traceback" not in err


def test_what_may_help_to_encode_comes_in_order(tmp_path):
    config = tiny_config(tmp_path, "trainer=gpu", "data.cache_on_device=true", "data.batch_size=64")
    cuda = torch.device("cuda")
    with pytest.raises(UserError) as raised, explaining_want_of_memory_to_encode(config, 16, cuda):
        raise GPU
    assert (
        "(1) data.cache_on_device=false, (2) trainer=cpu data.cache=build, which encodes on the processor, and then "
        "this command, (3) data.cache=false data.batch_size=8, which"
    ) in str(raised.value)
    with pytest.raises(RuntimeError, match="shapes"), explaining_want_of_memory_to_encode(config, 16, cuda):
        raise RuntimeError("shapes do not fit")


def test_other_errors_pass(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), explaining_want_of_memory(tiny_config(tmp_path), "clip", "auto"):
        raise RuntimeError("shapes do not fit")


def test_a_real_allocation_that_is_too_large(tmp_path):
    config = tiny_config(tmp_path)
    with pytest.raises(UserError, match="memory of this machine"), explaining_want_of_memory(config, "diffusion", "x"):
        torch.empty(2**60, dtype=torch.uint8)
