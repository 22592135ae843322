"""Where the time of a training step goes.

Two looks at the same steps: a clock that is handed from phase to phase, for the table, and torch's profiler for one
step more, for the flame graph. On a GPU the clock waits for the device at each hand-over.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.strategies import Strategy
from torch import nn
from torch.profiler import ProfilerActivity, record_function

from ldm.conditioner import Conditioner
from ldm.config import Stage, TrainConfig
from ldm.data.datamodule import DataModule
from ldm.data.order import Shuffle
from ldm.nn.autoencoder import AutoencoderKL
from ldm.nn.clip import CLIP
from ldm.nn.unet import UNet
from ldm.training import feed
from ldm.training.ema import Average, ScheduleFreeAverage
from ldm.training.flame import Frame, flame_graph
from ldm.training.module import StageModule
from ldm.training.trial import any_conditioner, any_vae, build_module, encoded, trial_trainer

WARM_UP, STEPS = 3, 10  # one more is seen by torch's profiler
OTHER = "other"
# What is charged to a phase of its own when it is called, from anywhere: class, method, phase.
PHASES: dict[Stage, list[tuple[type, str, str]]] = {
    "diffusion": [
        (AutoencoderKL, "encode", "VAE"), (Conditioner, "forward", "text"), (UNet, "forward", "U-Net forward"),
    ],
    "autoencoder": [(AutoencoderKL, "encode", "encoder forward"), (AutoencoderKL, "decode", "decoder forward")],
    "clip": [(CLIP, "encode_text", "text tower forward"), (CLIP, "encode_image", "image tower forward")],
}  # fmt: skip
SHARED: list[tuple[type, str, str]] = [
    (Strategy, "training_step", "loss"), (Strategy, "backward", "backward"), (StageModule, "usable", "clipping"),
    (Strategy, "optimizer_step", "optimizer"), (Average, "update", "EMA"), (ScheduleFreeAverage, "follow", "EMA"),
]  # fmt: skip


class Clock:
    """Time is that of the phase that was entered last; what it calls itself is not its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._names, self._since = [OTHER], time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.charge()
        self._names.append(name)
        try:
            with record_function(name):
                yield
        finally:
            self.charge()
            self._names.pop()

    def charge(self) -> None:
        """Charge the time until now to whom it belongs."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[self._names[-1]] = self.seconds.get(self._names[-1], 0.0) + now - self._since
        self._since = now

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return call

    @contextmanager
    def over(self, methods: list[tuple[type, str, str]]) -> Iterator[None]:
        """Charge these methods, whoever calls them, to their phases."""
        with ExitStack() as stack:
            for owner, method, name in methods:
                timed = self.timed(getattr(owner, method), name)
                stack.enter_context(mock.patch.object(owner, method, timed))
            yield


class Look(ProgressBar):
    """Take the clock's times of each step, and have torch's profiler look at the last; show no bar."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.steps: list[dict[str, float]] = []
        self.profiler: Any = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.clock.charge()
        self.steps.append(self.clock.seconds)
        if self.profiler:
            self.profiler.__exit__(None, None, None)
        elif len(self.steps) == WARM_UP + STEPS:
            activities = [ProfilerActivity.CPU]
            if self.clock.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            label_modules(pl_module.network)
            self.profiler = torch.profiler.profile(activities=activities)
            self.profiler.__enter__()
        self.clock.seconds = {}

    def medians(self) -> dict[str, float]:
        """Return the median seconds of each phase that was seen."""
        seen = self.steps[WARM_UP : WARM_UP + STEPS]
        names = {name for step in seen for name in step}
        return {name: statistics.median(step.get(name, 0.0) for step in seen) for name in names}


def label_modules(network: nn.Module) -> None:
    """Let torch's profiler see by name in which module of a network an operation was."""
    for path, module in network.named_modules():
        if path and module._compiled_call_impl is None:
            parts = path.split(".")
            last = ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])  # up_blocks.1
            name, entered = f"{last} ({type(module).__name__})", list[Any]()

            def enter(module: nn.Module, args: Any, name: str = name, entered: list[Any] = entered) -> None:
                entered.append(record_function(name))
                entered[-1].__enter__()

            def leave(module: nn.Module, args: Any, output: Any, entered: list[Any] = entered) -> None:
                entered.pop().__exit__(None, None, None)

            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)


def frames(profiler: Any, on_gpu: bool) -> Frame:
    """Put what torch's profiler saw together by what called what; time is the device's."""
    root = Frame("step")
    for event in profiler.events():
        seconds = 1e-6 * (event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        names, caller = [event.name], event.cpu_parent
        while caller is not None:
            names.append(caller.name)
            caller = caller.cpu_parent
        root.add(names[::-1], seconds)
    return root


def profile(config: TrainConfig) -> Path:
    """Profile a step of the last stage of a config; print the table and write all to `profile/` in the run directory.

    Returns:
        That folder.

    Raises:
        UserError: pictures or networks cannot be had.
    """
    stage: Stage = next(each for each in ("diffusion", "clip", "autoencoder") if each in config.stages)
    vae = any_vae(config)
    pictures, _ = feed.open_pictures(config, vae.config["in_channels"])
    conditioner = any_conditioner(config, pictures)
    batch_size = config.data.batch_size if stage == "diffusion" else getattr(config, stage).batch_size
    datasets: dict[str, Any] = {}
    on_gpu = config.trainer.accelerator != "cpu" and torch.cuda.is_available()
    if stage == "diffusion" and config.data.cache:
        device = torch.device("cuda" if on_gpu else "cpu")
        vae.to(device).eval(), conditioner.to(device).eval()
        datasets["cached"] = encoded(pictures, range(len(pictures)), vae, conditioner, batch_size)[0]
    datasets["uncached"] = pictures
    folder = Path(config.run_dir) / "profile"
    folder.mkdir(parents=True, exist_ok=True)
    columns: dict[str, dict[str, float]] = {}
    for kind, dataset in datasets.items():
        module = build_module(config, stage, vae, conditioner, WARM_UP + STEPS + 1)
        name = f"{stage}-{kind}" if stage == "diffusion" else stage
        columns[kind], seen = look(config, module, dataset, batch_size)
        seen.export_chrome_trace(str(folder / f"{name}.json"))
        title = f"{name}, one step of {batch_size}"
        (folder / f"{name}.svg").write_text(flame_graph(frames(seen, on_gpu), title), encoding="utf-8")
    text = table(stage, columns, batch_size)
    (folder / f"{stage}.txt").write_text(text, encoding="utf-8")
    print(f"{text}written: {folder}")
    return folder


def look(config: TrainConfig, module: StageModule, dataset: Any, batch_size: int) -> tuple[dict[str, float], Any]:
    """Train a few steps; return the seconds of each phase, and torch's profiler of the last step."""
    on_gpu = config.trainer.accelerator != "cpu" and torch.cuda.is_available()
    clock = Clock(torch.device("cuda" if on_gpu else "cpu"))
    watch = Look(clock)
    trainer = trial_trainer(config, module, WARM_UP + STEPS + 1, watch)
    order = Shuffle(len(dataset), config.seed)
    data = DataModule(dataset, dataset, order, batch_size, config.data.num_workers)
    open_loader = DataModule.train_dataloader

    def open_watched(self: DataModule) -> Batches:
        return Batches(open_loader(self), clock)

    with clock.over(PHASES[module.stage] + SHARED), mock.patch.object(DataModule, "train_dataloader", open_watched):
        trainer.fit(module, data)
    return watch.medians(), watch.profiler


class Batches:
    """A loader, with the time of each call for a batch charged to the data."""

    def __init__(self, loader: Any, clock: Clock) -> None:
        self.loader, self.clock = loader, clock

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while True:
            with self.clock.phase("data"):
                batch = next(batches)
            yield batch


def table(stage: Stage, columns: dict[str, dict[str, float]], batch_size: int) -> str:
    """Lay out milliseconds and shares of each phase, a pair of columns for each way of feeding."""
    order = dict.fromkeys(["data", *(name for _, _, name in PHASES[stage] + SHARED), OTHER])
    names = [name for name in order if any(name in column for column in columns.values())]
    totals = {kind: sum(column.values()) for kind, column in columns.items()}
    head = "".join(f"{kind:>14}    share" for kind in columns)
    lines = [f"{stage}, batch {batch_size}, milliseconds of a step, medians of {STEPS}", f"{'':24}{head}"]
    for name in names:
        cells = (f"{1e3 * c.get(name, 0):14.2f}{c.get(name, 0) / totals[kind]:9.1%}" for kind, c in columns.items())
        lines.append(f"{name:24}{''.join(cells)}")
    lines.append(f"{'whole step':24}" + "".join(f"{1e3 * total:14.2f}{1:9.0%}" for total in totals.values()))
    lines.append(f"{'images/s':24}" + "".join(f"{batch_size / total:14.1f}{'':9}" for total in totals.values()))
    return "\n".join(line.rstrip() for line in lines) + "\n"
